r"""datasets/prepare_acrd.py on a small tree in the layout of the repository, with rows as faces.tsv has them.

Run: python -m pytest tests/test_prepare_acrd.py
"""

import json
from pathlib import Path

import pytest
from PIL import Image

from util.data.manifest import read_manifest, write_manifest

# the first lines of tagIds.tsv, and the one whose name begins with a quotation mark
TAGS = r"""miyu_(vampire_princess_miyu)	0
morrigan_aensland	1
uchiha_sasuke	2
haruno_sakura	3
mithra	4
elvaan	5
seibu_kiyo	6
ito_nanami	7
maria_traydor	8
camilla_(fire_emblem_if)	16
"nene"_neville_solstice	26742
"""
# the first rows of faces.tsv; the raw file has the path with a backslash and quotes the third field
REAL = [
    ("0446/332446.jpg", 1, "0.448534, 0.441995, 0.584106, 0.654420 0.337403"),
    ("0959/324959.jpg", 2, "0.460978, 0.077540, 0.634755, 0.353783 0.331372"),
    ("0448/284448.jpg", 5, "0.729760, 0.227915, 0.906681, 0.434454 0.809762"),
    ("0305/427305.jpg", 7, "0.208869, 0.094551, 0.992154, 0.856721 0.800811"),
    ("0864/1083864.jpg", 8, "0.435706, 0.332848, 0.553165, 0.507933 0.848607"),
]
PLACE = "0.25, 0.1, 0.75, 0.6"
SIZE = (200, 100)
BOX = [50, 10, 150, 60]  # PLACE in px of a picture of SIZE


@pytest.fixture(scope="module")
def prepare(import_script):
    """prepare(flag, ...): the script's main(), in this process."""
    module = import_script("datasets/prepare_acrd.py")
    return lambda *flags: module.main([str(flag) for flag in flags])


def line(picture: int, tag: int, third: str = f"{PLACE} 0.950000", style: str = "\\") -> str:
    return f'{picture % 1000:04d}{style}{picture}.jpg\t{tag}\t"{third}"\r\n'


def save(folder: Path, picture: int, size=SIZE, digits: int = 4, suffix: str = ".jpg") -> Path:
    path = folder / f"{picture % 1000:0{digits}d}" / f"{picture}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def make(root: Path, lines: list[str], splits: dict[str, list[int]], tags: str = TAGS) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "tagIds.tsv").write_text(tags)
    (root / "faces.tsv").write_bytes("".join(lines).encode())
    for split in ("train", "val", "test"):  # as released: no newline after the last number
        (root / f"{split}Split.tsv").write_text("\n".join(map(str, splits.get(split, []))))
    return root


def rows_of(out: Path) -> dict[str, dict]:
    manifest = read_manifest(out)
    return {manifest.row(i)["sample_id"]: manifest.row(i) for i in range(len(manifest))}


def report_of(out: Path) -> dict:
    return json.loads((out / "preparation.json").read_text())


