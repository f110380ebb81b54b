"""Every reader on damaged files, and scripts/fuzz_readers.py, which does so ten thousand times.

Run: python -m pytest tests/test_fuzz_readers.py
     python -m pytest tests/test_fuzz_readers.py --runslow     # 10,000 inputs for each reader; hours
"""

import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts import fuzz_corpus as corpus
from scripts import fuzz_readers
from scripts.fuzz_mutations import AWARE, mutate
from scripts.fuzz_readers import ESCAPE, FAILED, READ, REFUSED, Campaign, table, try_one
from scripts.fuzz_targets import READERS
from util.benchmark.detection_files import read_predictions
from util.data.faces import StoredFinder
from util.data.images import BadImage
from util.data.prepare import read_table
from util.run.errors import UserError
from util.run.seed import rng_for
from util.run.untrusted import parse_json
from util.transfer.face_table import FaceTable, wishes
from util.transfer.gallery import Gallery
from util.transfer.lora import load_peft

FEW = 15  # inputs of each reader; the driver takes as many as it is told
COSTLY = ("weights", "transfer", "resume", "adapters")  # build a network for each


class NoGuard:
    """In the tests' own process nothing is limited."""

    def begin(self):
        pass

    def end(self):
        return None


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """corpora(reader): the folder of its valid files, made once."""
    made = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "valid"
            made[name].mkdir()
            READERS[name].make(made[name])
        return made[name]

    return folder


@pytest.mark.parametrize("name", READERS)
def test_valid_files_are_read(name, corpora, tmp_path, capfd):
    """Otherwise, to refuse everything would do."""
    reader, valid = READERS[name], corpora(name)
    victims = [path.relative_to(valid) for pattern in reader.victims for path in sorted(valid.glob(pattern))]
    for number, victim in enumerate(victims):
        folder = tmp_path / str(number) / "in"
        shutil.copytree(valid, folder)
        if (folder / victim).is_file() and not victim.name.startswith("evil"):
            reader.read(folder, folder / victim)


@pytest.mark.parametrize("name", READERS)
def test_valid_files_are_made_anew_for_each_child(name, tmp_path):
    """In folders beside each other, where nothing of the one may stand in the way of the other."""
    for child in ("valid-1", "valid-2"):
        (tmp_path / child).mkdir()
        READERS[name].make(tmp_path / child)
    made = [sorted(path.name for path in (tmp_path / child).rglob("*")) for child in ("valid-1", "valid-2")]
    assert made[0] == made[1] and made[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["valid-1", "valid-2"]


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(name, corpora, tmp_path, capfd):
    logging.disable(logging.CRITICAL)
    try:
        found = [
            try_one(READERS[name], corpora(name), tmp_path / "work", 1, name, number, NoGuard())
            for number in range(5 if name in COSTLY else FEW)
        ]
    finally:
        logging.disable(logging.NOTSET)
    assert not [(number, *one) for number, one in enumerate(found) if one[0] not in (READ, REFUSED)]


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_damaged_files(name, tmp_path):
    state = Campaign(name, 0, tmp_path).run(10_000)
    assert not state["failures"]


# --- what is damaged ------------------------------------------------------------------------------------------------


def test_an_input_is_a_function_of_seed_reader_and_number(corpora, tmp_path):
    def victim(seed: int, number: int, folder: str) -> bytes:
        return (
            READERS["images"].damage(corpora("images"), tmp_path / folder, rng_for(seed, "images", number)).read_bytes()
        )

    assert victim(0, 3, "a") == victim(0, 3, "b")
    assert victim(0, 3, "c") != victim(1, 3, "d") != victim(1, 4, "e")


@pytest.mark.parametrize("suffix", AWARE)
def test_damage_that_knows_the_format_gets_behind_the_first_check(suffix, corpora, tmp_path):
    """Of 40 inputs that are damaged by it alone, some are files of the format still."""
    name, pattern, opens = {
        ".png": ("images", "a.png", lambda data: data.startswith(b"\x89PNG")),
        ".json": ("predictions", "coco.json", parse_json),
        ".csv": ("dafre", "labels/train.csv", lambda data: data.count(b",") > 2),
        ".tsv": ("acrd", "faces.tsv", lambda data: data.count(b"\t") > 2),
        ".txt": ("icartoonface_rec", "icartoonface_rectrain_det.txt", lambda data: data.count(b"\t") > 2),
        ".npz": ("embeddings", "embeddings.npz", lambda data: data.startswith(b"PK")),
        ".pth": ("weights", "bare.pth", lambda data: data.startswith(b"PK")),
        ".bin": ("weights", "bare.pth", lambda data: data.startswith(b"PK")),
        ".safetensors": ("weights", "flags.safetensors", lambda data: data[8:9] in b"{["),
        ".parquet": ("protocols", "protocols/*", lambda data: data.startswith(b"PAR1") and data.endswith(b"PAR1")),
        ".pack": ("packed", "*.pack", lambda data: data.startswith(b"AniMask")),
    }[suffix]  # fmt: skip
    data = next(corpora(name).glob(pattern)).read_bytes()
    whole, different = 0, 0
    for number in range(40):
        rng = rng_for(number, suffix)
        try:
            changed = AWARE[suffix][0](data, rng, [])
            different += changed != data
            whole += bool(opens(changed))
        except (ValueError, RecursionError, UserError):
            continue
    assert whole >= 15 and different >= 20


def test_damage_to_nothing_is_possible():
    for suffix in (*AWARE, ".xyz"):
        for number in range(20):
            assert isinstance(mutate(b"", suffix, rng_for(number), []), bytes)


# --- the driver -----------------------------------------------------------------------------------------------------


class Played(Campaign):
    """A campaign whose child process is a few lines of Python that print what `serve` would."""

    script = ""

    def command(self, first: int, end: int) -> list[str]:
        return [sys.executable, "-c", f"import os, signal, sys, time\nfirst, end = {first}, {end}\n{self.script}"]


TELL = "def tell(outcome, detail=''): print(f'{outcome}\\t0.5\\t{detail}', flush=True)\n"


def played(script: str, inputs: int, out: Path, name: str = "images") -> dict:
    campaign = Played(name, 0, out)
    campaign.script = TELL + script
    work = out / name / "work"
    work.mkdir(parents=True, exist_ok=True)
    (work / "victim").write_text("the input")
    return campaign.run(inputs)


def test_a_child_that_crashes_or_hangs_is_counted_and_the_others_go_on(tmp_path):
    script = """
for number in range(first, end):
    if number == 2: os.kill(os.getpid(), signal.SIGSEGV)
    if number == 4:
        signal.setitimer(signal.ITIMER_PROF, 0.05)
        while True: pass
    tell('read' if number % 2 else 'refused')
"""
    state = played(script, 7, tmp_path)
    assert state["inputs"] == 7 and state["counts"] == {"refused": 2, "read": 3, "crash": 1, "hang": 1}
    assert [(one["input"], one["outcome"]) for one in state["failures"]] == [(2, "crash"), (4, "hang")]
    assert (tmp_path / "images/failures/2/victim").read_text() == "the input"
    assert state["cpu_seconds"] == 5 * 0.5 + fuzz_readers.SECONDS


def test_a_child_that_waits_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_readers, "PATIENCE_S", 0.5)
    state = played("if first == 0: time.sleep(60)\nfor _ in range(first, end): tell('read')", 2, tmp_path)
    assert state["counts"] == {"hang": 1, "read": 1}


