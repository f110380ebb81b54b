"""datasets/prepare_icartoonface_rec.py and _det.py on trees of the release's layout, built from real label lines.

Run: python -m pytest tests/test_prepare_icartoonface.py
"""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import fails, preparer, report_of
from PIL import Image

from util.data.face_crop import FaceCrops
from util.data.manifest import write_manifest
from util.data.sources import open_source
from util.data.trials import read_protocol

P = "personai_icartoonface_"

# --- detection --------------------------------------------------------------------------------------------------

# real lines of the release: picture number, box
DET_TRAIN = """00001.jpg,246,141,401,296
00002.jpg,85,6,114,46
00003.jpg,352,146,404,201
00003.jpg,450,181,477,212
00004.jpg,415,229,456,278
00005.jpg,323,219,391,311
00005.jpg,254,348,365,455
"""
DET_TEST = "00000.jpg,110,18,139,47\n00000.jpg,180,84,219,125\n00000.jpg,3,84,37,119\n00016.jpg,535,244,600,317\n"
DET_TRAIN = DET_TRAIN.replace("000", f"{P}dettrain_000")
DET_TEST = DET_TEST.replace("000", f"{P}detval_000")
DET_SIZE = (640, 480)


def save(path: Path, size: tuple[int, int], shade: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 90, 40)).save(path)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def detection(folder: Path, train: str = DET_TRAIN, test: str = DET_TEST, flat: bool = False) -> Path:
    """The release's layout; flat: the pictures of detval beside the archives, as its zip may be unpacked."""
    updated = f"{P}dettrain_anno_updatedv1.0"
    write(folder / updated / f"{updated}.csv", train)
    write(folder / f"{P}detval.csv", test)
    pictures = folder / f"{P}dettrain/icartoonface_dettrain"
    for line in dict.fromkeys(line.split(",")[0] for line in DET_TRAIN.splitlines()):
        save(pictures / line, DET_SIZE)
    for line in dict.fromkeys(line.split(",")[0] for line in DET_TEST.splitlines()):
        save((folder if flat else folder / f"{P}detval") / line, DET_SIZE)
    return folder


@pytest.fixture(scope="module")
def det_script(import_script):
    return import_script("datasets/prepare_icartoonface_det.py")


@pytest.fixture
def prepare_det(det_script, tmp_path):
    """prepare_det(data, flag, ...): the rows it writes, by sample_id."""
    return preparer(det_script, tmp_path)


def test_each_face_is_a_row(prepare_det, tmp_path):
    rows = prepare_det(detection(tmp_path / "in"), "--val_fraction", 0)
    assert list(rows) == [
        "dettrain_00001#0", "dettrain_00002#0", "dettrain_00003#0", "dettrain_00003#1", "dettrain_00004#0",
        "dettrain_00005#0", "dettrain_00005#1", "detval_00000#0", "detval_00000#1", "detval_00000#2", "detval_00016#0",
    ]  # fmt: skip
    assert rows["dettrain_00003#1"]["box"] == [450, 181, 477, 212]
    assert rows["dettrain_00003#1"]["file_name"] == rows["dettrain_00003#0"]["file_name"]
    assert rows["dettrain_00003#1"]["source"] == "dettrain_00003"
    assert Counter(row["split"] for row in rows.values()) == {"train": 7, "test": 4}
    assert {row["identity"] for row in rows.values()} == {None}
    counts = report_of(tmp_path)["counts"]
    assert (counts["train pictures on disk"], counts["test rows listed"]) == (5, 4)
    faces = FaceCrops(open_source(tmp_path / "out", "test"), 0.0)
    assert faces.load(0).size == (29, 29) and faces.record(0)["box"] == [0, 0, 29, 29]
    assert not list((tmp_path / "out").rglob("*.jpg"))  # nothing is copied


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("place", ["in", "in/outer", "in/a/b"])
def test_detection_is_found_wherever_it_was_unpacked(prepare_det, tmp_path, place, flat):
    detection(tmp_path / place, flat=flat)
    rows = prepare_det(tmp_path / "in")
    assert len(rows) == 11
    assert all((tmp_path / "in" / row["file_name"]).is_file() for row in rows.values())
    assert report_of(tmp_path)["counts"]["test pictures on disk"] == 2


