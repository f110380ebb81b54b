"""Every form of --data_path: what is found, which rows a role gets, and what a wrong path says.

Run: python -m pytest tests/test_sources.py
"""

import io
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from util.data.images import BadImage
from util.data.manifest import COLUMNS, write_manifest
from util.data.sources import open_source
from util.data.stream import open_stream
from util.run.errors import UserError


def colour_of(i: int) -> tuple[int, int, int]:
    return (i * 7 % 256, i * 31 % 256, i)


def save_pictures(folder: Path, names: list[str]) -> Path:
    """PNG files whose colour tells their number in `names`."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), colour_of(i)).save(path)
    return folder


def names_of(source) -> list[str]:
    return [source.record(i)["file_name"] for i in range(len(source))]


def identities_of(source) -> list[str | None]:
    return [source.record(i)["identity"] for i in range(len(source))]


NUMBERED = [f"{i:03d}.png" for i in range(200)]


def test_flat_folder_has_no_labels_and_every_picture(tmp_path):
    folder = save_pictures(tmp_path, ["b.png", "a.PNG", "c.png"])
    (folder / "notes.txt").write_text("hello")
    (folder / ".hidden.png").write_bytes(b"")
    source = open_source(folder, "train", val_fraction=0.0)
    assert names_of(source) == ["a.PNG", "b.png", "c.png"]
    assert identities_of(source) == [None] * 3
    assert tuple(source.record(0)) == COLUMNS
    assert source.load(0).getpixel((0, 0)) == colour_of(1)


def test_class_folders_give_identities(tmp_path):
    source = open_source(save_pictures(tmp_path, ["rin/1.png", "len/1.png", "len/2.png"]), "train", val_fraction=0.0)
    assert names_of(source) == ["len/1.png", "len/2.png", "rin/1.png"]
    assert identities_of(source) == ["len", "len", "rin"]


def test_hash_split_is_a_partition_of_the_asked_size(tmp_path):
    folder = save_pictures(tmp_path, NUMBERED)
    train, val = (names_of(open_source(folder, role, val_fraction=0.25)) for role in ("train", "val"))
    assert sorted(train + val) == NUMBERED
    assert 30 < len(val) < 70


def test_hash_split_does_not_move_when_pictures_are_added(tmp_path):
    save_pictures(tmp_path, NUMBERED[:100])
    before = names_of(open_source(tmp_path, "val"))
    save_pictures(tmp_path, NUMBERED)
    after = names_of(open_source(tmp_path, "val"))
    assert [name for name in after if name < "100"] == before


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_split_folders_are_splits(tmp_path, val):
    folder = save_pictures(tmp_path, ["train/a/1.png", "train/b/1.png", f"{val}/a/2.png", "test/b/2.png"])
    for role, expected in (
        ("train", [("train/a/1.png", "a"), ("train/b/1.png", "b")]),
        ("val", [(f"{val}/a/2.png", "a")]),
        ("test", [("test/b/2.png", "b")]),
    ):
        source = open_source(folder, role)
        assert list(zip(names_of(source), identities_of(source), strict=True)) == expected


def test_train_folder_without_val_is_split_by_hash(tmp_path):
    folder = save_pictures(tmp_path, [f"train/{name}" for name in NUMBERED])
    train, val = (names_of(open_source(folder, role)) for role in ("train", "val"))
    assert val and sorted(train + val) == [f"train/{name}" for name in NUMBERED]


def test_val_stands_in_for_a_missing_test_split_and_says_so(tmp_path, caplog):
    folder = save_pictures(tmp_path, ["train/1.png", "val/2.png"])
    assert names_of(open_source(folder, "test")) == ["val/2.png"]
    assert "stands in" in caplog.text


def test_pictures_outside_the_split_folders_are_mentioned(tmp_path, caplog):
    folder = save_pictures(tmp_path, ["train/1.png", "val/2.png", "extra/3.png"])
    assert names_of(open_source(folder, "train")) == ["train/1.png"]
    assert "1 pictures outside" in caplog.text


def test_labels_settle_what_nested_folders_mean(tmp_path, caplog):
    folder = save_pictures(tmp_path, ["show/rin/1.png", "show/len/1.png", "film/1.png"])
    for labels, expected in (("auto", [None] * 3), ("none", [None] * 3), ("folders", ["film", "show", "show"])):
        assert identities_of(open_source(folder, "train", labels=labels, val_fraction=0.0)) == expected
    assert "--labels folders" in caplog.text


def test_labels_none_overrules_class_folders(tmp_path):
    folder = save_pictures(tmp_path, ["a/1.png", "b/1.png"])
    assert identities_of(open_source(folder, "train", labels="none", val_fraction=0.0)) == [None, None]


def test_prepared_folder_roles(tmp_path):
    save_pictures(tmp_path, [f"{i}.png" for i in range(8)])
    splits = ["pretrain", "train", "val", "test", "open_val", "open_test", "novel", "figures"]
    rows = [
        {"sample_id": str(i), "file_name": f"{i}.png", "split": split, "identity": f"id{i}", "box": [0, 0, 4, 4]}
        for i, split in enumerate(splits)
    ]
    write_manifest(tmp_path, rows)
    assert names_of(open_source(tmp_path, "train")) == ["0.png", "1.png"]
    assert names_of(open_source(tmp_path, "val")) == ["2.png"]
    test = open_source(tmp_path, "test", labels="metadata")
    assert names_of(test) == ["3.png"]
    assert test.record(0)["box"] == [0, 0, 4, 4] and test.record(0)["identity"] == "id3"
    assert test.load(0).getpixel((0, 0)) == colour_of(3)


def test_hash_split_keeps_pictures_of_one_source_together(tmp_path):
    rows = [{"sample_id": f"{i}", "file_name": f"{i}.png", "split": "train", "source": f"{i // 4}"} for i in range(200)]
    write_manifest(tmp_path, rows)
    train, val = (open_source(tmp_path, role, val_fraction=0.3) for role in ("train", "val"))
    sources = [{source.record(i)["source"] for i in range(len(source))} for source in (train, val)]
    assert len(train) + len(val) == 200 and not sources[0] & sources[1]


def test_fingerprint_follows_the_list_of_samples(tmp_path):
    folder = save_pictures(tmp_path, ["a.png", "b.png"])
    first = open_source(folder, "train", val_fraction=0.0).fingerprint
    assert open_source(folder, "train", val_fraction=0.0).fingerprint == first
    Image.new("RGB", (80, 60)).save(folder / "b.png")
    resized = open_source(folder, "train", val_fraction=0.0).fingerprint
    (folder / "b.png").rename(folder / "c.png")
    assert len({first, resized, open_source(folder, "train", val_fraction=0.0).fingerprint}) == 3


def test_fingerprint_of_a_prepared_folder_is_of_its_content(tmp_path):
    rows = [{"sample_id": str(i), "file_name": f"{i}.png", "split": "train"} for i in range(3)]
    prints = []
    for folder, extra in (("a", {}), ("b", {"note": "written later"})):
        write_manifest(tmp_path / folder, rows, extra=extra)
        prints.append(open_source(tmp_path / folder, "train", val_fraction=0.0).fingerprint)
    write_manifest(tmp_path / "b", [{**rows[0], "identity": "x"}, *rows[1:]])
    assert prints[0] == prints[1] != open_source(tmp_path / "b", "train", val_fraction=0.0).fingerprint


def test_damaged_pictures_are_listed_and_bad_when_read(tmp_path):
    folder = save_pictures(tmp_path, ["a.png", "b.png"])
    (folder / "b.png").write_bytes(b"")
    os.symlink(folder / "nowhere.png", folder / "c.png")
    source = open_source(folder, "train", val_fraction=0.0)
    assert len(source) == 3
    for i in (1, 2):
        with pytest.raises(BadImage) as caught:
            source.load(i)
        assert caught.value.path == str(folder / source.record(i)["file_name"])


def test_a_link_that_leads_back_ends(tmp_path):
    folder = save_pictures(tmp_path, ["a/1.png"])
    os.symlink(folder, folder / "a" / "loop")
    assert names_of(open_source(folder, "train", val_fraction=0.0)) == ["a/1.png"]


def folder_of_text(folder: Path) -> Path:
    for i in range(3):
        (folder / f"{i}.txt").write_text("text")
    return folder


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda folder: folder / "nowhere", {}, "does not exist"),
        (lambda folder: folder, {}, "it is empty"),
        (folder_of_text, {}, "no pictures .3 other files"),
        (lambda folder: folder_of_text(folder) / "0.txt", {}, "is a file"),
        (lambda folder: save_pictures(folder, ["a.png"]), {"labels": "metadata"}, "metadata.parquet"),
        (lambda folder: save_pictures(folder, ["a.png"]), {"labels": "names"}, "--labels"),
        (lambda folder: save_pictures(folder, ["a.png"]), {"val_fraction": 1.0}, "--val_fraction"),
        (lambda folder: save_pictures(folder, ["a.png", "b/a.png"]), {"labels": "folders"}, "outside the class"),
    ],
)
def test_wrong_paths_are_named(tmp_path, make, options, message):
    path = make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_source(path, "train", **options)
    assert str(path) in str(caught.value) or message.startswith("--")
    assert "\n" not in str(caught.value)


def test_a_role_without_rows_is_an_error(tmp_path):
    write_manifest(tmp_path, [{"sample_id": "a", "file_name": "a.png", "split": "novel"}])
    with pytest.raises(UserError, match="nothing for 'train', only novel"):
        open_source(tmp_path, "train")
    folder = save_pictures(tmp_path / "one", ["a.png"])
    with pytest.raises(UserError, match="val_fraction"):
        open_source(folder, "val", val_fraction=0.0)


# --- data sets that Hugging Face's library opens -----------------------------------------------------------

SHARDS = (5, 9, 7, 11)


def png_bytes(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour_of(i)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, numbers: range, labels: list[int]) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"picture": ImageFeature(), "label": ClassLabel(names=["rin", "len"])})
    cells = [{"bytes": png_bytes(i), "path": f"{i}.png"} for i in numbers]
    Dataset.from_dict({"picture": cells, "label": labels}, features=features).to_parquet(str(path))


def write_shards(folder: Path, split: str, counts: tuple[int, ...], first: int = 0) -> None:
    for shard, count in enumerate(counts):
        numbers = range(first, first + count)
        write_parquet(
            folder / f"{split}-{shard:05d}-of-{len(counts):05d}.parquet", numbers, [number % 2 for number in numbers]
        )
        first += count


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders of Parquet files: "one" (32 rows, train only, 4 shards) and "three" (with validation and test)."""
    from datasets import config, disable_progress_bars

    root = tmp_path_factory.mktemp("hub")
    patch = pytest.MonkeyPatch()
    patch.setattr(config, "HF_DATASETS_CACHE", root / "cache")
    disable_progress_bars()
    for name in ("one", "three"):
        (root / name).mkdir()
        write_shards(root / name, "train", SHARDS)
    write_shards(root / "three", "validation", (3,), first=100)
    write_shards(root / "three", "test", (4,), first=200)
    yield root
    patch.undo()


