"""Semantic maps beside a data set: where in each picture the face, the eyes and the figure are.

MAPS/NAME.npy holds uint8 (N, 32, 32), a map over the whole picture for each row of the data, 0..255 the share of a
cell that is covered. MAPS/rows.u64 tells which row each is of, and MAPS/maps.json how the maps were had.
`datasets/prepare_maps.py` makes them; a packed file has its own.
"""

import hashlib
import logging
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from util.data.manifest import Manifest
from util.data.packed import MAP_CELLS, PackedSource, checksum
from util.data.sources import MAPS_FOLDER, MAPS_NOTE, FolderSource, Source, Subset, column_array
from util.run.errors import UserError
from util.run.untrusted import read_json

log = logging.getLogger(__name__)

ROWS_FILE = "rows.u64"  # an array file too, but not a map: only those end in .npy


def row_keys(sample_ids: Iterable[str]) -> np.ndarray:
    """What tells the rows of a data set apart: uint64 (N,), a hash of each sample_id."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in sample_ids)
    return np.frombuffer(digests, "<u8")


def read_map(path: Path) -> np.ndarray:
    """The map file `path`, uint8 (N, 32, 32), memory-mapped. Raises UserError where it is something else."""
    values = _read_array(path)
    if values.dtype != np.uint8 or values.shape[1:] != (MAP_CELLS, MAP_CELLS):
        raise UserError(
            f"{path} is {values.dtype} {values.shape}, not uint8 (N, {MAP_CELLS}, {MAP_CELLS}), a map for each row of "
            "the data: make it again with datasets/prepare_maps.py"
        )
    return values


def _read_array(path: Path) -> np.ndarray:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(values, np.ndarray):
            raise ValueError("it is an archive of arrays")
        return values
    except Exception as error:  # on a damaged header NumPy fails as its parser does, tokenize.TokenError included
        raise UserError(
            f"{path} cannot be read ({error}): make it again with datasets/prepare_maps.py --overwrite"
        ) from error


def check_rows(folder: Path, manifest: Manifest) -> None:
    """Raise UserError where the maps in `folder` are of other rows than those of `manifest`, or in another order."""
    if not (folder / ROWS_FILE).is_file():
        log.warning("%s has no %s: its maps are taken to be in the order of the rows", folder, ROWS_FILE)
        return
    kept, rows = _read_array(folder / ROWS_FILE), manifest.rows
    ids = manifest.table.column("sample_id")
    if kept.ndim != 1 or kept.dtype.kind != "u":
        raise UserError(f"{folder / ROWS_FILE} is no list of rows: make the maps again with --overwrite")
    if len(rows) and (rows.max() >= len(kept) or not all(_are_those(kept, rows, ids))):
        raise UserError(
            f"{folder} holds maps of other rows than the data has now: make them again with "
            "datasets/prepare_maps.py --overwrite"
        )


def _are_those(kept: np.ndarray, rows: np.ndarray, ids: pa.ChunkedArray, step: int = 65_536) -> Iterable[bool]:
    for first in range(0, len(rows), step):  # never a million strings at once
        part = slice(first, first + step)
        yield np.array_equal(kept[rows[part]], row_keys(ids.slice(first, step).to_pylist()))


class Maps:
    """Semantic maps of the samples of a source. Sent to another process, it opens the files there.

    names: of the C maps. rows: (n,) where those of each sample lie. fingerprint: 16 hex digits that change with them.
    """

    def __init__(self, names: Sequence[str], home: Path | PackedSource, rows: np.ndarray, fingerprint: str):
        self.names, self.rows, self.fingerprint, self._home = tuple(names), rows, fingerprint, home
        self._arrays: list[np.ndarray] | None = None

    def __getstate__(self) -> dict:
        return {**vars(self), "_arrays": None}  # a memory map would be sent as a copy

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, i: int) -> np.ndarray:
        """The maps of sample `i`: uint8 (C, 32, 32) over the whole picture, 0..255 the share of a cell covered."""
        if self._arrays is None:
            self._arrays = [self._open(name) for name in self.names]
        return np.stack([values[self.rows[i]] for values in self._arrays])

    def _open(self, name: str) -> np.ndarray:
        if isinstance(self._home, Path):
            return read_map(self._home / f"{name}.npy")
        return self._home.file.semantic_map(name)


def open_maps(source: Source, names: Sequence[str], folder: str | Path | None = None) -> Maps:
    """The maps `names` of a source: a folder, prepared or not, a packed file, or a Subset of either.

    folder: where they lie; default: the folder "maps" of the data, or the packed file itself. Raises UserError where
    they are missing, damaged or of other rows than the source has, or where the source cannot have any.
    """
    base, chosen = _base(source)
    if isinstance(base, PackedSource):
        return _packed_maps(base, chosen, names, folder)
    if not isinstance(base, FolderSource):
        raise UserError(
            f"{source.name} has no semantic maps: they are over whole pictures of a folder or a packed file, so leave "
            "out --face_padding and hf:, or choose another --masking"
        )
    manifest = base.manifest
    home = manifest.folder / MAPS_FOLDER if folder is None else Path(folder)
    if missing := [name for name in names if not (home / f"{name}.npy").is_file()]:
        raise UserError(_advice(f"{home} has no map", missing, source.name, None if folder is None else home))
    for name in names:
        if len(manifest) and len(values := read_map(home / f"{name}.npy")) <= manifest.rows.max():
            raise UserError(
                f"{home / name}.npy holds {len(values)} maps, too few for the data: make them again with "
                "datasets/prepare_maps.py --overwrite"
            )
    check_rows(home, manifest)
    rows = manifest.rows if chosen is None else manifest.rows[chosen]
    return Maps(names, home, rows, _fingerprint(_checksums(home, names)))


def _base(source: Source) -> tuple[Source, np.ndarray | None]:
    """The source that a chain of wrappers leads to, and which of its samples they show; None: all."""
    chosen = None
    while isinstance(source, (Subset, MappedSource)):
        if isinstance(source, Subset):
            chosen = source.chosen if chosen is None else source.chosen[chosen]
        source = source.source
    return source, chosen


def _packed_maps(base: PackedSource, chosen: np.ndarray | None, names: Sequence[str], folder) -> Maps:
    if folder is not None:
        raise UserError(f"{base.name} is packed, and shows its own maps: leave out --maps {folder}")
    if missing := [name for name in names if name not in base.file.names("maps")]:
        raise UserError(_advice(f"{base.name} has no map", missing, "DIR", None) + ", and pack DIR again")
    sums = [base.file.header.sections[f"maps/{name}"][2] for name in names]
    return Maps(names, base, base.rows if chosen is None else base.rows[chosen], _fingerprint(sums))


def _advice(problem: str, missing: list[str], data: str, out: Path | None) -> str:
    where = "" if out is None else f" --out {out}"
    listed = " ".join(missing)
    return f"{problem} {listed}: run datasets/prepare_maps.py --data_path {data} --maps {listed}{where}"


def file_stamp(path: Path) -> list[int]:
    """What changes when a file is replaced: its size in bytes and its time in ns."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _checksums(home: Path, names: Sequence[str]) -> list[str]:
    """That of each map, from maps.json if the file is the one it saw, as a million rows take seconds to read."""
    try:
        note = read_json(home / MAPS_NOTE)
        sums = {name: note["checksums"][name] for name, stamp in note["stamps"].items() if _is(home, name, stamp)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sums = {}
    return [sums.get(name) or checksum(read_map(home / f"{name}.npy")).hex() for name in names]


def _is(home: Path, name: str, stamp: list[int]) -> bool:
    path = home / f"{name}.npy"
    return path.is_file() and file_stamp(path) == stamp


def _fingerprint(parts: Iterable[str]) -> str:
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=8).hexdigest()


