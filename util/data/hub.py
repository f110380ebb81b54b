"""Data sets that Hugging Face's library opens: `hf:OWNER/NAME[:SPLIT]`, or `hf:FOLDER[:SPLIT]` on disk.

The library hands over the undecoded bytes of a picture; they are decoded as every other picture is. It reads Parquet
files, folders of pictures, and WebDataset: .tar files in which the files of a sample share their name up to the first
dot (0001.jpg, 0001.json, 0001.cls).
"""

import hashlib
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from util.data.images import BadImage, decode_image
from util.data.manifest import COLUMNS
from util.data.roles import ROLES, MissingRole, Share, in_part, role_of_name, share_of
from util.run.errors import UserError

PREFIX = "hf:"
_SPEC = re.compile(r"hf:(?P<path>.+?)(?::(?P<split>(?P<base>\w+)(?:\[[^\]]*\])?))?")
# what a data set may carry under our names; identity and split are settled by rules of their own
_KNOWN = tuple(name for name in COLUMNS if name not in ("identity", "split"))
_LABELS = ("label", "labels", "character")
_KEY, _JSON = "__key__", "json"  # columns of a tar
_BLOCK = 512  # bytes, of a tar


class Columns(NamedTuple):
    """Where the rows of a data set hold the picture and what is known of it.

    image: holds {"bytes", "path"}. identities: columns, the first that says something counts; class_names: where the
    first holds class numbers. known: columns that have the name of one of ours. A name in `nested` is not a column but
    a key in the column "json" of a tar. is_tar: its samples have a name, in the column "__key__".
    """

    image: str
    identities: tuple[str, ...]
    class_names: tuple[str, ...] | None
    known: tuple[str, ...]
    nested: frozenset[str] = frozenset()
    is_tar: bool = False

    @property
    def facts(self) -> list[str]:
        """Every column that a record is made of: cheap to read, unlike the picture."""
        names = [*self.known, *self.identities, *([_KEY] if self.is_tar else [])]
        return list(dict.fromkeys(_JSON if name in self.nested else name for name in names))

    def record(self, row: Mapping, key: str, split: str) -> dict:
        """The manifest's columns for a row; `key` stands in for sample_id and file_name where it has none."""
        record = dict.fromkeys(COLUMNS)
        record.update(sample_id=key, file_name=key, split=split)
        if self.is_tar:
            record.update(sample_id=row[_KEY], file_name=f"{row[_KEY]}.{self.image}")
            row = {**(row.get(_JSON) or {}), **row}
        record.update((name, row[name]) for name in self.known if row.get(name) is not None)
        label = next((row[name] for name in self.identities if row.get(name) is not None), None)
        if label is not None and label != -1:  # the library writes -1 for "not labelled"
            record["identity"] = self.class_names[label] if self.class_names else str(label)
        return record

    def size(self, row: Mapping) -> int:
        """Bytes of the undecoded picture; 0 where it is stored by its path."""
        return len((row[self.image] or {}).get("bytes") or b"")


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

    def split_keys(self) -> list[str]:
        """The name of each sample whose hash decides between train and val."""
        return [f"{self.split}/{row}" for row in self.rows]

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


def open_hub_splits(name: str) -> list[HubSource]:
    """Every split of "hf:..." that a role reads, whole. Raises UserError."""
    path, splits = find_splits(name)
    opened = {role: load(name, path, splits[role]) for role in ROLES if role in splits}
    if not opened:
        raise MissingRole(f"{name} has no split for any role, only {', '.join(splits.values())}: name a split")
    return [HubSource(name, dataset, np.arange(len(dataset)), role) for role, dataset in opened.items()]


def locate(name: str, role: str) -> tuple[str, str, Share]:
    """Path, split and share of that split that "hf:PATH[:SPLIT]" means for a role."""
    path, splits = find_splits(name)
    share = share_of(role, splits, name)
    if share is None:
        raise MissingRole(
            f"{name} has nothing for {role!r}, only {', '.join(splits.values())}: name a split, as in "
            f"{PREFIX}{path}:SPLIT"
        )
    return path, splits[share.of], share


def find_splits(name: str) -> tuple[str, dict[str | None, str]]:
    """Path and splits that "hf:PATH[:SPLIT]" means, by the role that reads each; None: its name says nothing."""
    match = _SPEC.fullmatch(name)
    if match is None:
        raise UserError(f"{name!r} is not understood: write hf:OWNER/NAME, hf:OWNER/NAME:SPLIT or hf:FOLDER")
    path, wanted = match["path"], match["base"]
    found = _ask(name, "get_dataset_split_names", path)
    if wanted and wanted not in found:
        raise UserError(f"{name} has no split {wanted!r}: it has {', '.join(found)}")
    if wanted or len(found) == 1:  # a name that says nothing ("default") can be trained on
        return path, {role_of_name(wanted or found[0]) or "train": match["split"] or found[0]}
    return path, {role_of_name(split): split for split in reversed(found)}


