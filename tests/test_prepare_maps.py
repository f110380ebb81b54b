"""The script that draws semantic maps: what it writes, resuming, refusals, kinds of folders.

Run: python -m pytest tests/test_prepare_maps.py
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import helpers
from tests.conftest import ROOT
from tests.helpers import kill_when_written, make_identities
from util.data import pack
from util.data.manifest import write_manifest
from util.data.map_rows import coverage, predicted_eyes
from util.data.maps import open_maps
from util.data.sources import open_source
from util.run.errors import UserError

FILES = ("face.npy", "eyes.npy", "foreground.npy", "rows.u64")


@pytest.fixture(scope="module")
def script(import_script):
    return import_script("datasets/prepare_maps.py")


@pytest.fixture
def fails(script, capsys):
    return partial(helpers.fails, script.main, capsys)


def flags(data: Path, *more) -> list[str]:
    return ["--data_path", str(data), "--workers", "0", "--sheet", "3", *map(str, more)]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def make_figures(folder: Path, count: int) -> Path:
    """Pictures of a square on plain ground, 48 x 40 px; rows in several splits, half of them with a face box."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        picture = Image.new("RGB", (48, 40), (200, 220, 250))
        picture.paste((200, 40 + i % 100, 60), (12, 10, 36, 40))
        if not (folder / f"{i % 20:02d}.png").exists():
            picture.save(folder / f"{i % 20:02d}.png")
        box = [14.0, 12, 30, 28] if i % 20 < 10 else None
        split = ("train", "val", "novel")[i % 3]
        rows.append({"sample_id": f"s{i}", "file_name": f"{i % 20:02d}.png", "split": split, "box": box})
    write_manifest(folder, rows)
    return folder


def test_what_it_writes(script, tmp_path, capsys):
    data = make_figures(tmp_path / "d", 70)
    script.main(flags(data))
    said = capsys.readouterr().out
    assert "face: 57.1 % of 70 rows have a map: 57.1 % metadata, 42.9 % none" in said
    note = json.loads((data / "maps/maps.json").read_text())
    assert note["maps"]["face"]["origins"] == {"metadata": 40, "none": 30}
    assert note["maps"]["eyes"]["origins"] == {"predicted": 40, "none": 30}
    assert note["maps"]["foreground"]["origins"] == {"estimate": 70}
    assert note["provenance"]["versions"]["numpy"] == np.__version__
    face = np.load(data / "maps/face.npy")
    assert face.shape == (70, 32, 32) and face.dtype == np.uint8
    assert np.array_equal(face[21], coverage([(14, 12, 30, 28)], (48, 40))) and not face[15].any()
    eyes = np.load(data / "maps/eyes.npy")
    expected = predicted_eyes([(14, 12, 30, 28)], Image.open(data / "00.png"))
    assert np.array_equal(eyes[0], coverage(expected, (48, 40)))
    assert note["maps"]["face"]["covered"] == pytest.approx(face.mean() / 255)
    figure = np.load(data / "maps/foreground.npy")
    assert figure[:, 14:, 10:22].mean() > 200 > 60 > figure[:, :6].mean()
    assert Image.open(data / "maps/overview.png").size[0] > 3 * 3 * 128
    assert sorted(path.name for path in (data / "maps").iterdir()) == sorted([*FILES, "maps.json", "overview.png"])
    novel = open_source(data, "novel")
    maps = open_maps(novel, ["eyes", "face"])
    rows = [int(name[1:]) for name in novel.column("sample_id")]
    assert all(np.array_equal(maps.of(i), [eyes[row], face[row]]) for i, row in enumerate(rows))
    packed = tmp_path / "p"
    pack.main(["--data_path", str(data), "--out", str(packed), "--canvas", "40", "--crop", "centre"])
    shown = open_maps(open_source(packed, "novel"), ["face"]).of(0)[0]
    places = 4 + (np.arange(32 * 50) + 0.5) * 40 / (32 * 50)  # the canvas shows px 4 to 44 of 48, 50 samples a cell
    expected = face[rows[0]][:, (places * 32 / 48).astype(int)].reshape(32, 32, 50).mean(2)
    assert np.abs(shown - expected).max() <= 255 / 50 + 0.5 and shown.max() == 255


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """160 rows in 3 chunks."""
    return make_figures(tmp_path_factory.mktemp("many") / "d", 160)


