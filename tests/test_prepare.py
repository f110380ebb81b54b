"""What the prepare scripts share: rows checked against pictures, counts, unpacked archives, tables, group splits.

Run: python -m pytest tests/test_prepare.py
"""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from util.data.manifest import read_manifest, write_manifest
from util.data.near_split import name_groups, near_groups, pick_identities, split_groups
from util.data.prepare import (
    EXAMPLES,
    Preparation,
    find_below,
    fit_box,
    image_sizes,
    parse_numbers,
    picture_folder,
    read_table,
    require,
)
from util.data.sources import open_source
from util.run.errors import UserError


def save(path, size=(30, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 60, 30)).save(path)
    return path


def row(name: str, **values) -> dict:
    return {"sample_id": name, "file_name": f"{name}.png", "identity": "rin", "split": "train", **values}


def report_of(out) -> dict:
    return json.loads((out / "preparation.json").read_text())


# --- rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "fitted", "remark"),
    [
        ([0, 0, 30, 20], [0, 0, 30, 20], None),
        ([5, 6, 7, 8], [5, 6, 7, 8], None),
        ([-2, 3, 31, 20.5], [0, 3, 30, 20], "box cut at the border"),
        ([30, 0, 40, 10], None, "box outside the picture"),
        ([-9, 0, 0, 10], None, "box outside the picture"),
        ([5, 5, 5, 9], None, "degenerate box"),
        ([5, 9, 8, 5], None, "degenerate box"),
        ([float("nan"), 0, 8, 5], None, "degenerate box"),
    ],
)
def test_boxes_are_cut_or_refused(box, fitted, remark):
    assert fit_box(box, (30, 20)) == (fitted, remark)


def test_a_box_is_taken_as_it_is_where_the_size_is_not_known():
    assert fit_box([-2, 3, 900, 20], None) == ([-2, 3, 900, 20], None)
    assert fit_box([3, 3, 2, 20], None) == (None, "degenerate box")


def test_what_is_kept_dropped_and_noted_is_counted(tmp_path, capsys):
    save(tmp_path / "in/a.png")
    work = Preparation("me", tmp_path / "in", tmp_path / "out")
    assert work.add(row("a", box=[1, 2, 40, 10]), (30, 20))
    assert work.add(row("b", split="val", file_name="a.png"), (30, 20))
    assert not work.add(row("c"), "file missing")
    assert not work.add(row("d", box=[1, 2, 1, 10]), (30, 20))
    for i in range(EXAMPLES + 5):
        work.drop("label unknown", f"x{i}")
    work.finish(counts={"classes": 7})
    report = report_of(tmp_path / "out")
    assert report["counts"] == {"rows": 2, "pictures": 1, "identities": 1, "train": 1, "val": 1, "classes": 7}
    assert report["dropped"] == {"file missing": 1, "degenerate box": 1, "label unknown": EXAMPLES + 5}
    assert report["notes"] == {"box cut at the border": 1}
    assert report["examples"]["degenerate box"] == ["d: [1, 2, 1, 10]"]
    assert len(report["examples"]["label unknown"]) == EXAMPLES
    source = open_source(tmp_path / "out", "train")
    assert source.record(0)["box"] == [1, 2, 30, 10] and source.load(0).size == (30, 20)
    said = capsys.readouterr().out
    assert "rows 2" in said and "degenerate box 1" in said and "box cut at the border 1" in said


def test_a_folder_without_a_usable_row_is_refused_with_the_reasons(tmp_path):
    work = Preparation("me", tmp_path, tmp_path / "out")
    work.add(row("c"), "file missing")
    with pytest.raises(UserError, match=r"no row is left.*file missing 1"):
        work.finish()
    assert not (tmp_path / "out").exists()