def test_both_parts_in_one_folder_are_counted_apart(prepare_det, tmp_path):
    data = detection(tmp_path / "in", flat=True)
    for path in list((data / f"{P}dettrain/icartoonface_dettrain").iterdir()):
        path.rename(data / path.name)
    save(data / f"{P}dettrain_00006.jpg", DET_SIZE)
    assert len(prepare_det(data)) == 11
    report = report_of(tmp_path)
    assert (report["counts"]["train pictures on disk"], report["counts"]["test pictures on disk"]) == (6, 2)
    assert report["notes"]["train pictures without a face in the list"] == 1


def test_faces_of_a_picture_are_held_out_together_wherever_it_lies(prepare_det, tmp_path):
    names = [f"{P}dettrain_{i:05d}.jpg" for i in range(1, 301)]
    lines = "".join(f"{name},1,1,9,9\n{name},2,2,9,9\n" for name in names)
    for place in ("in", "other/outer"):
        detection(tmp_path / place, lines)
        for name in names:
            save(tmp_path / place / f"{P}dettrain/icartoonface_dettrain" / name, (12, 12))
    splits = {}
    for name, row in prepare_det(tmp_path / "in", "--val_fraction", 0.2).items():
        splits.setdefault(row["file_name"], set()).add(row["split"])
        splits[name] = row["split"]
    pictures = [found for found in splits.values() if isinstance(found, set)]
    assert all(len(found) == 1 for found in pictures) and 30 < sum(found == {"val"} for found in pictures) < 90
    again = prepare_det(tmp_path / "other", "--val_fraction", 0.2)
    assert {name: row["split"] for name, row in again.items()} == {n: s for n, s in splits.items() if "#" in n}


def test_the_first_labels_stand_in_and_that_is_said(prepare_det, tmp_path, capsys):
    data = detection(tmp_path / "in")
    (data / f"{P}dettrain_anno_updatedv1.0" / f"{P}dettrain_anno_updatedv1.0.csv").unlink()
    write(data / f"{P}dettrain/icartoonface_dettrain.csv", DET_TRAIN.splitlines(True)[0])
    assert len(prepare_det(data)) == 5
    assert "warning:" in capsys.readouterr().out
    assert report_of(tmp_path)["notes"] == {
        "train pictures without a face in the list": 4,
        "test pictures without a face in the list": 0,
    }
    detection(data)
    assert len(prepare_det(data)) == 11
    assert "warning:" not in capsys.readouterr().out


def test_every_face_left_out_is_counted_with_its_reason(prepare_det, tmp_path):
    name = f"{P}dettrain_00001.jpg"
    faults = f"{name},5,5,5,9\n{name},9,5,3,9\n{name},700,5,720,9\n{name},246,141,401,296\n{name},600,400,700,479\n"
    data = detection(tmp_path / "in", DET_TRAIN + faults)
    pictures = data / f"{P}dettrain/icartoonface_dettrain"
    (pictures / f"{P}dettrain_00002.jpg").unlink()
    (pictures / f"{P}dettrain_00004.jpg").write_bytes(b"no picture")
    rows = prepare_det(data)
    report = report_of(tmp_path)
    assert report["dropped"] == {
        "degenerate box": 2, "box outside the picture": 1, "repeated row": 1, "file missing": 1, "file damaged": 1
    }  # fmt: skip
    assert report["notes"]["box cut at the border"] == 1
    assert rows["dettrain_00001#5"]["box"] == [600, 400, 640, 479]  # its number counts the faulty ones before it
    assert len(rows) == 10


@pytest.mark.parametrize("part", ["train", "test"])
def test_either_part_of_detection_may_be_absent(prepare_det, tmp_path, capsys, part):
    data = detection(tmp_path / "in")
    for path in list(data.rglob("*.csv")):
        if ("detval" in path.name) == (part == "test"):
            path.unlink()
    rows = prepare_det(data)
    assert len(rows) == (4 if part == "train" else 7)
    assert f"no {'training' if part == 'train' else 'test'} part" in capsys.readouterr().out
    assert all(name.startswith("test" if part == "train" else "train") for name in report_of(tmp_path)["published"])