def fails(prepare, capsys, *flags) -> str:
    with pytest.raises(SystemExit) as stop:
        prepare(*flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.fixture
def small(tmp_path) -> Path:
    """Two characters: 1 with three train pictures, 2 with two; a val and a test picture of each."""
    splits = {"train": [1001, 1002, 1003, 2001, 2002], "val": [1004, 2003], "test": [1005, 2004]}
    lines = [line(picture, 1 + (picture > 2000)) for split in splits.values() for picture in split]
    root = make(tmp_path / "acrd", lines, splits)
    for split in splits.values():
        for picture in split:
            save(root / "original", picture)
    return root


FREE = ("--min_images", "1")  # small trees are rare characters


def test_rows_of_the_release_are_read(prepare, tmp_path):
    pictures = [int(name.split("/")[1].removesuffix(".jpg")) for name, _, _ in REAL]
    lines = [line(picture, tag, third) for picture, (_, tag, third) in zip(pictures, REAL, strict=True)]
    root = make(tmp_path / "acrd", lines, {"train": pictures})
    for picture in pictures:
        save(root / "original", picture, (1000, 500))
    prepare("--data_path", root, "--out", tmp_path / "out", *FREE, "--min_confidence", 0.3, "--keep_generic")
    rows = rows_of(tmp_path / "out")
    assert [(row["file_name"], row["identity"], row["source"]) for row in rows.values()] == [
        ("0446/332446.jpg", "morrigan_aensland", "332446"),
        ("0959/324959.jpg", "uchiha_sasuke", "324959"),
        ("0448/284448.jpg", "elvaan", "284448"),
        ("0305/427305.jpg", "ito_nanami", "427305"),
        ("0864/1083864.jpg", "maria_traydor", "1083864"),
    ]
    # a share of the width, of the height, of the width, of the height
    assert rows["332446_0"]["box"] == pytest.approx([448.534, 220.9975, 584.106, 327.21], abs=1e-3)
    assert read_manifest(tmp_path / "out").root == root / "original"


@pytest.mark.parametrize("third", [f"{PLACE} 0.95", f"{PLACE}, 0.95", PLACE.replace(" ", "") + " 0.95"])
@pytest.mark.parametrize("style", ["\\", "/"])
@pytest.mark.parametrize("quote", ['"', ""])
def test_every_way_to_write_a_row_means_the_same(prepare, tmp_path, third, style, quote):
    text = line(1001, 1, third, style).replace('"', quote)
    root = make(tmp_path / "acrd", [text], {"train": [1001]})
    save(root / "original", 1001)
    prepare("--data_path", root, "--out", tmp_path / "out", *FREE)
    assert rows_of(tmp_path / "out")["1001_0"]["box"] == BOX


def test_splits_follow_the_lists_and_the_last_number_counts(prepare, small, tmp_path):
    prepare("--data_path", small, "--out", tmp_path / "out", *FREE)
    found = {name: row["split"] for name, row in rows_of(tmp_path / "out").items()}
    assert found["1003_0"] == "train" and found["1004_0"] == "val" and found["1005_0"] == found["2004_0"] == "test"
    assert len(found) == 9


def test_a_name_that_begins_with_a_quotation_mark_keeps_it(prepare, tmp_path):
    root = make(tmp_path / "acrd", [line(1001, 26742)], {"train": [1001]})
    save(root / "original", 1001)
    prepare("--data_path", root, "--out", tmp_path / "out", *FREE)
    assert rows_of(tmp_path / "out")["1001_0"]["identity"] == '"nene"_neville_solstice'


def test_what_is_left_out_is_counted_by_reason(prepare, small, tmp_path, capsys):
    lines = [
        line(3001, 1, f"{PLACE} 0.849999"),
        line(3002, 1, f"{PLACE} 0.85"),  # at the bar: kept
        line(3003, 1),  # in no list
        line(3004, 4),  # mithra, a race
        line(3005, 999),  # no such tag
        line(3006, 1),  # no picture
        line(3007, 1),  # a damaged one
        line(3008, 1, "0.5, 0.1, 0.5, 0.6 0.95"),  # no width
        line(3009, 1, "1.0, 0.1, 1.2, 0.6 0.95"),  # outside
        line(3010, 1, "0.9, 0.1, 1.1, 0.6 0.95"),  # over the border: cut
        line(3002, 1, f"{PLACE} 0.85"),  # again
        line(3011, 1, "0.1, 0.2, 0.3 0.95"),  # a number is missing
        line(3012, 1, "0.1, 0.2, 0.3, x 0.95"),
    ]
    with open(small / "faces.tsv", "a", newline="") as file:
        file.writelines(lines)
    with open(small / "trainSplit.tsv", "a") as file:
        file.write("".join(f"\n{picture}" for picture in range(3001, 3013) if picture != 3003))
    for picture in range(3001, 3013):
        if picture not in (3006, 3007):
            save(small / "original", picture)
    save(small / "original", 3007).write_bytes(b"no picture")
    prepare("--data_path", small, "--out", tmp_path / "out", *FREE)
    report = report_of(tmp_path / "out")
    assert report["dropped"] == {
        "below --min_confidence": 1,
        "in no split file": 1,
        "generic tag": 1,
        "tag unknown": 1,
        "file missing": 1,
        "file damaged": 1,
        "degenerate box": 1,
        "box outside the picture": 1,
        "row repeated": 1,
        "row not understood": 2,
    }
    assert report["notes"]["box cut at the border"] == 1
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 9 + 2 and rows["3010_0"]["box"] == [180, 10, 200, 60] and "3002_0" in rows
    assert "3006.jpg" in report["examples"]["file missing"][0]
    assert "below --min_confidence 1" in capsys.readouterr().out


def test_generic_tags_stay_if_asked_for(prepare, tmp_path):
    root = make(tmp_path / "acrd", [line(1001, 4), line(1002, 5), line(1003, 1)], {"train": [1001, 1002, 1003]})
    for picture in (1001, 1002, 1003):
        save(root / "original", picture)
    prepare("--data_path", root, "--out", tmp_path / "out", *FREE)
    assert {row["identity"] for row in rows_of(tmp_path / "out").values()} == {"morrigan_aensland"}
    prepare("--data_path", root, "--out", tmp_path / "out", *FREE, "--keep_generic")
    assert len(rows_of(tmp_path / "out")) == 3


def test_rarity_is_counted_in_train_after_all_other_filters(prepare, small, tmp_path):
    prepare("--data_path", small, "--out", tmp_path / "out", "--min_images", "3")
    assert {row["identity"] for row in rows_of(tmp_path / "out").values()} == {"morrigan_aensland"}
    assert report_of(tmp_path / "out")["dropped"] == {"rarer than --min_images in train": 4}
    # the third train picture of character 1 goes: it has two, val and test do not count
    (small / "original/0003/1003.jpg").unlink()
    with pytest.raises(SystemExit):
        prepare("--data_path", small, "--out", tmp_path / "none", "--min_images", "3")
    prepare("--data_path", small, "--out", tmp_path / "out", "--min_images", "2")
    assert len(rows_of(tmp_path / "out")) == 8


def test_two_faces_of_one_picture_are_one_picture(prepare, tmp_path):
    lines = [line(1001, 1), line(1001, 1, "0.0, 0.0, 0.2, 0.2 0.9"), line(1002, 2), line(1003, 2)]
    root = make(tmp_path / "acrd", lines, {"train": [1001, 1002, 1003]})
    for picture in (1001, 1002, 1003):
        save(root / "original", picture)
    prepare("--data_path", root, "--out", tmp_path / "out", *FREE)
    rows = rows_of(tmp_path / "out")
    assert rows["1001_0"]["file_name"] == rows["1001_1"]["file_name"] == "0001/1001.jpg"
    assert rows["1001_0"]["source"] == rows["1001_1"]["source"] == "1001"
    prepare("--data_path", root, "--out", tmp_path / "out", "--min_images", "2")
    assert set(rows_of(tmp_path / "out")) == {"1002_0", "1003_0"}


def test_identities_that_are_never_trained_on_are_dropped(prepare, small, tmp_path):
    with open(small / "faces.tsv", "a", newline="") as file:
        file.writelines([line(5001, 7), line(5002, 8)])
    with open(small / "testSplit.tsv", "a") as file:
        file.write("\n5001\n5002")
    save(small / "original", 5001)
    save(small / "original", 5002)
    prepare("--data_path", small, "--out", tmp_path / "out", "--min_images", "0")
    assert report_of(tmp_path / "out")["dropped"] == {"identity never in train": 2}
    assert len(rows_of(tmp_path / "out")) == 9


def test_pictures_of_several_characters_are_counted_and_left_out_if_asked(prepare, small, tmp_path):
    with open(small / "faces.tsv", "a", newline="") as file:
        file.write(line(1001, 2, "0.0, 0.0, 0.2, 0.2 0.1"))  # a sure sign, although its own box is not sure
    prepare("--data_path", small, "--out", tmp_path / "out", *FREE)
    assert "1001_0" in rows_of(tmp_path / "out")
    assert report_of(tmp_path / "out")["counts"]["pictures of several tags"] == 1
    prepare("--data_path", small, "--out", tmp_path / "out", *FREE, "--single_character")
    assert "1001_0" not in rows_of(tmp_path / "out")
    assert report_of(tmp_path / "out")["dropped"] == {"below --min_confidence": 1, "picture of several tags": 1}


def test_the_cap_is_on_train_pictures_and_follows_the_seed(prepare, tmp_path):
    pictures = list(range(1001, 1031))
    root = make(
        tmp_path / "acrd", [line(picture, 1) for picture in pictures], {"train": pictures[:20], "test": pictures[20:]}
    )
    for picture in pictures:
        save(root / "original", picture)

    def kept(seed: int) -> set[str]:
        prepare("--data_path", root, "--out", tmp_path / "out", "--max_images", "8", "--seed", seed)
        return set(rows_of(tmp_path / "out"))

    first = kept(0)
    assert len(first) == 8 + 10 and report_of(tmp_path / "out")["dropped"] == {"over --max_images": 12}
    assert first == kept(0) != kept(1)


@pytest.mark.parametrize("digits", [3, 4])
def test_head_crops_have_no_box_and_their_folders_three_or_four_digits(prepare, tmp_path, digits):
    root = make(tmp_path / "acrd", [line(1001, 1)], {"train": [1001]})
    crops = root / "2019-07-27-grapeot-danbooru2018-animecharacterrecognition"
    save(crops, 1001, digits=digits)
    prepare("--data_path", root, "--out", tmp_path / "out", *FREE)
    row = rows_of(tmp_path / "out")["1001_0"]
    assert row["box"] is None and row["file_name"] == f"{1:0{digits}d}/1001.jpg"
    prepare("--data_path", root, "--out", tmp_path / "out", *FREE, "--pictures", "full")
    assert rows_of(tmp_path / "out")["1001_0"]["box"] == BOX


def test_pictures_of_other_formats_and_padded_ones(prepare, tmp_path):
    root = make(tmp_path / "acrd", [line(1001, 1), line(1002, 1)], {"train": [1001, 1002]})
    save(root / "original", 1001, suffix=".png")  # the list says .jpg of every picture
    save(root / "original", 1002, size=(512, 512))
    prepare("--data_path", root, "--out", tmp_path / "out", *FREE)
    assert rows_of(tmp_path / "out")["1001_0"]["file_name"] == "0001/1001.png"
    assert [count for note, count in report_of(tmp_path / "out")["notes"].items() if "padded" in note] == [1]


def test_a_choice_of_picture_folders_has_to_be_made(prepare, small, tmp_path, capsys):
    save(small / "512px", 1001)
    error = fails(prepare, capsys, "--data_path", small, "--out", tmp_path / "out", *FREE)
    assert "original" in error and "512px" in error and "--images" in error
    prepare("--data_path", small, "--out", tmp_path / "out", *FREE, "--images", small / "original")
    assert len(rows_of(tmp_path / "out")) == 9


def test_running_twice_gives_the_same(prepare, small, tmp_path):
    def written() -> dict[str, bytes]:
        prepare("--data_path", small, "--out", tmp_path / "out", *FREE, "--max_images", "2")
        return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    first = written()
    assert set(first) == {"metadata.parquet", "preparation.json"} and written() == first


def test_check_compares_the_unfiltered_counts(prepare, small, tmp_path, capsys, monkeypatch, import_script):
    flags = ["--data_path", str(small), "--out", str(tmp_path / "out"), "--min_images", "3", "--check"]
    with pytest.raises(SystemExit) as stop:
        prepare(*flags)
    said = capsys.readouterr().out
    assert stop.value.code == 1
    assert "rows of faces.tsv: 9 found, 977356 published" in said and "classes at 0.85: 2 found, 34488" in said
    assert "test ids: 2 found, 10000" in said and (tmp_path / "out/metadata.parquet").exists()
    with open(small / "faces.tsv", "a", newline="") as file:
        file.write(line(9, 3, f"{PLACE} 0.5"))
    module = import_script("datasets/prepare_acrd.py")
    published = {
        "rows of faces.tsv": 10,
        "classes of faces.tsv": 3,
        "tags": 11,
        "rows at 0.85": 9,
        "classes at 0.85": 2,
    }
    published |= {"train ids": 5, "val ids": 2, "test ids": 2}
    assert published.keys() == module.PUBLISHED.keys()
    monkeypatch.setattr(module, "PUBLISHED", published)
    module.main(flags)  # whatever the filters leave
    assert "equals what is published" in capsys.readouterr().out


def test_another_writer_is_not_overwritten(prepare, small, tmp_path, capsys):
    write_manifest(tmp_path / "out", [{"sample_id": "a", "file_name": "a.png", "split": "train"}])
    assert "another program" in fails(prepare, capsys, "--data_path", small, "--out", tmp_path / "out")
    assert len(read_manifest(tmp_path / "out")) == 1


@pytest.mark.parametrize("name", ["faces.tsv", "tagIds.tsv", "trainSplit.tsv", "valSplit.tsv", "testSplit.tsv"])
def test_a_missing_file_is_named_with_its_origin(prepare, small, tmp_path, capsys, name):
    (small / name).unlink()
    error = fails(prepare, capsys, "--data_path", small, "--out", tmp_path / "out")
    assert str(small / name) in error and "grapeot/Danbooru2018AnimeCharacterRecognitionDataset" in error


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tagIds.tsv", "morrigan_aensland 1\n", "line 1"),
        ("tagIds.tsv", "a\t1\nb\t1\n", "line 2"),
        ("tagIds.tsv", "a\t1\na\t2\n", "'a' stands there twice"),
        ("trainSplit.tsv", "1001\nx", "entry 2: 'x'"),
        ("testSplit.tsv", "1001", "picture 1001 is in train too"),
        ("faces.tsv", "0001/1001.jpg\t1\n", "line 1: 2 fields"),
    ],
)
def test_damaged_lists_are_refused(prepare, small, tmp_path, capsys, name, text, message):
    (small / name).write_text(text)
    error = fails(prepare, capsys, "--data_path", small, "--out", tmp_path / "out")
    assert str(small / name) in error and message in error
    assert not (tmp_path / "out").exists()


def test_missing_pictures_are_said_by_the_names_of_their_downloads(prepare, small, tmp_path, capsys):
    (small / "original").rename(small.parent / "elsewhere")
    error = fails(prepare, capsys, "--data_path", small, "--out", tmp_path / "out")
    assert "2019-07-27-grapeot-danbooru2018-animecharacterrecognition.tar" in error and "Danbooru2018" in error
    assert "nowhere" in fails(prepare, capsys, "--data_path", "nowhere", "--out", tmp_path / "out")