def test_check_compares_with_what_is_published_and_ends_with_status_1(tmp_path, capsys):
    work = Preparation("me", tmp_path, tmp_path / "out")
    work.add(row("a"))
    work.finish(True, {"rows": 1, "train": 1, "faces": 3}, {"faces": 3})
    assert "equals what is published" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        work.finish(True, {"rows": 1, "train": 2, "test": 5})
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert "train: 1 found, 2 published" in said and "test: 0 found, 5 published" in said and "rows:" not in said
    assert len(read_manifest(tmp_path / "out")) == 1  # written all the same
    work.finish(False, {"train": 2})  # not asked, not compared


def test_the_folder_of_another_program_is_refused_before_any_work(tmp_path):
    write_manifest(tmp_path / "out", [row("a")], extra={"writer": "you"})
    with pytest.raises(UserError, match="another program"):
        Preparation("me", tmp_path, tmp_path / "out")
    Preparation("you", tmp_path, tmp_path / "out")


def test_pictures_prepared_in_place_need_no_root(tmp_path):
    for out, root in ((tmp_path, None), (tmp_path / "out", str(tmp_path))):
        work = Preparation("me", tmp_path, out)
        work.add(row("a"))
        work.finish(extra={"seed": "3"})
        metadata = read_manifest(out).metadata
        assert metadata.get("image_root") == root and metadata["seed"] == "3"


def test_sizes_come_in_order_with_reasons_for_those_without(tmp_path):
    names = [f"{i}.png" for i in range(40)]
    for i, name in enumerate(names):
        save(tmp_path / name, (i + 1, 5))
    (tmp_path / "3.png").write_bytes(b"no picture")
    (tmp_path / "4.png").write_bytes(b"")
    (tmp_path / "5.png").unlink()
    expected = [(i + 1, 5) for i in range(40)]
    expected[3:6] = ["file damaged", "file damaged", "file missing"]
    assert list(image_sizes(tmp_path, names)) == expected
    assert list(image_sizes(tmp_path, [])) == []


# --- where archives were unpacked -------------------------------------------------------------------------------


def test_files_are_found_where_ever_the_archive_was_unpacked(tmp_path):
    deep = tmp_path / "a/b/labels/train.csv"
    deep.parent.mkdir(parents=True)
    deep.write_text("deep")
    assert find_below(tmp_path, "train.csv") == deep
    assert find_below(tmp_path, "labels/train.csv") == deep
    assert find_below(tmp_path, "val.csv") is None
    (tmp_path / "c").mkdir()
    shallow = tmp_path / "c/train.csv"
    shallow.write_text("shallow")
    assert find_below(tmp_path, "train.csv") == shallow
    assert find_below(tmp_path, "val.csv", "train.csv") == shallow  # the first that is there


def test_class_folders_are_not_searched(tmp_path):
    for i in range(101):
        (tmp_path / f"many/{i:03d}").mkdir(parents=True)
    (tmp_path / "many/050/train.csv").write_text("")
    assert find_below(tmp_path, "train.csv") is None
    (tmp_path / "many/100").rmdir()
    assert find_below(tmp_path, "train.csv") == tmp_path / "many/050/train.csv"


def test_the_folder_of_listed_pictures_is_found_though_some_are_missing(tmp_path):
    names = [f"rin/{i:04d}.png" for i in range(1000)]
    save(tmp_path / "outer/inner/rin/0991.png")
    with pytest.raises(UserError, match=r"rin/0000.png.*the archive X"):
        picture_folder(tmp_path, names, "the archive X")
    for i in range(900, 1000):
        save(tmp_path / f"outer/inner/rin/{i:04d}.png")
    assert picture_folder(tmp_path, names, "the archive X") == "outer/inner/"
    assert picture_folder(tmp_path / "outer/inner", names, "the archive X") == ""
    with pytest.raises(UserError, match="cannot be found"):
        picture_folder(tmp_path, names, "the archive X", depth=1)
    with pytest.raises(UserError, match="no picture is listed"):
        picture_folder(tmp_path, [], "the archive X")


def test_a_missing_file_is_named_with_its_origin(tmp_path):
    assert require(tmp_path, "the folder", "nothing") == tmp_path
    with pytest.raises(UserError, match=r"tags.tsv is missing \(names\): it comes with the crops"):
        require(tmp_path / "tags.tsv", "names", "the crops")