def test_detection_twice_is_the_same_and_check_compares(prepare_det, det_script, tmp_path, capsys, monkeypatch):
    data = detection(tmp_path / "in")
    prepare_det(data)
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    prepare_det(data)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first
    with pytest.raises(SystemExit) as stop:
        prepare_det(data, "--check")
    assert stop.value.code == 1
    assert "train rows listed: 7 found, 91160 published" in capsys.readouterr().out
    monkeypatch.setattr(det_script, "PUBLISHED_TRAIN", {"train pictures on disk": 5, "train rows listed": 7})
    monkeypatch.setattr(det_script, "PUBLISHED_TEST", {"test pictures on disk": 2, "test rows listed": 4})
    prepare_det(data, "--check")
    assert "equals what is published" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (DET_TRAIN + "x.jpg,1,2,3\n", "line 8: 4 fields, not 5"),
        (DET_TRAIN.replace("246", "left"), "row 1: 'left, 141, 401, 296' are no numbers"),
        ("x.jpg,1,2,3,4\n", "x.jpg, like the others that are listed, cannot be found"),
        ("", "no picture is listed"),
    ],
)
def test_broken_lists_of_faces_end_in_one_line(det_script, tmp_path, capsys, train, message):
    argv = ["--data_path", str(detection(tmp_path / "in", train)), "--out", str(tmp_path / "out")]
    assert message in fails(det_script.main, capsys, argv)
    assert not (tmp_path / "out").exists()


def test_missing_downloads_of_detection_are_named(det_script, tmp_path, capsys):
    argv = ["--data_path", str(tmp_path), "--out", str(tmp_path / "out")]
    error = fails(det_script.main, capsys, argv)
    for name in (f"{P}dettrain_anno_updatedv1.0.csv", "icartoonface_dettrain.csv", f"{P}detval.csv"):
        assert name in error
    assert "nowhere does not exist" in fails(det_script.main, capsys, ["--data_path", "nowhere", "--out", "x"])
    write_manifest(tmp_path / "out", [{"sample_id": "a", "file_name": "a.png", "split": "train"}])
    assert "another program" in fails(det_script.main, capsys, argv)


# --- recognition ------------------------------------------------------------------------------------------------

NAMES = """{'id': 'personai_icartoonface_rectrain_00006', 'name': '松坂梅', 'url': 'http://baike.baidu.com/view/102893.htm'}
{'id': 'personai_icartoonface_rectrain_00007', 'name': '石井健太郎', 'url': 'http://baike.baidu.com/view/1405523.htm'}
{'id': 'personai_icartoonface_rectrain_00008', 'name': '李莓铃', 'url': None}
"""
# file number, box, label; the first two boxes are real
REC_TEST = [
    (0, (101, 131, 258, 327), 3), (1, (75, 17, 251, 205), 6), (2, (5, 5, 90, 80), 3),
    (3, (1, 2, 80, 90), -1), (4, (9, 9, 60, 60), 6), (5, (4, 8, 50, 60), -1), (6, (4, 8, 50, 60), 3),
]  # fmt: skip
PAIRS = [(0, 2), (0, 6), (2, 0), (1, 4), (4, 1)]
REC_SIZE = (300, 340)


def rectest(number: int) -> str:
    return f"{P}rectest_{number:07d}"


def rectrain(identity: int, number: int) -> str:
    return f"{P}rectrain_{identity:05d}/{P}rectrain_{identity:05d}_{number:07d}.jpg"


def info_text(test=REC_TEST, pairs=PAIRS) -> str:
    """icartoonface_rectest_info.txt: pictures, then pairs."""
    lines = [f"{rectest(number)}.jpg {' '.join(map(str, box))} {label}" for number, box, label in test]
    return "\n".join(lines + [f"{rectest(a)}.jpg {rectest(b)}.jpg" for a, b in pairs]) + "\n"


