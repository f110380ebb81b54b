"""Files that were made to do harm: bombs, paths that lead outside, code in pickles, sizes that are not there.

Each is refused in one line, or read without harm; none is unpickled, and none takes memory before it is checked.
Run: python -m pytest tests/test_hostile_input.py
"""

import io
import json
import math
import os
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models_transfer import load_recogniser, load_transferred
from scripts import fuzz_corpus as corpus
from tests.helpers import fails
from tests.hostile import refused
from util.benchmark.detection_files import read_predictions
from util.benchmark.embedded import read_embeddings
from util.benchmark.release import SUMS, digest, read_release
from util.benchmark.scores import read_scores
from util.benchmark.submission import read_scores as read_submission
from util.data.faces import StoredFinder
from util.data.images import decode_image
from util.data.manifest import MANIFEST_NAME, read_manifest, write_manifest
from util.data.maps import read_map
from util.data.packed import PackedFile
from util.data.prepare import image_sizes, picture_folder, read_table
from util.data.sources import list_folder, open_source
from util.data.trials import ICARTOONFACE, read_protocol
from util.run.errors import LONGEST, UserError, cli, one_line
from util.run.untrusted import parse_json, read_arrays, read_parquet
from util.training import hub
from util.training.checkpoint import read_checkpoint, save_checkpoint
from util.training.hub import load_weights
from util.transfer.face_store import FaceStore
from util.transfer.gallery import Gallery
from util.transfer.lora import load_peft

# --- paths ------------------------------------------------------------------------------------------------------------

OUTSIDE = ("../secret.jpg", "p/../../secret.jpg", "/etc/passwd", "..", "a\0b", "")


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("column", ["file_name", "mask_file"])
def test_a_manifest_names_nothing_outside_its_folder(name, column, tmp_path):
    row = {"sample_id": "a", "file_name": "a.png", "split": "train", column: name}
    refused(lambda: write_manifest(tmp_path, [row]), "leads outside")
    table = pa.table({"sample_id": ["a"], "file_name": ["a.png"], "split": ["train"]} | {column: [name]})
    pq.write_table(table, tmp_path / MANIFEST_NAME)
    refused(lambda: read_manifest(tmp_path), "leads outside")


@pytest.mark.parametrize("root, is_told", [(None, False), ("pictures", False), (".", False), ("..", True), ("/", True)])
def test_pictures_outside_the_folder_are_told_of(root, is_told, tmp_path, capsys):
    """An image_root may lead anywhere: whoever opens a stranger's manifest reads where."""
    row = {"sample_id": "a", "file_name": "a.png", "split": "train"}
    write_manifest(tmp_path / "data", [row], image_root=root)
    read_manifest(tmp_path / "data")
    said = capsys.readouterr().out
    assert said == (
        f"{tmp_path}/data/metadata.parquet: pictures are read from {tmp_path / 'data' / root}\n" if is_told else ""
    )


@pytest.mark.parametrize("name", OUTSIDE[:4])
def test_what_a_list_names_outside_its_folder_is_not_even_opened(name, tmp_path, monkeypatch):
    corpus.save(tmp_path / "secret.jpg", corpus.picture(0))
    corpus.save(tmp_path / "data/p/a.jpg", corpus.picture(0))
    opened = []
    monkeypatch.setattr("util.data.prepare.image_size", lambda path: opened.append(path) or (1, 1))
    outside = "name leads outside the folder"
    assert list(image_sizes(tmp_path / "data", [name, "p/a.jpg"])) == [outside, (1, 1)]
    assert opened == [tmp_path / "data/p/a.jpg"]