# --- tables -----------------------------------------------------------------------------------------------------


def table(tmp_path, text: str | bytes, columns=("class_id", "dir"), separator=","):
    path = tmp_path / "list.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_table(path, columns, separator)


def test_a_header_is_told_from_a_row(tmp_path):
    rows = [["0", "0291/1796291.jpg"], ["12", "0966/2160966.jpg"]]
    body = "0,0291/1796291.jpg\n12,0966/2160966.jpg"
    for text in (body, f"class_id,dir\n{body}\n", f"\ufeffclass_id,dir\r\n{body}\n\n", f"Class_ID, dir\n{body}"):
        assert table(tmp_path, text) == rows


def test_the_header_says_where_the_columns_are(tmp_path):
    text = 'id,dir,class_id,tags\n1796291,0291/1796291.jpg,0,"1girl, red_eyes"\n2,0002/2.jpg,7,solo\n'
    assert table(tmp_path, text) == [["0", "0291/1796291.jpg"], ["7", "0002/2.jpg"]]


def test_only_the_first_line_can_be_a_header(tmp_path):
    assert table(tmp_path, "0,a.jpg\nclass_id,dir\n") == [["0", "a.jpg"], ["class_id", "dir"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,a.jpg\n1\n", "line 2: 1 fields, not 2"),
        ("0,a.jpg\n1,b.jpg,c\n", "line 2: 3 fields, not 2"),
        ("id,dir,class_id\n5,a.jpg,0\n6,b.jpg\n", "line 3: 2 fields, not 3"),
        (b"0,a.jpg\n1,\xff\xfe.jpg\n", "no text"),
    ],
)
def test_a_row_of_another_width_is_named_by_its_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        table(tmp_path, text)


def test_tabs_separate_and_quotes_hold(tmp_path):
    assert table(tmp_path, 'a\t"0.1, 0.2 0.9"\n', ("dir", "box"), "\t") == [["a", "0.1, 0.2 0.9"]]


def test_numbers_are_read_or_named(tmp_path):
    assert parse_numbers(["1", "-20"], int, "line 1") == [1, -20]
    assert parse_numbers(["1.5"], float, "line 1") == [1.5]
    with pytest.raises(UserError, match=r"list.txt, line 7: '1, x' are no numbers"):
        parse_numbers(["1", "x"], int, "list.txt, line 7")


# --- splits that a near-copy cannot cross -----------------------------------------------------------------------


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A smooth random picture, unlike that of another seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def grouped(tmp_path, pictures: dict[str, Image.Image], boxes: dict[str, list] | None = None) -> set[str]:
    """Which pictures go together, each group as its letters."""
    for name, image in pictures.items():
        image.save(tmp_path / f"{name}.png")
    rows = [{"file_name": f"{name}.png", "box": (boxes or {}).get(name)} for name in pictures]
    numbers, bad = near_groups(tmp_path, rows)
    assert not bad
    found = {}
    for name, number in zip(pictures, numbers, strict=True):
        found[number] = found.get(number, "") + name
    return set(found.values())


def test_near_copies_mirrors_and_equal_flat_pictures_go_together(tmp_path):
    a, b = picture(1), picture(2)
    pictures = {
        "a": a, "b": b, "c": a.point(lambda value: value * 0.95), "d": a.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "e": Image.new("RGB", (9, 9), "red"), "f": Image.new("RGB", (9, 9), "red"),
        "g": Image.new("RGB", (9, 9), "blue"),
    }  # fmt: skip
    assert grouped(tmp_path, pictures) == {"acd", "b", "ef", "g"}  # of flat pictures only equal ones are near


def test_pictures_are_near_by_their_faces_or_as_a_whole(tmp_path):
    face = picture(9, (40, 40))
    scenes = {name: picture(seed, (160, 120)) for name, seed in (("a", 1), ("b", 2), ("c", 3), ("d", 3))}
    scenes["a"].paste(face, (10, 10))
    scenes["b"].paste(face, (100, 70))  # one drawing on two backgrounds
    faces = {"a": [10, 10, 50, 50], "b": [100, 70, 140, 110]}
    others = {"c": [0, 0, 40, 40], "d": [100, 60, 150, 110]}  # two faces of one frame
    assert grouped(tmp_path, scenes) == {"a", "b", "cd"}
    assert grouped(tmp_path, scenes, faces | others) == {"ab", "cd"}


