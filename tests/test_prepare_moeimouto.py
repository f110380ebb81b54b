"""datasets/prepare_moeimouto.py on class folders as released, with GLSim's lists and without.

The lists hold real lines. Run: python -m pytest tests/test_prepare_moeimouto.py
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import fails, preparer, report_of
from PIL import Image

from util.data.manifest import write_manifest
from util.data.sources import open_source

CLASSES = "class_id,class_name\n0,103_reinforce_zwei\n1,004_takamachi_nanoha\n"
LISTS = {
    "train": "0,103_reinforce_zwei/face_356_34_66.png\n0,103_reinforce_zwei/face_492_331_47.png\n",
    "val": "0,103_reinforce_zwei/face_968_385_22.png\n",
    "test": "0,103_reinforce_zwei/face_276_69_53.png\n0,103_reinforce_zwei/face_298_85_5.png\n",
}


def picture(*seed: int) -> Image.Image:
    """A smooth random picture, unlike that of another seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC)


def save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope="module")
def script(import_script):
    return import_script("datasets/prepare_moeimouto.py")


@pytest.fixture
def prepare(script, tmp_path):
    """prepare(data, flag, ...): the rows it writes, by sample_id."""
    return preparer(script, tmp_path)


def listed(folder: Path, suffix: str = ".png") -> Path:
    """Pictures and lists side by side."""
    folder.mkdir(parents=True)
    (folder / "classid_classname.csv").write_text(CLASSES)
    for split, text in LISTS.items():
        (folder / f"{split}.csv").write_text("class_id,dir\n" + text)
        for line in text.splitlines():
            save((folder / line.split(",")[1]).with_suffix(suffix), Image.new("RGB", (30, 30)))
    return folder


def class_folders(folder: Path, classes: int = 6, pictures: int = 20) -> Path:
    """The release without lists: thumb/<3 digits>_<name>/face_*.png, and a file that is no picture."""
    for number in range(classes):
        for i in range(pictures):
            save(folder / f"thumb/{number:03d}_name{number}/face_{i}_1_2.png", picture(number, i))
        (folder / f"thumb/{number:03d}_name{number}/color.csv").write_text("1,2,3\n")
    return folder


# --- the published split ----------------------------------------------------------------------------------------


def test_the_lists_say_the_split(prepare, tmp_path):
    rows = prepare(listed(tmp_path / "in"))
    assert {name: row["split"] for name, row in rows.items()} == {
        line.split(",")[1]: split for split, text in LISTS.items() for line in text.splitlines()
    }
    assert {row["identity"] for row in rows.values()} == {"103_reinforce_zwei"}
    assert open_source(tmp_path / "out", "test").load(0).size == (30, 30)
    assert not list((tmp_path / "out").rglob("*.png"))  # nothing is copied


@pytest.mark.parametrize("place", ["in", "in/outer/thumb"])
def test_pictures_and_lists_may_lie_apart(prepare, tmp_path, place):
    listed(tmp_path / place)
    lists = tmp_path / "glsim/data/moe"
    lists.mkdir(parents=True)
    for path in (tmp_path / place).glob("*.csv"):
        path.rename(lists / path.name)
    rows = prepare(tmp_path / "in", "--labels", tmp_path / "glsim")
    assert len(rows) == 5 and all((tmp_path / "in" / row["file_name"]).is_file() for row in rows.values())


def test_pictures_stored_anew_as_jpeg_are_found(prepare, tmp_path):
    rows = prepare(listed(tmp_path / "in", ".jpg"))
    name = "103_reinforce_zwei/face_356_34_66"
    assert rows[f"{name}.png"]["file_name"] == f"{name}.jpg"
    assert report_of(tmp_path)["notes"] == {"stored in another format": 5}


def test_every_row_left_out_is_counted_with_its_reason(prepare, tmp_path):
    data = listed(tmp_path / "in")
    (data / "103_reinforce_zwei/face_356_34_66.png").unlink()
    (data / "103_reinforce_zwei/face_492_331_47.png").write_bytes(b"no picture")
    more = "7,007_x/face_1_1_1.png\n1,103_reinforce_zwei/face_298_85_5.png\n0,103_reinforce_zwei/face_968_385_22.png\n"
    absent = "1,004_takamachi_nanoha/face_1_1_1.png\n"  # a class without a folder
    (data / "test.csv").write_text("class_id,dir\n" + LISTS["test"] + more + absent)
    assert len(prepare(data)) == 3
    assert report_of(tmp_path)["dropped"] == {
        "class id unknown": 1, "class id and folder disagree": 1, "listed twice": 1,
        "file missing": 2, "file damaged": 1,
    }  # fmt: skip


def test_check_compares_with_the_published_counts(prepare, script, tmp_path, capsys, monkeypatch):
    data = listed(tmp_path / "in")
    with pytest.raises(SystemExit) as stop:
        prepare(data, "--check")
    assert stop.value.code == 1
    assert "val: 1 found, 2356 published" in capsys.readouterr().out
    monkeypatch.setattr(script, "PUBLISHED", {"rows": 5, "identities": 1})
    monkeypatch.setattr(script, "PUBLISHED_SPLIT", {"train": 2, "val": 1, "test": 2})
    prepare(data, "--check")
    assert "equals what is published" in capsys.readouterr().out


# --- class folders alone ----------------------------------------------------------------------------------------