@pytest.mark.parametrize("name", ["../../secret.jpg", "/etc/passwd"])
def test_a_label_list_that_names_files_outside_prepares_the_others(name, tmp_path, import_script, capsys):
    corpus.icartoonface_det(tmp_path / "data")
    listed = next((tmp_path / "data").glob("*_anno_*.csv"))
    listed.write_text(listed.read_text() + f"{name},1,2,9,8\n")
    corpus.save(tmp_path / "secret.jpg", corpus.picture(0))
    import_script("datasets/prepare_icartoonface_det.py").main(
        ["--data_path", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    )
    assert "name leads outside the folder 1" in capsys.readouterr().out
    assert all("secret" not in name for name in read_manifest(tmp_path / "out").table.column("file_name").to_pylist())


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd"])
def test_a_list_with_splits_that_names_files_outside_prepares_the_others(name, tmp_path, import_script, capsys):
    """Before, they were opened by --verify, and then the whole list was refused."""
    corpus.listed(tmp_path / "data")
    with open(tmp_path / "data/splits.csv", "a") as file:
        file.write(f"{name},train,a,rei,9\n")
    flags = ["--data_path", str(tmp_path / "data"), "--splits", str(tmp_path / "data/splits.csv"), "--verify"]
    import_script("datasets/prepare_folder.py").main([*flags, "--out", str(tmp_path / "out")])
    assert "outside --data_path 1" in capsys.readouterr().out


def test_a_link_to_something_else_shows_nothing_of_it(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the word is fish")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.png").symlink_to(secret)
    (tmp_path / "data/again").symlink_to(tmp_path / "data")  # leads back for ever
    (tmp_path / "data/lost.png").symlink_to(tmp_path / "nowhere")
    manifest, _ = list_folder(tmp_path / "data")
    assert manifest.table.column("file_name").to_pylist() == ["a.png", "lost.png"]
    for i in range(2):
        assert "fish" not in refused(lambda i=i: decode_image(manifest.path(i)))


def test_members_of_an_archive_are_not_unpacked_to_their_names(tmp_path):
    path = tmp_path / "in/a.npz"
    path.parent.mkdir()
    array = io.BytesIO()
    np.save(array, np.ones(3))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../evil.npy", array.getvalue())
    assert list(read_arrays(path)) == ["../../evil"]
    assert sorted(item.name for item in tmp_path.rglob("*")) == ["a.npz", "in"]


def test_a_file_of_the_hub_cannot_be_named_out_of_the_cache(monkeypatch):
    monkeypatch.setattr(hub, "_offline", lambda: True)
    refused(lambda: load_weights("hf:owner/repo/../../../../../../etc/passwd"))
    monkeypatch.setattr(hub, "_hub_files", lambda repo, revision: ["../../../../../etc/passwd.pth"])
    refused(lambda: load_weights("hf:owner/repo"))


def test_names_that_are_no_text_or_hold_a_line_break(tmp_path, capsys):
    corpus.save(tmp_path / "a\nb\x1b[2J.png", corpus.picture(0))
    source = open_source(tmp_path, "train", val_fraction=0)
    assert source.load(0).size == (24, 20)
    (tmp_path / "a\nb\x1b[2J.png").write_bytes(b"no picture")
    assert one_line(refused(lambda: source.load(0))).isprintable()
    try:
        (tmp_path / os.fsdecode(b"\xff.png")).touch()
    except OSError:
        pytest.skip("this file system takes valid UTF-8 only")
    refused(lambda: list_folder(tmp_path), "not valid UTF-8")


def test_a_name_too_long_to_be_one_is_a_missing_file(tmp_path):
    """Before, Path.exists let the system's error through."""
    refused(lambda: picture_folder(tmp_path, ["x" * 5000], "the archive"), "cannot be found")


# --- code ---------------------------------------------------------------------------------------------------------


class Evil:
    """Pickled, it writes a file when it is loaded by anything that runs what it loads."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch '{self.sentinel}'",)


@pytest.fixture
def evil(tmp_path):
    sentinel = tmp_path / "it ran"
    yield Evil(sentinel)
    assert not sentinel.exists()


def test_the_evil_pickle_is_one(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "it ran")))
    assert (tmp_path / "it ran").exists()


def official(evil) -> dict:
    """What a released checkpoint looks like, with a surprise in its flags."""
    state = {"patch_embed.proj.weight": torch.zeros(4, 3, 8, 8), "cls_token": torch.zeros(1, 1, 4)}
    return {"model": state, "optimizer": {}, "epoch": 3, "args": {"model": "mae", "callback": evil}}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["args", "whole", "state"])
def test_code_in_a_checkpoint_does_not_run(place, zipped, evil, tmp_path):
    content = {"args": official(evil), "whole": evil, "state": {"model": {"a": evil}}}[place]
    for name in ("mae_pretrain_vit_base.pth", "checkpoint-last.pth", "pytorch_model.bin"):
        path = tmp_path / name
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        for read in (load_weights, load_transferred, load_recogniser, lambda path: read_checkpoint(Path(path))):
            refused(lambda read=read, path=path: read(str(path)), "carries code|was not loaded")
        path.unlink()


@pytest.mark.parametrize("file, place, name, value", [
    ("finetune.pth", "args", "seed", math.inf), ("lora.pth", "lora", "alpha", 10**400),
], ids=["seed", "alpha"])  # fmt: skip
def test_numbers_that_are_too_large_for_a_float_are_refused(file, place, name, value, tmp_path):
    corpus.transfer(tmp_path)
    stored = read_checkpoint(tmp_path / file)
    stored[place] = {**stored[place], name: value}
    save_checkpoint(tmp_path / file, stored)
    refused(lambda: load_transferred(tmp_path / file), f"{file} .*(Overflow|{name})")


def test_a_tar_archive_is_not_unpacked(tmp_path, monkeypatch):
    """torch.load unpacks one of torch 0.1 into a folder that it makes."""
    path, made = tmp_path / "a.pth", []
    monkeypatch.setattr("tempfile.mkdtemp", lambda *args, **options: made.append(args) or str(tmp_path))
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("storages")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    refused(lambda: read_checkpoint(path), "a.pth is damaged or no checkpoint")
    assert not made and not (tmp_path / "storages").is_symlink()


def test_a_bare_pickle_under_any_name_does_not_run(evil, tmp_path):
    for name in ("a.pth", "a.safetensors", "a.npz", "a.parquet", "a.pack", "a.json"):
        (tmp_path / name).write_bytes(pickle.dumps(evil))
    for read in (lambda: load_weights(str(tmp_path / "a.pth")), lambda: load_weights(str(tmp_path / "a.safetensors")),
                 lambda: read_embeddings(str(tmp_path / "a.npz")), lambda: PackedFile(tmp_path / "a.pack"),
                 lambda: read_predictions(tmp_path / "a.json", ["a"])):  # fmt: skip
        refused(read)
    with pytest.raises((ValueError, OSError)):
        read_parquet(tmp_path / "a.parquet")


def test_arrays_of_objects_are_not_unpickled(evil, tmp_path):
    objects = np.array([evil, None], dtype=object)
    names = ("embeddings", "sample_id", "class_scores", "classes", "name", "boxes", "protocol", "psnr_db/values")
    path = tmp_path / "a.npz"
    np.savez(path, **dict.fromkeys(names, objects))
    corpus.release(tmp_path / "bench")
    for read in (read_embeddings, lambda path: read_submission(path, read_release(tmp_path / "bench/release")),
                 lambda path: read_scores(Path(path))):  # fmt: skip
        refused(lambda read=read: read(str(path)), "objects")
    np.save(tmp_path / "a.npy", objects)
    refused(lambda: read_map(tmp_path / "a.npy"))
    corpus.gallery(tmp_path / "gallery")
    victim = next((tmp_path / "gallery/people").glob("*.npz"))
    victim.write_bytes(path.read_bytes())
    assert list(Gallery.open(tmp_path / "gallery", "0123", corpus.DIM).broken) == [str(victim)]
    corpus.faces(tmp_path / "faces")
    next((tmp_path / "faces/store").rglob("*.npz")).write_bytes(path.read_bytes())
    assert not FaceStore(tmp_path / "faces/store", {"finder": "a"}, corpus.DIM)._faces


# --- documents ------------------------------------------------------------------------------------------------------

DEEP = "[" * 100_000 + "]" * 100_000


def test_json_is_refused_in_one_way():
    for text in (DEEP, "{", "", '"\\ud800"', "9" * 5000, b"\xff"):
        with pytest.raises(ValueError):
            parse_json(text)
    assert parse_json('{"a": ["\\ud83d\\ude00"]}') == {"a": ["😀"]}


@pytest.mark.parametrize("text", [DEEP, "null", "[]", "{}", '"a"', "[1]", "\x00", ""])
def test_documents_of_another_form(text, tmp_path):
    """Before, the first was a RecursionError in each of these."""
    corpus.adapters(tmp_path / "lora")
    corpus.gallery(tmp_path / "gallery")
    corpus.weights(tmp_path / "weights")
    corpus.release(tmp_path / "bench")
    for place in ("lora/adapter_config.json", "gallery/gallery.json", "bench/release/protocol.json", "a.json"):
        (tmp_path / place).write_text(text)
    release = tmp_path / "bench/release"
    lines = (release / SUMS).read_text().splitlines()
    sums = [f"{digest(release / name)}  {name}" for name in (line.split("  ", 1)[1] for line in lines)]
    (release / SUMS).write_text("\n".join(sums))
    for read in (lambda: load_peft(tmp_path / "lora"), lambda: Gallery.open(tmp_path / "gallery", "0123", corpus.DIM),
                 lambda: read_release(release), lambda: StoredFinder(tmp_path / "a.json").find(None, "x")):  # fmt: skip
        refused(read)
    if text != "[]":  # a detector that found nothing
        refused(lambda: read_predictions(tmp_path / "a.json", ["a"]))


FIND = {"image_id": "a", "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}


@pytest.mark.parametrize(
    "change",
    [
        {"category_id": [1]}, {"category_id": {}}, {"image_id": []}, {"image_id": {"a": 1}}, {"image_id": None},
        {"bbox": [10**400, 1, 1, 1]}, {"score": 10**400},
        {"bbox": "abcd"}, {"bbox": {"a": 1}},
    ],
)  # fmt: skip
def test_a_find_that_is_none(change, tmp_path):
    """Before, a list as category_id or image_id was a TypeError, and a huge number an OverflowError."""
    (tmp_path / "a.json").write_text(json.dumps([FIND | change]))
    refused(lambda: read_predictions(tmp_path / "a.json", ["a"]), "result 1")


@pytest.mark.parametrize("content", [b"\xff\xfe,1,2,3\n", b"1," + b"x" * 200_000 + b"\n"])
def test_lists_that_are_no_text(content, tmp_path, capsys, import_script):
    """Before, some of the six label formats let the decoder's error through."""
    for name, make, victim in (
        ("acrd", corpus.acrd, "tagIds.tsv"), ("acrd", corpus.acrd, "trainSplit.tsv"),
        ("dafre", corpus.dafre, "labels/train.csv"), ("moeimouto", corpus.moeimouto, "train.csv"),
        ("icartoonface_rec", corpus.icartoonface_rec, "icartoonface_rectrain_det.txt"),
        ("icartoonface_det", corpus.icartoonface_det, "personai_icartoonface_detval.csv"),
    ):  # fmt: skip
        folder = tmp_path / name / victim.replace("/", "_")
        make(folder)
        (folder / victim).write_bytes(content)
        script = import_script(f"datasets/prepare_{name}.py")
        flags = ["--data_path", str(folder), "--out", str(tmp_path / f"out-{name}-{folder.name}")]
        assert victim.rpartition("/")[2] in fails(script.main, capsys, flags)


def test_a_folder_in_the_place_of_a_list(tmp_path, capsys, import_script):
    corpus.acrd(tmp_path / "acrd")
    (tmp_path / "acrd/faces.tsv").unlink()
    (tmp_path / "acrd/faces.tsv").mkdir()
    script = import_script("datasets/prepare_acrd.py")
    flags = ["--data_path", str(tmp_path / "acrd"), "--out", str(tmp_path / "out")]
    assert "faces.tsv cannot be read" in fails(script.main, capsys, flags)
    refused(lambda: read_table(tmp_path, ("a",)), "cannot be read")


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_a_folder_or_nothing_in_the_place_of_a_file(make, tmp_path):
    def at(name: str) -> Path:
        make(tmp_path / name)
        return tmp_path / name

    for read in (
        lambda: read_predictions(at("a.json"), ["a"]), lambda: StoredFinder(at("b.json")),
        lambda: read_embeddings(str(at("a.npz"))), lambda: read_scores(at("b.npz")), lambda: read_map(at("a.npy")),
        lambda: read_checkpoint(at("a.pth")), lambda: load_weights(str(at("b.pth"))),
        lambda: load_weights(str(at("a.safetensors"))), lambda: open_source(at("a.pack"), "train"),
        lambda: read_manifest(at(MANIFEST_NAME).parent), lambda: decode_image(at("a.png")),
    ):  # fmt: skip
        refused(read)


@pytest.mark.parametrize("number", ["9" * 5000, "9" * 400, "²", "1_0", "-1"])
def test_numbers_that_are_none(number, tmp_path, capsys, import_script):
    """Before: ValueError beyond 4,300 digits, OverflowError where one was made a float, int("²")."""
    corpus.acrd(tmp_path / "acrd")
    with open(tmp_path / "acrd/trainSplit.tsv", "a") as file:
        file.write(f"\n{number}\n")
    flags = ["--data_path", str(tmp_path / "acrd"), "--out", str(tmp_path / "out")]
    assert "no picture number" in fails(import_script("datasets/prepare_acrd.py").main, capsys, flags)
    corpus.icartoonface_rec(tmp_path / "rec")
    name = f"personai_icartoonface_rectrain_{number}"
    listed = tmp_path / "rec/icartoonface_rectrain_det.txt"
    listed.write_text(listed.read_text() + f"{name}/{name}_{number}.jpg 1 2 {number} {number}\n")
    flags = [
        "--data_path",
        str(tmp_path / "rec"),
        "--out",
        str(tmp_path / "o"),
        "--groups",
        "blocks",
        "--val_ident",
        "1",
    ]
    script = import_script("datasets/prepare_icartoonface_rec.py")
    try:
        script.main(flags)
    except SystemExit as stop:
        assert stop.code == 2
    assert "Traceback" not in capsys.readouterr().err


GOOD_FACE = {"score": 0.9, "face": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    "found",
    [
        None, [], {"faces": 1}, {"faces": [{}]}, {"faces": [GOOD_FACE]}, {"faces": [GOOD_FACE], "size": [9]},
        {"faces": [GOOD_FACE | {"score": "x"}], "size": [9, 9]},
        {"faces": [GOOD_FACE | {"face": [1, 2]}], "size": [9, 9]},
        {"faces": [GOOD_FACE | {"face": [10**400, 2, 3, 4]}], "size": [9, 9]},
    ],
)  # fmt: skip
def test_parts_of_another_form(found, tmp_path, capsys, import_script):
    corpus.listed(tmp_path)
    (tmp_path / "parts.json").write_text(json.dumps({"p/0.png": found}))
    flags = ["--data_path", str(tmp_path), "--out", str(tmp_path / "out"), "--splits", str(tmp_path / "splits.csv")]
    script = import_script("datasets/prepare_folder.py")
    assert "p/0.png" in fails(script.main, capsys, [*flags, "--parts", str(tmp_path / "parts.json")])


@pytest.mark.parametrize("text", [DEEP, "[", "\xff", "[]", '{"data": "\\ud800", "maps": {}}'])
def test_a_note_of_maps_that_is_none(text, tmp_path, import_script):
    """Before, one that is nested deep was a RecursionError."""
    (tmp_path / "maps.json").write_bytes(text.encode("latin-1"))
    refused(lambda: import_script("datasets/prepare_maps.py").noted(tmp_path), "make the maps again")


def test_trials_of_another_kind(tmp_path):
    (tmp_path / "protocols").mkdir()
    path = tmp_path / f"protocols/{ICARTOONFACE}.parquet"
    for table in (pa.table({"id_a": [1]}), pa.table({"id_a": [None], "id_b": ["a"], "label": [1], "kind": ["x"]}),
                  pa.table({"id_a": [[1]], "id_b": ["a"], "label": ["x"], "kind": [b"\xff"]})):  # fmt: skip
        pq.write_table(table, path)
        refused(lambda: read_protocol(tmp_path, ICARTOONFACE), "holds no trials")


# --- what is said -----------------------------------------------------------------------------------------------------


def test_a_message_is_one_line_that_moves_no_cursor(capsys):
    @cli
    def main():
        raise UserError("a\nb \x1b[2J\x07\u202e " + "x" * 10**6)

    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said[:-1].isprintable() and len(said) < LONGEST + 100
    assert one_line("plain – “text”: 日本") == "plain – “text”: 日本"


def test_reading_says_nothing_of_its_own(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus.embeddings(tmp_path)
        read_embeddings(str(tmp_path / "embeddings.npz"))
