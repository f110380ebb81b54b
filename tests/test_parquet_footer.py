"""What a Parquet footer announces, as pyarrow reads it; what it would end the process over; how long it may be.

Run: python -m pytest tests/test_parquet_footer.py
"""

import contextlib
import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from util.run import parquet_footer
from util.run.parquet_footer import announced_chunks
from util.run.untrusted import read_parquet

ROOT = Path(__file__).resolve().parents[1]
HUGE = 10**12


def written(table: pa.Table, **options) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def some_table(rng: np.random.Generator, rows: int) -> pa.Table:
    """Text, numbers, lists, structs, truth values, many columns and few, metadata."""
    columns = {
        "t": pa.array([str(n) * int(n) for n in rng.integers(0, 40, rows)]),
        "l": pa.array([list(range(n)) for n in rng.integers(0, 9, rows)], pa.list_(pa.int32())),
        "s": pa.array([{"bytes": rng.bytes(9), "path": None}] * rows, pa.struct({"bytes": "binary", "path": "string"})),
        "b": pa.array(rng.random(rows) < 0.5),
        "m": pa.array([[("k", 1)]] * rows, pa.map_(pa.string(), pa.int8())),
    } | {f"n{i}": pa.array(rng.random(rows)) for i in range(int(rng.integers(0, 40)))}
    names = [name for name in columns if rng.random() < 0.8]
    return pa.table({name: columns[name] for name in names}).replace_schema_metadata({"k": "v" * 300})


def by_arrow(metadata) -> list[list[tuple[int, int]]]:
    """The same numbers by Arrow's own accessor."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = [[group.column(number) for number in range(group.num_columns)] for group in groups]
    return [[(chunk.num_values, chunk.total_uncompressed_size) for chunk in group] for group in chunks]


@pytest.mark.parametrize("seed", range(30))
def test_it_is_what_pyarrow_reads(seed, tmp_path):
    rng = np.random.default_rng(seed)
    data = written(
        some_table(rng, int(rng.integers(0, 200))), row_group_size=int(rng.integers(1, 120)),
        compression=("zstd", "none", "snappy")[seed % 3], write_page_index=bool(seed % 2),
        sorting_columns=[pq.SortingColumn(0)] if seed % 5 == 0 else None,
    )  # fmt: skip
    (tmp_path / "a.parquet").write_bytes(data)
    expected = by_arrow(pq.read_metadata(pa.py_buffer(data)))
    assert announced_chunks(pa.py_buffer(data)) == announced_chunks(tmp_path / "a.parquet") == expected


def compare_damaged() -> None:
    """Prints for each damaged footer that Arrow reads, it ends the process over some, whether it is read here alike."""
    data = written(some_table(np.random.default_rng(0), 50), row_group_size=20)
    rng, length = np.random.default_rng(1), int.from_bytes(data[-8:-4], "little")
    for _ in range(300):
        damaged = bytearray(data)
        for at in rng.integers(len(data) - 8 - length, len(data) - 8, int(rng.integers(1, 4))):
            damaged[at] = rng.integers(256)
        if child := os.fork():
            os.waitpid(child, 0)
            continue
        with contextlib.suppress(pa.ArrowException, OSError, ValueError, MemoryError):
            metadata = pq.read_metadata(pa.py_buffer(bytes(damaged)))
            expected = by_arrow(metadata)
            try:
                print("same" if announced_chunks(pa.py_buffer(bytes(damaged))) == expected else "different", flush=True)
            except ValueError as error:
                print("refused" if str(error) == "its footer is damaged" else repr(error), flush=True)
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_damaged_footer_is_understood_as_arrow_understands_it():
    program = "from tests.test_parquet_footer import compare_damaged; compare_damaged()"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    seen = done.stdout.split()
    assert done.returncode == 0 and set(seen) <= {"same", "refused"}, done.stderr
    assert seen.count("same") > 50


def test_statistics_that_contradict_the_schema_are_refused_and_do_not_end_the_process(tmp_path):
    """Arrow's own accessor does (26.0)."""
    data = written(pa.table({"t": ["x"] * 3}), store_schema=False, use_dictionary=False, compression="none")
    schema = data.rindex(b"\x15\x0c\x25\x02\x18\x01t")  # BYTE_ARRAY, optional, named t
    path = tmp_path / "a.parquet"
    path.write_bytes(data[: schema + 1] + b"\x00" + data[schema + 2 :])  # BOOLEAN
    program = f"import pyarrow.parquet as pq; pq.read_metadata({str(path)!r}).row_group(0).column(0)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode
    program = f"from util.run.untrusted import read_parquet; read_parquet({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Error: " in done.stderr.splitlines()[-1]


# --- bytes that two readers could understand differently: Arrow sees a trillion values


def varint(number: int) -> bytes:
    return bytes([number & 0x7F | 0x80]) + varint(number >> 7) if number > 0x7F else bytes([number])


def field(delta: int, kind: int, value: bytes) -> bytes:
    return bytes([delta << 4 | kind]) + value


def whole(delta: int, number: int, kind: int = parquet_footer.I64) -> bytes:
    return field(delta, kind, varint(2 * number))


