"""Faces cut out of their pictures, so that recognition sees one face where the stored image shows a scene.

How far a crop reaches beyond the face box changes every published figure (0, a quarter and a doubled box are all in
use), so the padding is a flag, and a part of the data's fingerprint.
"""

import argparse
import hashlib
import logging
from collections import ChainMap
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
from PIL import Image

from util.data.images import cut, size_of
from util.data.sources import BOX_TYPES, Source, column_array, open_source

log = logging.getLogger(__name__)


class FaceCrops:
    """A source whose pictures are cut to their face boxes.

    padding: what is added on each side, a fraction of the box's longer side: 0 is the box, 0.5 doubles it. The region
    is a square around the box's centre, cut at the border of the picture. A sample without a box keeps its picture.
    """

    def __init__(self, source: Source, padding: float):
        self.source, self.padding, self.name = source, padding, source.name
        self.fingerprint = hashlib.blake2b(f"{source.fingerprint} {padding}".encode(), digest_size=8).hexdigest()
        self._boxes = _boxes_of(source)
        without = int(np.isnan(self._boxes[:, 0]).sum())
        if without:
            log.warning("%s: %d of %d samples have no face box: shown whole", self.name, without, len(source))

    def __len__(self) -> int:
        return len(self.source)

    def record(self, i: int) -> Mapping:
        """The record of the sample, its boxes in px of the crop."""
        record = self.source.record(i)
        if self._box(i) is None:
            return record
        return ChainMap({"box": self._on_crop(i, self._box(i)), "eyes": self._eyes(i, record["eyes"])}, record)

    def column(self, name: str) -> list:
        """One column of the manifest; boxes in px of the crops."""
        if name == "box":
            return [self._on_crop(i, self._box(i)) for i in range(len(self))]
        values = self.source.column(name)
        return [self._eyes(i, eyes) for i, eyes in enumerate(values)] if name == "eyes" else values

    def array(self, name: str) -> pa.Array:
        """The same as an Arrow array."""
        if name in BOX_TYPES:
            return pa.array(self.column(name), BOX_TYPES[name])
        return column_array(self.source, name)

    def stamp(self) -> str:
        """That of the source."""
        return self.source.stamp()

    def load(self, i: int) -> Image.Image:
        """The face of the sample, RGB. Raises BadImage where the picture cannot be decoded."""
        return cut_face(self.source.load(i), self._box(i), self.padding)

    @property
    def view(self) -> Callable[[int], np.ndarray]:
        """The faces within `view` of the source. Raises AttributeError where that has none: then this has none."""
        view = self.source.view
        return lambda i: self._cut(view(i), i)

    def _cut(self, canvas: np.ndarray, i: int) -> np.ndarray:
        box = self._box(i)
        return canvas if box is None else cut(canvas, visible_region(box, self.padding, size_of(canvas)))

    def _box(self, i: int) -> list[float] | None:
        box = self._boxes[i].tolist()
        return None if np.isnan(box[0]) else box

    def _on_crop(self, i: int, box: list[float] | None) -> list[float] | None:
        """A box of sample `i` in px of its crop."""
        face = self._box(i)
        if face is None or box is None:
            return box
        x1, y1, x2, y2 = face_region(face, self.padding)
        left, top = max(0, x1), max(0, y1)
        return _shift(box, left, top, (x2 - left, y2 - top))

    def _eyes(self, i: int, eyes: list | None) -> list | None:
        return eyes if self._box(i) is None else [self._on_crop(i, eye) for eye in eyes or ()] or None


def _boxes_of(source: Source) -> np.ndarray:
    """Face boxes (N, 4) float64, px; NaN where there is none. As objects they would be copied in every worker."""
    column = column_array(source, "box")
    boxes = np.full((len(column), 4), np.nan)
    boxes[np.asarray(column.is_valid())] = np.asarray(column.flatten()).reshape(-1, 4)
    return boxes


def open_pictures(args: argparse.Namespace, role: str) -> Source:
    """The pictures for a role that the flags of `add_data_args` describe, cut to faces with --face_padding."""
    source = open_source(args.data_path, role, labels=args.labels, val_fraction=args.val_fraction)
    return source if args.face_padding is None else FaceCrops(source, args.face_padding)


def face_region(box: list[float], padding: float) -> tuple[int, int, int, int]:
    """The square (x1, y1, x2, y2, px) around a face box that is shown; it may reach beyond the picture."""
    x1, y1, x2, y2 = box
    half = max(x2 - x1, y2 - y1) * (0.5 + padding)
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    left, top = round(x - half), round(y - half)
    side = max(1, round(2 * half))
    return left, top, left + side, top + side


def visible_region(box: list[float], padding: float, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part of `face_region` that lies in a picture of `size` (width, height)."""
    x1, y1, x2, y2 = face_region(box, padding)
    return max(0, x1), max(0, y1), min(size[0], x2), min(size[1], y2)


def cut_face(image: Image.Image, box: list[float] | None, padding: float) -> Image.Image:
    """The region of a face, as far as it lies in the picture; the whole picture without a box."""
    return image if box is None else image.crop(visible_region(box, padding, image.size))


def _shift(box: list[float], left: int, top: int, limits: tuple[int, int]) -> list[float]:
    moved = np.array(box) - (left, top, left, top)
    return moved.clip(0, (*limits, *limits)).tolist()
