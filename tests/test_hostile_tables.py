"""Tables of strangers: Parquet and packed files that announce, or unpack to, far more than they hold.

Run: python -m pytest tests/test_hostile_tables.py
"""

import json
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scripts import fuzz_corpus as corpus
from tests.hostile import MIB, linux, peak_growth, refused
from util.data.manifest import MANIFEST_NAME, read_manifest
from util.data.packed import ALIGNMENT, MAGIC, PACKED_SCHEMA, Header, PackedFile, checksum
from util.data.pools import parquet_rows
from util.data.trials import ICARTOONFACE, read_protocol, write_protocol
from util.run import untrusted

# --- Parquet ------------------------------------------------------------------------------------------------------


@linux
def test_a_table_of_more_rows_than_its_file_has_bytes(tmp_path):
    pq.write_table(pa.table({"sample_id": pa.nulls(40_000_000)}), tmp_path / MANIFEST_NAME)
    assert (tmp_path / MANIFEST_NAME).stat().st_size < MIB
    assert peak_growth(lambda: refused(lambda: read_manifest(tmp_path), "announces 40000000 rows")) < 16 * MIB


@linux
def test_a_text_that_stands_in_every_row(tmp_path, monkeypatch):
    """Once in the file, but a copy for each row in memory: 2 GB."""
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2000, np.int32)), pa.array(["x" * MIB]))
    ids = pa.array([str(i) for i in range(2000)])
    pq.write_table(pa.table({"sample_id": ids, "file_name": text}), tmp_path / MANIFEST_NAME, compression="zstd")
    assert peak_growth(lambda: refused(lambda: read_manifest(tmp_path), "unpacks to more")) < 64 * MIB
    monkeypatch.setattr(untrusted, "SPARE_BYTES", MIB)
    monkeypatch.setattr(untrusted, "RATIO", 1)
    plain = pa.table({"file_name": ["y" * 50_000] * 100})
    pq.write_table(plain, tmp_path / MANIFEST_NAME, compression="zstd")
    refused(lambda: read_manifest(tmp_path), "unpacks to more")


REPEATED = 8000  # rows of one text of 60 kB: half a gigabyte for each column that is spelled out


@linux
def test_a_text_that_is_in_the_file_once_and_in_its_schema_nowhere(tmp_path):
    """Before, the first 8,192 rows were spelled out before anything was counted: 1.4 GB for 418 bytes."""
    ids = pa.array([str(i) for i in range(REPEATED)])
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(REPEATED, np.int32)), pa.array(["x" * 60_000]))
    table = pa.table({"sample_id": ids, "file_name": text, "identity": text, "split": ["train"] * REPEATED})
    pq.write_table(table, tmp_path / MANIFEST_NAME, compression="zstd", store_schema=False)
    assert (tmp_path / MANIFEST_NAME).stat().st_size < MIB
    assert peak_growth(lambda: refused(lambda: read_manifest(tmp_path), "unpacks to")) < 64 * MIB


@linux
def test_numbers_in_a_list_that_are_in_the_file_once(tmp_path):
    boxes = pa.ListArray.from_arrays(pa.array([0, 11 * 10**7], pa.int32()), pa.array(np.zeros(11 * 10**7, np.float32)))
    table = pa.table({"sample_id": ["a"], "file_name": ["a"], "split": ["train"], "box": boxes})
    pq.write_table(table, tmp_path / MANIFEST_NAME, compression="zstd")
    del boxes, table
    assert (tmp_path / MANIFEST_NAME).stat().st_size < MIB
    assert peak_growth(lambda: refused(lambda: read_manifest(tmp_path), "unpacks to")) < 16 * MIB


def test_columns_that_are_not_asked_for_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "SPARE_BYTES", MIB)
    monkeypatch.setattr(untrusted, "RATIO", 1)
    table = pa.table({"sample_id": ["a"], "file_name": ["a"], "split": ["train"], "more": ["x" * 9 * MIB]})
    pq.write_table(table, tmp_path / MANIFEST_NAME, compression="zstd")
    assert len(read_manifest(tmp_path)) == 1
    with pytest.raises(ValueError, match="unpacks to"):
        untrusted.read_parquet(tmp_path / MANIFEST_NAME)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("store_schema", [True, False])