def numbers_of(source) -> list[int]:
    """The blue level of each picture is its number."""
    return [source.load(i).getpixel((0, 0))[2] for i in range(len(source))]


def test_hub_splits_are_roles(hub):
    spec = f"hf:{hub / 'three'}"
    assert numbers_of(open_source(spec, "train")) == list(range(32))
    assert numbers_of(open_source(spec, "val")) == [100, 101, 102]
    assert numbers_of(open_source(spec, "test")) == [200, 201, 202, 203]
    assert numbers_of(open_source(f"{spec}:test", "test")) == [200, 201, 202, 203]


def test_hub_records(hub):
    source = open_source(f"hf:{hub / 'three'}", "val")
    assert tuple(source.record(0)) == COLUMNS
    assert identities_of(source) == ["rin", "len", "rin"]
    assert source.record(2)["sample_id"] == "val/2"


def test_hub_class_number_minus_one_means_not_labelled(hub, tmp_path):
    write_parquet(tmp_path / "train.parquet", range(3), [1, -1, 0])
    assert identities_of(open_source(f"hf:{tmp_path}", "train", val_fraction=0.0)) == ["len", None, "rin"]


@pytest.mark.parametrize("suffix", ["", ":train"])
def test_hub_without_validation_is_split_by_hash(hub, suffix):
    spec = f"hf:{hub / 'one'}{suffix}"
    train, val = (open_source(spec, role, val_fraction=0.3) for role in ("train", "val"))
    assert len(val) > 2 and sorted(numbers_of(train) + numbers_of(val)) == list(range(32))
    assert train.fingerprint != val.fingerprint == open_source(spec, "val", val_fraction=0.3).fingerprint


