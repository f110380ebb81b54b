"""The prepared folder's schema: round trips, what is refused, and that the file is replaced whole.

Run: python -m pytest tests/test_manifest.py
"""

import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from util.data.manifest import COLUMNS, read_manifest, write_manifest
from util.run.errors import UserError


def row(i: int = 0, **values) -> dict:
    return {"sample_id": f"s{i}", "file_name": f"{i}.png", "split": "train", **values}


def test_round_trip_keeps_every_value_and_fills_null(tmp_path):
    full = row(
        0,
        identity="miku",
        box=[1, 2, 3.5, 4],
        eyes=[[1, 1, 2, 2], [2, 1, 3, 2]],
        source="album 7",
        style="moe",
        pose="left",
        occlusion="hat",
        expression="smile",
        mask_file="masks/0.png",
    )
    write_manifest(tmp_path, [full, row(1, split="novel")], extra={"seed": "0"})
    manifest = read_manifest(tmp_path)
    assert len(manifest) == 2
    assert manifest.row(0) == full
    assert tuple(manifest.row(1)) == COLUMNS
    assert {name for name, value in manifest.row(1).items() if value is not None} == set(row())
    assert manifest.metadata == {"seed": "0"}
    assert manifest.path(1) == tmp_path / "1.png"
    assert manifest.mask_path(0) == tmp_path / "masks" / "0.png"
    assert manifest.mask_path(1) is None


@pytest.mark.parametrize("absolute", [True, False])
def test_image_root_is_where_the_pictures_lie(tmp_path, absolute):
    pictures, folder = tmp_path / "pictures", tmp_path / "prepared"
    write_manifest(folder, [row()], image_root=pictures if absolute else "../pictures")
    path = read_manifest(folder).path(0)
    assert os.path.normpath(path) == str(pictures / "0.png")


def test_select_keeps_order_and_row_numbers(tmp_path):
    splits = ["val", "train", "pretrain", "val", "test", "train"]
    write_manifest(tmp_path, [row(i, split=split) for i, split in enumerate(splits)])
    chosen = read_manifest(tmp_path).select(("pretrain", "train"))
    assert [chosen.row(i)["sample_id"] for i in range(len(chosen))] == ["s1", "s2", "s5"]
    assert chosen.rows.tolist() == [1, 2, 5]
    again = chosen.keep(np.array([False, True, True]))
    assert again.rows.tolist() == [2, 5]
    assert pickle.loads(pickle.dumps(again)).row(1) == chosen.row(2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"colour": "red"}, "colour"),
        ({"split": "training"}, "'training'"),
        ({"split": None}, "'split'"),
        ({"sample_id": None}, "'sample_id'"),
        ({"file_name": 7}, "'file_name'"),
        ({"box": [1, 2, 3]}, "'box'"),
        ({"box": [3, 2, 1, 4]}, "'box'"),
        ({"box": [1, 2, float("nan"), 4]}, "'box'"),
        ({"box": [1, 2, float("inf"), 4]}, "'box'"),
        ({"box": "1 2 3 4"}, "'box'"),
        ({"eyes": [[1, 2, 3, 4], [1, 2]]}, "'eyes'"),
        ({"file_name": "../0.png"}, "outside"),
        ({"file_name": "a/../../0.png"}, "outside"),
        ({"file_name": "/etc/0.png"}, "outside"),
        ({"file_name": ""}, "outside"),
        ({"mask_file": "../mask.png"}, "outside"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_name(tmp_path, values, message):
    write_manifest(tmp_path, [row(5)])
    with pytest.raises(UserError, match=message):
        write_manifest(tmp_path, [row(), row(1, **values)])
    assert read_manifest(tmp_path).row(0)["sample_id"] == "s5"  # what was there is still whole
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.parquet"]


def test_repeated_sample_id_is_refused(tmp_path):
    with pytest.raises(UserError, match="s1 more than once"):
        write_manifest(tmp_path, [row(0), row(1), row(1)])


def test_a_sound_detour_inside_the_root_is_accepted(tmp_path):
    write_manifest(tmp_path, [row(file_name="a/../b..c/0.png")])
    assert len(read_manifest(tmp_path)) == 1


def write_table(folder, **columns):
    pq.write_table(pa.table(columns), folder / "metadata.parquet")


def test_files_of_other_writers_are_read_where_they_fit(tmp_path):
    names = pa.array(["a.png", "b.png"], pa.large_string())
    boxes = pa.array([[0.0, 0.0, 2.0, 2.0], None], pa.list_(pa.float64()))
    write_table(tmp_path, file_name=names, sample_id=[1, 2], split=["train", "val"], box=boxes, note=["x", "y"])
    manifest = read_manifest(tmp_path)
    assert manifest.row(0)["sample_id"] == "1"
    assert manifest.row(0)["box"] == [0, 0, 2, 2]
    assert manifest.row(1)["box"] is None


@pytest.mark.parametrize("missing", ["sample_id", "file_name", "split"])
def test_missing_column_is_named(tmp_path, missing):
    columns = {"sample_id": ["a"], "file_name": ["a.png"], "split": ["train"]}
    del columns[missing]
    write_table(tmp_path, **columns)
    with pytest.raises(UserError, match=f"no column '{missing}'"):
        read_manifest(tmp_path)


def test_wrong_column_is_named(tmp_path):
    write_table(tmp_path, sample_id=["a"], file_name=["a.png"], split=["train"], box=["1,2,3,4"])
    with pytest.raises(UserError, match="column 'box' is string"):
        read_manifest(tmp_path)


def test_name_outside_the_root_is_refused_on_reading(tmp_path):
    write_table(tmp_path, sample_id=["a"], file_name=["../../secret.png"], split=["train"])
    with pytest.raises(UserError, match="outside"):
        read_manifest(tmp_path)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_manifest(tmp_path)
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_manifest(tmp_path)
