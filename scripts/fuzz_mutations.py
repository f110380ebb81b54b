"""Damaged and hostile versions of valid files, each a function of a generator: `mutate(data, suffix, rng, others)`.

Some change bytes wherever they lie. The others know the format and keep what a reader checks first (checksums,
lengths, offsets, the archive around it) right, so that the damage reaches the code behind that check.
"""

import argparse
import io
import json
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from util.data.packed import ALIGNMENT, MAGIC, checksum

Rng = np.random.Generator
Mutation = Callable[[bytes, Rng, Sequence[bytes]], bytes]

# numbers at which sizes, counts and offsets go wrong
EDGES = (0, 1, 2, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**64 - 1)
# text that means something to somebody
NAMES = (
    "", " ", ".", "..", "../../etc/passwd", "/etc/passwd", "C:\\windows\\win.ini", "a/../../b", "a\0b", "a\nb", "a\tb",
    "\x1b[2J", "\u202egnp.exe", "\ufeff", "é" * 300, "x" * 5000, "ä/ö.png", "-1", "1e999", "nan", "inf", "-inf", "0x10",
    "١٢", "²", "1_000", "99999999999999999999999", "9" * 5000, "true", "null", "None", "[]", "{}", '"', "'", ",", ";",
    "__import__('os').system('true')", "=1+1", "%s%n", "$HOME", "~", "CON", "\ud7ff",
)  # fmt: skip
TREES = (
    None, True, False, 0, -1, 1.5, 1e308, float("nan"), float("inf"), -float("inf"), 2**31, 2**63, 2**64, 10**400, "",
    "x", "9" * 5000, [], {}, [[]], [None], [1, 2], {"a": None}, [0.0] * 5, "\0",
)  # fmt: skip