def test_class_folders_are_split_and_every_identity_is_trained_on(prepare, tmp_path, capsys):
    rows = prepare(class_folders(tmp_path / "in"), "--test_fraction", 0.4, "--val_fraction", 0.3)
    assert len(rows) == 120 and "no lists" in capsys.readouterr().out
    splits = Counter(row["split"] for row in rows.values())
    assert set(splits) == {"train", "val", "test"} and 24 < splits["test"] < 72
    assert {row["identity"] for row in rows.values() if row["split"] == "train"} == {
        f"{i:03d}_name{i}" for i in range(6)
    }
    assert rows["003_name3/face_7_1_2.png"]["file_name"] == "thumb/003_name3/face_7_1_2.png"
    assert report_of(tmp_path)["published"] == {"rows": 14397, "identities": 173}


def test_a_small_test_fraction_is_a_part_of_a_larger_one(prepare, tmp_path):
    data = class_folders(tmp_path / "in")
    few, many = (
        {name for name, row in prepare(data, "--test_fraction", part).items() if row["split"] == "test"}
        for part in (0.1, 0.4)
    )
    assert few < many


def test_near_identical_faces_never_straddle_splits(prepare, tmp_path):
    data = class_folders(tmp_path / "in", classes=4, pictures=12)
    for number in range(4):
        for i in range(12):
            face = picture(number, i)
            place = data / f"thumb/{number:03d}_name{number}"
            save(place / f"face_{i}_again.jpg", face.point(lambda value: value * 0.97))
            save(place / f"face_{i}_mirrored.png", face.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    rows = prepare(data, "--test_fraction", 0.3, "--open_identities", 1)
    found = {}
    for name, row in rows.items():
        found.setdefault(name.split("_")[:3:2][0] + name.split("_")[2], set()).add((row["split"], row["source"]))
    assert len(rows) == 144 and len(found) == 48
    assert all(len(own) == 1 for own in found.values())
    assert len({source for own in found.values() for _, source in own}) == 48
    assert {split for own in found.values() for split, _ in own} == {"train", "val", "test", "open_val", "open_test"}


def test_open_identities_are_disjoint(prepare, tmp_path):
    data = class_folders(tmp_path / "in", classes=8, pictures=6)
    rows = prepare(data, "--open_identities", 2)
    of = {}
    for row in rows.values():
        of.setdefault(row["split"], set()).add(row["identity"])
    assert len(of["open_val"]) == len(of["open_test"]) == 2 and not of["open_val"] & of["open_test"]
    assert not (of["open_val"] | of["open_test"]) & (of["train"] | of["val"] | of["test"])
    assert Counter(row["split"] in ("open_val", "open_test") for row in rows.values()) == {True: 24, False: 24}


def test_a_face_of_two_held_out_identities_stays_in_open_test(prepare, tmp_path):
    data = class_folders(tmp_path / "in", classes=8, pictures=6)
    rows = prepare(data, "--open_identities", 2)
    val, test = (next(row for row in rows.values() if row["split"] == split) for split in ("open_val", "open_test"))
    (data / test["file_name"]).write_bytes((data / val["file_name"]).read_bytes())
    again = prepare(data, "--open_identities", 2)
    assert set(rows) - set(again) == {val["sample_id"]} and again[test["sample_id"]]["split"] == "open_test"
    assert report_of(tmp_path)["dropped"] == {"near-copy of a picture of a held-out identity": 1}


def test_twice_gives_the_same_bytes_and_damaged_pictures_are_counted(prepare, tmp_path):
    data = class_folders(tmp_path / "in", classes=3, pictures=5)
    cut = data / "thumb/001_name1/face_0_1_2.png"
    cut.write_bytes(cut.read_bytes()[:-300])  # its header is whole: only decoding shows it
    (data / "thumb/001_name1/face_1_1_2.png").write_bytes(b"")
    assert len(prepare(data)) == 13
    assert report_of(tmp_path)["dropped"] == {"file damaged": 2}
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    prepare(data)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first


# --- faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (lambda data: (data / "val.csv").unlink(), (), "val.csv is missing (the val list)"),
        (lambda data: (data / "val.csv").write_text("class_id,dir\n0\n"), (), "val.csv, line 2: 1 fields"),
        (lambda data: (data / "103_reinforce_zwei").rename(data / "103"), (), "103_reinforce_zwei, like the others"),
        (
            lambda data: (data / "103_reinforce_zwei").rename(data / "1"),
            ("--labels", "tests"),
            "classid_classname.csv is",
        ),
        (lambda data: None, ("--labels", "nowhere"), "nowhere is missing"),
        (lambda data: None, ("--test_fraction", "1"), "out of range"),
    ],
)
def test_what_is_missing_or_broken_ends_in_one_line(script, tmp_path, capsys, spoil, flags, message):
    data = listed(tmp_path / "in")
    spoil(data)
    argv = ["--data_path", str(data), "--out", str(tmp_path / "out"), *flags]
    assert message in fails(script.main, capsys, argv)
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_used_are_refused(script, tmp_path, capsys):
    (tmp_path / "in/faces").mkdir(parents=True)
    argv = ["--data_path", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert "no class folders such as 000_hatsune_miku" in fails(script.main, capsys, argv)
    assert "nowhere does not exist" in fails(script.main, capsys, ["--data_path", "nowhere", "--out", "x"])
    class_folders(tmp_path / "in", classes=3, pictures=2)
    assert "2 identities cannot be held out of 3" in fails(script.main, capsys, [*argv, "--open_identities", "1"])
    both = ["--test_fraction", "0.6", "--val_fraction", "0.5"]
    assert "nothing to train on" in fails(script.main, capsys, [*argv, *both])
    write_manifest(tmp_path / "out", [{"sample_id": "a", "file_name": "a.png", "split": "train"}])
    assert "another program" in fails(script.main, capsys, argv)
