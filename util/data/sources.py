"""Open whatever a `--data_path` names: a folder, prepared or not, a Hub data set, a packed file.

A source hands out records (the columns of `util.data.manifest`) and decoded pictures by number;
`util.data.roles` says which of the rows a role gets.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from util.data.arrow_sink import ArrowSink
from util.data.hub import PREFIX, open_hub
from util.data.images import SUFFIXES, Picture, decode_image
from util.data.manifest import MANIFEST_NAME, SCHEMA, Manifest, cells, one_array, read_manifest
from util.data.packed import PackedFile, PackedSource
from util.data.roles import ROLES, MissingRole, in_part, role_of_name, share_of
from util.run.errors import UserError

log = logging.getLogger(__name__)

LABELS = ("auto", "none", "folders", "metadata")
MAPS_FOLDER, MAPS_NOTE = "maps", "maps.json"  # semantic maps (`util.data.maps`): a folder of the data, a note in it


class Source(Protocol):
    """Pictures by number. It can be sent to worker processes (pickled).

    name: the data path, for messages. fingerprint: 16 hex digits that change with the list of samples.

    Those that hold an Arrow table also have `array(name)`, a column as an Arrow array; `column_array` asks.
    A packed one also has `view(i)`, the decoded picture where it lies, uint8 (H, W, 3), and `picture_size`, (width,
    height) in px of all its pictures. Wrappers have what the source in them has; `reader` asks.
    """

    name: str
    fingerprint: str

    def __len__(self) -> int: ...

    def record(self, i: int) -> Mapping:
        """What is known of sample `i`: a value or None for each column of the manifest."""
        ...

    def column(self, name: str) -> list:
        """One column of the manifest for all samples, None where the value is not known."""
        ...

    def stamp(self) -> str:
        """16 hex digits that change when a picture is replaced, under whatever name."""
        ...

    def load(self, i: int) -> Image.Image:
        """The picture of sample `i`, RGB. Raises BadImage where it cannot be decoded."""
        ...


class FolderSource:
    """Pictures in files, listed by a manifest. sizes: bytes of each file, for the fingerprint only."""

    def __init__(self, name: str, manifest: Manifest, sizes: np.ndarray | None = None):
        self.name, self.manifest = name, manifest
        self.fingerprint = _fingerprint(manifest.table, sizes)

    def __len__(self) -> int:
        return len(self.manifest)

    def record(self, i: int) -> dict:
        """Row `i` of the manifest."""
        return self.manifest.row(i)

    def column(self, name: str) -> list:
        """One column of the manifest, in row order."""
        return self.array(name).to_pylist()

    def array(self, name: str) -> pa.Array:
        """The same as an Arrow array, not copied."""
        return one_array(self.manifest.table.column(name))

    def stamp(self) -> str:
        """16 hex digits from the size and the time of every file."""
        digest, root = hashlib.blake2b(digest_size=8), os.fspath(self.manifest.root)
        for name in cells(self.manifest.table.column("file_name")):
            try:
                found = os.stat(os.path.join(root, name))
                digest.update(f"{found.st_size} {found.st_mtime_ns}\0".encode())
            except OSError:
                digest.update(b"missing\0")
        return digest.hexdigest()

    def load(self, i: int) -> Image.Image:
        """The picture of row `i`, RGB. Raises BadImage where it cannot be decoded."""
        return decode_image(self.manifest.path(i))


def spread(total: int, wanted: int) -> list[int]:
    """`wanted` indices evenly spread over range(total); all of them if wanted is 0 or too many."""
    wanted = min(wanted, total) or total
    return [i * total // wanted for i in range(wanted)]


def origins(source: "Source") -> np.ndarray:
    """What each picture was cut from, itself where that is not known: (N,) str. Those of one are not independent."""
    columns = (source.column(name) for name in ("source", "file_name"))
    return np.array([origin or file_name for origin, file_name in zip(*columns, strict=True)])


class Subset:
    """Some samples of a source. chosen: (n,) their numbers there, in the order they get here."""

    def __init__(self, source: Source, chosen: np.ndarray):
        self.source, self.chosen, self.name = source, np.asarray(chosen, dtype=np.int64), source.name
        digest = hashlib.blake2b(source.fingerprint.encode() + self.chosen.tobytes(), digest_size=8)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.chosen)

    def record(self, i: int) -> dict:
        """The record of the sample."""
        return self.source.record(int(self.chosen[i]))

    def column(self, name: str) -> list:
        """One column of the manifest for the chosen samples."""
        return self.array(name).to_pylist()

    def array(self, name: str) -> pa.Array:
        """The same as an Arrow array."""
        return column_array(self.source, name).take(pa.array(self.chosen))

    def stamp(self) -> str:
        """That of the whole source."""
        return self.source.stamp()

    def load(self, i: int) -> Image.Image:
        """The picture of the sample."""
        return self.source.load(int(self.chosen[i]))

    @property
    def view(self) -> Callable[[int], np.ndarray]:
        """`view` of the whole source. Raises AttributeError where that has none, so that this has none either."""
        view, chosen = self.source.view, self.chosen
        return lambda i: view(int(chosen[i]))

    @property
    def picture_size(self) -> tuple[int, int]:
        """That of the whole source. Raises AttributeError where that has none."""
        return self.source.picture_size


def reader(source: Source) -> Callable[[int], Picture]:
    """What gives the picture of sample `i` at least cost: `view` where the source has it, else `load`.

    Raises BadImage where the picture cannot be decoded.
    """
    return getattr(source, "view", None) or source.load


# a source without `array` may know boxes to more digits than a manifest keeps
BOX_TYPES = {"box": pa.list_(pa.float64()), "eyes": pa.list_(pa.list_(pa.float64()))}


def column_array(source: Source, name: str) -> pa.Array:
    """One column of the manifest as an Arrow array: of a million rows no Python objects are made where it is `array`.

    Those would also be copied in every worker process as soon as they are looked at.
    """
    if array := getattr(source, "array", None):
        return array(name)
    return pa.array(source.column(name), BOX_TYPES.get(name, pa.string()))


def open_source(data_path: str | Path, role: str, *, labels: str = "auto", val_fraction: float = 0.1) -> Source:
    """Open `data_path` for a role: "train", "val", "test", "open_val", "open_test" or "novel".

    data_path: a prepared folder; class folders, with or without train/, val/ and test/; a flat or nested folder
    of pictures; "hf:OWNER/NAME[:SPLIT]" or "hf:FOLDER[:SPLIT]", read by Hugging Face's library; a packed file, which
    gives a role the same samples as what was packed. labels: what a
    nested folder means: "folders" (the first folder is the identity), "none" (no labels), "metadata" (there
    must be a metadata.parquet), "auto" (metadata.parquet, else class folders where every picture lies exactly
    one folder deep, else no labels). val_fraction: in 0..1. Raises UserError where there is nothing to read, of the
    kind MissingRole where the data are there but not for this role.
    """
    if role not in ROLES:
        raise ValueError(f"role {role!r} is not one of {', '.join(ROLES)}")
    _check_labels(labels)
    if not 0.0 <= val_fraction < 1.0:
        raise UserError(f"--val_fraction {val_fraction} is out of range: give a fraction from 0 to below 1")
    name = str(data_path)
    if name.startswith(PREFIX):
        return open_hub(name, role, val_fraction)
    if Path(name).is_file():
        return _open_packed(name, role, labels, val_fraction)
    manifest, sizes = open_folder(name, labels)
    rows = _role_rows(name, manifest.table, split_key_column, role, val_fraction)
    chosen = np.zeros(len(manifest), dtype=bool)
    chosen[rows] = True
    manifest = manifest.keep(chosen)
    return FolderSource(name, manifest, None if sizes is None else sizes[manifest.rows])


def _check_labels(labels: str) -> None:
    if labels not in LABELS:
        raise UserError(f"--labels {labels} is not known: choose one of {', '.join(LABELS)}")


def open_folder(name: str, labels: str = "auto") -> tuple[Manifest, np.ndarray | None]:
    """Every row of a folder, prepared or not, and the sizes of its files (N,) in bytes, None if it is prepared.

    labels: as in `open_source`. Raises UserError where there is nothing to read.
    """
    _check_labels(labels)
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"{name} does not exist: check --data_path, or make the data with a script of datasets/")
    if labels in ("auto", "metadata") and (folder / MANIFEST_NAME).is_file():
        return read_manifest(folder), None
    if labels == "metadata":
        raise UserError(f"{name} holds no {MANIFEST_NAME}: run datasets/prepare_folder.py, or give other --labels")
    return list_folder(folder, labels)


def split_keys(table: pa.Table) -> list[str]:
    """The name of each row of a manifest whose hash decides between train and val.

    Pictures cut from one source go to one side, so that no near-copy of a training picture is held out.
    """
    return split_key_column(table).to_pylist()


def split_key_column(table: pa.Table) -> pa.ChunkedArray:
    """The same as an Arrow column."""
    source, file_name = table.column("source"), table.column("file_name")
    has_source = pc.fill_null(pc.not_equal(source, ""), False)
    return pc.if_else(has_source, source, file_name)


def _open_packed(name: str, role: str, labels: str, val_fraction: float) -> PackedSource:
    file = PackedFile(name)
    packed_with = file.header.plan["labels"]
    if labels not in ("auto", "none", packed_with):
        raise UserError(f"{name} was packed with --labels {packed_with}: leave out --labels {labels}, or pack again")
    rows = _role_rows(name, file.table, lambda part: part.column("split_key"), role, val_fraction)
    return PackedSource(name, file, rows, labelled=labels != "none")


def _role_rows(
    name: str, table: pa.Table, keys: Callable[[pa.Table], pa.ChunkedArray], role: str, val_fraction: float
) -> np.ndarray:
    """The numbers (n,) of the rows that a role gets. keys: of some rows, the names that are hashed."""
    present = set(table.column("split").unique().to_pylist())
    available = [role for role, splits in ROLES.items() if present.intersection(splits)]
    share = share_of(role, available, name)
    if share is None:
        found = ", ".join(sorted(present)) or "no rows"
        raise MissingRole(f"{name} has nothing for {role!r}, only {found}: prepare it with such a split")
    inside = pc.is_in(table.column("split"), value_set=pa.array(ROLES[share.of], pa.string()))
    rows = np.flatnonzero(np.asarray(inside))
    if share.part != "all":
        rows = rows[in_part(cells(keys(table.filter(inside))), share.part, val_fraction)]
    if not len(rows):
        raise MissingRole(f"{name} has no picture left for {role!r} at --val_fraction {val_fraction}: change it")
    return rows


def list_folder(folder: Path, labels: str = "auto") -> tuple[Manifest, np.ndarray]:
    """The pictures under a folder as a manifest, sorted by path, and their sizes (N,) in bytes.

    Top folders called train, val (or valid, validation, dev), test, open_val, open_test and novel are splits, where
    there is a train/ or nothing else; all is train otherwise. labels: as in `open_source`. Raises UserError if there is
    no picture.
    """
    names, sizes, others = _scan(folder)
    if not names:
        found = f"{others} other files" if others else "it is empty"
        raise UserError(f"{folder} holds no pictures ({found}): give a folder of {', '.join(sorted(SUFFIXES))} files")
    splits = _split_folders(names)
    if splits:
        inside = [i for i, name in enumerate(names) if name.split("/", 1)[0] in splits]
        if len(inside) < len(names):
            log.warning("%s: %d pictures outside %s are not used", folder, len(names) - len(inside), ", ".join(splits))
        names, sizes = [names[i] for i in inside], sizes[inside]
    parents = [name.split("/")[1 if splits else 0 : -1] for name in names]
    identities = _identities(folder, parents, labels)
    columns = {
        "sample_id": names,
        "file_name": names,
        "identity": identities,
        "split": [splits[name.split("/", 1)[0]] for name in names] if splits else ["train"] * len(names),
    }
    try:
        arrays = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    except UnicodeEncodeError as error:
        raise UserError(f"{folder}: the file name {error.object!r} is not valid UTF-8: rename it") from error
    table = pa.Table.from_arrays(
        [arrays.get(field.name, pa.nulls(len(names), field.type)) for field in SCHEMA], schema=SCHEMA
    )
    return Manifest(table, folder, folder, np.arange(len(names)), {}), sizes


def _scan(folder: Path) -> tuple[list[str], np.ndarray, int]:
    """Relative paths of the pictures under `folder`, sorted; their sizes in bytes; the number of other files."""
    found, others, visited = [], 0, set()
    pending = [("", os.fspath(folder))]
    while pending:
        prefix, path = pending.pop()
        real = os.path.realpath(path)
        if real in visited:  # a symbolic link that leads back
            continue
        visited.add(real)
        try:
            entries = list(os.scandir(path))
        except OSError as error:
            raise UserError(f"{path} cannot be listed ({error.strerror}): check its permissions") from error
        for entry in entries:
            if entry.name.startswith((".", "__MACOSX")):
                continue
            if entry.is_dir():
                if prefix or not _are_maps(entry):
                    pending.append((f"{prefix}{entry.name}/", entry.path))
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                found.append((prefix + entry.name, _size(entry)))
            else:
                others += 1
    found.sort()
    return [name for name, _ in found], np.array([size for _, size in found], dtype=np.int64), others


def _are_maps(entry: os.DirEntry) -> bool:
    """Whether a folder holds maps of the data: the sheet in it is no picture of the data."""
    return os.path.isfile(os.path.join(entry.path, MAPS_NOTE))


def _size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link that leads nowhere: listed, so that it is counted as a bad picture when it is read
        return -1


def _split_folders(names: list[str]) -> dict[str, str]:
    """The top folders that are splits, and the role of each; empty where the top folders mean something else."""
    tops = {name.split("/", 1)[0] if "/" in name else "" for name in names}
    roles = {top: role for top in sorted(tops) if (role := role_of_name(top))}
    return roles if "train" in roles.values() or len(roles) == len(tops) else {}


def _identities(folder: Path, parents: list[list[str]], labels: str) -> list[str | None]:
    """The identity of each picture from the folders it lies in."""
    depths = {len(parts) for parts in parents}
    if labels == "folders":
        if 0 in depths:
            raise UserError(f"{folder} has pictures outside the class folders: move them, or give --labels none")
        return [parts[0] for parts in parents]
    if labels == "auto" and depths == {1}:
        return [parts[0] for parts in parents]
    if labels == "auto" and depths != {0}:
        log.warning("%s: nested folders are read without labels; --labels folders takes the first as identity", folder)
    return [None] * len(parents)


def _fingerprint(table: pa.Table, sizes: np.ndarray | None) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for batch in table.combine_chunks().to_batches():
        sink = _Digested(digest, skipped=batch.schema.serialize().size)
        with pa.ipc.new_stream(pa.PythonFile(sink, "w"), batch.schema) as stream:
            stream.write_batch(batch)
            sink.is_done = True  # what ends a stream does not count
    digest.update(b"" if sizes is None else sizes.tobytes())
    return digest.hexdigest()


class _Digested(ArrowSink):
    """Digests all but the first bytes: those of `batch.serialize()`, without a copy of the batch."""

    def __init__(self, digest, skipped: int):
        self.digest, self.skipped, self.is_done = digest, skipped, False

    def take(self, data) -> None:
        data = memoryview(data)
        counted = data[min(self.skipped, len(data)) :]
        self.skipped -= len(data) - len(counted)
        if not self.is_done:
            self.digest.update(counted)
