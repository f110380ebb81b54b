"""The prepared folder: `metadata.parquet`, one row for each sample (a picture, or one face in a picture).

It follows the Hugging Face image-folder convention. `file_name` is relative to the folder the
file lies in, or to the `image_root` in the file's key-value metadata, so that pictures on
read-only media are neither copied nor moved. `mask_file` is relative to the folder itself, where
masks made later can be written.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from util.run.errors import UserError
from util.run.files import write_atomically
from util.run.untrusted import read_parquet

MANIFEST_NAME = "metadata.parquet"
SPLITS = ("pretrain", "train", "val", "test", "open_val", "open_test", "novel", "figures")

_BOX = pa.list_(pa.float32())
SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("file_name", pa.string(), nullable=False),
        pa.field("identity", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("box", _BOX),  # face, x1 y1 x2 y2, px of the stored image
        pa.field("eyes", pa.list_(_BOX)),
        pa.field("source", pa.string()),  # what the picture was cut from; never split across train and test
        pa.field("style", pa.string()),
        pa.field("pose", pa.string()),
        pa.field("occlusion", pa.string()),
        pa.field("expression", pa.string()),
        pa.field("mask_file", pa.string()),
    ]
)
COLUMNS = tuple(SCHEMA.names)
REQUIRED = tuple(field.name for field in SCHEMA if not field.nullable)
LONGEST_TEXT = 2**31 - 1  # bytes that an array with 32-bit offsets can hold
SLICE = 65_536  # rows that are Python objects at a time


@dataclass(frozen=True)
class Manifest:
    """The rows of a prepared folder, or a selection of them.

    table: the columns of COLUMNS in that order. folder: where metadata.parquet lies. root: what
    `file_name` is relative to. rows: (len,) int64, the row number in the file of each row here, which
    is also its row in `maps/NAME.npy`. metadata: the file's own key-value pairs.
    """

    table: pa.Table
    folder: Path
    root: Path
    rows: np.ndarray
    metadata: dict[str, str]

    def __len__(self) -> int:
        return self.table.num_rows

    def row(self, i: int) -> dict:
        """Row `i` as a dict with a key for each of COLUMNS; None where the value is not known."""
        return {name: self.table.column(name)[i].as_py() for name in COLUMNS}

    def path(self, i: int) -> Path:
        """Where the picture of row `i` lies."""
        return self.root / self.table.column("file_name")[i].as_py()

    def mask_path(self, i: int) -> Path | None:
        """Where the foreground mask of row `i` lies, None if it has none."""
        name = self.table.column("mask_file")[i].as_py()
        return None if name is None else self.folder / name

    def select(self, splits: Sequence[str]) -> "Manifest":
        """The rows whose split is one of `splits`, in file order."""
        return self.keep(np.asarray(pc.is_in(self.table.column("split"), value_set=pa.array(splits, pa.string()))))

    def keep(self, chosen: np.ndarray) -> "Manifest":
        """The rows where `chosen` (len,) bool is true, in file order."""
        if chosen.all():
            return self
        table = self.table.filter(pa.array(chosen)).combine_chunks()
        return Manifest(table, self.folder, self.root, self.rows[chosen], self.metadata)


def write_manifest(
    folder: str | Path,
    rows: Iterable[Mapping],
    image_root: str | Path | None = None,
    extra: Mapping[str, str] | None = None,
) -> Path:
    """Write `folder`/metadata.parquet and return its path. An existing file is replaced in one step.

    rows: mappings with keys of COLUMNS; a key that is missing means null. image_root: absolute, or relative to
    `folder` (default: `folder` itself). extra: further key-value metadata. Raises UserError where a row does not
    fit the schema (unknown key, repeated sample_id, unknown split, box that is not x1 < x2, y1 < y2).
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    table = to_table(rows, path)
    _validate(table, folder, _root(folder, image_root), path)
    metadata = dict(extra or {})
    if image_root is not None:
        metadata["image_root"] = str(image_root)
    folder.mkdir(parents=True, exist_ok=True)
    table = table.replace_schema_metadata(metadata)
    write_atomically(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))
    return path


def read_manifest(folder: str | Path) -> Manifest:
    """Read `folder`/metadata.parquet. Columns that are not required may be missing and read as null.

    Raises UserError that names the column or the row at fault, also where a file_name leaves its root. A root outside
    `folder` is named in a printed line.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a prepared folder, or make one with datasets/prepare_folder.py")
    found = path.stat()
    manifest = _read(folder, path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))
    return replace(manifest, rows=manifest.rows.copy(), metadata=dict(manifest.metadata))


@lru_cache(maxsize=1)  # a run opens its data once for each role, and a million rows take a second each time
def _read(folder: Path, path: Path, version: tuple[int, ...]) -> Manifest:
    """The manifest at `path`. version: changes with the file."""
    try:
        table = read_parquet(path, COLUMNS)
        metadata = _own_metadata(table.schema)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({error}): prepare the folder again") from error
    if "\0" in metadata.get("image_root", ""):
        raise UserError(f"{path} has an image_root with a zero byte in it: prepare the folder again")
    root = _root(folder, metadata.get("image_root"))
    table = _to_schema(table, path)
    _validate(table, folder, root, path)
    if not _is_below(root, folder):  # whoever wrote the file chose it, and the pictures may be anybody's
        print(f"{path}: pictures are read from {root}")
    return Manifest(table, folder, root, np.arange(table.num_rows), metadata)


def _root(folder: Path, image_root: str | Path | None) -> Path:
    return folder if image_root is None else folder / image_root  # an absolute image_root stands alone


def _is_below(root: Path, folder: Path) -> bool:
    base, found = (os.path.join(os.path.abspath(each), "") for each in (folder, root))
    return found.startswith(base)


def _own_metadata(schema: pa.Schema) -> dict[str, str]:
    # other writers leave binary blocks there (b"ARROW:schema", b"pandas"); only plain text is ours
    pairs = (schema.metadata or {}).items()
    return {key.decode(): value.decode() for key, value in pairs if key.isascii() and not key.startswith(b"ARROW:")}


def cells(column: pa.Array | pa.ChunkedArray) -> Iterator:
    """The values of a column, as Python objects for some rows at a time: all at once are 60 bytes each and more."""
    for first in range(0, len(column), SLICE):
        yield from column.slice(first, SLICE).to_pylist()


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array, not copied where it is one already; of text beyond 2 GiB one with 64-bit offsets."""
    return (wide(column) if column.num_chunks > 1 else column).combine_chunks()