def load(name: str, path: str, split: str):
    """The data set in the library's cache, with every failure as a UserError."""
    builder = _builder(name, path)
    for file in (builder.config.data_files or {}).get(split.split("[")[0], ()):
        if is_cut_short(str(file)):
            raise UserError(f"{file} of {name} is cut short (its end is missing): mend or remove it")
    _guarded(name, path, builder.download_and_prepare)
    return _guarded(name, path, partial(builder.as_dataset, split=split))


def load_stream(name: str, path: str, split: str) -> tuple[object, list[str] | None]:
    """The same data set as a stream, and the file or address of each of its shards where they are known."""
    builder = _builder(name, path)
    dataset = _guarded(name, path, partial(builder.as_streaming_dataset, split=split))
    files = [str(file) for file in (builder.config.data_files or {}).get(split, ())]
    return dataset, files if len(files) == dataset.num_shards else None


def _builder(name: str, path: str):
    builder = _ask(name, "load_dataset_builder", path)
    if builder.name != "webdataset":
        return builder
    streams = _guarded(name, path, builder.as_streaming_dataset)
    features = next(iter(streams.values())).features
    if not isinstance(features.get(_JSON), dict):
        return builder
    features = type(features)({**features, _JSON: _types_of_json(features[_JSON])})
    return _ask(name, "load_dataset_builder", path, features=features)


def is_cut_short(file: str) -> bool:
    """Whether a tar on disk lacks the empty blocks at its end.

    Where it breaks off between two files, nothing else tells.
    """
    if "://" in file or not file.endswith(".tar"):
        return False
    with open(file, "rb") as opened:
        opened.seek(-_BLOCK, os.SEEK_END)
        return any(opened.read(_BLOCK))


def _types_of_json(found: Mapping) -> dict:
    """The keys that mean something to us, with their types, unless those of `found` are of another shape.

    The library goes by what it finds in the first five samples: it would drop keys that come later, and cut the
    fractions off the boxes where the first ones are whole.
    """
    from datasets import Value

    number, text, unknown = Value("float64"), Value("string"), Value("null")
    wanted = dict.fromkeys(("identity", *_LABELS, *_KNOWN), text) | {"box": [number], "eyes": [[number]]}

    def fits(name: str) -> bool:
        return found.get(name, unknown) == unknown or isinstance(found[name], Value) == (wanted[name] is text)

    return {name: feature for name, feature in wanted.items() if fits(name)}


def _ask(name: str, function: str, path: str, **options):
    try:
        # a bare folder called datasets/ (ours) imports as an empty namespace, so only the name tells
        from datasets import disable_progress_bars, get_dataset_split_names, load_dataset_builder
    except ImportError as error:
        raise UserError(f"{name} needs Hugging Face's library: pip install datasets") from error
    if not sys.stderr.isatty():
        disable_progress_bars()
    quieten()
    calls = {"get_dataset_split_names": get_dataset_split_names, "load_dataset_builder": load_dataset_builder}
    call = calls[function]
    return _guarded(name, path, partial(call, path, **options))


def quieten() -> None:
    """The library reports a damaged file before it raises what becomes our one line."""
    logging.getLogger("datasets.packaged_modules.parquet.parquet").setLevel(logging.CRITICAL)


def _guarded(name: str, path: str, call: Callable):
    try:
        return call()
    except Exception as error:  # the library raises some twenty types here, network errors among them
        if type(error).__name__ == "DatasetGenerationError" and error.__cause__:  # which says nothing itself
            error = error.__cause__
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        download = f"hf download {path} --repo-type dataset --local-dir DIR"
        remedy = f"check the name, or download it ({download}) and give hf:DIR"
        if Path(path).is_dir():
            remedy = "give a folder of Parquet files, .tar files of WebDataset, or pictures"
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
    is_tar = _KEY in features
    image = min(images, key=lambda column: "." in column) if is_tar else images[0]  # rather "jpg" than "mask.png"
    inside = features.get(_JSON) if is_tar else None
    nested = frozenset(inside if isinstance(inside, dict) else ()) - features.keys()
    found = features.keys() | nested
    classes = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    candidates = ("identity", *classes, *_LABELS, *(["cls"] if is_tar else []))
    identities = tuple(column for column in candidates if column in found)
    if not is_tar:  # every row has what the first has
        identities = identities[:1]
    names = tuple(features[identities[0]].names) if identities and identities[0] in classes else None
    return Columns(image, identities, names, tuple(column for column in _KNOWN if column in found), nested, is_tar)


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
