"""Characters enrolled from a few pictures each, kept on disk, and who a new picture shows.

    gallery = Gallery.open("runs/gallery", weights="0123456789abcdef", dim=768)
    gallery.enrol("Hatsune Miku", embeddings, thumbnails)
    best = gallery.identify(embeddings, k=5)

FOLDER/gallery.json           which weights made the embeddings, and below which similarity nobody is meant
FOLDER/people/KEY.npz         a character: its name, and an embedding of each picture
FOLDER/people/KEY/0.png       small copies of the pictures, to be looked at

KEY is a hash of the name, so that no name, whatever it holds, is a path. Each file is written in one step: what was
enrolled is there after a crash, and a character is never there by half.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from util.run.errors import UserError
from util.run.files import write_atomically
from util.run.log import write_json
from util.run.untrusted import read_arrays, read_json

VERSION = 1
THUMBNAIL = 128  # px, longer side
LONGEST_NAME = 200  # characters


@dataclass(frozen=True)
class Match:
    """A character that a picture may show. similarity: cosine with the mean of its pictures, -1..1.

    nearest: the number of its picture that is most alike, for `Gallery.thumbnail`.
    """

    name: str
    similarity: float
    nearest: int


@dataclass
class Gallery:
    """people: name -> unit embeddings (n, D) float32, in the order they were enrolled in.

    threshold: similarity below which nobody in the gallery is meant; None until it is set. broken: files that cannot
    be read, each with the reason: their characters are not found.
    """

    folder: Path
    weights: str
    dim: int
    threshold: float | None = None
    people: dict[str, np.ndarray] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path, weights: str, dim: int) -> "Gallery":
        """The gallery of a folder, an empty one where there is none yet.

        weights: fingerprint of the network that embeds. dim: D. UserError where the gallery is of another network, or
        its gallery.json cannot be read.
        """
        gallery = cls(Path(folder), weights, dim)
        note = gallery._note()
        if note is None:
            return gallery
        if (note["weights"], note["dim"]) != (weights, dim):
            raise UserError(f"{folder} was enrolled with another network: give its weights, or another folder")
        gallery.threshold = note["threshold"]
        for path in sorted((gallery.folder / "people").glob("*.npz")):
            try:
                name, embeddings = _read_person(path, dim)
                gallery.people[name] = embeddings
            except (OSError, ValueError, KeyError) as error:
                gallery.broken[str(path)] = str(error)
        return gallery

    def _note(self) -> dict | None:
        path = self.folder / "gallery.json"
        if not path.is_file():
            return None
        try:
            note = read_json(path)
            if note["version"] != VERSION:
                raise UserError(f"{path} is of version {note['version']}, and this reads {VERSION}: update the code")
            note = {name: note[name] for name in ("weights", "dim", "threshold")}
            if note["threshold"] is not None and not math.isfinite(note["threshold"]):
                raise ValueError(f"threshold {note['threshold']}")
            return note
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{path} cannot be read ({error}): remove the folder, and enrol anew") from error

    def save(self) -> None:
        """Write gallery.json, with the threshold."""
        note = {"version": VERSION, "weights": self.weights, "dim": self.dim, "threshold": self.threshold}
        write_json(self.folder / "gallery.json", note)

    def enrol(self, name: str, embeddings: np.ndarray, pictures: Sequence[Image.Image] = ()) -> int:
        """Add pictures of a character, new or known. Returns how many it has now.

        embeddings: (n, D), any length, n >= 1. pictures: n or none, of which small copies are kept.
        UserError for an empty or overlong name; ValueError for embeddings that do not fit.
        """
        name = " ".join(name.split())
        if not 0 < len(name) <= LONGEST_NAME:
            raise UserError(f"a character's name has 1 to {LONGEST_NAME} characters: this one has {len(name)}")
        fresh = unit(np.atleast_2d(np.asarray(embeddings, dtype=np.float32)))
        if fresh.ndim != 2 or fresh.shape[1] != self.dim or not len(fresh) or not np.isfinite(fresh).all():
            raise ValueError(f"embeddings of shape {np.shape(embeddings)} do not fit a gallery of dimension {self.dim}")
        if len(pictures) not in (0, len(fresh)):
            raise ValueError(f"{len(pictures)} pictures for {len(fresh)} embeddings")
        if not (self.folder / "gallery.json").is_file():
            self.save()
        known = self.people.get(name, np.empty((0, self.dim), np.float32))
        both, place = np.concatenate([known, fresh]), self._place(name)
        place.mkdir(parents=True, exist_ok=True)
        # the copies first: a picture without its copy is worse than a copy without its picture
        for number, picture in enumerate(pictures, start=len(known)):
            _write_thumbnail(place / f"{number}.png", picture)
        write_atomically(place.with_suffix(".npz"), lambda path: _write_person(path, name, both))
        self.people[name] = both
        return len(both)

    def remove(self, name: str) -> None:
        """Forget a character. UserError where there is none of that name."""
        if name not in self.people:
            raise UserError(f"nobody is called {name!r} in {self.folder}")
        place = self._place(name)
        place.with_suffix(".npz").unlink(missing_ok=True)
        for path in place.glob("*.png"):
            path.unlink(missing_ok=True)
        place.rmdir()
        del self.people[name]

    def identify(self, embeddings: np.ndarray, k: int = 5) -> list[list[Match]]:
        """The k characters most alike to each picture, best first; ties in the order of names. embeddings: (N, D)."""
        probes = unit(np.atleast_2d(np.asarray(embeddings, dtype=np.float32)))
        names = sorted(self.people)
        if not names:
            return [[] for _ in probes]
        similar = probes @ np.stack([unit(self.people[name].mean(0)) for name in names]).T
        order = np.argsort(-similar, axis=1, kind="stable")[:, :k]
        return [
            [self._match(probe, names[i], float(row[i])) for i in best]
            for probe, row, best in zip(probes, similar, order, strict=True)
        ]

    def _match(self, probe: np.ndarray, name: str, similarity: float) -> Match:
        return Match(name, similarity, int((self.people[name] @ probe).argmax()))

    def is_known(self, match: Match) -> bool:
        """Whether a match is close enough to be meant; every one is while no threshold is set."""
        return self.threshold is None or match.similarity >= self.threshold

    def thumbnail(self, name: str, number: int) -> Path | None:
        """The small copy of a character's picture, None where none was kept."""
        path = self._place(name) / f"{int(number)}.png"
        return path if path.is_file() else None

    def _place(self, name: str) -> Path:
        return self.folder / "people" / hashlib.blake2b(name.encode(), digest_size=16).hexdigest()


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (..., D) scaled to length 1; rows of zeros stay as they are."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _write_person(path: Path, name: str, embeddings: np.ndarray) -> None:
    with open(path, "wb") as file:  # np.savez would append .npz to the name
        np.savez(file, name=np.array(name), embeddings=embeddings)


def _read_person(path: Path, dim: int) -> tuple[str, np.ndarray]:
    stored = read_arrays(path)
    name, embeddings = str(stored["name"]), stored["embeddings"]
    if stored["name"].shape or not 0 < len(name) <= LONGEST_NAME:
        raise ValueError("it has no name, or none that could have been enrolled")
    if embeddings.ndim != 2 or embeddings.shape[1] != dim or embeddings.dtype != np.float32 or not len(embeddings):
        raise ValueError(f"its embeddings are {embeddings.dtype} {embeddings.shape}, not float32 (n, {dim})")
    if not np.isfinite(embeddings).all():
        raise ValueError("its embeddings are not finite")
    return name, embeddings


def _write_thumbnail(path: Path, picture: Image.Image) -> None:
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    write_atomically(path, lambda temporary: small.save(temporary, "PNG"))