def picture(seed: int, size: tuple[int, int] = (48, 48)) -> Image.Image:
    """A smooth random picture, unlike that of another seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def recognition(folder: Path, train: dict[int, int] | None = None, test: bool = True) -> Path:
    """The release's layout. train: {identity: pictures}."""
    lines = []
    for identity, pictures in (train or {}).items():
        for number in range(pictures):
            name = rectrain(identity, number)
            path = folder / f"{P}rectrain/icartoonface_rectrain" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(1000 * identity + number).save(path, quality=95)
            lines.append(f"{name}\t4\t5\t40\t44\n")
    if train:
        write(folder / f"{P}rectrain/icartoonface_rectrain_det.txt", "".join(lines))
        write(folder / "icartoonface_rectest_idInfo.txt", NAMES)
    if test:
        for number, *_ in REC_TEST:
            save(folder / f"{P}rectest/icartoonface_rectest/{rectest(number)}.jpg", REC_SIZE)
        write(folder / "icartoonface_rectest_info.txt", info_text())
        boxes = "".join("\t".join((f"{rectest(n)}.jpg", *map(str, box))) + "\n" for n, box, _ in REC_TEST)
        write(folder / f"{P}rectest/icartoonface_rectest_det.txt", boxes)
    return folder


@pytest.fixture(scope="module")
def rec_script(import_script):
    return import_script("datasets/prepare_icartoonface_rec.py")


@pytest.fixture
def prepare_rec(rec_script, tmp_path):
    """prepare_rec(data, flag, ...): the rows it writes, by sample_id."""
    return preparer(rec_script, tmp_path)


WHOLE = ("--val_identities", 0, "--val_fraction", 0)


def test_the_test_becomes_open_test_with_its_trials_and_distractors(prepare_rec, tmp_path):
    rows = prepare_rec(recognition(tmp_path / "in", {6: 3, 7: 2}), *WHOLE)
    assert {name: row["identity"] for name, row in rows.items() if row["split"] == "open_test"} == {
        "rectest_0000000": "test_3", "rectest_0000001": "test_6", "rectest_0000002": "test_3", "rectest_0000003": None,
        "rectest_0000004": "test_6", "rectest_0000005": None, "rectest_0000006": "test_3",
    }  # fmt: skip
    assert rows["rectest_0000000"]["box"] == [101, 131, 258, 327]
    assert read_protocol(tmp_path / "out", "icartoonface") == {
        "id_a": [f"rectest_{a:07d}" for a, _ in PAIRS] + ["rectest_0000003", "rectest_0000005"],
        "id_b": [f"rectest_{b:07d}" for _, b in PAIRS] + [None, None],
        "label": [1] * 5 + [0] * 2,
        "kind": ["trial"] * 5 + ["distractor"] * 2,
    }
    faces = FaceCrops(open_source(tmp_path / "out", "open_test"), 0.0)
    assert len(faces) == 7 and faces.load(0).size == (196, 196)


def test_the_training_part_takes_its_identities_from_the_names(prepare_rec, tmp_path):
    rows = prepare_rec(recognition(tmp_path / "in", {6: 3, 7: 2, 10512: 2}, test=False), *WHOLE)
    assert {name: row["identity"] for name, row in rows.items()} == {
        "rectrain_00006_0000000": "00006", "rectrain_00006_0000001": "00006", "rectrain_00006_0000002": "00006",
        "rectrain_00007_0000000": "00007", "rectrain_00007_0000001": "00007",
        "rectrain_10512_0000000": "10512", "rectrain_10512_0000001": "10512",
    }  # fmt: skip
    assert rows["rectrain_00006_0000000"]["box"] == [4, 5, 40, 44]
    assert {row["split"] for row in rows.values()} == {"train"}
    with open(tmp_path / "out/identities.csv", newline="", encoding="utf-8") as file:
        names = {row["identity"]: (row["name"], row["url"]) for row in csv.DictReader(file)}
    assert names["00006"] == ("松坂梅", "http://baike.baidu.com/view/102893.htm") and names["00008"] == ("李莓铃", "")
    assert report_of(tmp_path)["counts"]["identities without a name"] == 1  # 10512


