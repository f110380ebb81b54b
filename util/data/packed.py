"""Packed data: a data set decoded once, as canvases of one size in one file that is memory-mapped.

    0         header: magic, length and checksum of a JSON object, and the object (`Header`)
    65,536    pixels, uint8 (N, C, C, 3)
    then      sections, each at a multiple of 65,536 bytes: "samples" (the manifest, an Arrow IPC file),
              "chunks" (checksums of the pixels), "maps/NAME" (uint8 (N, 32, 32)), "protocols/NAME" (Parquet)

65,536 is a multiple of every page size in use. Nothing is read before it is asked for, and processes that read the
same file share one copy in memory. `python -m util.data.pack` writes such files.
"""

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from util.data.images import BadImage
from util.data.manifest import COLUMNS, SCHEMA, one_array, wide
from util.run.device import free_memory_bytes
from util.run.errors import UserError
from util.run.untrusted import parse_json

ALIGNMENT = 65_536
LARGEST_CANVAS = 1 << 15  # px on a side
MAP_CELLS = 32  # cells of a semantic map on a side
SAMPLES, CHUNKS = "samples", "chunks"  # names of sections
# What is stored of a sample beside the manifest: the name whose hash decides between train and val; why it has no
# pixels, or null; the part of the picture that the canvas shows and the size of that picture, px.
PACKED_SCHEMA = pa.schema(
    [
        *SCHEMA,
        pa.field("split_key", pa.string(), nullable=False),
        pa.field("bad", pa.string()),
        pa.field("region", pa.list_(pa.int32())),
        pa.field("picture_size", pa.list_(pa.int32())),
    ]
)
MAGIC = b"AniMask packed\n\x00"
_DIGEST_BYTES = 16
_IPC_MAGIC = b"ARROW1\0\0"
_JSON_AT = len(MAGIC) + 8 + _DIGEST_BYTES


def checksum(data) -> bytes:
    """16 bytes that change with the data (anything that has a buffer)."""
    return new_checksum(data).digest()


def new_checksum(data=b""):
    """The same for data that come in parts: `update(part)`, then `digest()` or `hexdigest()`."""
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES)


def end_of_pixels(samples: int, canvas: int) -> int:
    """Where the pixels of `samples` canvases of side `canvas` (px) end in the file, bytes."""
    return ALIGNMENT + samples * 3 * canvas**2


def aligned(offset: int) -> int:
    """The next multiple of ALIGNMENT, bytes."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Header:
    """What a packed file says of itself.

    samples: N. canvas: C, px. chunk: canvases that share a checksum. size: of the file, bytes. plan: what it was made
    from and with which flags (`util.data.pack`). sections: name -> (offset, bytes, checksum in hex).
    """

    samples: int
    canvas: int
    chunk: int
    size: int
    plan: dict
    sections: dict[str, tuple[int, int, str]]

    def to_bytes(self) -> bytes:
        """The first block of the file."""
        text = json.dumps(asdict(self), sort_keys=True).encode()
        if _JSON_AT + len(text) > ALIGNMENT:
            raise UserError(f"{len(self.sections)} maps and protocols are too many for a packed file: leave some out")
        return (MAGIC + len(text).to_bytes(8, "little") + checksum(text) + text).ljust(ALIGNMENT, b"\0")

    @classmethod
    def read(cls, path: Path) -> "Header":
        """That of a file. Raises UserError where it is no packed file, half-written, truncated or damaged."""
        with open(path, "rb") as file:
            block = file.read(ALIGNMENT)
            size = os.fstat(file.fileno()).st_size
        if block and not block.strip(b"\0"):
            raise UserError(f"{path} is half-written: run the command that packs it again, it goes on where it was")
        if not block.startswith(MAGIC):
            raise UserError(
                f"{path} is a file, and not of a kind that can be read: give a folder, hf:OWNER/NAME, or a file of "
                "python -m util.data.pack"
            )
        length = int.from_bytes(block[len(MAGIC) : len(MAGIC) + 8], "little")
        text = block[_JSON_AT : _JSON_AT + length]
        if len(text) < length or checksum(text) != block[len(MAGIC) + 8 : _JSON_AT]:
            raise UserError(f"{path} is damaged in its header: copy or pack it again")
        try:
            header = cls(**parse_json(text))
            if not header.is_sound():
                raise ValueError("its sizes do not fit each other")
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"{path} is damaged in its header ({error}): copy or pack it again") from error
        if size != header.size:
            raise UserError(f"{path} has {size} bytes of {header.size}: copy or pack it again")
        return header

    def is_sound(self) -> bool:
        """Whether everything is of its type and lies inside the file: the checksum is anybody's to write."""
        numbers = [self.samples, self.canvas, self.chunk, self.size]
        for offset, length, digest in self.sections.values():
            numbers += [offset, length]
            if not isinstance(digest, str):
                return False
        if not all(type(number) is int and number >= 0 for number in numbers):
            return False
        if not (0 < self.canvas <= LARGEST_CANVAS and self.chunk):
            return False
        ends = [offset + length for offset, length, _ in self.sections.values()]
        maps = [length for name, (_, length, _) in self.sections.items() if name.startswith("maps/")]
        return (
            max([end_of_pixels(self.samples, self.canvas), *ends]) <= self.size
            and {SAMPLES, CHUNKS} <= self.sections.keys()
            and isinstance(self.plan.get("labels") if isinstance(self.plan, dict) else None, str)
            and all(length == self.samples * MAP_CELLS**2 for length in maps)
        )


