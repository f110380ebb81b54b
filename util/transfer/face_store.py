"""Faces that were found and embedded, kept on disk: what was done once is not done again.

    store = FaceStore(folder, facts)          # facts: all that finds and embeddings depend on, beside the pictures
    todo = [picture for picture in pictures if picture not in store]
    store.add([Faces(picture, boxes, scores, embeddings), ...])

FOLDER/KEY/facts.json     what KEY is a hash of
FOLDER/KEY/00000.npz      some pictures: their names and stamps, their faces; each file is whole or not there
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.run.files import write_atomically
from util.run.log import write_json
from util.run.untrusted import read_arrays


@dataclass(frozen=True)
class PictureFile:
    """A picture: its path below the folder, and a stamp that changes when the file does."""

    name: str
    stamp: str

    @classmethod
    def of(cls, folder: Path, name: str) -> "PictureFile":
        """The picture as it is now. OSError where it is gone."""
        found = (folder / name).stat()
        return cls(name, f"{found.st_size}-{found.st_mtime_ns}")


@dataclass(frozen=True)
class Faces:
    """The faces of a picture. boxes: (n, 4) float32, x1 y1 x2 y2 px. scores: (n,) float32. embeddings: (n, D) float32.

    bad: why the picture cannot be read, "" where it can; it has no faces then.
    """

    picture: PictureFile
    boxes: np.ndarray
    scores: np.ndarray
    embeddings: np.ndarray
    bad: str = ""


class FaceStore:
    """dim: D of the embeddings."""

    def __init__(self, folder: str | Path, facts: dict, dim: int):
        key = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12).hexdigest()
        self.folder, self.dim = Path(folder) / key, dim
        write_json(self.folder / "facts.json", facts)
        self._faces: dict[PictureFile, Faces] = {}
        self._next = 0
        for path in sorted(path for path in self.folder.glob("*.npz") if path.stem.isdecimal()):
            self._next = int(path.stem) + 1
            for faces in _read(path, dim):
                self._faces[faces.picture] = faces

    def __contains__(self, picture: PictureFile) -> bool:
        return picture in self._faces

    def __getitem__(self, picture: PictureFile) -> Faces:
        return self._faces[picture]

    def add(self, found: Sequence[Faces]) -> None:
        """Keep the faces of some pictures, in one file."""
        if not found:
            return
        write_atomically(self.folder / f"{self._next:05d}.npz", lambda path: _write(path, found))
        self._next += 1
        self._faces |= {faces.picture: faces for faces in found}


def _write(path: Path, found: Sequence[Faces]) -> None:
    with open(path, "wb") as file:
        np.savez(
            file,
            names=np.array([faces.picture.name for faces in found]),
            stamps=np.array([faces.picture.stamp for faces in found]),
            bad=np.array([faces.bad for faces in found]),
            counts=np.array([len(faces.scores) for faces in found], dtype=np.int64),
            **{key: np.concatenate([getattr(faces, key) for faces in found]) for key in _ARRAYS},
        )


_ARRAYS = ("boxes", "scores", "embeddings")


def _read(path: Path, dim: int) -> list[Faces]:
    """The pictures of a file; none where it is damaged: they are looked at again."""
    try:
        stored = read_arrays(path)
        arrays = {name: stored[name] for name in ("names", "stamps", "bad", "counts", *_ARRAYS)}
        counts = arrays["counts"]
        total = int(counts.sum())
        shapes = {"boxes": (total, 4), "scores": (total,), "embeddings": (total, dim)}
        if counts.dtype.kind != "i" or (counts < 0).any():
            return []
        if any(arrays[name].shape != shape or arrays[name].dtype != np.float32 for name, shape in shapes.items()):
            return []
        parts = [np.split(arrays[name], counts.cumsum()[:-1]) for name in _ARRAYS]
        facts = zip(*(arrays[name].tolist() for name in ("names", "stamps", "bad")), *parts, strict=True)
        return [Faces(PictureFile(name, stamp), *own, bad) for name, stamp, bad, *own in facts]
    except (OSError, ValueError, KeyError, TypeError):
        return []