def test_hub_damaged_picture_names_its_row(hub, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": png_bytes(0), "path": None}, {"bytes": b"no picture", "path": None}]
    pq.write_table(pa.table({"image": cells, "box": [[0.0, 1.0, 2.0, 3.0]] * 2}), tmp_path / "train.parquet")
    source = open_source(f"hf:{tmp_path}", "train", val_fraction=0.0)  # plain Parquet, without the library's types
    assert source.record(0)["box"] == [0, 1, 2, 3] and source.load(0).size == (8, 6)
    with pytest.raises(BadImage, match="#1"):
        source.load(1)


def test_hub_errors_are_one_line(hub, tmp_path, monkeypatch):
    def message(spec) -> str:
        with pytest.raises(UserError) as caught:
            open_source(spec, "train")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no split 'dev'" in message(f"hf:{hub / 'one'}:dev")
    assert "Parquet" in message(f"hf:{tmp_path}")
    (tmp_path / "text").mkdir()
    assert "no column of pictures, only text" in message(f"hf:{folder_of_text(tmp_path / 'text')}")

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nwith a long trace")

    monkeypatch.setattr("datasets.get_dataset_split_names", unreachable)
    assert "hf download someone/faces" in message("hf:someone/faces")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in message("hf:someone/faces")


# --- streams --------------------------------------------------------------------------------------------------


@pytest.fixture
def stream(hub):
    return open_stream(f"hf:{hub / 'one'}", "train", val_fraction=0.0)


def order(stream, *key) -> list[int]:
    return [index for index, _, _ in stream.iterate(*key)]


def test_stream_holds_every_sample_once(stream):
    expected = [shard * 2**32 + row for shard, count in enumerate(SHARDS) for row in range(count)]
    assert stream.num_shards == 4
    assert sorted(order(stream, 0, 0)) == expected
    first = np.cumsum((0, *SHARDS))
    for index, record, load in stream.iterate(0, 0):
        number = int(first[index >> 32]) + index % 2**32
        assert load().getpixel((0, 0))[2] == number
        assert record["identity"] == ("rin", "len")[number % 2]


def test_stream_order_is_shards_then_rows(stream):
    indices = order(stream, 3, 1)
    shards = [index >> 32 for index in indices]
    runs = [shard for i, shard in enumerate(shards) if i == 0 or shards[i - 1] != shard]
    assert sorted(runs) == [0, 1, 2, 3]
    assert indices != sorted(indices)


def test_stream_orders_differ_by_epoch_and_seed(stream):
    orders = {tuple(order(stream, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert order(stream, 0, 0) == order(stream, 0, 0)


def test_stream_rows_of_a_shard_are_shuffled_anew_each_epoch(stream):
    shard3 = [tuple(index for index in order(stream, 0, epoch) if index >> 32 == 3) for epoch in range(3)]
    assert len(set(shard3)) == 3


def test_stream_is_split_by_hash(hub):
    parts = [set(order(open_stream(f"hf:{hub / 'one'}", role, val_fraction=0.3), 0, 0)) for role in ("train", "val")]
    assert len(parts[0]) + len(parts[1]) == sum(SHARDS) and not parts[0] & parts[1] and parts[1]


def test_sources_and_streams_can_be_pickled(hub, stream, tmp_path):
    folder = save_pictures(tmp_path, ["a.png", "b.png"])
    for source in (open_source(folder, "train", val_fraction=0.0), open_source(f"hf:{hub / 'one'}", "train")):
        copy = pickle.loads(pickle.dumps(source))
        assert names_of(copy) == names_of(source) and copy.fingerprint == source.fingerprint
        assert copy.load(1).tobytes() == source.load(1).tobytes()
    assert order(pickle.loads(pickle.dumps(stream)), 0, 0) == order(stream, 0, 0)