class PackedFile:
    """A packed file, memory-mapped read-only. Raises UserError where it is not whole.

    checked: whether this process, or the one that it works for, has looked at the samples before.
    """

    def __init__(self, path: str | Path, checked: bool = False):
        self.path = Path(path)
        self.header = Header.read(self.path)
        with open(self.path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # more than the page cache can hold: each canvas is read from the disk, and is better asked for as a whole
        self._asks_ahead = hasattr(mmap, "MADV_WILLNEED") and self.header.size > free_memory_bytes(torch.device("cpu"))
        shape = (self.header.samples, self.header.canvas, self.header.canvas, 3)
        self.pixels = np.ndarray(shape, np.uint8, self._map, ALIGNMENT)
        self._data = pa.py_buffer(self._map)
        self.table = self._samples(checked)
        # not from where and when it was packed: a copy of the data gives the same
        sums = "".join(self.header.sections[name][2] for name in (SAMPLES, CHUNKS))
        self.fingerprint = hashlib.blake2b(sums.encode(), digest_size=8).hexdigest()

    def _samples(self, checked: bool) -> pa.Table:
        try:
            table = pa.Table.from_batches(_batches(self.section(SAMPLES)), PACKED_SCHEMA)
            if table.num_rows != self.header.samples:
                raise ValueError("they are others than its header says")
            if not checked:  # offsets that lead outside the file would end the process when a cell is read
                table.validate(full=True)
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise UserError(f"{self.path} is damaged in section 'samples' ({error}): copy or pack it again") from error
        return table

    def canvas(self, row: int) -> np.ndarray:
        """Canvas `row` where it lies in the file: uint8 (C, C, 3), read-only."""
        pixels = self.pixels[row]
        if self._asks_ahead:
            offset = ALIGNMENT + row * pixels.nbytes
            start = offset - offset % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start, offset + pixels.nbytes - start)
        return pixels

    def section(self, name: str) -> pa.Buffer:
        """The bytes of a section, not copied. Raises KeyError."""
        offset, length, _ = self.header.sections[name]
        return self._data.slice(offset, length)

    def names(self, folder: str) -> list[str]:
        """The NAMEs of the sections "folder/NAME"."""
        return [name.split("/", 1)[1] for name in self.header.sections if name.startswith(f"{folder}/")]

    def semantic_map(self, name: str) -> np.ndarray:
        """A map as the canvases show it, uint8 (N, 32, 32), not copied. Raises KeyError."""
        return np.frombuffer(self.section(f"maps/{name}"), np.uint8).reshape(-1, MAP_CELLS, MAP_CELLS)

    def damage(self) -> Iterator[str | None]:
        """Checks every chunk of canvases and every section: None for one that is whole, else what it is, in words."""
        expected = bytes(self.section(CHUNKS)) if self._is_whole(CHUNKS) else b""
        for number, first in enumerate(range(0, self.header.samples, self.header.chunk)):
            found = checksum(self.pixels[first : first + self.header.chunk])
            last = min(first + self.header.chunk, self.header.samples) - 1
            is_whole = found == expected[number * _DIGEST_BYTES : (number + 1) * _DIGEST_BYTES]
            yield None if is_whole else f"chunk {number} (canvases {first} to {last})"
        for name in self.header.sections:
            yield None if self._is_whole(name) else f"section {name!r}"

    def _is_whole(self, name: str) -> bool:
        return checksum(self.section(name)).hex() == self.header.sections[name][2]