def mutate(data: bytes, suffix: str, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """A changed version of the bytes of a file. suffix: of its name, ".png". others: files to splice with."""
    aware = AWARE.get(suffix.lower(), ())
    changed = data
    for _ in range(int(rng.choice(3, p=(0.6, 0.3, 0.1))) + 1):
        kinds = aware if aware and rng.random() < 0.65 else ANYWHERE
        try:
            changed = kinds[int(rng.integers(len(kinds)))](changed, rng, others)
        except Exception:  # what is already damaged cannot be taken apart
            changed = flip_bits(changed, rng, others)
    return changed


# --- wherever they lie ------------------------------------------------------------------------------------------


def _span(data: bytes, rng: Rng, longest: int = 64) -> tuple[int, int]:
    start = int(rng.integers(len(data) + 1))
    return start, min(len(data), start + int(rng.integers(1, longest + 1)))


def flip_bits(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """1 to 16 bits turned over."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 17)) if data else 0):
        changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def set_bytes(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """A stretch of one value, or of random ones."""
    start, end = _span(data, rng)
    kind = int(rng.integers(4))
    new = rng.bytes(end - start) if kind == 3 else (b"\0", b"\xff", b"\x7f")[kind] * (end - start)
    return data[:start] + new + data[end:]


def set_number(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """Something that may be a length or a count becomes one of EDGES, 1 to 8 bytes wide, in either order."""
    width = int(rng.choice((1, 2, 4, 8)))
    start = int(rng.integers(max(1, len(data) - width)))
    value = EDGES[int(rng.integers(len(EDGES)))] & (1 << 8 * width) - 1
    return data[:start] + value.to_bytes(width, ("little", "big")[int(rng.integers(2))]) + data[start + width :]


def truncate(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """The beginning alone; sometimes nothing."""
    return data[: int(rng.integers(len(data) + 1))] if rng.random() < 0.95 else b""


def cut_out(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """A stretch is missing."""
    start, end = _span(data, rng, 1024)
    return data[:start] + data[end:]


def repeat(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """A stretch stands there several times."""
    start, end = _span(data, rng, 256)
    return data[:end] + data[start:end] * int(rng.integers(1, 40)) + data[end:]


def splice(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """The beginning of one file, the end of another."""
    other = others[int(rng.integers(len(others)))] if len(others) else data[::-1]
    return data[: int(rng.integers(len(data) + 1))] + other[int(rng.integers(len(other) + 1)) :]


ANYWHERE: tuple[Mutation, ...] = (flip_bits, set_bytes, set_number, truncate, cut_out, repeat, splice)


# --- text ---------------------------------------------------------------------------------------------------------


def mutate_lines(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """Lines left out, doubled, moved; fields replaced, left out, doubled; another separator, quotation marks."""
    lines = data.split(b"\n")
    at = int(rng.integers(len(lines)))
    match int(rng.integers(6)):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[int(rng.integers(len(lines)))])
        case 2:
            lines[at] = rng.bytes(12)
        case 3:
            lines.insert(at, b'"')  # a quotation that ends nowhere
        case _:
            lines[at] = _other_fields(lines[at], rng)
    return b"\n".join(lines)


def _other_fields(line: bytes, rng: Rng) -> bytes:
    separator = max((b",", b"\t", b" "), key=line.count)
    fields = line.split(separator)
    at = int(rng.integers(len(fields)))
    match int(rng.integers(4)):
        case 0:
            del fields[at]
        case 1:
            fields.insert(at, fields[at])
        case _:
            fields[at] = NAMES[int(rng.integers(len(NAMES)))].encode()
    return separator.join(fields)


def mutate_json(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """A value of a JSON document replaced, left out or doubled; or arrays nested too deep for a recursive reader."""
    if rng.random() < 0.03:
        depth = int(rng.choice((500, 100_000)))
        return b"[" * depth + b"]" * depth
    return json.dumps(other_value(json.loads(data), rng)).encode()


def other_value(tree, rng: Rng):
    """A copy of plain data with one value, anywhere in it, replaced, left out or put there twice."""
    if isinstance(tree, argparse.Namespace):
        changed = other_value(vars(tree), rng)
        return argparse.Namespace(**changed) if isinstance(changed, dict) else changed
    if isinstance(tree, torch.Tensor) and rng.random() < 0.8:
        return _other_tensor(tree, rng)
    if isinstance(tree, dict) and tree and rng.random() < 0.85:
        key = list(tree)[int(rng.integers(len(tree)))]
        match int(rng.integers(8)):
            case 0:
                return {name: value for name, value in tree.items() if name != key}
            case 1:
                return tree | {NAMES[int(rng.integers(len(NAMES)))]: tree[key]}
            case _:
                return tree | {key: other_value(tree[key], rng)}
    if isinstance(tree, list) and tree and rng.random() < 0.85:
        at = int(rng.integers(len(tree)))
        match int(rng.integers(8)):
            case 0:
                return tree[:at] + tree[at + 1 :]
            case 1:
                return [*tree[: at + 1], *tree[at:]]
            case _:
                return [*tree[:at], other_value(tree[at], rng), *tree[at + 1 :]]
    if isinstance(tree, str) and rng.random() < 0.7:
        return NAMES[int(rng.integers(len(NAMES)))]
    return TREES[int(rng.integers(len(TREES)))]


# --- pictures -------------------------------------------------------------------------------------------------------


def mutate_png(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """Chunks changed, moved, doubled or left out, their checksums right."""
    chunks, place = [], 8
    while place + 8 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunks.append([data[place + 4 : place + 8], data[place + 8 : place + 8 + length]])
        place += 12 + length
    at = int(rng.integers(len(chunks)))
    match int(rng.integers(6)):
        case 0:
            del chunks[at]
        case 1:
            chunks.insert(at, list(chunks[int(rng.integers(len(chunks)))]))
        case 2:
            chunks[0][1] = set_number(chunks[0][1], rng)
        case 3:
            packed = zlib.compress(bytes(1 << 20), 9)
            chunks.insert(at, [(b"iTXt", b"zTXt", b"iCCP", b"eXIf")[int(rng.integers(4))], b"a\0\0" + packed])
        case _:
            chunks[at][1] = ANYWHERE[int(rng.integers(len(ANYWHERE)))](chunks[at][1], rng, others)
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


# --- archives: .npz and .pth ----------------------------------------------------------------------------------------


def mutate_zip(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """Members changed, renamed, doubled or left out; the archive around them is whole."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [[name, archive.read(name)] for name in archive.namelist()]
    at = int(rng.integers(len(members)))
    match int(rng.integers(8)):
        case 0:
            del members[at]
        case 1:
            members[at][0] = NAMES[int(rng.integers(len(NAMES)))].replace("\0", "") or "x"
        case 2:
            members.insert(at, list(members[at]))
        case 3:
            members[at][1] = members[int(rng.integers(len(members)))][1]
        case 4 if members[at][1].startswith(b"\x93NUMPY"):
            members[at][1] = _other_shape(members[at][1], rng)
        case _:
            # the small ones are what says how the others are read
            at = min(range(len(members)), key=lambda i: len(members[i][1])) if rng.random() < 0.3 else at
            members[at][1] = ANYWHERE[int(rng.integers(len(ANYWHERE)))](members[at][1], rng, others)
    written = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(written, "w", kind) as archive:
        warnings.simplefilter("ignore")  # names that are there twice are meant
        for name, content in members:
            archive.writestr(name, content)
    return written.getvalue()


def _other_shape(array: bytes, rng: Rng) -> bytes:
    """An .npy whose header announces another type or shape."""
    length = int.from_bytes(array[8:10], "little")
    kinds = ("'|O'", "'<f8'", "'<f4'", "'|u1'", "'<U9'", "'|V0'", "'<m8[s]'", "'<c16'", "[('a', '<f4')]", "'|S0'")
    sizes = (
        "(0,)",
        "()",
        "(-1,)",
        "(1000000000,)",
        "(2, 3)",
        "(99999999999999999999,)",
        "(1, 1, 1)",
        "(100000, 99999)",
    )
    kind, size = kinds[int(rng.integers(len(kinds)))], sizes[int(rng.integers(len(sizes)))]
    order = ("False", "True")[int(rng.integers(2))]
    text = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {size}, }}".encode()
    return array[:8] + array[8:10] + text.ljust(length - 1)[: length - 1] + b"\n" + array[10 + length :]


