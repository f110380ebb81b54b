"""Data sets that Hugging Face's library opens: `hf:OWNER/NAME[:SPLIT]`, or `hf:FOLDER[:SPLIT]` on disk.

The library hands over the undecoded bytes of a picture; they are decoded as every other picture is.
"""

import hashlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from util.data.images import BadImage, decode_image
from util.data.manifest import COLUMNS
from util.data.roles import MissingRole, Share, in_part, role_of_name, share_of
from util.run.errors import UserError

PREFIX = "hf:"
_SPEC = re.compile(r"hf:(?P<path>.+?)(?::(?P<split>(?P<base>\w+)(?:\[[^\]]*\])?))?")
# what a data set may carry under our names; identity and split are settled by rules of their own
_KNOWN = tuple(name for name in COLUMNS if name not in ("identity", "split"))


class Columns(NamedTuple):
    """Where the rows of a data set hold the picture and what is known of it.

    image: holds {"bytes", "path"}. identity: a column, or None; class_names: where that column holds class numbers.
    known: columns that have the name of one of ours.
    """

    image: str
    identity: str | None
    class_names: tuple[str, ...] | None
    known: tuple[str, ...]

    @property
    def facts(self) -> list[str]:
        """Every column that a record is made of: cheap to read, unlike the picture."""
        return list(dict.fromkeys([*self.known, *([self.identity] if self.identity else [])]))

    def record(self, row: Mapping, key: str, split: str) -> dict:
        """The manifest's columns for a row; `key` stands in for sample_id and file_name where it has none."""
        record = dict.fromkeys(COLUMNS)
        record.update(sample_id=key, file_name=key, split=split)
        record.update((name, row[name]) for name in self.known if row[name] is not None)
        label = row[self.identity] if self.identity else None
        if label is not None and label != -1:  # the library writes -1 for "not labelled"
            record["identity"] = self.class_names[label] if self.class_names else str(label)
        return record


class HubSource:
    """A data set in the library's cache, memory-mapped. rows: (N,) the row numbers that belong to this source."""

    def __init__(self, name: str, dataset, rows: np.ndarray, split: str):
        self.name, self.split, self.rows = name, split, rows
        self.columns = find_columns(dataset.features, name)
        self._images = undecoded(dataset.select_columns([self.columns.image]), self.columns.image)
        self._facts = dataset.select_columns(self.columns.facts) if self.columns.facts else None
        self.fingerprint = _fingerprint(self._images.data.column(self.columns.image), rows, split)

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, i: int) -> dict:
        """The manifest's columns; None where the data set says nothing."""
        row = int(self.rows[i])
        return self.columns.record(self._facts[row] if self._facts else {}, f"{self.split}/{row}", self.split)

    def stamp(self) -> str:
        """The fingerprint: the library's cache holds the pictures themselves."""
        return self.fingerprint

    def column(self, name: str) -> list:
        """One column of the manifest for all samples."""
        return [self.record(i)[name] for i in range(len(self))]

    def load(self, i: int) -> Image.Image:
        """The picture of sample `i`, RGB. Raises BadImage where it cannot be decoded."""
        row = int(self.rows[i])
        return decode_cell(self._images[row][self.columns.image], f"{self.name}#{row}")


def open_hub(name: str, role: str, val_fraction: float) -> HubSource:
    """Open "hf:..." for a role. Raises UserError where the library, the data set, a split or a picture is missing."""
    path, split, share = locate(name, role)
    dataset = load(name, path, split)
    keys = (f"{share.of}/{row}" for row in range(len(dataset)))
    rows = np.flatnonzero(in_part(keys, share.part, val_fraction))
    if not len(rows):
        raise MissingRole(f"{name} has no picture for {role!r} at --val_fraction {val_fraction}: change it")
    return HubSource(name, dataset, rows, share.of)


def locate(name: str, role: str) -> tuple[str, str, Share]:
    """Path, split and share of that split that "hf:PATH[:SPLIT]" means for a role."""
    match = _SPEC.fullmatch(name)
    if match is None:
        raise UserError(f"{name!r} is not understood: write hf:OWNER/NAME, hf:OWNER/NAME:SPLIT or hf:FOLDER")
    path, wanted = match["path"], match["base"]
    found = _ask(name, "get_dataset_split_names", path)
    if wanted and wanted not in found:
        raise UserError(f"{name} has no split {wanted!r}: it has {', '.join(found)}")
    if wanted or len(found) == 1:  # a name that says nothing ("default") can be trained on
        splits = {role_of_name(wanted or found[0]) or "train": match["split"] or found[0]}
    else:
        splits = {role_of_name(split): split for split in reversed(found)}
    share = share_of(role, splits, name)
    if share is None:
        raise MissingRole(
            f"{name} has nothing for {role!r}, only {', '.join(found)}: name a split, as in {PREFIX}{path}:SPLIT"
        )
    return path, splits[share.of], share


