"""Contact sheets of identified faces: a row for each character and each unknown cluster, on as many pages as needed."""

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from util.data.sheet import sheet
from util.run.files import write_atomically
from util.transfer.gallery import unit
from util.transfer.naming import UNKNOWN, Name

COLUMNS, ROWS, CELL = 10, 12, 96  # faces in a row, rows on a page, px of a face
TITLE_WIDTH = 24  # characters


@dataclass(frozen=True)
class Row:
    """A row of a sheet. faces: numbers of those that are shown, the most typical first."""

    title: str
    faces: tuple[int, ...]


def sheet_rows(names: Sequence[Name], clusters: np.ndarray, embeddings: np.ndarray) -> list[Row]:
    """Named characters by falling number of faces, then unknown clusters, then unknown faces that are alone."""
    faces = unit(np.asarray(embeddings, dtype=np.float32))
    given = np.array([name.name for name in names], dtype=object)
    rows, alone = [], []
    for name in _by_size(given[given != UNKNOWN]):
        own = np.flatnonzero(given == name)
        similarity = np.mean([names[i].similarity for i in own])
        rows.append(
            Row(f"{_short(name)}\n{_faces(own)}, {similarity:.2f}\n{_numbers(clusters[own])}", _best(faces, own))
        )
    unknown = given == UNKNOWN
    for number in _by_size(clusters[unknown]):
        own = np.flatnonzero(unknown & (clusters == number))
        if len(own) == 1:
            alone.append(int(own[0]))
            continue
        nearest = f"\nmost like {_short(names[own[0]].nearest)}" if names[own[0]].nearest else ""
        rows.append(Row(f"{UNKNOWN}\n{_faces(own)}{nearest}\n{_numbers(clusters[own])}", _best(faces, own)))
    for start in range(0, len(alone), COLUMNS):
        part = tuple(alone[start : start + COLUMNS])
        rows.append(Row(f"{UNKNOWN}, one face each\n{_numbers(clusters[list(part)])}", part))
    return rows


def write_sheets(
    folder: Path, rows: Sequence[Row], load: Callable[[Sequence[int]], dict[int, Image.Image]], pages: int
) -> tuple[list[Path], int]:
    """Write sheet.png, sheet-2.png, ... into a folder; (the files, rows that had no place on so many pages).

    load: numbers of faces -> their pictures; those that cannot be had are left blank. Older pages are removed.
    """
    shown, files = rows[: pages * ROWS], []
    total = -(-len(shown) // ROWS)
    for number, start in enumerate(range(0, len(shown), ROWS), 1):
        part = shown[start : start + ROWS]
        pictures = load([face for row in part for face in row.faces])
        page = sheet(
            [[pictures.get(face) for face in row.faces] + [None] * (COLUMNS - len(row.faces)) for row in part],
            row_titles=[row.title for row in part],
            title=f"Faces by character, page {number} of {total}" if total > 1 else "Faces by character",
            cell=CELL,
        )
        files.append(folder / ("sheet.png" if number == 1 else f"sheet-{number}.png"))
        write_atomically(files[-1], lambda temporary, page=page: page.save(temporary, "PNG"))
    for old in folder.glob("sheet*.png"):
        if re.fullmatch(r"sheet(-\d+)?\.png", old.name) and old not in files:
            old.unlink()
    return files, len(rows) - len(shown)


def _by_size(values: np.ndarray) -> list:
    """Distinct values, the most frequent first, then in their own order."""
    found, counts = np.unique(values, return_counts=True) if len(values) else ([], np.empty(0))
    return [found[i] for i in np.argsort(-counts, kind="stable")]


def _best(faces: np.ndarray, own: np.ndarray) -> tuple[int, ...]:
    typical = faces[own] @ unit(faces[own].mean(axis=0))
    return tuple(own[np.argsort(-typical, kind="stable")][:COLUMNS].tolist())


def _short(name: str) -> str:
    return textwrap.shorten(name, TITLE_WIDTH, placeholder="...") if " " in name else name[:TITLE_WIDTH]


def _faces(own: np.ndarray) -> str:
    return f"{len(own)} face" + "s" * (len(own) > 1)


def _numbers(clusters: np.ndarray) -> str:
    numbers = sorted(set(clusters.tolist()))
    text = ("clusters " if len(numbers) > 1 else "cluster ") + ", ".join(map(str, numbers))
    return "\n".join(textwrap.wrap(text, TITLE_WIDTH, max_lines=3, placeholder=" ..."))