# --- tensors ----------------------------------------------------------------------------------------------------------


def mutate_safetensors(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """The header's JSON changed, its length right."""
    length = int.from_bytes(data[:8], "little")
    text = mutate_json(data[8 : 8 + length], rng)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def mutate_checkpoint(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """A value of a checkpoint replaced, left out or doubled, and written well."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        tree = torch.load(io.BytesIO(data), weights_only=True)
    file = io.BytesIO()
    torch.save(other_value(tree, rng), file)
    return file.getvalue()


def _other_tensor(tensor: torch.Tensor, rng: Rng) -> torch.Tensor:
    return (
        lambda: tensor[:0] if tensor.ndim else tensor[None],
        lambda: tensor.flatten()[:1],
        lambda: tensor[None],
        lambda: tensor * float("nan"),
        lambda: tensor.double(),
        lambda: tensor.to(torch.int8),
        lambda: torch.zeros(1).expand(10**9),
        lambda: tensor.flatten()[::2],
        lambda: torch.zeros_like(tensor, device="meta"),
    )[int(rng.integers(9))]()


# --- tables -----------------------------------------------------------------------------------------------------------


def mutate_parquet(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """Another table, written well: columns left out, renamed, of another type, with other cells; other metadata."""
    table = pq.read_table(pa.BufferReader(data))
    at = int(rng.integers(table.num_columns))
    name, column = table.column_names[at], table.column(at)
    match int(rng.integers(8)):
        case 0:
            table = table.remove_column(at)
        case 1:
            table = table.rename_columns([*table.column_names[:at], _name(rng), *table.column_names[at + 1 :]])
        case 2:
            table = table.append_column(name, column)  # twice the same name
        case 3:
            table = table.set_column(at, name, _other_type(column, rng))
        case 4:
            table = table.replace_schema_metadata({_name(rng).encode() or b"k": rng.bytes(9), b"image_root": b"/etc"})
        case 5:
            table = table.slice(0, int(rng.integers(table.num_rows + 1)))
        case _:
            cells = column.to_pylist()
            cells[int(rng.integers(max(1, len(cells))))] = _cell(column.type, rng)
            table = table.set_column(at, name, pa.array(cells, column.type))
    file = io.BytesIO()
    pq.write_table(table, file, compression=("zstd", "none", "snappy")[int(rng.integers(3))])
    return file.getvalue()


def _name(rng: Rng) -> str:
    return NAMES[int(rng.integers(len(NAMES)))]


def _cell(kind: pa.DataType, rng: Rng):
    if pa.types.is_string(kind):
        return (None, _name(rng))[int(rng.random() < 0.9)]
    if pa.types.is_list(kind):
        return [_cell(kind.value_type, rng) for _ in range(int(rng.integers(6)))] if rng.random() < 0.9 else None
    if pa.types.is_floating(kind):
        return (float("nan"), float("inf"), -1e30, 3e38, 0.0, None)[int(rng.integers(6))]
    return None


def _other_type(column: pa.ChunkedArray, rng: Rng) -> pa.Array:
    rows = len(column)
    return (
        lambda: pa.nulls(rows),
        lambda: pa.array([b"\xff\xfe"] * rows, pa.binary()),
        lambda: pa.array(range(rows), pa.int64()),
        lambda: pa.array([[["a"]]] * rows),
        lambda: column.combine_chunks().cast(pa.large_string()),
        lambda: pa.array([str(cell) for cell in column.to_pylist()]).dictionary_encode(),
        lambda: pa.array([{"bytes": None, "path": "x"}] * rows),
        lambda: pa.array([[1.5, None, 3.0, 4.0]] * rows, pa.list_(pa.float32())),
    )[int(rng.integers(8))]()


# --- packed files ----------------------------------------------------------------------------------------------------


def mutate_packed(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """The header's JSON changed with its checksum right, or a section changed with its checksum right."""
    start = len(MAGIC) + 24
    length = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 8], "little")
    header = json.loads(data[start : start + length])
    if rng.random() < 0.5:
        header = other_value(header, rng)
    else:
        name = list(header["sections"])[int(rng.integers(len(header["sections"])))]
        offset, size, _ = header["sections"][name]
        section = ANYWHERE[int(rng.integers(len(ANYWHERE)))](data[offset : offset + size], rng, others)
        section = section[:size].ljust(size, b"\0")
        data = data[:offset] + section + data[offset + size :]
        header["sections"][name] = [offset, size, checksum(section).hex()]
    text = json.dumps(header).encode()
    block = MAGIC + len(text).to_bytes(8, "little") + checksum(text) + text
    return block[:ALIGNMENT].ljust(ALIGNMENT, b"\0") + data[ALIGNMENT:]


AWARE: dict[str, tuple[Mutation, ...]] = {
    ".png": (mutate_png,),
    ".json": (mutate_json,),
    ".csv": (mutate_lines,),
    ".tsv": (mutate_lines,),
    ".txt": (mutate_lines,),
    ".npz": (mutate_zip,),
    ".pth": (mutate_checkpoint, mutate_zip),
    ".bin": (mutate_checkpoint,),
    ".safetensors": (mutate_safetensors,),
    ".parquet": (mutate_parquet,),
    ".pack": (mutate_packed,),
}
