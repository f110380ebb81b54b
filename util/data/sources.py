"""Open whatever a `--data_path` names: a prepared folder, class folders, a folder of pictures, a Hub data set.

A source hands out records (the columns of `util.data.manifest`) and decoded pictures by number;
`util.data.roles` says which of the rows a role gets.
"""

import hashlib
import logging
import os
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from util.data.hub import PREFIX, open_hub
from util.data.images import SUFFIXES, decode_image
from util.data.manifest import MANIFEST_NAME, SCHEMA, Manifest, read_manifest
from util.data.roles import ROLES, MissingRole, in_part, role_of_name, share_of
from util.run.errors import UserError

log = logging.getLogger(__name__)

LABELS = ("auto", "none", "folders", "metadata")


class Source(Protocol):
    """Pictures by number. It can be sent to worker processes (pickled).

    name: the data path, for messages. fingerprint: 16 hex digits that change with the list of samples.
    """

    name: str
    fingerprint: str

    def __len__(self) -> int: ...

    def record(self, i: int) -> dict:
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
        return self.manifest.table.column(name).to_pylist()

    def stamp(self) -> str:
        """16 hex digits from the size and the time of every file."""
        digest = hashlib.blake2b(digest_size=8)
        for i in range(len(self)):
            try:
                found = os.stat(self.manifest.path(i))
                digest.update(f"{found.st_size} {found.st_mtime_ns}\0".encode())
            except OSError:
                digest.update(b"missing\0")
        return digest.hexdigest()

    def load(self, i: int) -> Image.Image:
        """The picture of row `i`, RGB. Raises BadImage where it cannot be decoded."""
        return decode_image(self.manifest.path(i))


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
        values = self.source.column(name)
        return [values[i] for i in self.chosen]

    def stamp(self) -> str:
        """That of the whole source."""
        return self.source.stamp()

    def load(self, i: int) -> Image.Image:
        """The picture of the sample."""
        return self.source.load(int(self.chosen[i]))


def open_source(data_path: str | Path, role: str, *, labels: str = "auto", val_fraction: float = 0.1) -> Source:
    """Open `data_path` for a role: "train", "val", "test", "open_val", "open_test" or "novel".

    data_path: a prepared folder; class folders, with or without train/, val/ and test/; a flat or nested folder
    of pictures; "hf:OWNER/NAME[:SPLIT]" or "hf:FOLDER[:SPLIT]", read by Hugging Face's library. labels: what a
    nested folder means: "folders" (the first folder is the identity), "none" (no labels), "metadata" (there
    must be a metadata.parquet), "auto" (metadata.parquet, else class folders where every picture lies exactly
    one folder deep, else no labels). val_fraction: in 0..1. Raises UserError where there is nothing to read, of the
    kind MissingRole where the data are there but not for this role.
    """
    if role not in ROLES:
        raise ValueError(f"role {role!r} is not one of {', '.join(ROLES)}")
    if labels not in LABELS:
        raise UserError(f"--labels {labels} is not known: choose one of {', '.join(LABELS)}")
    if not 0.0 <= val_fraction < 1.0:
        raise UserError(f"--val_fraction {val_fraction} is out of range: give a fraction from 0 to below 1")
    name = str(data_path)
    if name.startswith(PREFIX):
        return open_hub(name, role, val_fraction)
    folder = Path(name)
    if folder.is_file():
        raise UserError(f"{name} is a file, and not of a kind that can be read: give a folder, or hf:OWNER/NAME")
    if not folder.is_dir():
        raise UserError(f"{name} does not exist: check --data_path, or make the data with a script of datasets/")
    if labels in ("auto", "metadata") and (folder / MANIFEST_NAME).is_file():
        manifest, sizes = read_manifest(folder), None
    elif labels == "metadata":
        raise UserError(f"{name} holds no {MANIFEST_NAME}: run datasets/prepare_folder.py, or give other --labels")
    else:
        manifest, sizes = list_folder(folder, labels)
    return _for_role(name, manifest, sizes, role, val_fraction)


def _for_role(name: str, manifest: Manifest, sizes: np.ndarray | None, role: str, val_fraction: float) -> FolderSource:
    present = set(manifest.table.column("split").unique().to_pylist())
    available = [role for role, splits in ROLES.items() if present.intersection(splits)]
    share = share_of(role, available, name)
    if share is None:
        found = ", ".join(sorted(present)) or "no rows"
        raise MissingRole(f"{name} has nothing for {role!r}, only {found}: prepare it with such a split")
    manifest = manifest.select(ROLES[share.of])
    if share.part != "all":
        # pictures cut from one source go to one side, so that no near-copy of a training picture is held out
        columns = (manifest.table.column(column).to_pylist() for column in ("source", "file_name"))
        keys = [source or file_name for source, file_name in zip(*columns, strict=True)]
        manifest = manifest.keep(in_part(keys, share.part, val_fraction))
    if not len(manifest):
        raise MissingRole(f"{name} has no picture left for {role!r} at --val_fraction {val_fraction}: change it")
    return FolderSource(name, manifest, None if sizes is None else sizes[manifest.rows])


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
                pending.append((f"{prefix}{entry.name}/", entry.path))
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                found.append((prefix + entry.name, _size(entry)))
            else:
                others += 1
    found.sort()
    return [name for name, _ in found], np.array([size for _, size in found], dtype=np.int64), others


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
        digest.update(batch.serialize())
    digest.update(b"" if sizes is None else sizes.tobytes())
    return digest.hexdigest()