def test_a_table_is_read_as_it_was_written(kind, store_schema, tmp_path):
    text = pa.array(["ルリ", None, "", "a"] * 5000).cast(kind)
    boxes = pa.array([[1.0, 2.0], None, [], [3.0]] * 5000, pa.list_(pa.float32()))
    table = pa.table({"t": text, "b": boxes, "n": pa.array(range(20_000))}).replace_schema_metadata(
        {"image_root": "/x"}
    )
    pq.write_table(table, tmp_path / "a.parquet", store_schema=store_schema, row_group_size=7000)
    found = untrusted.read_parquet(tmp_path / "a.parquet")
    assert found.to_pydict() == table.to_pydict() and found.column("t").type == pa.string()
    assert not store_schema or found.schema.metadata == {b"image_root": b"/x"}
    pq.write_table(table.slice(0, 0), tmp_path / "b.parquet")
    assert untrusted.read_parquet(tmp_path / "b.parquet", ["t", "n"]).schema.names == ["t", "n"]


@linux
def test_a_picture_that_stands_in_every_row(tmp_path):
    """The rows of a pool are decoded one at a time."""
    cell = pa.DictionaryArray.from_arrays(pa.array(np.zeros(REPEATED, np.int32)), pa.array([b"x" * 4 * MIB]))
    path = pa.DictionaryArray.from_arrays(pa.array(np.zeros(REPEATED, np.int32)), pa.array(["a"]))
    image = pa.StructArray.from_arrays([cell, path], ["bytes", "path"])
    pq.write_table(pa.table({"image": image}), tmp_path / "a.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < MIB
    rows = parquet_rows([tmp_path / "a.parquet"])
    assert peak_growth(lambda: [len(next(rows)["bytes"]) for _ in range(50)]) < 64 * MIB
    large = pa.table({"image": [{"bytes": bytes(100 * MIB), "path": str(i)} for i in range(5)]})
    pq.write_table(large, tmp_path / "b.parquet", compression="zstd", use_dictionary=False)
    del large
    assert peak_growth(lambda: refused(lambda: next(parquet_rows([tmp_path / "b.parquet"])), "unpacks to")) < 16 * MIB


@linux
def test_all_pairs_of_many_names_are_read(tmp_path):
    """As this project writes them; before, they were refused: 582 bytes in memory for each of the file."""
    names = [f"personai_icartoonface_rectest/icartoonface_rectest_{i:05d}.jpg" for i in range(1500)]
    columns = {"id_a": [a for a in names for _ in names], "id_b": names * 1500, "label": [0, 1] * (1500 * 750)}
    path = write_protocol(tmp_path, ICARTOONFACE, columns | {"kind": ["official"] * 1500**2})
    assert path.stat().st_size * untrusted.RATIO < 2 * 1500**2 * len(names[0])
    found = {}
    assert peak_growth(lambda: found.update(read_protocol(tmp_path, ICARTOONFACE))) < 1000 * MIB
    assert all(found[name] == values for name, values in columns.items())
    assert found["id_a"][0] is found["id_a"][1499]  # one object, not 1,500


def write_pack(path: Path, samples: bytes) -> None:
    """A packed file of no pixels whose section "samples" is this."""
    at = {"samples": (ALIGNMENT, len(samples), checksum(samples).hex()), "chunks": (ALIGNMENT, 0, "")}
    header = Header(0, 8, 4, ALIGNMENT + len(samples), {"labels": "auto"}, at)
    path.write_bytes(header.to_bytes() + samples)


@linux
@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_packed_file_whose_table_unpacks_to_far_more_than_it_holds(codec, tmp_path):
    """Before, these 300 MB were unpacked."""
    text = pa.array(["x" * (100 * MIB)])
    columns = [text if field.name in ("file_name", "style", "pose") else pa.array(["a"]).cast(field.type)
               if field.type == pa.string() else pa.nulls(1, field.type) for field in PACKED_SCHEMA]  # fmt: skip
    table, sink = pa.Table.from_arrays(columns, schema=PACKED_SCHEMA), pa.BufferOutputStream()
    with pa.ipc.new_file(sink, PACKED_SCHEMA, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table)
    write_pack(tmp_path / "a.pack", sink.getvalue().to_pybytes())
    del table, columns, text, sink
    assert (tmp_path / "a.pack").stat().st_size < 2 * MIB
    assert peak_growth(lambda: refused(lambda: PackedFile(tmp_path / "a.pack"), "compressed")) < 16 * MIB


def test_a_packed_file_of_other_columns(tmp_path):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, pa.schema({"a": pa.int8()})):
        pass
    for content in (sink.getvalue().to_pybytes(), b"", b"ARROW1\0\0", bytes(64)):
        write_pack(tmp_path / "a.pack", content)
        refused(lambda: PackedFile(tmp_path / "a.pack"), "damaged in section 'samples'")
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, PACKED_SCHEMA):
        pass
    write_pack(tmp_path / "a.pack", sink.getvalue().to_pybytes())
    assert len(PackedFile(tmp_path / "a.pack").table) == 0