def test_pictures_that_cannot_be_decoded_are_told_and_stand_alone(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(b"no picture")
    picture(1).save(tmp_path / "b.png")
    numbers, bad = near_groups(tmp_path, [{"file_name": f"{name}.png"} for name in "abc"])
    assert bad == [0, 2] and len(set(numbers)) == 3


def test_a_group_is_called_after_its_first_member():
    ids, groups = ["d", "a", "c", "b"], [7, 3, 7, 7]
    assert name_groups(ids, groups) == ["b", "a", "b", "b"]
    assert name_groups(ids[:1] + ids[2:], [1, 1, 1]) == ["b"] * 3  # whatever the other groups and their numbers


def test_identities_are_drawn_without_overlap_whatever_their_order():
    names = [f"{i:03d}" for i in range(50)]
    chosen = pick_identities(names, {"open_val": 5, "open_test": 7}, 3)
    assert Counter(chosen.values()) == {"open_val": 5, "open_test": 7} and len(chosen) == 12
    assert pick_identities([*reversed(names), "007"], {"open_val": 5, "open_test": 7}, 3) == chosen
    assert pick_identities(names, {"open_val": 5, "open_test": 7}, 4) != chosen
    assert pick_identities(names[:1], {"open_val": 0}, 3) == {}
    with pytest.raises(UserError, match="49 identities cannot be held out of 50"):
        pick_identities(names, {"open_val": 49}, 3)


def test_a_split_by_groups_keeps_its_promises_on_random_data():
    rng = np.random.default_rng(11)
    for _ in range(20):
        groups = [f"g{number}" for number in rng.integers(0, 60, 200)]
        identities = [f"i{number}" for number in rng.integers(0, 12, 200)]
        chosen = {"i0": "open_val", "i1": "open_test", "i2": "open_val"}
        splits = split_groups(groups, identities, {"test": 0.3, "val": 0.4}, chosen)
        of_group, of_identity = {}, {}
        for group, identity, split in zip(groups, identities, splits, strict=True):
            of_group.setdefault(group, set()).add(split)
            of_identity.setdefault(identity, set()).add(split)
            assert split in ({chosen[identity], None} if identity in chosen else {"train", "val", "test", None})
        assert all(len(own - {None}) == 1 for own in of_group.values())
        for group, own in of_group.items():  # who yields, yields to a held-out identity
            assert None not in own or own & {"open_val", "open_test"}, group
        assert all("train" in own or own == {None} for name, own in of_identity.items() if name not in chosen)


def test_shares_are_those_asked_and_grow_without_moving():
    groups = [f"g{i}" for i in range(4000)]
    splits = split_groups(groups, ["rin"] * 4000, {"test": 0.2, "val": 0.1})
    shares = Counter(splits)
    assert abs(shares["test"] / 4000 - 0.2) < 0.02 and abs(shares["val"] / 4000 - 0.1) < 0.02
    more = split_groups(groups, ["rin"] * 4000, {"test": 0.2, "val": 0.3})
    assert all(new == old for old, new in zip(splits, more, strict=True) if old != "train")
    fewer = split_groups(groups[::3], ["rin"] * 1334, {"test": 0.2, "val": 0.1})
    assert fewer == splits[::3]  # whoever else is there


def test_an_identity_gets_one_group_back_to_train_on():
    almost_all = {"test": 0.999999}
    assert split_groups(["b", "a", "a"], ["rin"] * 3, almost_all) == ["test", "train", "train"]
    # what len needs back is enough for rin as well
    assert split_groups(["a", "b", "c", "c"], ["rin", "rin", "rin", "len"], almost_all) == ["test"] * 2 + ["train"] * 2