def test_no_test_identity_is_ever_a_training_identity(prepare_rec, tmp_path):
    """The test numbers its identities by itself: its 3 and 6 are others than 00003 and 00006 of the training part."""
    rows = prepare_rec(
        recognition(tmp_path / "in", {3: 8, 6: 8, 7: 8, 8: 8}), "--val_identities", 2, "--groups", "blocks"
    )
    of = {
        split: {row["identity"] for row in rows.values() if row["split"] == split}
        for split in ("train", "val", "open_val", "open_test")
    }
    assert len(of["open_val"]) == 2
    assert not of["open_val"] & (of["train"] | of["val"] | of["open_test"])
    assert not of["open_test"] & (of["train"] | of["val"]) and of["val"] <= of["train"]


@pytest.mark.parametrize("place", ["in", "in/outer", "in/a/b"])
def test_recognition_is_found_wherever_it_was_unpacked(prepare_rec, tmp_path, place):
    data = recognition(tmp_path / place, {6: 3, 7: 2})
    rows = prepare_rec(tmp_path / "in", *WHOLE)
    assert len(rows) == 12 and all((tmp_path / "in" / row["file_name"]).is_file() for row in rows.values())
    for part in ("rectrain", "rectest"):  # without the outer folders
        for path in list((data / f"{P}{part}").iterdir()):
            path.rename(data / path.name)
    assert len(prepare_rec(tmp_path / "in", *WHOLE)) == 12


def test_whole_identities_are_drawn_by_the_seed(prepare_rec, tmp_path):
    data = recognition(tmp_path / "in", dict.fromkeys(range(1, 21), 2), test=False)
    flags = ("--val_identities", 5, "--val_fraction", 0, "--groups", "blocks")

    def drawn(seed: int) -> set[str]:
        rows = prepare_rec(data, *flags, "--seed", seed).values()
        assert Counter(row["split"] for row in rows) == {"train": 30, "open_val": 10}
        return {row["identity"] for row in rows if row["split"] == "open_val"}

    assert len(drawn(0)) == 5 and drawn(0) == drawn(0) and drawn(0) != drawn(1)