def wide(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column; of text beyond 2 GiB with 64-bit offsets, so that its pieces can be put together."""
    if pa.types.is_string(column.type) and (pc.sum(pc.binary_length(column)).as_py() or 0) > LONGEST_TEXT:
        return column.cast(pa.large_string())
    return column


def to_table(rows: Iterable[Mapping], path: Path | None = None) -> pa.Table:
    """Rows with keys of COLUMNS as a table of SCHEMA; path: for messages. Raises UserError where one does not fit.

    They are taken some at a time, so that a generator of them never is all in memory.
    """
    rows = iter(rows)
    parts = []
    while part := list(islice(rows, SLICE)):
        parts += _some_rows(part, path).to_batches()
    return pa.Table.from_batches(parts, SCHEMA).combine_chunks()


def _some_rows(rows: list[Mapping], path: Path | None) -> pa.Table:
    unknown = sorted({key for row in rows for key in row} - set(COLUMNS))
    if unknown:
        raise UserError(f"{path}: unknown column {unknown[0]!r}: the columns are {', '.join(COLUMNS)}")
    columns = []
    for field in SCHEMA:
        try:
            columns.append(pa.array([row.get(field.name) for row in rows], field.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise UserError(f"{path}: column {field.name!r} must hold {field.type} ({error})") from error
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _to_schema(table: pa.Table, path: Path) -> pa.Table:
    """The columns of SCHEMA from a table that another program may have written."""
    columns = []
    for field in SCHEMA:
        if field.name not in table.column_names:
            if not field.nullable:
                raise UserError(f"{path} has no column {field.name!r}: it must hold {', '.join(REQUIRED)}")
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        try:
            column = table.column(field.name).cast(field.type)
        except KeyError as error:
            raise UserError(f"{path} has the column {field.name!r} twice: keep one") from error
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            found = table.schema.field(field.name).type
            raise UserError(f"{path}: column {field.name!r} is {found}, it must be {field.type}") from error
        columns.append(column)
    # of the table, which leaves text beyond 2 GiB in several pieces; of a column it fails there
    return pa.Table.from_arrays(columns, schema=SCHEMA).combine_chunks()


def _validate(table: pa.Table, folder: Path, root: Path, path: Path) -> None:
    for name in REQUIRED:
        if table.column(name).null_count:
            raise UserError(f"{path}: column {name!r} has empty cells: give each row a value")
    ids = table.column("sample_id")
    if pc.count_distinct(ids).as_py() != len(ids):
        counts = pc.value_counts(one_array(ids))
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"]
        raise UserError(f"{path}: column 'sample_id' holds {repeated} more than once: make the ids unique")
    for split in pc.unique(table.column("split")).to_pylist():
        if split not in SPLITS:
            raise UserError(f"{path}: column 'split' holds {split!r}: use one of {', '.join(SPLITS)}")
    _validate_boxes(table.column("box").combine_chunks(), "box", path)
    _validate_boxes(pc.list_flatten(table.column("eyes").combine_chunks()), "eyes", path)
    _validate_inside(table.column("file_name"), root, "file_name", path)
    _validate_inside(table.column("mask_file"), folder, "mask_file", path)


def _validate_boxes(boxes: pa.Array | pa.ChunkedArray, name: str, path: Path) -> None:
    boxes = boxes.drop_null()
    if not len(boxes):
        return
    if pc.any(pc.not_equal(pc.list_value_length(boxes), 4)).as_py():
        raise UserError(f"{path}: column {name!r} holds a box without exactly 4 numbers: write x1, y1, x2, y2 in px")
    flat = pc.list_flatten(boxes)
    corners = flat.to_numpy(zero_copy_only=False).reshape(-1, 4)
    good = np.isfinite(corners).all(1) & (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])
    if not good.all():
        bad = corners[~good][0].tolist()
        raise UserError(f"{path}: column {name!r} holds {bad}: a box is x1, y1, x2, y2 with x1 < x2 and y1 < y2")


def _validate_inside(names: pa.ChunkedArray, root: Path, column: str, path: Path) -> None:
    # Only names that could leave the root are resolved, so a million rows cost one vectorised scan. Symbolic
    # links are followed: whoever put them under the root chose where they lead.
    suspicious = pc.match_substring_regex(names, r"\.\.|^[/\\]|^[A-Za-z]:|^$|\x00")
    for name in names.filter(suspicious).to_pylist():
        if not is_inside(name, root):
            raise UserError(f"{path}: {column} {name!r} leads outside {root}: keep pictures under the image_root")


def is_inside(name: str, root: str | Path) -> bool:
    """Whether a relative file name stays below `root`, by its spelling: the disk is not asked."""
    base = os.path.join(os.path.abspath(root), "")
    return "\0" not in name and os.path.normpath(os.path.join(base, name)).startswith(base)