@pytest.fixture(scope="module")
def whole(script, many, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    script.main(flags(many, "--out", out))
    return contents(out)


def test_killed_it_goes_on_to_the_same_bytes(script, many, whole, tmp_path, capsys):
    out = tmp_path / "m"
    journal = out / "maps.json.part.jsonl"
    for workers, least in ((2, 2), (0, 3)):  # lines of the journal, the first is the plan
        command = [sys.executable, "datasets/prepare_maps.py", *flags(many, "--out", out, "--workers", workers)]
        kill_when_written(command, journal, least)
        assert not (out / "maps.json").exists() and not (out / "face.npy").exists()
    with open(journal, "a") as file:
        file.write('{"chunk": 2, "checks')  # a line that a crash cut short
    script.main(flags(many, "--out", out, "--workers", 1))
    assert "going on after" in capsys.readouterr().out
    assert contents(out) == whole
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, "maps.json", "overview.png"])


def test_killed_at_the_very_end_it_is_finished(script, tmp_path, monkeypatch, capsys):
    data, out = make_figures(tmp_path / "d", 20), tmp_path / "m"
    script.main(flags(data))
    monkeypatch.setattr(script, "write_json", lambda *_: sys.exit(9))
    with pytest.raises(SystemExit):
        script.main(flags(data, "--out", out))
    monkeypatch.undo()
    monkeypatch.setattr(script.MapJournal, "discard", lambda _: sys.exit(9))
    monkeypatch.setattr(script.MapChunks, "fill", lambda *_: pytest.fail("drawn again"))
    with pytest.raises(SystemExit):
        script.main(flags(data, "--out", out))
    monkeypatch.undo()
    assert (out / "maps.json.part").exists()
    script.main(flags(data, "--out", out))
    assert "complete already" in capsys.readouterr().out
    assert contents(out) == contents(data / "maps") and not list(out.glob("*.part*"))


def test_a_finished_drawing_is_left_alone_until_something_changes(script, fails, tmp_path, capsys):
    data = make_figures(tmp_path / "d", 20)
    script.main(flags(data, "--maps", "face"))
    first = (data / "maps/face.npy").stat().st_mtime_ns
    script.main(flags(data, "--maps", "eyes", "face"))  # what is there stays, what is missing comes
    assert (data / "maps/face.npy").stat().st_mtime_ns == first and (data / "maps/eyes.npy").exists()
    assert json.loads((data / "maps/maps.json").read_text())["maps"].keys() == {"face", "eyes"}
    script.main(flags(data, "--maps", "eyes", "face"))
    assert "complete already" in capsys.readouterr().out
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({f"{i:02d}.png": {"faces": []} for i in range(20)}))
    assert "--finder was None and is now boxes:" in fails(flags(data, "--maps", "face", "--finder", f"boxes:{boxes}"))
    Image.new("RGB", (9, 9)).save(data / "03.png")
    assert "the pictures" in fails(flags(data, "--maps", "face"))
    script.main(flags(data, "--maps", "face", "--overwrite"))
    assert not (data / "maps/eyes.npy").exists()  # of other pictures
    make_figures(data, 21)
    assert "the number of samples" in fails(flags(data, "--maps", "face"))


def test_a_finder_is_asked_where_the_metadata_know_no_face(script, fails, tmp_path, capsys):
    data = make_figures(tmp_path / "d", 20)
    face = {"score": 0.9, "face": [20, 10, 10, 10], "left_eye": [22, 13, 2, 2], "right_eye": [26, 13, 2, 2]}
    low = {**face, "score": 0.2}
    found = {f"{i:02d}.png": {"faces": [face] if i == 12 else [low] if i == 13 else []} for i in range(20)}
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps(found))
    finder = ("--finder", f"boxes:{boxes}")
    script.main(flags(data, *finder))
    assert "face: 55.0 % of 20 rows have a map: 5.0 % finder, 50.0 % metadata, 45.0 % none" in capsys.readouterr().out
    values = np.load(data / "maps/face.npy")
    assert np.array_equal(values[12], coverage([(20, 10, 30, 20)], (48, 40))) and not values[13].any()
    eyes = np.load(data / "maps/eyes.npy")[12]
    assert np.array_equal(eyes, coverage([(22, 13, 24, 15), (26, 13, 28, 15)], (48, 40)))
    boxes.write_text(json.dumps(found) + " ")
    assert "the files of the finder" in fails(flags(data, *finder))
    assert "--min_score was 0.5 and is now 0.1" in fails(flags(data, *finder, "--min_score", 0.1))
    boxes.write_text(json.dumps({"00.png": {"faces": []}}))
    assert ".png" in fails(flags(data, *finder, "--overwrite"))  # a picture that the file does not list
    assert "nope.xml" in fails(flags(data, "--finder", "cascade:nope.xml"))


