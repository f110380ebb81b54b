"""datasets/prepare_dafre.py on trees of the release's layout: the published split, its formula, runs of uploads.

The lists hold real lines of the release. Run: python -m pytest tests/test_prepare_dafre.py
"""

import csv
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import fails, preparer, report_of
from PIL import Image

from util.data.manifest import read_manifest, write_manifest
from util.data.sources import open_source

# real lines; class 9 has uploads 3 and 5 apart in val and test
CLASS_NAMES = "0,morrigan_aensland\n1,uchiha_sasuke\n2,haruno_sakura\n9,hinata_hyuuga\n"
TRAIN = "0,0545/676545.jpg\n0,0950/1390950.jpg\n1,0750/1848750.jpg\n1,0288/264288.jpg\n1,0692/694692.jpg\n"
VAL = "0,0933/194933.jpg\n1,0361/75361.jpg\n9,0742/42742.jpg\n9,0612/184612.jpg\n"
TEST = "0,0291/1796291.jpg\n1,0816/277816.jpg\n9,0745/42745.jpg\n9,0607/184607.jpg\n"
LISTS = {"train": TRAIN + "9,0606/184606.jpg\n9,0618/184618.jpg\n9,0001/1.jpg\n", "val": VAL, "test": TEST}
REAL = Path(os.environ.get("ANIMASK_LABELS", "nowhere")) / "dafre"
needs_labels = pytest.mark.skipif(
    not REAL.is_dir(), reason="ANIMASK_LABELS names no folder with dafre/val.csv, test.csv and per_class_counts.csv"
)


@pytest.fixture(scope="module")
def script(import_script):
    return import_script("datasets/prepare_dafre.py")


def dafre(folder: Path, lists=LISTS, variant: str = "faces") -> Path:
    """The release's layout: labels/*.csv without headers, and a picture for each line."""
    labels = folder / "labels"
    labels.mkdir(parents=True)
    (labels / "classid_classname.csv").write_text(CLASS_NAMES)
    for split, text in lists.items():
        (labels / f"{split}.csv").write_text(text)
        for line in text.splitlines():
            path = folder / variant / line.split(",")[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (24, 20), (int(path.stem) % 256, 90, 40)).save(path)
    return folder


@pytest.fixture
def prepare(script, tmp_path):
    """prepare(data, flag, ...): the rows it writes, by sample_id."""
    return preparer(script, tmp_path)


def near_of(tmp_path, grouped: bool = False) -> int:
    name = "test pictures with one of their class within 5 ids in train"
    return report_of(tmp_path)["counts"][name + (", grouped" if grouped else "")]


# --- the published split ----------------------------------------------------------------------------------------


def test_the_lists_become_rows_with_names_for_class_numbers(prepare, tmp_path):
    rows = prepare(dafre(tmp_path / "in"))
    assert {name: row["split"] for name, row in rows.items()} == {
        line.split("/")[1].removesuffix(".jpg"): split for split, text in LISTS.items() for line in text.splitlines()
    }
    assert rows["1796291"]["identity"] == "morrigan_aensland" and rows["277816"]["identity"] == "uchiha_sasuke"
    assert rows["1796291"]["file_name"] == "faces/0291/1796291.jpg"
    assert {row["box"] for row in rows.values()} == {None}
    source = open_source(tmp_path / "out", "test")
    assert len(source) == 4 and source.load(0).size == (24, 20)
    assert not list((tmp_path / "out").rglob("*.jpg"))  # nothing is copied


@pytest.mark.parametrize("place", ["in", "in/outer", "in/a/b/outer"])
def test_it_does_not_matter_where_the_archive_was_unpacked(prepare, tmp_path, place):
    dafre(tmp_path / place)
    assert len(prepare(tmp_path / "in")) == 16


def test_labels_may_lie_elsewhere_and_the_picture_folder_be_given_itself(prepare, tmp_path):
    dafre(tmp_path / "in")
    (tmp_path / "in/labels").rename(tmp_path / "lists")
    assert len(prepare(tmp_path / "in", "--labels", tmp_path / "lists")) == 16
    rows = prepare(tmp_path / "in/faces", "--labels", tmp_path / "lists")
    assert rows["1796291"]["file_name"] == "0291/1796291.jpg"