def edited(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new))


@linux
@pytest.mark.parametrize("length", [2**31 - 1, 2**32 - 1, 0, 2**30])
def test_a_footer_of_any_length(length, tmp_path):
    corpus.prepared(tmp_path)
    data = (tmp_path / MANIFEST_NAME).read_bytes()
    (tmp_path / MANIFEST_NAME).write_bytes(data[:-8] + struct.pack("<I", length) + data[-4:])
    assert peak_growth(lambda: refused(lambda: read_manifest(tmp_path), "cannot be read as Parquet")) < 16 * MIB


def test_text_that_is_no_utf8(tmp_path):
    """Parquet does not promise it. Before, it was a UnicodeDecodeError where a cell was first looked at."""
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(struct.pack("<II", 0, 2)), pa.py_buffer(b"\xff\xfe")]
    )
    good = pa.array(["train"])
    pq.write_table(pa.table({"sample_id": bad, "file_name": good, "split": good}), tmp_path / MANIFEST_NAME)
    refused(lambda: read_manifest(tmp_path), "cannot be read as Parquet")
    table = pa.table({"sample_id": good, "file_name": good, "split": good})
    pq.write_table(table.replace_schema_metadata({b"writer": b"\xff"}), tmp_path / MANIFEST_NAME)
    refused(lambda: read_manifest(tmp_path), "cannot be read as Parquet")


def test_a_column_that_is_there_twice(tmp_path):
    column = pa.array(["train"])
    names = ["sample_id", "file_name", "split", "split"]
    pq.write_table(pa.Table.from_arrays([column] * 4, names), tmp_path / MANIFEST_NAME)
    refused(lambda: read_manifest(tmp_path), "twice")


def test_an_image_root_with_a_zero_byte(tmp_path):
    column = pa.array(["train"])
    table = pa.Table.from_arrays([column] * 3, ["sample_id", "file_name", "split"])
    pq.write_table(table.replace_schema_metadata({"image_root": "/a\0b"}), tmp_path / MANIFEST_NAME)
    refused(lambda: read_manifest(tmp_path), "zero byte")


def test_a_text_column_of_pictures_is_not_taken_for_paths(tmp_path):
    """Before, decode_image was handed the text and opened the file of that name."""
    table = pa.table({"image": [{"bytes": "/etc/passwd", "path": "a.png"}]})
    pq.write_table(table, tmp_path / "a.parquet")
    refused(lambda: list(parquet_rows([tmp_path / "a.parquet"])), "is struct")


# --- the header of a packed file ---------------------------------------------------------------------------------


def packed_header(header) -> bytes:
    text = json.dumps(header).encode()
    return (MAGIC + len(text).to_bytes(8, "little") + checksum(text) + text).ljust(ALIGNMENT, b"\0")


@pytest.mark.parametrize(
    "change",
    [
        None, [], {"samples": 10**12}, {"samples": -1}, {"canvas": "8"}, {"canvas": 0}, {"canvas": 2**31}, {"chunk": 0},
        {"sections": []},
        {"sections": {}}, {"sections": {"samples": [0, 2**62, "a"], "chunks": [0, 1, "b"]}}, {"plan": None},
        {"more": 1},
    ],
)  # fmt: skip
def test_a_packed_file_whose_checksum_is_right_and_whose_header_is_not(change, tmp_path):
    """Anybody can write the checksum. Before, these were TypeError and ValueError, or reads beyond the file."""
    section = {"samples": [ALIGNMENT, 0, "a"], "chunks": [ALIGNMENT, 0, "b"]}
    good = {"samples": 0, "canvas": 8, "chunk": 4, "size": ALIGNMENT, "plan": {"labels": "auto"}, "sections": section}
    header = good | change if isinstance(change, dict) else change
    (tmp_path / "a.pack").write_bytes(packed_header(header))
    refused(lambda: PackedFile(tmp_path / "a.pack"), "damaged")