def find_maps(source: Source, names: Iterable[str], folder: str | None) -> tuple[Maps | None, dict[str, str]]:
    """The semantic maps of these names that the data have, None if none, and why the others are missing.

    folder: of --maps; default: DATA/maps. UserError if it is given and holds none of them.
    """
    found, missing = [], {}
    for name in names:
        try:
            open_maps(source, (name,), folder)
            found.append(name)
        except UserError as error:
            missing[name] = str(error)
    if folder and missing and not found:
        raise UserError(next(iter(missing.values())))
    return (open_maps(source, tuple(found), folder) if found else None), missing


class MappedSource:
    """A source whose records also have "maps", uint8 (C, 32, 32), as `Maps.of` gives them."""

    def __init__(self, source: Source, maps: Maps):
        self.source, self.maps, self.name = source, maps, source.name
        self.fingerprint = _fingerprint((source.fingerprint, maps.fingerprint, *maps.names))

    def __len__(self) -> int:
        return len(self.source)

    def record(self, i: int) -> Mapping:
        """The record of the sample, with its maps."""
        return ChainMap({"maps": self.maps.of(i)}, self.source.record(i))

    def column(self, name: str) -> list:
        """One column of the manifest."""
        return self.source.column(name)

    def array(self, name: str) -> pa.Array:
        """The same as an Arrow array."""
        return column_array(self.source, name)

    def stamp(self) -> str:
        """That of the source."""
        return self.source.stamp()

    def load(self, i: int) -> Image.Image:
        """The picture of the sample."""
        return self.source.load(i)

    @property
    def view(self) -> Callable[[int], np.ndarray]:
        """`view` of the source. Raises AttributeError where that has none, so that this has none either."""
        return self.source.view

    @property
    def picture_size(self) -> tuple[int, int]:
        """That of the source. Raises AttributeError where that has none."""
        return self.source.picture_size
