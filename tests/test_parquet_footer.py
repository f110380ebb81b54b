"""What a Parquet footer announces: as pyarrow reads it where it is sound, and refused where it is not.

Run: python -m pytest tests/test_parquet_footer.py
"""

import io
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


def written(table: pa.Table, **options) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def some_table(rng: np.random.Generator, rows: int) -> pa.Table:
    """Text, numbers, lists, structs, truth values, many columns and none, metadata."""
    columns = {
        "t": pa.array([str(n) * int(n) for n in rng.integers(0, 40, rows)]),
        "l": pa.array([list(range(n)) for n in rng.integers(0, 9, rows)], pa.list_(pa.int32())),
        "s": pa.array([{"bytes": rng.bytes(9), "path": None}] * rows, pa.struct({"bytes": "binary", "path": "string"})),
        "b": pa.array(rng.random(rows) < 0.5),
        "m": pa.array([[("k", 1)]] * rows, pa.map_(pa.string(), pa.int8())),
    } | {f"n{i}": pa.array(rng.random(rows)) for i in range(int(rng.integers(0, 40)))}
    names = [name for name in columns if rng.random() < 0.8]
    return pa.table({name: columns[name] for name in names}).replace_schema_metadata({"k": "v" * 300})


@pytest.mark.parametrize("seed", range(30))
def test_it_is_what_pyarrow_reads(seed, tmp_path):
    rng = np.random.default_rng(seed)
    data = written(
        some_table(rng, int(rng.integers(0, 200))), row_group_size=int(rng.integers(1, 120)),
        compression=("zstd", "none", "snappy")[seed % 3], write_page_index=bool(seed % 2),
    )  # fmt: skip
    (tmp_path / "a.parquet").write_bytes(data)
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    expected = [
        [
            (group.column(number).num_values, group.column(number).total_uncompressed_size)
            for number in range(metadata.num_columns)
        ]
        for group in groups
    ]
    assert announced_chunks(tmp_path / "a.parquet") == announced_chunks(pa.py_buffer(data)) == expected


def test_statistics_that_contradict_the_schema_are_refused_and_do_not_end_the_process(tmp_path):
    """Arrow's own reader of the footer does (26.0)."""
    data = written(pa.table({"t": ["x"] * 3}), store_schema=False, use_dictionary=False, compression="none")
    schema = data.rindex(b"\x15\x0c\x25\x02\x18\x01t")  # BYTE_ARRAY, optional, named t
    path = tmp_path / "a.parquet"
    path.write_bytes(data[: schema + 1] + b"\x00" + data[schema + 2 :])  # BOOLEAN
    program = f"import pyarrow.parquet as pq; pq.read_metadata({str(path)!r}).row_group(0).column(0)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode
    assert announced_chunks(path) == [[(3, announced_chunks(path)[0][0][1])]]
    program = f"from util.run.untrusted import read_parquet; read_parquet({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Error: " in done.stderr.splitlines()[-1]


def test_a_damaged_footer_is_a_value_error_and_nothing_else(tmp_path):
    data = written(some_table(np.random.default_rng(0), 50), row_group_size=20)
    rng, path, refused = np.random.default_rng(1), tmp_path / "a.parquet", 0
    for _ in range(3000):
        damaged = bytearray(data)
        for at in rng.integers(len(data) - 2000, len(data), int(rng.integers(1, 4))):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged[: len(data) - int(rng.integers(0, 9)) * (rng.random() < 0.1)])
        try:
            chunks = announced_chunks(path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith("its footer")
        else:
            assert all(number >= 0 for group in chunks for chunk in group for number in chunk)
    assert 300 < refused < 2900


def varint(number: int) -> bytes:
    return bytes([number & 0x7F | 0x80]) + varint(number >> 7) if number > 0x7F else bytes([number])


def chunk(*fields: bytes) -> bytes:
    """A file of one row group with one column, whose meta_data are these fields."""
    footer = b"\x49\x1c" + b"\x19\x1c" + b"\x3c" + b"".join(fields) + b"\x00\x00\x00\x00"
    return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


VALUES, BYTES = b"\x56" + varint(2 * 3), b"\x16" + varint(2 * 70)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([VALUES, BYTES], [[(3, 70)]]),
        ([VALUES, BYTES, b"\x06" + varint(2 * 5) + varint(2 * 9)], [[(9, 70)]]),  # twice: the last
        ([VALUES, BYTES, b"\x05" + varint(2 * 5) + varint(2 * 9)], [[(3, 70)]]),  # of another type: not read by others
        ([VALUES, BYTES, b"\x06" + varint(2 * (5 + (1 << 16))) + varint(0)], None),  # 5 in sixteen bits
        ([b"\x56" + varint(1), BYTES], None),  # -1
        ([VALUES], None),
        ([VALUES, b"\x16" + b"\xff" * 10 + b"\x01"], None),
        ([VALUES, BYTES, b"\x18" + varint(1 << 40)], None),
        ([VALUES, BYTES, b"\x19\xfc" + varint(1 << 40)], None),
        ([VALUES, BYTES, b"\x1c" * 5000], None),
    ],
)
def test_numbers_that_readers_could_take_differently(fields, expected):
    if expected is None:
        with pytest.raises(ValueError, match="its footer is damaged"):
            announced_chunks(pa.py_buffer(chunk(*fields)))
    else:
        assert announced_chunks(pa.py_buffer(chunk(*fields))) == expected


def test_a_list_of_something_else_than_structs_is_refused():
    data = chunk(VALUES, BYTES).replace(b"\x49\x1c", b"\x49\x15")
    with pytest.raises(ValueError, match="damaged"):
        announced_chunks(pa.py_buffer(data))


def test_a_footer_that_would_take_long_is_refused(monkeypatch):
    monkeypatch.setattr(parquet_footer, "LONGEST", 100)
    data = written(pa.table({"t": ["x"]}).replace_schema_metadata({"k": "v" * 300}))
    with pytest.raises(ValueError, match=r"its footer of \d+ bytes is longer than 100"):
        read_parquet(pa.py_buffer(data))


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1\xff\xff\xff\x7fPAR1"])
def test_a_file_with_no_room_for_a_footer(data):
    with pytest.raises(ValueError, match="its footer is damaged"):
        announced_chunks(pa.py_buffer(data))
