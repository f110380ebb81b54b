"""Files that anybody may have written: JSON, NumPy archives and Parquet, read without believing what they announce.

Each reader raises ValueError, with the reason in one line, or OSError, and nothing else; its caller names the file and
the remedy. None of them unpickles anything. What a file unpacks to is bounded by its own size: a few kilobytes cannot
ask for gigabytes.
"""

import json
import os
import zipfile
from collections.abc import Collection, Sequence
from math import prod
from pathlib import Path

import numpy as np

from util.run.parquet_footer import announced_chunks

SPARE_BYTES = 384 << 20  # that any file may unpack to: with a copy of it that is below a gigabyte
RATIO = 100  # bytes in memory for each byte of a file that unpacks to more
_ROWS = 8192  # of a Parquet file, between two looks at what they came to
_SPARE_ROWS = 1 << 22  # of it: all pairs of two thousand names take few bytes each
# bytes that a value takes in memory; of text it is the number of the text, which is spelled out later
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8, "BYTE_ARRAY": 4}
_CHUNK = 1 << 24
_LAST_CHARACTER = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)


def allowed_bytes(size: int) -> int:
    """What a file of `size` bytes may unpack to, bytes."""
    return max(SPARE_BYTES, RATIO * size)


def _check_bytes(unpacked: int, size: int, spare: int = 0) -> None:
    if unpacked > max(allowed_bytes(size), spare):
        raise ValueError(f"it unpacks to more than {unpacked - 1} bytes, which is too much for a file of {size}")


def reason_of(error: BaseException) -> str:
    """An exception in one line that is never empty."""
    return " ".join(str(error).split()) or type(error).__name__


def parse_json(text: str | bytes):
    """The value of a JSON document. ValueError also where it nests too deep or holds half of a character."""
    try:
        value = json.loads(text)
        if "\\ud" in (text if isinstance(text, str) else text.decode()).lower():
            json.dumps(value, ensure_ascii=False).encode()  # halves of a surrogate pair cannot be written
        return value
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_json(path: Path):
    """The value of a JSON file. ValueError or OSError where it holds none."""
    return parse_json(path.read_text(encoding="utf-8"))


# --- NumPy archives -------------------------------------------------------------------------------------------------


def read_arrays(path: str | Path, names: Collection[str] | None = None, spare: int = 0) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name; ValueError or OSError where it is damaged or hostile.

    names: of those that are wanted, default all; the others are not looked at. spare: bytes that they may come to
    however small the file is, where the caller knows that they are meant to. Arrays of objects, which only pickle can
    read, are refused. What the headers announce is checked against the archive before memory is asked for. Text is
    valid Unicode.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            wanted = {name: member for name, member in members.items() if names is None or name in names}
            _check_bytes(sum(member.file_size for member in wanted.values()), os.fstat(file.fileno()).st_size, spare)
            return {name: _read_member(archive, member) for name, member in wanted.items()}
    except (OSError, ValueError):
        raise
    except Exception as error:  # BadZipFile, zlib.error, NotImplementedError, RuntimeError (a password), struct.error
        raise ValueError(reason_of(error)) from error


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as stream:
        shape, fortran, dtype = _read_header(stream)
        count = prod(shape)
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds Python objects, which are not read")
        if min(shape, default=0) < 0 or count * dtype.itemsize > member.file_size or (count and not dtype.itemsize):
            raise ValueError(f"{member.filename} announces {dtype} {shape} and is shorter")
        data = np.empty(count * dtype.itemsize, np.uint8)
        view, filled = memoryview(data), 0
        while filled < len(data):
            got = stream.readinto(view[filled : filled + _CHUNK])
            if not got:
                raise ValueError(f"{member.filename} ends early")
            filled += got
        stream.read(1)  # at the end the checksum is compared
    array = np.ndarray(shape, dtype, data, order="F" if fortran else "C")
    _check_text(array, member.filename)
    return array


def _read_header(stream) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"it is of .npy version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def _check_text(array: np.ndarray, name: str) -> None:
    if array.dtype.kind != "U" or not array.size:
        return
    characters = np.frombuffer(array.tobytes(), np.dtype("u4").newbyteorder(array.dtype.byteorder))
    low, high = _SURROGATES
    if (characters > _LAST_CHARACTER).any() or ((characters >= low) & (characters <= high)).any():
        raise ValueError(f"{name} holds text that is no Unicode")


