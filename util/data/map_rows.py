"""Drawing the semantic maps of the rows of a data set: from what its metadata say, a face finder, or an estimate."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from util.data.augment import View
from util.data.faces import FACEBOXES_FRAMING, Face, settle_eye
from util.data.foreground import estimate_foreground
from util.data.images import decode_image, decode_with_alpha
from util.data.manifest import Manifest
from util.data.pack_journal import Chunks
from util.data.packed import MAP_CELLS
from util.data.sources import FolderSource

MAP_NAMES = ("face", "eyes", "foreground")
CUT_OUT = 0.02  # share of transparent pixels from which a picture is a cut-out: rounded corners are less

Box = Sequence[float]
Find = Callable[[Image.Image, str], list[Face]]  # picture and its file_name -> the faces in it
Drawn = tuple[np.ndarray, str]  # a map, and where it comes from


def coverage(boxes: Iterable[Box], size: tuple[int, int]) -> np.ndarray:
    """The share of each cell that boxes cover together, exactly: uint8 (32, 32), 0..255.

    boxes: x1, y1, x2, y2, px; what lies outside the picture is cut off. size: (width, height) of the picture, px.
    """
    boxes = np.array(list(boxes), float).reshape(-1, 2, 2) * (MAP_CELLS / np.array(size))
    boxes = boxes.clip(0, MAP_CELLS)
    # between the edges of the boxes, each piece of the picture lies in some box or in none
    x, y = (np.unique(boxes[:, :, axis]) for axis in (0, 1))
    covered = np.zeros((max(0, len(y) - 1), max(0, len(x) - 1)))
    for (x1, y1), (x2, y2) in boxes:
        covered[np.searchsorted(y, y1) : np.searchsorted(y, y2), np.searchsorted(x, x1) : np.searchsorted(x, x2)] = 1
    return _to_levels(_shared(y) @ covered @ _shared(x).T)


def _shared(edges: np.ndarray) -> np.ndarray:
    """The length that each cell shares with each piece between the edges (n,), in cells: (32, n - 1)."""
    cell = np.arange(MAP_CELLS)[:, None]
    return (np.minimum(edges[1:], cell + 1) - np.maximum(edges[:-1], cell)).clip(0)


def _to_levels(shares: np.ndarray) -> np.ndarray:
    return np.rint(shares * 255).astype(np.uint8)


def cell_means(values: np.ndarray) -> np.ndarray:
    """The mean of a mask under each cell, exactly: uint8 (32, 32), 0..255, from (h, w) of 0..255."""
    height, width = values.shape
    return View((0, 0, width, height)).crop_map(values.astype(np.float32), (width, height), (MAP_CELLS, MAP_CELLS))


def predicted_eyes(boxes: Sequence[Box], image: Image.Image) -> list[Box]:
    """Where the eyes of faces are likely: two boxes for each face box x1, y1, x2, y2, px of the image.

    They lie where eyes mostly are in boxes that people draw, moved a little to where the image has lines.
    """
    corners = np.array(boxes, float).reshape(-1, 2, 2)
    size = corners[:, 1] - corners[:, 0]
    within = np.array(FACEBOXES_FRAMING.eyes).reshape(2, 2, 2)
    eyes = corners[:, None, None, 0] + within * size[:, None, None]
    grey = np.asarray(image.convert("L"))
    return [settle_eye(grey, eye) for eye in eyes.reshape(-1, 4)]


class Picture:
    """What the maps of a picture are drawn from; each thing is looked for when it is first asked for.

    rows: all rows of the metadata that are of it. find: looks for faces where they know none. Raises BadImage where
    the picture cannot be decoded.
    """

    def __init__(self, path: Path, rows: list[dict], find: Find | None):
        self.image, self.alpha = decode_with_alpha(path)
        self.rows, self.find = rows, find
        self.boxes = [row["box"] for row in rows if row["box"]]

    @cached_property
    def found(self) -> list[Face]:
        """The faces that the finder finds."""
        return self.find(self.image, self.rows[0]["file_name"]) if self.find else []

    @cached_property
    def face_boxes(self) -> list[Box]:
        """The faces, px: those of the metadata, else those found."""
        return self.boxes or [face.box for face in self.found]

    def face(self, mask: Path | None) -> Drawn:
        """The faces; from "metadata", "finder" or "none"."""
        origin = "metadata" if self.boxes else "finder" if self.face_boxes else "none"
        return coverage(self.face_boxes, self.image.size), origin

    def eyes_of_faces(self, mask: Path | None) -> Drawn:
        """The eyes; from "metadata", the "finder", "predicted" from the faces, or "none"."""
        if any(row["eyes"] for row in self.rows):
            without = [row["box"] for row in self.rows if row["box"] and not row["eyes"]]
            known = [eye for row in self.rows for eye in row["eyes"] or ()]
            eyes, origin = known + predicted_eyes(without, self.image), "metadata"
        elif found := [eye for face in self.found for eye in face.eyes if any(on(eye, b) for b in self.face_boxes)]:
            without = [box for box in self.face_boxes if not any(on(eye, box) for eye in found)]
            eyes, origin = found + predicted_eyes(without, self.image), "finder"
        else:
            eyes, origin = predicted_eyes(self.face_boxes, self.image), "predicted" if self.face_boxes else "none"
        return coverage(eyes, self.image.size), origin

    def foreground(self, mask: Path | None) -> Drawn:
        """The figure; from "alpha", where the picture is a cut-out, its "mask", or an "estimate"."""
        if self.alpha is not None and (self.alpha < 128).mean() >= CUT_OUT and self.alpha.any():
            return cell_means(self.alpha), "alpha"
        if mask is not None:
            return cell_means(np.asarray(decode_image(mask).convert("L"))), "mask"
        return self._estimate, "estimate"

    @cached_property
    def _estimate(self) -> np.ndarray:
        return cell_means(estimate_foreground(self.image, self.face_boxes) * 255)


def on(eye: Box, face: Box) -> bool:
    """Whether the centre of an eye lies in a face box."""
    x, y = (eye[0] + eye[2]) / 2, (eye[1] + eye[3]) / 2
    return face[0] <= x <= face[2] and face[1] <= y <= face[3]


_DRAW = {"face": Picture.face, "eyes": Picture.eyes_of_faces, "foreground": Picture.foreground}


class MapChunks(Chunks):
    """The maps of all rows of a folder as chunks, uint8 (C, 32, 32) a row.

    names: of MAP_NAMES. find: a face finder; None: only the faces that the metadata know. What is known of a row is
    where each of its maps comes from, as the methods of Picture say it.
    """

    def __init__(self, source: FolderSource, path: Path, names: Sequence[str], find: Find | None = None):
        super().__init__(source, path, (len(names), MAP_CELLS, MAP_CELLS))
        self.names, self.find = tuple(names), find
        self._rows_of = _RowsOfPicture(source.manifest)
        self._last: tuple[str | None, Picture | None] = (None, None)  # rows of one picture mostly lie together

    def fill(self, values: np.ndarray, i: int) -> list[str]:
        """Draw the maps of row `i` into `values` (C, 32, 32); says where each comes from. Raises BadImage."""
        picture, mask = self._picture(i), self.source.manifest.mask_path(i)
        drawn = [_DRAW[name](picture, mask) for name in self.names]
        values[:] = [shares for shares, _ in drawn]
        return [origin for _, origin in drawn]

    def _picture(self, i: int) -> Picture:
        manifest = self.source.manifest
        name = manifest.row(i)["file_name"]
        if self._last[0] != name:
            rows = [manifest.row(int(row)) for row in self._rows_of(i)]
            self._last = (name, Picture(manifest.path(i), rows, self.find))
        return self._last[1]


class _RowsOfPicture:
    """Row number -> the numbers (n,) of all rows with the same file_name, in memory of 20 bytes a row."""

    def __init__(self, manifest: Manifest):
        names = manifest.table.column("file_name").combine_chunks()
        self._pictures = np.asarray(pc.dictionary_encode(names).indices)
        self._order = np.argsort(self._pictures, kind="stable")
        self._ends = np.cumsum(np.bincount(self._pictures))

    def __call__(self, i: int) -> np.ndarray:
        picture = self._pictures[i]
        return np.sort(self._order[self._ends[picture - 1] if picture else 0 : self._ends[picture]])