def _batches(section: pa.Buffer) -> Iterator[pa.RecordBatch]:
    """The parts of an Arrow IPC file of PACKED_SCHEMA, where they lie: nothing in it is unpacked, or takes memory.

    Raises ValueError where it is of another schema, or compressed, as no packed file is.
    """
    messages = iter(pa.ipc.MessageReader.open_stream(section.slice(len(_IPC_MAGIC))))  # a stream, then a footer
    schema = pa.ipc.read_schema(next(messages, pa.py_buffer(b"")))
    if bytes(section[: len(_IPC_MAGIC)]) != _IPC_MAGIC or not schema.equals(PACKED_SCHEMA):
        raise ValueError("they are of other columns")
    for message in messages:
        if message.type != "record batch" or _is_compressed(bytes(message.metadata)):
            raise ValueError("they are compressed")
        yield pa.ipc.read_record_batch(message, schema)


def _is_compressed(metadata: bytes) -> bool:
    """Whether a message of a record batch, a FlatBuffer that Arrow has checked, says that its body is compressed."""

    def place(table: int, field: int) -> int:
        """Where a field of a table lies; 0 where the table does without."""
        fields = table - struct.unpack_from("<i", metadata, table)[0]
        length, at = struct.unpack_from("<H", metadata, fields)[0], 4 + 2 * field
        offset = struct.unpack_from("<H", metadata, fields + at)[0] if at < length else 0
        return offset and table + offset

    header = place(struct.unpack_from("<I", metadata)[0], 2)  # of Message: version, header type, header
    batch = header + struct.unpack_from("<I", metadata, header)[0]
    return place(batch, 3) != 0  # of RecordBatch: length, nodes, buffers, compression


class Row(Mapping):
    """A record that reads a cell when it is asked for: most transforms need none of the twelve."""

    __slots__ = ("_columns", "_i")

    def __init__(self, columns: Mapping[str, pa.Array], i: int):
        self._columns, self._i = columns, i

    def __getitem__(self, name: str):
        return self._columns[name][self._i].as_py()

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


class PackedSource:
    """Samples of a packed file, as a Source (`util.data.sources`) that also shows its canvases where they lie.

    rows: (n,) their numbers in the file; default: all. labelled: False hides the identities. Sent to another process,
    it opens the file there. picture_size: (width, height) of every picture, px.
    """

    def __init__(self, name: str, file: PackedFile, rows: np.ndarray | None = None, labelled: bool = True):
        self.name, self.file, self.labelled = name, file, labelled
        self.rows = np.arange(file.header.samples) if rows is None else rows
        self.picture_size = (file.header.canvas, file.header.canvas)
        # in one piece but for text beyond 2 GiB, whose pieces are left where they lie in the file
        columns = {column: file.table.column(column) for column in COLUMNS}
        self._columns = {name: one.chunk(0) if one.num_chunks == 1 else one for name, one in columns.items()}
        if not labelled:
            self._columns["identity"] = pa.nulls(len(file.table), pa.string())
        bad = file.table.column("bad")
        self._bad = {row: bad[row].as_py() for row in np.flatnonzero(np.asarray(bad.is_valid())).tolist()}
        described = hashlib.blake2b(f"{file.fingerprint} {labelled}".encode(), digest_size=8)
        described.update(np.ascontiguousarray(self.rows, "<i8"))
        self.fingerprint = described.hexdigest()

    def __reduce__(self):
        return _reopened, (self.name, str(self.file.path), self.file.fingerprint, self.rows, self.labelled)

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, i: int) -> Row:
        """What is known of sample `i`; boxes in px of its canvas."""
        return Row(self._columns, int(self.rows[i]))

    def column(self, name: str) -> list:
        """One column of the manifest, in row order; boxes in px of the canvases."""
        return self.array(name).to_pylist()

    def array(self, name: str) -> pa.Array:
        """The same as an Arrow array."""
        column = self._columns[name]
        if isinstance(column, pa.Array):
            return column.take(pa.array(self.rows))
        # to take from pieces Arrow puts them together first, which text beyond 2 GiB does not fit
        return one_array(wide(column).take(pa.array(self.rows)))

    def stamp(self) -> str:
        """The fingerprint: the checksums of the pixels are in it."""
        return self.file.fingerprint

    def view(self, i: int) -> np.ndarray:
        """The canvas of sample `i` where it lies in the file: uint8 (C, C, 3), read-only.

        Raises BadImage where the picture could not be decoded when it was packed.
        """
        row = int(self.rows[i])
        if row in self._bad:
            raise BadImage(self._columns["file_name"][row].as_py(), self._bad[row])
        return self.file.canvas(row)

    def load(self, i: int) -> Image.Image:
        """A copy of the canvas, RGB. Raises BadImage as `view` does."""
        return Image.fromarray(self.view(i))


def _reopened(name: str, path: str, fingerprint: str, rows: np.ndarray, labelled: bool) -> PackedSource:
    file = PackedFile(path, checked=True)
    if file.fingerprint != fingerprint:
        raise UserError(f"{path} was replaced while it was read: start again")
    return PackedSource(name, file, rows, labelled)