# --- Parquet ---------------------------------------------------------------------------------------------------------


def read_parquet(source, columns: Sequence[str] | None = None):
    """A Parquet file, a path or a pyarrow.Buffer, as a pyarrow.Table whose every cell is valid. Text is spelled out.

    columns: those that are read where they are there, default all. ValueError or OSError where the file is damaged,
    holds lists of text, or has more rows or bytes than a file of its size can have.
    """
    import pyarrow as pa

    try:
        size = _size_of(source)
        with open_parquet(source, columns) as file:
            for leaf in _leaves(file.metadata, columns).values():
                if leaf.physical_type == "BYTE_ARRAY" and "." in leaf.path:
                    raise ValueError(f"column {leaf.path.split('.')[0]!r} holds text in a list or a struct")
            held, batches = 0, []
            for batch in file.iter_batches(_ROWS, columns=columns):
                held += sum(map(_spelled_bytes, batch.columns))
                _check_bytes(held, size)
                batches.append(_spelled_out(batch))
            schema = batches[0].schema if batches else _chosen(file.schema_arrow, columns)
        table = pa.Table.from_batches(batches, schema)
        table.validate(full=True)  # Parquet does not promise that its text is UTF-8
        return table
    except (OSError, ValueError):
        raise
    except Exception as error:  # Arrow's other errors are of half a dozen types
        raise ValueError(reason_of(error)) from error


def open_parquet(source, columns: Sequence[str] | None = None):
    """A pyarrow.parquet.ParquetFile that reads text as dictionaries: one that stands in each row, once.

    What a struct holds comes as it is: it is to be read one row at a time.
    ValueError where it announces more rows or values in these columns than a file of its size can have; the errors of
    Arrow where it is damaged.
    """
    import pyarrow.parquet as pq

    size, metadata = _size_of(source), pq.read_metadata(source)
    if metadata.num_rows > max(_SPARE_ROWS, 16 * size):
        raise ValueError(f"it announces {metadata.num_rows} rows, which is too much for a file of {size} bytes")
    leaves = _leaves(metadata, columns)
    unpacked = values = 0
    for group in announced_chunks(source):
        if len(group) != metadata.num_columns:
            raise ValueError("its footer is damaged")
        for number, leaf in leaves.items():
            count, size_of_chunk = group[number]
            unpacked += size_of_chunk
            values += count * _WIDTHS.get(leaf.physical_type, leaf.length)
    _check_bytes(max(unpacked, values), size)
    # inside a struct Arrow cannot always put such dictionaries together
    texts = [leaf.path for leaf in leaves.values() if leaf.physical_type == "BYTE_ARRAY" and "." not in leaf.path]
    return pq.ParquetFile(source, metadata=metadata, read_dictionary=texts)


def _size_of(source) -> int:
    return os.stat(source).st_size if isinstance(source, (str, os.PathLike)) else source.size


def _leaves(metadata, columns: Sequence[str] | None) -> dict:
    """The columns of plain values that these columns are made of, by number."""
    leaves = {number: metadata.schema.column(number) for number in range(metadata.num_columns)}
    if columns is None:
        return leaves
    return {number: leaf for number, leaf in leaves.items() if leaf.path.split(".")[0] in columns}


def _chosen(schema, columns: Sequence[str] | None):
    import pyarrow as pa

    fields = [pa.field(field.name, spelled_type(field.type)) for field in schema]
    return pa.schema([field for field in fields if columns is None or field.name in columns], schema.metadata)


def spelled_type(kind):
    """The type of what a dictionary holds, and any other type as it is."""
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _spelled_out(batch):
    """A batch with a copy of its text in each cell."""
    import pyarrow as pa

    columns = [each.dictionary_decode() if pa.types.is_dictionary(each.type) else each for each in batch.columns]
    names = [field.name for field in batch.schema]
    fields = [pa.field(name, column.type) for name, column in zip(names, columns, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields, batch.schema.metadata))


def _spelled_bytes(column) -> int:
    """The bytes that a column comes to in `_spelled_out`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_dictionary(column.type):
        return column.nbytes
    text = pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0
    return text + column.indices.nbytes
