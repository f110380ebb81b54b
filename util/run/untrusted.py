"""Files that anybody may have written: JSON, NumPy archives and Parquet, read without believing what they announce.

Each reader raises ValueError, with the reason in one line, or OSError, and nothing else; its caller names the file and
the remedy. None of them unpickles anything. What a file unpacks to is bounded by its own size: a few kilobytes cannot
ask for gigabytes.
"""

import json
import os
import zipfile
from math import prod
from pathlib import Path

import numpy as np

SPARE_BYTES = 256 << 20  # that any file may unpack to
RATIO = 100  # bytes in memory for each byte of a larger file; real tables and embeddings stay below 50
_ROWS = 8192  # of a Parquet file, between two looks at what they came to
_SPARE_ROWS = 1 << 20
_CHUNK = 1 << 24
_LAST_CHARACTER = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)


def allowed_bytes(size: int) -> int:
    """What a file of `size` bytes may unpack to, bytes."""
    return max(SPARE_BYTES, RATIO * size)


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


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name; ValueError or OSError where it is damaged or hostile.

    Arrays of objects, which only pickle can read, are refused. What the headers announce is checked against the
    archive before memory is asked for. Text is valid Unicode.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            members, size = archive.infolist(), os.fstat(file.fileno()).st_size
            announced = sum(member.file_size for member in members)
            if announced > allowed_bytes(size):
                raise ValueError(f"it unpacks to {announced} bytes, which is too much for a file of {size}")
            return {member.filename.removesuffix(".npy"): _read_member(archive, member) for member in members}
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


# --- Parquet ----------------------------------------------------------------------------------------------------------


def read_parquet(source):
    """A whole Parquet file, a path or a pyarrow.Buffer, as a pyarrow.Table whose every cell is valid.

    ValueError or OSError where it is damaged, or has more rows or bytes than a file of its size can have.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = os.stat(source).st_size if isinstance(source, (str, os.PathLike)) else source.size
    try:
        with pq.ParquetFile(source) as file:
            rows, held, batches = file.metadata.num_rows, 0, []
            # names differ from row to row, so that a row takes a byte of the file at the very least
            if rows > max(_SPARE_ROWS, 16 * size):
                raise ValueError(f"it announces {rows} rows, which is too much for a file of {size} bytes")
            for batch in file.iter_batches(_ROWS):
                held += batch.nbytes + sum(map(_spelled_out, batch.columns))
                if held > allowed_bytes(size):
                    raise ValueError(f"it unpacks to more than {held} bytes, which is too much for a file of {size}")
                batches.append(batch)
            table = pa.Table.from_batches(batches, batches[0].schema if batches else file.schema_arrow)
        table.validate(full=True)  # Parquet does not promise that its text is UTF-8
        return table
    except (OSError, ValueError):
        raise
    except Exception as error:  # Arrow's other errors are of half a dozen types
        raise ValueError(reason_of(error)) from error


def _spelled_out(column) -> int:
    """The bytes that a dictionary-encoded column comes to when each cell has a copy of its text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_dictionary(column.type) or not pa.types.is_string(column.type.value_type):
        return 0
    return pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0