def load(name: str, path: str, split: str, streaming: bool = False):
    """`datasets.load_dataset` with every failure as a UserError."""
    return _ask(name, "load_dataset", path, split=split, streaming=streaming)


def _ask(name: str, function: str, path: str, **options):
    try:
        # a bare folder called datasets/ (ours) imports as an empty namespace, so only the name tells
        from datasets import disable_progress_bars, get_dataset_split_names, load_dataset
    except ImportError as error:
        raise UserError(f"{name} needs Hugging Face's library: pip install datasets") from error
    if not sys.stderr.isatty():
        disable_progress_bars()
    call = {"get_dataset_split_names": get_dataset_split_names, "load_dataset": load_dataset}[function]
    try:
        return call(path, **options)
    except Exception as error:  # the library raises some twenty types here, network errors among them
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        download = f"hf download {path} --repo-type dataset --local-dir DIR"
        remedy = f"check the name, or download it ({download}) and give hf:DIR"
        if Path(path).is_dir():
            remedy = "give a folder of Parquet files or pictures"
        raise UserError(f"{name} cannot be opened ({reason}): {remedy}") from error


def find_columns(features: Mapping | None, name: str) -> Columns:
    """The columns of a data set by the types of its features. Raises UserError where there is no picture."""
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    features = features or {}  # None where a stream of text does not say
    images = [column for column, feature in features.items() if isinstance(feature, ImageFeature)]
    # Parquet files that another program wrote lack the library's types, but have the same layout
    images += [column for column, feature in features.items() if isinstance(feature, dict) and "bytes" in feature]
    if not images:
        raise UserError(
            f"{name} has no column of pictures, only {', '.join(features) or 'unknown ones'}: give an image data set"
        )
    classes = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    candidates = ("identity", *classes, "label", "labels", "character")
    identity = next((column for column in candidates if column in features), None)
    names = tuple(features[identity].names) if identity in classes else None
    return Columns(images[0], identity, names, tuple(column for column in _KNOWN if column in features))


def undecoded(dataset, column: str):
    """The data set with the pictures of `column` as {"bytes", "path"}."""
    from datasets import Image as ImageFeature

    if isinstance(dataset.features[column], ImageFeature):
        return dataset.cast_column(column, ImageFeature(decode=False))
    return dataset


def decode_cell(cell: Mapping | None, label: str) -> Image.Image:
    """Decode {"bytes", "path"}. Raises BadImage that names `label`."""
    if cell is None or (cell["bytes"] is None and cell.get("path") is None):
        raise BadImage(label, "the cell is empty")
    data = cell["bytes"]
    try:
        return decode_image(_fetch(cell["path"]) if data is None else data)
    except BadImage as error:
        raise BadImage(label, error.reason) from error


def _fetch(path: str) -> bytes | str:
    """What lies at a path that the library names: a file, or a member of a remote archive (`zip://a::hf://...`)."""
    if "://" not in path:
        return path
    import fsspec

    try:
        with fsspec.open(path) as file:
            return file.read()
    except Exception as error:
        raise BadImage(path, f"cannot be fetched ({error})") from error


def _fingerprint(images: pa.ChunkedArray, rows: np.ndarray, split: str) -> str:
    """From the split and the byte count of every picture: offsets only are read, so it is cheap on a mapped table.

    A picture that is stored by its path has no bytes there; its path stands for it.
    """
    digest = hashlib.blake2b(split.encode() + rows.astype("<i8").tobytes(), digest_size=8)
    for chunk in images.chunks:
        stored = pc.struct_field(chunk, "bytes")
        sizes = pc.fill_null(pc.binary_length(stored), -1)
        digest.update(sizes.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
        for path in pc.struct_field(chunk, "path").filter(pc.is_null(stored)).to_pylist():
            digest.update(f"{path}\0".encode())
    return digest.hexdigest()