def test_a_note_that_is_none_is_one_line(script, fails, tmp_path):
    data = make_figures(tmp_path / "d", 3)
    (data / "maps").mkdir()
    (data / "maps/maps.json").write_text('{"title": "x"}')
    assert "no note of maps: remove it" in fails(flags(data))


def test_class_folders_and_flat_folders(script, tmp_path, make_images):
    classes = make_identities(tmp_path / "classes", train=3)
    flat = make_images(tmp_path / "flat", 9)
    for data in (classes, flat):
        before = open_source(data, "train").fingerprint
        script.main(flags(data, "--maps", "foreground"))
        source = open_source(data, "train")
        assert source.fingerprint == before  # the sheet is no picture of the data
        maps, files = open_maps(source, ["foreground"]), np.load(data / "maps/foreground.npy")
        for i in range(len(source)):
            assert np.array_equal(maps.of(i)[0], files[source.manifest.rows[i]])
        script.main(flags(data, "--maps", "foreground"))
    Image.new("RGB", (8, 8)).save(flat / "0000.png")  # sorted before the others
    with pytest.raises(UserError, match=r"other rows|too few"):
        open_maps(open_source(flat, "train"), ["foreground"])
    packed = tmp_path / "p"
    pack.main(["--data_path", str(classes), "--out", str(packed), "--canvas", "24", "--num_workers", "0"])
    for role in ("train",):
        here, there = (open_maps(open_source(data, role), ["foreground"]) for data in (classes, packed))
        assert len(here) == len(there) and all(np.array_equal(here.of(i), there.of(i)) for i in range(len(here)))


def test_damaged_pictures_have_empty_maps_and_are_listed(script, fails, tmp_path, capsys):
    data = make_figures(tmp_path / "d", 20)
    (data / "04.png").write_bytes(b"no picture")
    error = fails(flags(data))
    assert "--max_bad 0.01" in error and "bad_images.jsonl" in error
    script.main(flags(data, "--max_bad", 0.1))
    assert "5.0 % unreadable" in capsys.readouterr().out
    (entry,) = [json.loads(line) for line in (data / "maps/bad_images.jsonl").read_text().splitlines()]
    assert (entry["index"], entry["path"]) == (4, "04.png")
    for name in ("face", "eyes", "foreground"):
        values = np.load(data / f"maps/{name}.npy")
        assert not values[4].any() and values[5].any()


def test_a_second_drawing_at_the_same_time_is_refused(script, tmp_path):
    data = make_figures(tmp_path / "d", 20)
    (tmp_path / "m").mkdir()
    plan = {"samples": 20, "maps": ["face"], "chunk": 64}
    with script.MapJournal(tmp_path / "m", plan, overwrite=False):
        command = [sys.executable, "datasets/prepare_maps.py", *flags(data, "--out", tmp_path / "m")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "in use by another drawing of maps" in done.stderr


def test_what_a_user_can_get_wrong_is_one_line(script, fails, tmp_path, make_images):
    data = make_images(tmp_path / "d", 3)
    assert "does not exist" in fails(flags(tmp_path / "nowhere"))
    assert "not a folder of pictures" in fails(flags(data / "000.png"))
    assert "not a folder of pictures" in fails(flags("hf:owner/name"))
    assert "invalid choice" in fails(flags(data, "--maps", "nose"))
    assert "is not known" in fails(flags(data, "--finder", "eyes:x"))
    (tmp_path / "file").write_text("")
    assert "choose another --out" in fails(flags(data, "--out", tmp_path / "file"))
    (data / "maps").mkdir()
    (data / "maps/maps.json").write_text("{")
    assert "remove it" in fails(flags(data))