def file_of(chunk_meta: bytes) -> pa.Buffer:
    """A file of one row and one column c of int64, with these meta_data."""
    i32 = parquet_footer.I32
    root = field(4, parquet_footer.BINARY, b"\x04root") + whole(1, 1, i32) + b"\0"
    leaf = whole(1, 2, i32) + whole(2, 0, i32) + field(1, parquet_footer.BINARY, b"\x01c") + b"\0"
    chunk = whole(2, 4) + b"\x1c" + chunk_meta + b"\0"
    group = b"\x19\x1c" + chunk + whole(1, HUGE) + whole(1, 1) + b"\0"
    footer = whole(1, 1, i32) + b"\x19\x2c" + root + leaf + whole(1, 1) + b"\x19\x1c" + group + b"\0"
    return pa.py_buffer(b"PAR1" + b"\0" * 60 + footer + struct.pack("<I", len(footer)) + b"PAR1")


def a_type_that_is_none() -> bytes:
    """A header of type 0 with a number ends a struct for some, and is a field for others."""
    meta = whole(1, 2, parquet_footer.I32) + b"\x19\x15\x00" + b"\x19\x18\x01c" + whole(1, 0, parquet_footer.I32)
    meta += whole(1, HUGE) + whole(1, HUGE) + whole(1, 50) + whole(2, 4)
    small = b"\x06" + varint(10) + varint(2) + whole(1, 1) + b"\0" + b"\x18\x01"
    length = 23 + len(small)
    return meta + b"\x10" + b"\x0c\x18" + b"\x18" + varint(length) + b"\0" * 23 + small + b"\0"


def a_list_of_another_type() -> bytes:
    """`encodings` are said to be a DOUBLE: readers that know what they are read whole numbers all the same."""
    eight = b"\x00" + b"\x19\x18\x01c" + whole(1, 0, parquet_footer.I32) + b"\xf8"
    small = b"\x06" + varint(10) + varint(2) + whole(1, 1)
    inner = b"\x06" + varint(10) + varint(2 * HUGE) + whole(1, HUGE) + whole(1, 50) + whole(2, 4)
    inner += b"\x18" + varint(len(small))
    meta = whole(1, 2, parquet_footer.I32) + b"\x19\x17" + eight + b"\x18" + varint(23 + len(inner))
    return meta + b"\0" * 23 + inner + small + b"\0"


def test_a_type_that_is_none_ends_a_struct_as_it_does_for_arrow():
    data = file_of(a_type_that_is_none())
    assert announced_chunks(data) == by_arrow(pq.read_metadata(data)) == [[(HUGE, HUGE)]]
    with pytest.raises(ValueError, match="unpacks to"):
        read_parquet(data)


def test_a_list_that_says_it_is_made_of_something_else_is_refused():
    data = file_of(a_list_of_another_type())
    assert by_arrow(pq.read_metadata(data)) == [[(HUGE, HUGE)]]
    with pytest.raises(ValueError, match="its footer is damaged"):
        read_parquet(data)


HEAD = whole(1, 2, parquet_footer.I32) + b"\x19\x15\x00" + b"\x19\x18\x01c" + whole(1, 0, parquet_footer.I32)
VALUES, BYTES, REST = whole(1, 3), whole(1, 70), whole(1, 50) + whole(2, 4)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (VALUES + BYTES + REST, (3, 70)),
        (VALUES + BYTES + REST + field(0, 6, varint(2 * 5)) + varint(2 * 9), (9, 70)),  # twice: the last
        (VALUES + BYTES + REST + field(0, 5, varint(2 * 5)) + varint(2 * 9), (3, 70)),  # of another type: passed over
        (VALUES + BYTES + REST + field(0, 6, varint(2 * (5 + (1 << 16)))) + varint(0), None),  # 5 in sixteen bits
        (field(1, 6, varint(1)) + BYTES + REST, None),  # -1
        (VALUES, None),
        (VALUES + BYTES + REST + field(0, 8, varint(2 * 30)) + varint(1 << 40), None),
        (VALUES + BYTES + REST + field(0, 9, varint(2 * 30)) + b"\xfc" + varint(1 << 40), None),
        (VALUES + field(1, 6, b"\xff" * 10 + b"\x01"), None),
        (VALUES + BYTES + b"\x1c" * 5000, None),
    ],
)
def test_numbers_that_readers_could_take_differently(fields, expected):
    data = file_of(HEAD + fields + b"\0")
    if expected is None:
        with pytest.raises(ValueError, match="its footer is damaged"):
            announced_chunks(data)
    else:
        assert announced_chunks(data) == by_arrow(pq.read_metadata(data)) == [[expected]]


def test_a_file_that_says_it_is_encrypted_is_refused_and_does_not_end_the_process():
    """Arrow's own writer of footers does (26.0)."""
    data = file_of(HEAD + VALUES + BYTES + REST + b"\0").to_pybytes()
    length = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - length : -9] + field(4, parquet_footer.STRUCT, b"\x1c\0\0") + b"\0"
    data = data[: -8 - length] + footer + struct.pack("<I", len(footer)) + b"PAR1"
    with pytest.raises((ValueError, OSError)):
        read_parquet(pa.py_buffer(data))


@pytest.mark.parametrize("kind", ["path", "buffer"])
def test_a_footer_that_would_take_long_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_footer, "LONGEST", 100)
    data = written(pa.table({"t": ["x"]}).replace_schema_metadata({"k": "v" * 300}))
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"its footer of \d+ bytes is longer than 100"):
        read_parquet(tmp_path / "a.parquet" if kind == "path" else pa.py_buffer(data))


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1\xff\xff\xff\x7fPAR1", b"PAR1\x08\x00\x00\x00PAR1"])
def test_a_file_with_no_room_for_a_footer(data, tmp_path):
    (tmp_path / "a.parquet").write_bytes(data)
    for source in (tmp_path / "a.parquet", pa.py_buffer(data)):
        with pytest.raises((ValueError, OSError)):
            read_parquet(source)