def test_a_campaign_goes_on_where_it_was(tmp_path):
    played("for _ in range(first, end): tell('read')", 3, tmp_path)
    state = played("for number in range(first, end): tell('refused', number)", 5, tmp_path)
    assert state["inputs"] == 5 and state["counts"] == {"read": 3, "refused": 2}
    assert played("sys.exit('not started again')", 5, tmp_path) == state
    with pytest.raises(UserError, match="--seed 0"):
        Campaign("images", 1, tmp_path)


def test_a_child_that_does_not_start_is_no_finding(tmp_path):
    with pytest.raises(UserError, match="does not start"):
        played("sys.exit(1)", 5, tmp_path)


def test_the_table_adds_up(tmp_path):
    played("for _ in range(first, end): tell('read')", 3, tmp_path)
    played("for _ in range(first, end): tell('refused')", 2, tmp_path, "manifest")
    lines = table(tmp_path).splitlines()
    assert lines[2:] == [
        "| images | 3 | 3 | 0 | 0 | 0 | 0 | 0 | 0 | 0.0 |",
        "| manifest | 2 | 0 | 2 | 0 | 0 | 0 | 0 | 0 | 0.0 |",
        "| all | 5 | 3 | 2 | 0 | 0 | 0 | 0 | 0 | 0.0 |",
    ]


class Misbehaves:
    """A reader that does what its input says."""

    def __init__(self, act):
        self.act = act

    def damage(self, valid, folder, rng):
        folder.mkdir()
        return folder

    def read(self, folder, victim):
        self.act(folder)


def _raise(error):
    raise error


def _hide(error):
    try:
        raise error
    except MemoryError:
        raise UserError("it is damaged")  # noqa: B904


def _beside(folder: Path) -> Path:
    """A file outside the home of a campaign."""
    return folder.parent.parent.parent / "secret"


