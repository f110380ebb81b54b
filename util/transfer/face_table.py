"""faces.csv: a row for each face that was found, and back: whom its reader says it shows.

picture, x1, y1, x2, y2 (px), score, name (or "unknown"), similarity, nearest, cluster, enrol_as. The last is empty: a
name that is written there is enrolled by the next run.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.benchmark.lists import write_csv
from util.run.errors import UserError
from util.transfer.face_store import Faces
from util.transfer.gallery import Gallery, unit
from util.transfer.naming import UNKNOWN, Name

HEADER = ("picture", "x1", "y1", "x2", "y2", "score", "name", "similarity", "nearest", "cluster", "enrol_as")


@dataclass(frozen=True)
class FaceTable:
    """All faces of all pictures. picture: (N,) names. boxes: (N, 4) px. scores: (N,). embeddings: (N, D)."""

    picture: list[str]
    boxes: np.ndarray
    scores: np.ndarray
    embeddings: np.ndarray

    def __len__(self) -> int:
        return len(self.picture)

    @classmethod
    def of(cls, found: Sequence[Faces]) -> "FaceTable":
        """The faces of some pictures, one or more, in their order."""
        return cls(
            [faces.picture.name for faces in found for _ in faces.scores],
            np.concatenate([faces.boxes for faces in found]),
            np.concatenate([faces.scores for faces in found]),
            np.concatenate([faces.embeddings for faces in found]),
        )

    def key(self, row: int) -> tuple:
        """What a face is found by in a file: its picture, and its box in tenths of a px."""
        return self.picture[row], *(round(float(value), 1) for value in self.boxes[row])

    def write(self, path: Path, names: Sequence[Name], clusters: np.ndarray) -> None:
        """Write faces.csv."""
        write_csv(
            path,
            HEADER,
            (
                [*self.key(i), f"{self.scores[i]:.3f}", name.name, f"{name.similarity:.3f}", name.nearest, cluster, ""]
                for i, (name, cluster) in enumerate(zip(names, clusters.tolist(), strict=True))
            ),
        )


def wishes(path: Path, table: FaceTable, by_cluster: dict[int, str]) -> tuple[dict[str, list[int]], int]:
    """({name: rows of `table` that are to be enrolled}, faces of the file that are no longer there).

    path: faces.csv as the last run has left it, with names in `enrol_as`. by_cluster: {cluster number of that file:
    name}. A name in a row goes before that of its cluster. UserError for a file that cannot be read, an unknown cluster
    and a name that means nobody.
    """
    if not path.is_file():
        if by_cluster:
            raise UserError(f"{path} does not exist: run once without --enrol, and look at the clusters")
        return {}, 0
    rows = _read(path)
    absent = set(by_cluster) - {int(row["cluster"]) for row in rows}
    if absent:
        raise UserError(f"{path} has no cluster {min(absent)}: look at its column cluster")
    places = {table.key(i): i for i in range(len(table))}
    wanted: dict[str, list[int]] = {}
    lost = 0
    for row in rows:
        name = " ".join((row["enrol_as"] or "").split()) or by_cluster.get(int(row["cluster"]), "")
        if not name:
            continue
        if name.lower() == UNKNOWN:
            raise UserError(f"{path}: nobody can be enrolled as {name!r}: write another name into enrol_as")
        place = places.get((row["picture"], *(round(float(row[side]), 1) for side in HEADER[1:5])))
        if place is None:
            lost += 1
        else:
            wanted.setdefault(name, []).append(place)
    return wanted, lost


def _read(path: Path) -> list[dict[str, str]]:
    """The rows of a faces.csv, which a spreadsheet may have saved with a byte order mark, or with semicolons."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        semicolons = text.split("\n", 1)[0].count(";") > 5
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=";" if semicolons else ","))
        for row in rows:
            int(row["cluster"]), [float(row[side]) for side in HEADER[1:5]], row["enrol_as"], row["picture"]
        return rows
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} is no list of faces any more ({error}): save it as CSV in UTF-8 with its columns, or remove it"
        ) from error


def fresh_rows(gallery: Gallery, name: str, embeddings: np.ndarray) -> np.ndarray:
    """Which of some embeddings (n, D) a character does not have yet (n,) bool: nobody is enrolled twice."""
    known = gallery.people.get(" ".join(name.split()))
    if known is None:
        return np.ones(len(embeddings), dtype=bool)
    return (unit(embeddings.astype(np.float32)) @ known.T).max(axis=1) < 1 - 1e-6
