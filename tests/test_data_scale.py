"""Opening large data: the same rows, classes and boxes as by plain Python, read once, without an object for each row.

Run: python -m pytest tests/test_data_scale.py
"""

import gc
import hashlib
import logging
import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from util.data import manifest
from util.data.augment import EvalCrop
from util.data.face_crop import FaceCrops, face_region, open_pictures
from util.data.labels import open_labelled, stratified
from util.data.loader import in_batches
from util.data.manifest import read_manifest, write_manifest
from util.data.roles import in_part
from util.data.sources import Subset, column_array, open_source, split_keys
from util.run.seed import rng_for

ROWS = 3000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Faces on four pictures: some without a box, some without eyes, a source or an identity."""
    folder, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(3)
    for i in range(4):
        Image.new("RGB", (60, 50), (40 * i, 90, 200)).save(folder / f"{i}.png")
    rows = []
    for i in range(ROWS):
        x, y = rng.uniform(0, 30, 2)
        box = None if i % 7 == 0 else [x, y, x + rng.uniform(3, 20), y + rng.uniform(3, 20)]
        eyes = [[x, y, x + 1, y + 2]] * (i % 3) if i % 2 else None
        rows.append({
            "sample_id": f"face {i}", "file_name": f"{i % 4}.png", "split": "train", "box": box, "eyes": eyes,
            "source": (None, "", f"album {i // 5}", f"アルバム {i // 5}")[i % 4], "identity": f"who {i % 41}",
        })  # fmt: skip
    write_manifest(folder, rows)
    return folder


def unit_hash(key: str) -> float:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") / 2**64


def test_parts_are_those_of_the_hash_of_each_name():
    keys = [f"{i}.png" for i in range(2000)] + ["", "ルリ", "0.png"]
    for fraction in (0.0, 0.1, 0.5, unit_hash("ルリ"), np.nextafter(unit_hash("ルリ"), 1)):
        expected = [unit_hash(key) < fraction for key in keys]
        assert in_part(keys, "val", fraction).tolist() == expected
        assert in_part(iter(keys), "train", fraction).tolist() == [not held for held in expected]
    assert in_part(iter(keys), "all", 0.5).tolist() == [True] * len(keys)
    assert in_part([], "val", 0.5).shape == (0,)


def test_keys_are_sources_and_else_file_names(folder):
    table = read_manifest(folder).table
    pairs = zip(table.column("source").to_pylist(), table.column("file_name").to_pylist(), strict=True)
    assert split_keys(table) == [source or file_name for source, file_name in pairs]


def test_the_file_is_read_once_for_all_roles_and_anew_when_it_changes(folder, tmp_path, monkeypatch):
    write_manifest(tmp_path, [{"sample_id": str(i), "file_name": f"{i}.png", "split": "train"} for i in range(50)])
    read, reads = manifest.read_parquet, []
    monkeypatch.setattr(manifest, "read_parquet", lambda path, columns: reads.append(path) or read(path, columns))
    train, val = open_source(tmp_path, "train"), open_source(tmp_path, "val")
    assert len(reads) == 1 and len(train) + len(val) == 50
    first = read_manifest(tmp_path)
    first.metadata["note"], first.rows[:] = "mine", 0
    assert read_manifest(tmp_path).metadata == {} and read_manifest(tmp_path).rows.tolist() == list(range(50))
    write_manifest(tmp_path, [{"sample_id": "a", "file_name": "b.png", "split": "train"}])
    assert read_manifest(tmp_path).row(0)["sample_id"] == "a" and len(reads) == 2
    read_manifest(folder)
    assert read_manifest(tmp_path).row(0)["file_name"] == "b.png"


@pytest.mark.parametrize("has_arrays", [True, False])
def test_boxes_and_eyes_are_those_of_each_record(folder, has_arrays, caplog):
    source = open_source(folder, "train", val_fraction=0.0)
    if not has_arrays:  # as a Hugging Face data set
        names = ("name", "fingerprint", "record", "column", "__len__")
        plain = type("Plain", (), {"__len__": lambda self: len(source)})()
        vars(plain).update({name: getattr(source, name) for name in names[:-1]})
        assert not hasattr(plain, "array")
    with caplog.at_level(logging.WARNING):
        crops = FaceCrops(source if has_arrays else plain, 0.25)
    assert f"{-(-ROWS // 7)} of {ROWS} samples have no face box" in caplog.text

    def moved(record: dict) -> dict:
        if record["box"] is None:
            return record
        x1, y1, x2, y2 = face_region(record["box"], 0.25)
        left, top = max(0, x1), max(0, y1)
        size = (x2 - left, y2 - top)
        shift = [left, top, left, top]
        on_crop = [
            [min(max(value - by, 0), most) for value, by, most in zip(box, shift, size * 2, strict=True)]
            for box in (record["box"], *(record["eyes"] or ()))
        ]
        return {**record, "box": on_crop[0], "eyes": on_crop[1:] or None}

    expected = [moved(source.record(i)) for i in range(ROWS)]
    for i in range(0, ROWS, 17):
        assert dict(crops.record(i)) == expected[i]
    for name in ("box", "eyes", "source"):
        assert crops.column(name) == crops.array(name).to_pylist() == [record[name] for record in expected]


def test_columns_of_a_part_are_its_rows(folder):
    source = open_source(folder, "train", val_fraction=0.0)
    part = Subset(source, np.array([5, 0, 2999]))
    for name in ("box", "identity", "eyes"):
        assert part.column(name) == [source.record(i)[name] for i in (5, 0, 2999)]
        assert column_array(part, name).to_pylist() == part.column(name)


def options(folder, **more) -> SimpleNamespace:
    usual = {"labels": "auto", "val_fraction": 0.1, "face_padding": 0.25, "nb_classes": None, "label_fraction": 1.0}
    return SimpleNamespace(data_path=str(folder), seed=0, **{**usual, **more})


def test_classes_are_identities_in_alphabetical_order(folder):
    task = open_labelled(options(folder))
    assert list(task.classes) == sorted({f"who {i % 41}" for i in range(ROWS)})
    for source in (task.train, task.val):
        expected = [task.numbers[source.record(i)["identity"]] for i in range(len(source))]
        assert task.labels(source).tolist() == expected and task.labels(source).dtype == np.int64


def test_a_share_of_the_labels_is_drawn_identity_by_identity():
    identities = [f"who {i * i % 23}" for i in range(900)]
    for fraction in (0.003, 0.25, 0.5, 1.0):
        chosen = []
        for name, count in Counter(identities).items():
            rows = [row for row, other in enumerate(identities) if other == name]
            chosen += rng_for(4, name, "labels").permutation(rows)[: max(1, round(fraction * count))].tolist()
        assert stratified(identities, fraction, 4).tolist() == sorted(chosen)
        assert stratified(pa.array(identities), fraction, 4).tolist() == sorted(chosen)


def test_no_object_is_kept_for_a_row(folder):
    """Objects that workers look at are copied in each of them; numbers in one block are shared."""
    open_pictures(options(folder), "train")
    gc.collect()
    before = len(gc.get_objects())
    crops = open_pictures(options(folder), "train")
    gc.collect()
    assert len(crops) > 2000 and len(gc.get_objects()) - before < 200
    assert len(pickle.dumps(crops)) / len(crops) < 200  # bytes that a spawned worker is sent


def test_batches_are_named_when_they_are_wanted(folder):
    class Counting(list):
        asked = 0

        def __iter__(self):
            for rows in super().__iter__():
                self.asked += 1
                yield rows

    batches = Counting([i, i + 1] for i in range(1000))
    source = open_source(folder, "train", val_fraction=0.0)
    loaded = in_batches(source, EvalCrop((16, 16)), batches, num_workers=0, device=torch.device("cpu"))
    assert next(loaded)["index"].tolist() == [0, 1] and next(loaded)["index"].tolist() == [1, 2]
    assert batches.asked <= 3


def test_a_picture_that_is_replaced_changes_the_stamp(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"sample_id": str(i), "file_name": name, "split": "train"} for i, name in enumerate(("a.png", "no.png"))]
    write_manifest(tmp_path, rows)
    source, found = open_source(tmp_path, "train", val_fraction=0.0), (tmp_path / "a.png").stat()
    text = f"{found.st_size} {found.st_mtime_ns}\0".encode() + b"missing\0"
    assert source.stamp() == hashlib.blake2b(text, digest_size=8).hexdigest()
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    assert source.stamp() != hashlib.blake2b(text, digest_size=8).hexdigest()
