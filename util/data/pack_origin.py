"""What a packing reads: every row of a data set, whatever its split, with the maps and protocols beside it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from util.data.hub import PREFIX, HubSource, open_hub_splits
from util.data.manifest import to_table
from util.data.maps import check_rows, read_map
from util.data.sources import MAPS_FOLDER, MAPS_NOTE, FolderSource, Source, open_folder, split_key_column
from util.run.errors import UserError


class Chain:
    """Several sources, one after the other, as one: the splits of a Hub data set."""

    def __init__(self, sources: list[HubSource]):
        self.sources, self.name = sources, sources[0].name
        self._ends = np.cumsum([len(source) for source in sources])
        self.fingerprint = _digest(*(source.fingerprint for source in sources))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _at(self, i: int) -> tuple[HubSource, int]:
        part = int(np.searchsorted(self._ends, i, side="right"))
        return self.sources[part], i - int(self._ends[part]) + len(self.sources[part])

    def record(self, i: int) -> Mapping:
        """The record of the sample."""
        source, place = self._at(i)
        return source.record(place)

    def column(self, name: str) -> list:
        """One column of the manifest."""
        return [value for source in self.sources for value in source.column(name)]

    def split_keys(self) -> list[str]:
        """The name of each sample whose hash decides between train and val."""
        return [key for source in self.sources for key in source.split_keys()]

    def stamp(self) -> str:
        """Those of the parts."""
        return _digest(*(source.stamp() for source in self.sources))

    def load(self, i: int) -> Image.Image:
        """The picture of the sample. Raises BadImage."""
        source, place = self._at(i)
        return source.load(place)


class Origin:
    """source: all samples. table: their manifest. keys: the names whose hash decides between train and val, a column.

    labels: what settled the identities, "metadata", "folders" or "none". maps: name -> uint8 (N, h, w), over the
    whole pictures. protocols: name -> file.
    """

    def __init__(self, source: Source, table: pa.Table, keys: pa.ChunkedArray, labels: str, folder: Path | None = None):
        self.source, self.table, self.keys, self.labels = source, table, keys, labels
        beside = {kind: _beside(folder, kind, suffix) for kind, suffix in (("maps", "npy"), ("protocols", "parquet"))}
        self.maps = {path.stem: _open_map(path, len(source)) for path in beside["maps"]}
        if self.maps:
            check_rows(folder / MAPS_FOLDER, source.manifest)
        self.protocols = {path.stem: path for path in beside["protocols"]}
        self._beside = [*beside["maps"], *beside["protocols"]]

    def plan(self) -> dict:
        """What tells whether the data are still the same."""
        beside = (f"{path.stem} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in self._beside)
        return {
            "samples": len(self.source),
            "fingerprint": self.source.fingerprint,
            "stamp": self.source.stamp(),
            "beside": _digest(*beside),
            "labels": self.labels,
        }


def open_origin(data_path: str, labels: str) -> Origin:
    """Open every row behind `data_path`. labels: as in `open_source`. Raises UserError."""
    if data_path.startswith(PREFIX):
        sources = open_hub_splits(data_path)
        source = Chain(sources) if len(sources) > 1 else sources[0]
        table = to_table((source.record(i) for i in range(len(source))), Path(data_path))
        keys = pa.chunked_array([source.split_keys()], pa.string())
        return Origin(source, table, keys, "metadata")
    folder = Path(data_path)
    if folder.is_file():
        raise UserError(f"{data_path} is a file: give the folder of the pictures themselves, or hf:OWNER/NAME")
    manifest, sizes = open_folder(data_path, labels)
    is_prepared = sizes is None
    settled = "metadata" if is_prepared else "folders" if manifest.table.column("identity").null_count == 0 else "none"
    source = FolderSource(data_path, manifest, sizes)
    has_more = is_prepared or (folder / MAPS_FOLDER / MAPS_NOTE).is_file()
    return Origin(source, manifest.table, split_key_column(manifest.table), settled, folder if has_more else None)


def _beside(folder: Path | None, kind: str, suffix: str) -> list[Path]:
    return [] if folder is None else sorted((folder / kind).glob(f"*.{suffix}"))


def _open_map(path: Path, samples: int) -> np.ndarray:
    values = read_map(path)
    if len(values) != samples:
        raise UserError(f"{path} holds {len(values)} maps for the {samples} rows of the data: make it again")
    return values


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