def test_runs_of_file_numbers_are_held_out_whole(prepare_rec, tmp_path):
    data = recognition(tmp_path / "in", {1: 60, 2: 60}, test=False)
    rows = prepare_rec(data, "--val_identities", 0, "--val_fraction", 0.3, "--groups", "blocks", "--block", 5)
    splits = {}
    for name, row in rows.items():
        stem, _, number = name.rpartition("_")
        splits.setdefault((stem, int(number) // 5), set()).add((row["split"], row["source"]))
    assert len(splits) == 24 and all(len(found) == 1 for found in splits.values())
    assert 2 < sum(split == "val" for found in splits.values() for split, _ in found) < 14


def test_near_identical_frames_are_held_out_together(prepare_rec, tmp_path):
    data = recognition(tmp_path / "in", dict.fromkeys((1, 2, 3), 30), test=False)
    folder = data / f"{P}rectrain/icartoonface_rectrain"
    for identity in (1, 2, 3):  # frames 3 i, 3 i + 1 and 3 i + 2 are one picture, brightened or mirrored
        for number in range(0, 30, 3):
            image = Image.open(folder / rectrain(identity, number)).convert("RGB")
            image.point(lambda value: min(255, value + 3)).save(folder / rectrain(identity, number + 1), quality=90)
            image.resize((44, 44)).resize((48, 48)).save(folder / rectrain(identity, number + 2), quality=92)
    rows = prepare_rec(data, "--val_identities", 1, "--val_fraction", 0.3)
    found = {}
    for name, row in rows.items():
        found.setdefault((row["identity"], int(name[-7:]) // 3), set()).add((row["split"], row["source"]))
    assert all(len(own) == 1 for own in found.values()) and len(found) == 30
    assert len({source for own in found.values() for _, source in own}) == 30
    assert {split for own in found.values() for split, _ in own} == {"train", "val", "open_val"}


def test_a_copy_of_a_held_out_identity_leaves_training(prepare_rec, tmp_path):
    data = recognition(tmp_path / "in", dict.fromkeys(range(1, 9), 4), test=False)
    flags = ("--val_identities", 2, "--val_fraction", 0)
    rows = prepare_rec(data, *flags)
    held, kept = (next(row for row in rows.values() if row["split"] == split) for split in ("open_val", "train"))
    (data / kept["file_name"]).write_bytes((data / held["file_name"]).read_bytes())
    again = prepare_rec(data, *flags)
    assert set(rows) - set(again) == {kept["sample_id"]}
    assert report_of(tmp_path)["dropped"] == {"near-copy of a picture of a held-out identity": 1}
    assert held["sample_id"] in again


def test_recognition_twice_is_the_same_and_check_compares(prepare_rec, rec_script, tmp_path, capsys, monkeypatch):
    data = recognition(tmp_path / "in", dict.fromkeys((6, 7, 8, 9), 5))
    flags = ("--val_identities", 1, "--val_fraction", 0.2)
    prepare_rec(data, *flags)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    first = {path: path.read_bytes() for path in files}
    assert len(first) == 4
    prepare_rec(data, *flags)
    assert {path: path.read_bytes() for path in files} == first
    with pytest.raises(SystemExit) as stop:
        prepare_rec(data, *flags, "--check")
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert "train pictures: 20 found, 389678 published" in said and "distractors: 2 found, 2500 published" in said
    monkeypatch.setattr(rec_script, "PUBLISHED_TRAIN", {"train pictures": 20, "train identities": 4})
    test = {"test pictures": 7, "distractors": 2, "test faces": 5, "test identities": 2}
    monkeypatch.setattr(rec_script, "PUBLISHED_TEST", test)
    prepare_rec(data, *flags, "--check")
    assert "equals what is published" in capsys.readouterr().out


def test_parts_may_be_absent_and_that_is_said(prepare_rec, tmp_path, capsys):
    data = recognition(tmp_path / "in", {6: 3, 7: 2})
    assert len(prepare_rec(data, "--test_only")) == 7
    assert "train pictures" not in report_of(tmp_path)["published"]
    (data / f"{P}rectrain/icartoonface_rectrain_det.txt").unlink()
    assert len(prepare_rec(data, *WHOLE)) == 7
    assert "no training part" in capsys.readouterr().out
    (data / "icartoonface_rectest_info.txt").unlink()
    rows = prepare_rec(data, *WHOLE)
    assert {(row["identity"], row["split"]) for row in rows.values()} == {(None, "open_test")} and len(rows) == 7
    assert rows["rectest_0000001"]["box"] == [75, 17, 251, 205]
    assert "no test labels" in capsys.readouterr().out
    assert report_of(tmp_path)["published"] == {"test pictures": 22_500}
    assert read_protocol(tmp_path / "out", "icartoonface") is None  # that of the earlier run does not stay


def test_every_test_picture_and_trial_left_out_is_counted(prepare_rec, tmp_path):
    data = recognition(tmp_path / "in")
    test = [*REC_TEST, (0, (1, 1, 9, 9), 3), (7, (1, 1, 9, 9), 3)]
    test[1], test[2] = (1, (75, 17, 75, 205), 6), (2, (5, 5, 400, 80), 3)
    pairs = [*PAIRS, (0, 1), (3, 0), (3, 5), (0, 7), (4, 99)]
    write(data / "icartoonface_rectest_info.txt", info_text(test, pairs))
    (data / f"{P}rectest/icartoonface_rectest/{rectest(6)}.jpg").write_bytes(b"no picture")
    rows = prepare_rec(data, *WHOLE)
    report = report_of(tmp_path)
    assert report["dropped"] == {
        "repeated row": 1, "file missing": 1, "file damaged": 1,
        "trial of two identities": 3, "trial of a picture that is not there": 3,
    }  # fmt: skip
    assert report["notes"] == {"box taken from icartoonface_rectest_det.txt": 1, "box cut at the border": 1}
    assert rows["rectest_0000001"]["box"] == [75, 17, 251, 205] and rows["rectest_0000002"]["box"] == [5, 5, 300, 80]
    assert report["counts"]["trials"] == 4
    ids = read_protocol(tmp_path / "out", "icartoonface")
    assert set(ids["id_a"]) | set(ids["id_b"]) - {None} <= set(rows)


def test_every_training_picture_left_out_is_counted(prepare_rec, tmp_path):
    data = recognition(tmp_path / "in", {6: 3, 7: 4}, test=False)
    listed = data / f"{P}rectrain/icartoonface_rectrain_det.txt"
    first = listed.read_text().splitlines()[0]
    stray = f"{P}rectrain_00006/{P}rectrain_00007_0000000.jpg 1 1 9 9\nother/a.jpg 1 1 9 9\n"
    degenerate = f"{rectrain(6, 2)}\t4\t5\t4\t44\n"
    text = listed.read_text().replace(f"{rectrain(6, 2)}\t4\t5\t40\t44\n", degenerate)
    listed.write_text(f"{text}{first}\n{stray}")
    (data / f"{P}rectrain/icartoonface_rectrain" / rectrain(7, 0)).unlink()
    broken = data / f"{P}rectrain/icartoonface_rectrain" / rectrain(7, 1)
    broken.write_bytes(broken.read_bytes()[:-200])  # its header is whole: only decoding shows it
    rows = prepare_rec(data, "--val_identities", 0, "--val_fraction", 0.01)
    assert report_of(tmp_path)["dropped"] == {
        "degenerate box": 1, "file missing": 1, "file damaged": 1, "repeated row": 1, "name without an identity": 2,
    }  # fmt: skip
    assert len(rows) == 4


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("icartoonface_rectest_info.txt", info_text() + "a b c\n", "line 13: 3 fields"),
        ("icartoonface_rectest_info.txt", info_text().replace("101 131", "x 131"), "line 1: 'x, 131, 258, 327, 3' are"),
        ("icartoonface_rectest_info.txt", info_text().replace("327 3", "327 -2"), "line 1: the label -2"),
        ("icartoonface_rectest_info.txt", info_text(test=[]), "no picture is listed"),
        (f"{P}rectrain/icartoonface_rectrain_det.txt", f"{rectrain(6, 0)} 1 2 3\n", "line 1: 4 fields, not file"),
        (f"{P}rectrain/icartoonface_rectrain_det.txt", f"{rectrain(5, 0)} 1 2 3 4\n", f"{P}rectrain; unpack it"),
        ("icartoonface_rectest_idInfo.txt", NAMES + "{'id': 'x'}\n", "line 4: no dict with id, name and url"),
        ("icartoonface_rectest_idInfo.txt", "__import__('os').abort()\n", "line 1: no dict"),
    ],
)
def test_broken_label_files_end_in_one_line(rec_script, tmp_path, capsys, name, text, message):
    data = recognition(tmp_path / "in", {6: 2, 7: 2})
    write(data / name, text)
    argv = ["--data_path", str(data), "--out", str(tmp_path / "out"), *map(str, WHOLE)]
    assert message in fails(rec_script.main, capsys, argv)
    assert not (tmp_path / "out/metadata.parquet").exists()


def test_missing_downloads_of_recognition_are_named(rec_script, tmp_path, capsys):
    argv = ["--data_path", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    (tmp_path / "in").mkdir()
    error = fails(rec_script.main, capsys, argv)
    for name in ("icartoonface_rectrain_det.txt", "icartoonface_rectest_info.txt", "icartoonface_rectest_det.txt"):
        assert name in error
    recognition(tmp_path / "in", {6: 2, 7: 2})
    assert "100 identities cannot be held out of 2" in fails(rec_script.main, capsys, argv)
    write_manifest(tmp_path / "out", [{"sample_id": "a", "file_name": "a.png", "split": "train"}])
    assert "another program" in fails(rec_script.main, capsys, argv)