def test_the_other_variant_is_taken_only_when_asked(prepare, script, tmp_path, capsys):
    dafre(tmp_path / "in", variant="fullMin256")
    error = fails(script.main, capsys, ["--data_path", str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    assert "faces/0545/676545.jpg" in error and "archive faces" in error
    assert prepare(tmp_path / "in", "--variant", "fullMin256")["1796291"]["file_name"].startswith("fullMin256/")


def test_lists_with_headers_and_tags_are_read_alike(prepare, tmp_path):
    plain = prepare(dafre(tmp_path / "in"))
    labels = tmp_path / "in/labels"
    for split, text in LISTS.items():
        rows = [line.split(",") for line in text.splitlines()]
        with open(labels / f"{split}_tags.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("id", "dir", "class_id", "tags_cat0", "tags_cat3", "tags_cat4"))
            writer.writerows([Path(place).stem, place, number, "1girl, solo", "naruto", ""] for number, place in rows)
        (labels / f"{split}.csv").unlink()
    (labels / "classid_classname.csv").write_text("class_id,class_name\n" + CLASS_NAMES)
    assert prepare(tmp_path / "in") == plain
    for split, text in LISTS.items():
        (labels / f"{split}.csv").write_text("class_id,dir\n" + text)
    assert prepare(tmp_path / "in") == plain


def test_twice_gives_the_same_bytes(prepare, tmp_path):
    dafre(tmp_path / "in")
    prepare(tmp_path / "in", "--grouped")
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    prepare(tmp_path / "in", "--grouped")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first


def test_check_compares_with_the_published_counts(prepare, script, tmp_path, capsys, monkeypatch):
    dafre(tmp_path / "in")
    with pytest.raises(SystemExit) as stop:
        prepare(tmp_path / "in", "--check")
    said = capsys.readouterr().out
    assert stop.value.code == 1
    assert "train: 8 found, 322947 published" in said and "test: 4 found, 94440 published" in said
    monkeypatch.setattr(script, "PUBLISHED", {"rows": 16, "identities": 3, "train": 8, "val": 4, "test": 4})
    prepare(tmp_path / "in", "--check")
    assert "equals what is published" in capsys.readouterr().out


# --- faults -----------------------------------------------------------------------------------------------------


def test_every_row_left_out_is_counted_with_its_reason(prepare, tmp_path):
    data = dafre(tmp_path / "in")
    (data / "faces/0291/1796291.jpg").unlink()
    (data / "faces/0816/277816.jpg").write_bytes(b"no picture")
    more = "77,0002/2.jpg\n0,0003/4.jpg\n0,0545/676545.jpg\n0,0006/5006.png\n"
    (data / "labels/test.csv").write_text(TEST + more)
    rows = prepare(data)
    assert report_of(tmp_path)["dropped"] == {
        "class id unknown": 1,
        "folder and upload number disagree": 1,
        "listed twice": 1,
        "file missing": 2,
        "file damaged": 1,
    }
    assert report_of(tmp_path)["examples"]["class id unknown"] == ["77,0002/2.jpg"]
    assert len(rows) == 14 and rows["676545"]["split"] == "train"


def test_a_list_may_be_absent_and_that_is_said(prepare, tmp_path, capsys):
    data = dafre(tmp_path / "in")
    (data / "labels/train.csv").unlink()
    assert Counter(row["split"] for row in prepare(data).values()) == {"val": 4, "test": 4}
    assert "no train.csv beside" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (lambda data: (data / "labels/classid_classname.csv").unlink(), (), "classid_classname.csv is missing"),
        (lambda data: [(data / f"labels/{split}.csv").unlink() for split in LISTS], (), "train.csv, val.csv, test.csv"),
        (lambda data: (data / "labels/train.csv").unlink(), ("--resplit",), "train.csv missing"),
        (lambda data: (data / "labels/val.csv").write_text("0,0933/194933.jpg\n0\n"), (), "val.csv, line 2: 1 fields"),
        (lambda data: (data / "labels/classid_classname.csv").write_text("0,a\n1,a\n"), (), "one name"),
        (lambda data: (data / "faces").rename(data / "crops"), (), "faces/0545/676545.jpg"),
        (lambda data: None, ("--labels", "nowhere"), "nowhere is missing"),
        (lambda data: None, ("--variant", "thumbs"), "--variant"),
    ],
)
def test_what_is_missing_or_broken_ends_in_one_line(script, tmp_path, capsys, spoil, flags, message):
    data = dafre(tmp_path / "in")
    spoil(data)
    argv = ["--data_path", str(data), "--out", str(tmp_path / "out"), *flags]
    assert message in fails(script.main, capsys, argv)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_program_is_left_alone(script, tmp_path, capsys):
    write_manifest(tmp_path / "out", [{"sample_id": "a", "file_name": "a.png", "split": "train"}])
    argv = ["--data_path", str(dafre(tmp_path / "in")), "--out", str(tmp_path / "out")]
    assert "another program" in fails(script.main, capsys, argv)
    assert "nowhere does not exist" in fails(script.main, capsys, ["--data_path", "nowhere", "--out", "x"])
    assert len(read_manifest(tmp_path / "out")) == 1


# --- the formula ------------------------------------------------------------------------------------------------


# train/val/test as published of classes of all sizes; of 15 of them, 0.7 + 0.1 = 0.8 would give others
PUBLISHED_CLASSES = """
14/1/5 14/2/5 38/5/12 39/6/12 52/7/16 62/10/18 65/10/19 84/11/25 91/13/27 98/13/29 112/15/33 118/18/34 125/19/36
144/21/42 161/22/47 175/24/51 175/25/51 192/27/56 208/30/60 210/29/61 224/31/65 245/35/71 291/42/84 359/51/103
360/51/104 381/54/110 430/61/124 467/67/134 601/86/172 626/89/180 933/133/267 1523/218/436 7478/1068/2137
"""


def test_the_formula_gives_the_published_sizes_of_classes(script):
    published = [tuple(map(int, sizes.split("/"))) for sizes in PUBLISHED_CLASSES.split()]
    assert [script.split_sizes(sum(sizes)) for sizes in published] == published
    quirks = [sizes for sizes in published if sizes[2] != sum(sizes) - sum(sizes) * 8 // 10]
    assert len(quirks) == 15 and (14, 1, 5) in quirks
    # how often it matters, as counted by others
    assert sum(script.split_sizes(n)[2] != n - n * 8 // 10 for n in range(20, 2000)) == 230


def test_resplit_follows_the_order_of_the_lists_within_each_class(prepare, tmp_path):
    listed = [f"1,{i % 1000:04d}/{i}.jpg" for i in np.random.default_rng(3).permutation(np.arange(2000, 9000, 350))]
    assert len(listed) == 20
    # the lists hold them in another share, and other classes stand between
    parts = {"train": listed[:6], "val": listed[6:16], "test": listed[16:]}
    other = {"train": ["0,0545/676545.jpg"], "val": ["0,0933/194933.jpg"], "test": ["0,0291/1796291.jpg"]}
    lists = {split: "\n".join(parts[split][:1] + other[split] + parts[split][1:]) + "\n" for split in parts}
    data = dafre(tmp_path / "in", lists)
    prepare(data)
    assert report_of(tmp_path)["counts"]["classes split by another rule"] == 2  # 3 pictures go 2, 0, 1
    rows = prepare(data, "--resplit")
    order = [line.split("/")[1].removesuffix(".jpg") for line in listed]
    assert [rows[name]["split"] for name in order] == ["train"] * 14 + ["val"] + ["test"] * 5
    assert [rows[name]["split"] for name in ("676545", "194933", "1796291")] == ["train", "train", "test"]


@needs_labels
def test_the_formula_gives_every_published_class(script):
    with open(REAL / "per_class_counts.csv", newline="") as file:
        classes = {row["class_id"]: row for row in csv.DictReader(file)}
    assert len(classes) == script.PUBLISHED["identities"]
    total = Counter()
    for row in classes.values():
        published = tuple(int(row[split]) for split in ("train", "val", "test"))
        assert script.split_sizes(sum(published)) == published, row
        total.update(dict(zip(("train", "val", "test"), published, strict=True)))
    assert total == {split: script.PUBLISHED[split] for split in total}
    assert total.total() == script.PUBLISHED["rows"]
    for split in ("val", "test"):
        listed = script.read_table(REAL / f"{split}.csv", ("class_id", "dir"))
        assert Counter(number for number, _ in listed) == {number: int(row[split]) for number, row in classes.items()}
        assert [number for number, _ in listed] == sorted((number for number, _ in listed), key=int)
        assert all(script.is_upload(place) for _, place in listed)


# --- runs of uploads --------------------------------------------------------------------------------------------


def test_a_run_is_a_chain_of_near_uploads_of_one_class(prepare, tmp_path):
    rows = prepare(dafre(tmp_path / "in"))
    runs = {}
    for name, row in rows.items():
        runs.setdefault(row["source"], set()).add(name)
    assert {"42742", "42745"} in runs.values()
    assert {"184606", "184607", "184612"} in runs.values()  # 1 and 5 apart; 184618 is 6 away
    assert {"184618"} in runs.values()
    assert near_of(tmp_path) == 1  # 184607 beside 184606


def test_near_is_5_and_no_more(prepare, tmp_path):
    train = "".join(f"0,{n:04d}/{n}.jpg\n" for n in (105, 195, 306, 394, 500))
    test = "".join(f"0,{n:04d}/{n}.jpg\n" for n in (100, 200, 300, 400))  # 5 and 6 away, after and before
    prepare(dafre(tmp_path / "in", {"train": train, "val": "0,0900/900.jpg\n", "test": test}))
    assert near_of(tmp_path) == 2


def test_a_run_never_holds_two_classes(prepare, tmp_path):
    lists = {"train": "0,0001/1.jpg\n1,0002/2.jpg\n0,0003/3.jpg\n", "val": "1,0004/4.jpg\n", "test": "0,0005/5.jpg\n"}
    rows = prepare(dafre(tmp_path / "in", lists))
    assert [rows[name]["source"][-1] for name in "12345"] == ["1", "2", "1", "2", "1"]
    assert rows["1"]["source"] != rows["2"]["source"]


def test_grouped_keeps_the_test_and_takes_its_runs_out_of_training(prepare, tmp_path):
    before = prepare(dafre(tmp_path / "in"))
    rows = prepare(tmp_path / "in", "--grouped")
    assert {name: row for name, row in before.items() if row["split"] == "test"} == {
        name: row for name, row in rows.items() if row["split"] == "test"
    }
    assert set(before) - set(rows) == {"42742", "184612", "184606"}
    assert report_of(tmp_path)["dropped"] == {"val yields to test": 2, "train yields to test": 1}
    assert (near_of(tmp_path), near_of(tmp_path, grouped=True)) == (1, 0)
    assert set(report_of(tmp_path)["published"]) == {"identities", "test"}  # what is still as published


def test_grouped_leaves_a_class_its_training_pictures(prepare, tmp_path):
    lists = {
        "train": "0,0001/1.jpg\n0,0009/9.jpg\n1,0100/100.jpg\n1,0200/200.jpg\n",
        "val": "0,0004/4.jpg\n0,0090/90.jpg\n1,0101/101.jpg\n",
        "test": "0,0007/7.jpg\n0,0500/500.jpg\n1,0203/203.jpg\n1,0300/300.jpg\n",
    }
    rows = prepare(dafre(tmp_path / "in", lists), "--grouped")
    assert {name: row["split"] for name, row in rows.items()} == {
        "1": "train", "9": "train", "90": "val", "500": "test",  # 1, 4, 7 and 9 are one run: test and val yield
        "100": "train", "200": "train", "300": "test",
    }  # fmt: skip
    assert report_of(tmp_path)["dropped"] == {"val yields to train": 2, "test yields to train": 2}


def test_no_run_is_left_in_two_splits_and_near_pictures_are_counted_right(prepare, tmp_path):
    """Against brute force, on uploads so dense that runs are long."""
    rng = np.random.default_rng(5)
    uploads = rng.choice(3000, 240, replace=False)
    splits, classes = rng.choice(["train", "val", "test"], 240, p=[0.7, 0.1, 0.2]), rng.integers(0, 3, 240)
    lists = {
        split: "".join(
            f"{number},{upload % 1000:04d}/{upload}.jpg\n"
            for upload, own, number in zip(uploads, splits, classes, strict=True)
            if own == split
        )
        for split in LISTS
    }
    rows = list(prepare(dafre(tmp_path / "in", lists)).values())
    places = {int(row["sample_id"]): (row["identity"], row["split"]) for row in rows}

    def near(one: int, split: str) -> bool:
        around = (places.get(one + d, (None, None)) for d in range(-5, 6) if d)
        return (places[one][0], split) in around

    assert near_of(tmp_path) == sum(near(one, "train") for one, (_, split) in places.items() if split == "test") > 0
    rows = list(prepare(tmp_path / "in", "--grouped").values())
    places = {int(row["sample_id"]): (row["identity"], row["split"]) for row in rows}
    for one, (_, split) in places.items():
        assert not any(near(one, other) for other in LISTS if other != split)
    assert near_of(tmp_path, grouped=True) == 0
    assert {row["identity"] for row in rows if row["split"] == "train"} == {name for name, _ in places.values()}


@needs_labels
def test_near_uploads_of_the_published_val_and_test(script):
    """1,587 neighbours 5 or fewer apart lie on both sides of the published val and test, by a count of its own."""
    rows = []
    for split in ("val", "test"):
        for number, place in script.read_table(REAL / f"{split}.csv", ("class_id", "dir")):
            rows.append({"sample_id": Path(place).stem, "identity": number, "split": split})
    script.name_runs(rows)
    of = {}
    for row in rows:
        of.setdefault(row["source"], []).append((int(row["sample_id"]), row["split"]))
    across = 0
    for run in of.values():
        run.sort()
        steps = list(pairwise(run))
        assert all(b[0] - a[0] <= 5 for a, b in steps)
        across += sum(a[1] != b[1] for a, b in steps)
    assert across == 1587
