"""The prepare scripts of unlabelled pools, splcher, huggan and AnimeDiffusion, on small trees in their real layouts.

Run: python -m pytest tests/test_prepare_pools.py
"""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from util.data.manifest import read_manifest, write_manifest
from util.data.pools import pixel_digest, pool_splits, suffix_of
from util.data.sources import open_source
from util.run.errors import UserError

NAMES = ["10000_2004.jpg", "10004_2004.jpg", "1003_2000.jpg", "20_2001.jpg", "9_2019.jpg", "63631_2010.jpg"]


@pytest.fixture(scope="module")
def script(import_script):
    """script("huggan", flag, ...): main() of datasets/prepare_huggan.py, in this process."""
    modules = {}

    def run(name: str, *flags):
        if name not in modules:
            modules[name] = import_script(f"datasets/prepare_{name}.py")
        modules[name].main([str(flag) for flag in flags])

    run.module = lambda name: modules.setdefault(name, import_script(f"datasets/prepare_{name}.py"))
    return run


def picture(number: int, size=(8, 8)) -> Image.Image:
    """A picture of its own for each number."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def save(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def rows_of(out: Path) -> dict[str, dict]:
    manifest = read_manifest(out)
    return {manifest.row(i)["file_name"]: manifest.row(i) for i in range(len(manifest))}


def report_of(out: Path) -> dict:
    return json.loads((out / "preparation.json").read_text())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fails(capsys, run, *flags) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def differs(capsys, run, *flags) -> str:
    """What --check says where it ends with status 1."""
    with pytest.raises(SystemExit) as stop:
        run(*flags, "--check")
    assert stop.value.code == 1
    return capsys.readouterr().out


# --- what they share --------------------------------------------------------------------------------------------


def test_shares_of_a_pool_are_as_asked_and_a_name_keeps_its_side():
    names = [f"{i}_2004.jpg" for i in range(4000)]
    splits = pool_splits(names, 0.1, 0.2)
    counts = Counter(splits)
    assert abs(counts["val"] - 400) < 4 * 19 and abs(counts["test"] - 800) < 4 * 26  # 4 sd of a binomial
    assert pool_splits(names[::-1], 0.1, 0.2) == splits[::-1]
    assert pool_splits(names[500:600], 0.1, 0.2) == splits[500:600]
    assert pool_splits([names[7]] * 3, 0.1, 0.2) == [splits[7]] * 3
    # the val part is that of every other data path, and does not move when a test part is asked for
    assert [split == "val" for split in splits] == [split == "val" for split in pool_splits(names, 0.1, 0.0)]
    assert set(pool_splits(names, 0.0, 0.0)) == {"pretrain"}
    with pytest.raises(UserError, match="leave nothing"):
        pool_splits(names, 0.5, 0.5)


def test_a_digest_is_of_the_pixels_and_the_size():
    image = picture(1, (6, 4))
    again = Image.open(io.BytesIO(encoded(image, "BMP"))).convert("RGB")
    assert pixel_digest(image) == pixel_digest(again)
    assert pixel_digest(image) != pixel_digest(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert pixel_digest(Image.new("RGB", (6, 4))) != pixel_digest(Image.new("RGB", (4, 6)))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_the_bytes_say_the_format(form):
    suffix = {"JPEG": ".jpg", "TIFF": ".tif"}.get(form, f".{form.lower()}")
    assert suffix_of(encoded(picture(0), form)) == suffix


def test_bytes_of_no_picture_have_no_format():
    assert suffix_of(b"<html>") is None and suffix_of(b"") is None


# --- splcher ----------------------------------------------------------------------------------------------------


@pytest.fixture
def splcher(tmp_path) -> Path:
    for number, name in enumerate(NAMES):
        save(tmp_path / "in/images" / name, encoded(picture(number), "JPEG"))
    return tmp_path / "in"


def test_splcher_becomes_a_pool_with_eras(script, splcher, tmp_path):
    script("splcher", "--data_path", splcher, "--out", tmp_path / "out", "--val_fraction", 0, "--test_fraction", 0)
    rows = rows_of(tmp_path / "out")
    assert {name: row["style"] for name, row in rows.items()} == {
        "10000_2004.jpg": "2000-2004",
        "10004_2004.jpg": "2000-2004",
        "1003_2000.jpg": "2000-2004",
        "20_2001.jpg": "2000-2004",
        "9_2019.jpg": "2015-2019",
        "63631_2010.jpg": "2010-2014",
    }
    assert {row["split"] for row in rows.values()} == {"pretrain"}
    assert {row["identity"] for row in rows.values()} == {None}
    assert report_of(tmp_path / "out")["counts"]["era 2000-2004"] == 4
    assert open_source(tmp_path / "out", "train", val_fraction=0.0).load(0).size == (8, 8)
    assert set(content(tmp_path / "out")) == {"metadata.parquet", "preparation.json"}  # nothing is copied


@pytest.mark.parametrize(
    ("years", "name", "era"),
    [
        (1, "1_2003.jpg", "2003"),
        (10, "1_2019.jpg", "2010-2019"),
        (5, "1_1999.jpg", "1995-1999"),
        (3, "1_2003.jpg", "2003-2005"),
    ],
)
def test_eras_are_counted_from_2000(script, years, name, era):
    assert script.module("splcher").era(name, years) == era


def test_splcher_drops_what_it_cannot_use(script, splcher, tmp_path):
    images = splcher / "images"
    save(images / "7_2005.jpg", b"no picture")
    save(images / "8_2005.jpg", b"")
    save(images / "notes.txt", b"hello")
    save(images / "12.jpg", encoded(picture(0), "JPEG"))
    save(images / "13_3005.jpg", encoded(picture(0), "JPEG"))
    script("splcher", "--data_path", splcher, "--out", tmp_path / "out")
    assert sorted(rows_of(tmp_path / "out")) == sorted(NAMES)
    assert report_of(tmp_path / "out")["dropped"] == {"name is not <index>_<year>.jpg": 3, "file damaged": 2}


def test_copies_in_splcher_share_source_and_split(script, tmp_path):
    images = tmp_path / "in/images"
    for number in range(30):
        for copy in range(3):
            save(images / f"{number + 100 * copy}_{2004 + 5 * copy}.jpg", encoded(picture(number), "JPEG"))
    flags = ("--val_fraction", 0.3, "--test_fraction", 0.3)
    script("splcher", "--data_path", tmp_path / "in", "--out", tmp_path / "out", *flags)
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 90 and report_of(tmp_path / "out")["counts"]["copies of another"] == 60
    sides, sources = {}, {}
    for name, row in rows.items():
        number = int(name.split("_")[0]) % 100
        sides.setdefault(number, set()).add(row["split"])
        sources.setdefault(number, set()).add(row["source"])
    assert all(len(side) == 1 for side in sides.values()) and all(len(source) == 1 for source in sources.values())
    assert len(set.union(*sides.values())) == 3 and len(set.union(*sources.values())) == 30
    assert {row["style"] for row in rows.values()} == {"2000-2004", "2005-2009", "2010-2014"}  # each its own era


def test_splcher_takes_the_folder_of_pictures_itself(script, splcher, tmp_path):
    script("splcher", "--data_path", splcher / "images", "--out", tmp_path / "a")
    script("splcher", "--data_path", splcher, "--out", tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_splcher_runs_twice_alike_and_refuses_others_folders(script, splcher, tmp_path, capsys):
    flags = ("splcher", "--data_path", splcher, "--out", tmp_path / "out")
    script(*flags)
    first = content(tmp_path / "out")
    script(*flags)
    assert content(tmp_path / "out") == first
    write_manifest(tmp_path / "other", [{"sample_id": "a", "file_name": "a.png", "split": "train"}])
    assert "another program" in fails(capsys, script, *flags[:-1], tmp_path / "other")
    assert len(read_manifest(tmp_path / "other")) == 1


def test_splcher_check(script, splcher, tmp_path, capsys, monkeypatch):
    flags = ("splcher", "--data_path", splcher, "--out", tmp_path / "out")
    assert "pictures: 6 found, 63632 published" in differs(capsys, script, *flags)
    monkeypatch.setattr(script.module("splcher"), "PUBLISHED", {"pictures": 6})
    script(*flags, "--check")
    assert "equals what is published" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["splcher", "huggan", "animediffusion"])
def test_faults_of_the_command_line(script, tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    out = ("--out", tmp_path / "out")
    assert "nowhere is no folder" in fails(capsys, script, name, "--data_path", tmp_path / "nowhere", *out)
    assert "hf download" in fails(capsys, script, name, "--data_path", "hf:huggan/anime-faces", *out)
    empty = fails(capsys, script, name, "--data_path", tmp_path / "empty", *out)
    assert ("splcher/animefacedataset" if name == "splcher" else "holds no pictures") in empty
    save(tmp_path / "in/1_2000.jpg", encoded(picture(0), "JPEG"))
    some = (name, "--data_path", tmp_path / "in", *out)
    assert "leave nothing" in fails(capsys, script, *some, "--val_fraction", 0.6, "--test_fraction", 0.5)
    assert "out of range" in fails(capsys, script, *some, "--val_fraction", 1)
    assert not (tmp_path / "out").exists()


# --- huggan -----------------------------------------------------------------------------------------------------


@pytest.fixture
def huggan(tmp_path) -> Path:
    """Twelve pictures, each twice, as data.zip has them."""
    for number in range(12):
        for place in ("images", "images/data"):
            save(tmp_path / "in" / place / f"{number + 1}.png", encoded(picture(number, (64, 64))))
    return tmp_path / "in"


def parquet(path: Path, cells: list[bytes | None], group: int = 5, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": cell, "path": f"{number}.png"} for number, cell in enumerate(cells)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), **columns})
    pq.write_table(table, path, row_group_size=group)
    return path


def test_huggan_keeps_each_picture_once(script, huggan, tmp_path):
    script("huggan", "--data_path", huggan, "--out", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert set(rows) == {f"images/{number}.png" for number in range(1, 13)}
    report = report_of(tmp_path / "out")
    assert report["dropped"] == {"same picture as another": 12} and report["counts"]["files"] == 24
    assert "images/data/1.png: images/1.png" in report["examples"]["same picture as another"]
    assert read_manifest(tmp_path / "out").root == huggan


def test_huggan_tells_copies_by_their_pixels(script, huggan, tmp_path):
    save(huggan / "images/90.png", encoded(picture(0, (64, 64)), compress_level=0))  # other bytes, same picture
    save(huggan / "images/91.png", encoded(picture(0, (64, 64)).transpose(Image.Transpose.ROTATE_180)))
    save(huggan / "images/92.png", b"no picture")
    script("huggan", "--data_path", huggan, "--out", tmp_path / "out")
    assert "images/91.png" in rows_of(tmp_path / "out") and "images/90.png" not in rows_of(tmp_path / "out")
    assert report_of(tmp_path / "out")["dropped"] == {"same picture as another": 13, "file damaged": 1}


def test_huggan_splits_by_pixels_so_the_form_of_the_download_does_not_matter(script, huggan, tmp_path):
    cells = [encoded(picture(number % 12, (64, 64))) for number in range(24)]
    parquet(tmp_path / "hub/data/train-00000-of-00002.parquet", cells[:9])
    parquet(tmp_path / "hub/data/train-00001-of-00002.parquet", cells[9:])
    flags = ("--val_fraction", 0.3, "--test_fraction", 0.3)
    script("huggan", "--data_path", huggan, "--out", tmp_path / "a", *flags)
    script("huggan", "--data_path", f"hf:{tmp_path / 'hub'}", "--out", tmp_path / "b", *flags)

    def sides(out: Path) -> dict[str, str]:
        manifest = read_manifest(out)
        return {
            pixel_digest(Image.open(manifest.path(i)).convert("RGB")): manifest.row(i)["split"]
            for i in range(len(manifest))
        }

    assert sides(tmp_path / "a") == sides(tmp_path / "b") and len(sides(tmp_path / "b")) == 12
    assert len(set(sides(tmp_path / "a").values())) == 3
    # out of Parquet, only one of each was written, as it was
    assert (tmp_path / "b/images/000003.png").read_bytes() == cells[3]
    assert len(list((tmp_path / "b/images").iterdir())) == 12


def test_huggan_runs_twice_alike(script, huggan, tmp_path):
    parquet(tmp_path / "hub/0.parquet", [encoded(picture(number)) for number in (0, 1, 0, 2)])
    for source in (huggan, tmp_path / "hub"):
        out = tmp_path / f"out-{source.name}"
        script("huggan", "--data_path", source, "--out", out)
        first = content(out)
        script("huggan", "--data_path", source, "--out", out)
        assert content(out) == first


def test_huggan_check(script, huggan, tmp_path, capsys, monkeypatch):
    flags = ("huggan", "--data_path", huggan, "--out", tmp_path / "out")
    said = differs(capsys, script, *flags)
    assert "pictures: 12 found, 21551 published" in said and "files: 24 found, 43102 published" in said
    monkeypatch.setattr(script.module("huggan"), "PUBLISHED", {"pictures": 12, "files": 24})
    script(*flags, "--check")
    assert "equals what is published" in capsys.readouterr().out


def test_huggan_asks_to_unpack(script, tmp_path, capsys):
    save(tmp_path / "in/data.zip", b"PK")
    assert "unpack it" in fails(capsys, script, "huggan", "--data_path", tmp_path / "in", "--out", tmp_path / "out")


# --- AnimeDiffusion ---------------------------------------------------------------------------------------------

TEXTS = ("image_tags", "resolution", "image_path", "long_prompt", "short_prompt", "source", "image_url")


def wallpapers(path: Path, cells: list[bytes | None], first: int = 0) -> Path:
    """A Parquet file with the columns of the data card."""
    numbers = range(first, first + len(cells))
    texts = {name: [f"{name} {number}" for number in numbers] for name in TEXTS}
    vectors = pa.array([[0.5] * 4 for _ in numbers], pa.list_(pa.float64()))
    return parquet(
        path, cells, page_number=list(numbers), short_prompt_embedding=vectors, long_prompt_embedding=vectors, **texts
    )


@pytest.fixture
def diffusion(tmp_path) -> tuple[Path, list[bytes]]:
    """Fourteen wallpapers in two files of several row groups; JPEG and PNG mixed."""
    cells = [encoded(picture(i, (32, 18)), "PNG" if i % 3 else "JPEG") for i in range(14)]
    wallpapers(tmp_path / "hub/data/train-00000-of-00002.parquet", cells[:8])
    wallpapers(tmp_path / "hub/data/train-00001-of-00002.parquet", cells[8:], 8)
    return tmp_path / "hub", cells


def test_animediffusion_is_unpacked_byte_by_byte(script, diffusion, tmp_path):
    folder, cells = diffusion
    script("animediffusion", "--data_path", folder, "--out", tmp_path / "out", "--val_fraction", 0.3)
    rows = rows_of(tmp_path / "out")
    names = [f"images/{number:04d}{'.png' if number % 3 else '.jpg'}" for number in range(14)]
    assert list(rows) == names
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == cells
    assert [row["split"] for row in rows.values()] == pool_splits(names, 0.3, 0.0)
    tags = [json.loads(line) for line in (tmp_path / "out/tags.jsonl").read_text().splitlines()]
    assert [tag["file_name"] for tag in tags] == names
    assert tags[9]["image_tags"] == "image_tags 9" and tags[9]["page_number"] == 9
    assert set(tags[0]) == {"file_name", "page_number", *TEXTS}  # no embeddings
    assert open_source(tmp_path / "out", "val").load(0).size == (32, 18)


def test_animediffusion_reads_no_embeddings(script, diffusion, tmp_path, monkeypatch):
    asked = []
    read = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, size, columns: asked.append(columns) or read(self, size, columns=columns),
    )
    script("animediffusion", "--data_path", diffusion[0], "--out", tmp_path / "out")
    assert len(asked) == 2 and all("image" in columns for columns in asked)
    assert not any("embedding" in column for columns in asked for column in columns)


def test_animediffusion_goes_on_where_it_was(script, diffusion, tmp_path):
    folder, cells = diffusion
    script("animediffusion", "--data_path", folder, "--out", tmp_path / "out")
    first = content(tmp_path / "out")
    images = tmp_path / "out/images"
    times = {path.name: path.stat().st_mtime_ns for path in images.iterdir()}
    (images / "0003.jpg").unlink()
    (images / "0004.png").write_bytes(cells[4][:20])  # cut short
    script("animediffusion", "--data_path", folder, "--out", tmp_path / "out")
    assert content(tmp_path / "out") == first
    assert {path.name for path in images.iterdir() if path.stat().st_mtime_ns != times[path.name]} == {
        "0003.jpg",
        "0004.png",
    }


def test_animediffusion_counts_what_it_drops(script, tmp_path):
    good = [encoded(picture(i, (32, 18))) for i in range(3)]
    cut = encoded(picture(7, (32, 18)))[:12]
    wallpapers(tmp_path / "hub/0.parquet", [good[0], None, b"", b"<html>", good[1], good[0], cut, good[2]])
    script("animediffusion", "--data_path", tmp_path / "hub", "--out", tmp_path / "out")
    assert list(rows_of(tmp_path / "out")) == ["images/0000.png", "images/0004.png", "images/0007.png"]
    report = report_of(tmp_path / "out")
    assert report["dropped"] == {
        "no picture in the row": 2,
        "picture of no known format": 1,
        "same file as another": 1,
        "file damaged": 1,
    }
    assert report["counts"]["rows read"] == 8 and "image_url 3" in report["examples"]["picture of no known format"][0]


def test_animediffusion_takes_a_folder_of_pictures(script, tmp_path):
    for number in range(5):
        save(tmp_path / "in/walls" / f"{number}.jpg", encoded(picture(number), "JPEG"))
    script("animediffusion", "--data_path", tmp_path / "in", "--out", tmp_path / "out", "--val_fraction", 0)
    assert list(rows_of(tmp_path / "out")) == [f"walls/{number}.jpg" for number in range(5)]
    assert set(content(tmp_path / "out")) == {"metadata.parquet", "preparation.json"}


def test_animediffusion_check_allows_for_a_rounded_number(script, diffusion, tmp_path, capsys, monkeypatch):
    flags = ("animediffusion", "--data_path", diffusion[0], "--out", tmp_path / "out")
    assert "rows, to the nearest hundred: 0 found, 8200 published" in differs(capsys, script, *flags)
    monkeypatch.setattr(script.module("animediffusion"), "PUBLISHED", {"rows, to the nearest hundred": 0})
    script(*flags, "--check")
    assert "equals what is published" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["huggan", "animediffusion"])
def test_files_that_are_no_such_data_set(script, tmp_path, capsys, name):
    folder = tmp_path / "hub"
    folder.mkdir()
    flags = (name, "--data_path", folder, "--out", tmp_path / "out")
    pq.write_table(pa.table({"label": [1]}), folder / "0.parquet")
    assert "no column 'image', only label" in fails(capsys, script, *flags)
    pq.write_table(pa.table({"image": ["1.png"]}), folder / "0.parquet")
    assert "column 'image' is string" in fails(capsys, script, *flags)
    save(folder / "0.parquet", b"PAR1 but no more")
    assert "cannot be read as Parquet" in fails(capsys, script, *flags)
    assert not (tmp_path / "out/metadata.parquet").exists()