@pytest.mark.parametrize(
    "act, outcome",
    [
        (lambda folder: None, READ),
        (lambda folder: _raise(UserError("no")), REFUSED),
        (lambda folder: _raise(BadImage("a", "no")), REFUSED),
        (lambda folder: _raise(ValueError("a\nb")), FAILED),
        (lambda folder: _raise(SystemExit(1)), FAILED),
        (lambda folder: _raise(MemoryError()), "memory"),
        (lambda folder: os.system("true"), ESCAPE),
        (lambda folder: open("/etc/passwd").close(), ESCAPE),
        (lambda folder: open(folder.parent.parent.parent / "outside", "w").close(), ESCAPE),
        (lambda folder: open(folder / "inside", "w").close(), READ),
        (lambda folder: open(_beside(folder)).close(), ESCAPE),
        (lambda folder: open(json.__file__).close(), READ),
        (lambda folder: os.symlink(_beside(folder), folder / "link"), ESCAPE),
        (lambda folder: os.link(_beside(folder), folder / "link"), ESCAPE),
        (lambda folder: shutil.copy(_beside(folder), folder / "copy"), ESCAPE),
        (lambda folder: os.symlink(folder / "a", folder / "link"), READ),
        (lambda folder: os.mkdir(f"{folder.parent.parent}-of-another"), ESCAPE),
        (lambda folder: _hide(MemoryError()), "memory"),
        (lambda folder: (os.mkdir(folder / "own"), shutil.rmtree(folder)), READ),
        (lambda folder: os.rename(folder, folder.parent.parent.parent / "moved"), ESCAPE),
        (lambda folder: os.mkdir(folder.parent.parent.parent / "beside"), ESCAPE),
    ],
)
def test_what_an_input_does_is_seen(act, outcome, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "secret").touch()
    guard = fuzz_readers.Guard(home)
    found, _, _ = try_one(Misbehaves(act), tmp_path, home / "work", 0, "x", 0, guard)
    guard.home = "/"  # an audit hook stays for the life of the process
    assert found == outcome


def test_a_child_reads_and_tells(tmp_path):
    """The real thing, as far as 30 inputs."""
    state = Campaign("embeddings", 0, tmp_path).run(30)
    assert state["inputs"] == 30 and set(state["counts"]) <= {READ, REFUSED}
    assert not list((tmp_path / "embeddings").glob("valid-*"))


# --- values that no mutation of a valid file comes to -----------------------------------------------------------------

TREE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)
FACE = st.fixed_dictionaries({}, optional=dict.fromkeys(("score", "face", "left_eye", "right_eye", "size"), TREE))
FIND = st.fixed_dictionaries(dict.fromkeys(("image_id", "category_id", "bbox", "score"), TREE))
NOTE = st.fixed_dictionaries({}, optional=dict.fromkeys(("version", "weights", "dim", "threshold"), TREE))
SETTINGS = st.fixed_dictionaries(
    {"peft_type": st.just("LORA"), "lora_alpha": TREE},
    optional=dict.fromkeys(("lora_dropout", "alpha_pattern", "bias", "use_rslora", "target_modules"), TREE),
)
often = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def place(corpora):
    """A folder with a valid file of each kind, to put one document in another's place."""
    folder = Path(tempfile.mkdtemp())
    corpus.adapters(folder / "lora")
    return folder


def only_user_errors(read) -> None:
    try:
        read()
    except UserError as error:
        assert str(error)


@often
@given(found=st.lists(FIND | TREE, max_size=3) | TREE)
def test_any_predictions(found):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        path.write_text(json.dumps(found))
        only_user_errors(lambda: read_predictions(path, ["a", "b/c"]))


@often
@given(
    found=st.dictionaries(st.sampled_from(["a", "b"]), st.fixed_dictionaries({"faces": st.lists(FACE, max_size=2)}))
    | TREE
)
def test_any_stored_faces(found):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        path.write_text(json.dumps(found))
        only_user_errors(lambda: StoredFinder(path).find(None, "a"))


@often
@given(note=NOTE | TREE)
def test_any_gallery_note(note):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "gallery.json").write_text(json.dumps(note))
        only_user_errors(lambda: Gallery.open(folder, "0123", corpus.DIM).identify(np.ones((1, corpus.DIM))))


@often
@given(given_settings=SETTINGS | TREE)
def test_any_adapter_settings(given_settings, place):
    (place / "lora/adapter_config.json").write_text(json.dumps(given_settings))
    only_user_errors(lambda: load_peft(place / "lora"))


@often
@given(
    text=st.text(max_size=60)
    | st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)).map(",".join)).map("\n".join)
)
def test_any_text_as_a_list(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
        only_user_errors(lambda: read_table(path, ("a", "b")))


@often
@given(rows=st.lists(st.lists(st.text(max_size=6), min_size=11, max_size=11), max_size=3))
def test_any_list_of_faces(rows):
    faces = FaceTable(["a"], np.ones((1, 4)), np.ones(1), np.ones((1, 3)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "faces.csv"
        from util.benchmark.lists import write_csv
        from util.transfer.face_table import HEADER

        write_csv(path, HEADER, rows)
        only_user_errors(lambda: wishes(path, faces, {0: "rei"}))
