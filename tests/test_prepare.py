"""What the prepare scripts share: rows checked against pictures, counts, the search for unpacked archives, tables.

Run: python -m pytest tests/test_prepare.py
"""

import json

import pytest
from PIL import Image

from util.data.manifest import read_manifest, write_manifest
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
