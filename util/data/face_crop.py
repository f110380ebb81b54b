"""Faces cut out of their pictures, so that recognition sees one face where the stored image shows a scene.

How far a crop reaches beyond the face box changes every published figure (0, a quarter and a doubled box are all in
use), so the padding is a flag, and a part of the data's fingerprint.
"""

import argparse
import hashlib
import logging

import numpy as np
from PIL import Image

from util.data.sources import Source, open_source

log = logging.getLogger(__name__)


class FaceCrops:
    """A source whose pictures are cut to their face boxes.

    padding: what is added on each side, a fraction of the box's longer side: 0 is the box, 0.5 doubles it. The region
    is a square around the box's centre, cut at the border of the picture. A sample without a box keeps its picture.
    """

    def __init__(self, source: Source, padding: float):
        self.source, self.padding, self.name = source, padding, source.name
        self.fingerprint = hashlib.blake2b(f"{source.fingerprint} {padding}".encode(), digest_size=8).hexdigest()
        self._boxes = source.column("box")
        without = sum(box is None for box in self._boxes)
        if without:
            log.warning("%s: %d of %d samples have no face box: shown whole", self.name, without, len(source))

    def __len__(self) -> int:
        return len(self.source)

    def record(self, i: int) -> dict:
        """The record of the sample, its boxes in px of the crop."""
        record = dict(self.source.record(i))
        if record["box"] is None:
            return record
        x1, y1, x2, y2 = face_region(record["box"], self.padding)
        left, top = max(0, x1), max(0, y1)
        limits = (x2 - left, y2 - top)
        record["box"] = _shift(record["box"], left, top, limits)
        record["eyes"] = [_shift(eye, left, top, limits) for eye in record["eyes"] or ()] or None
        return record

    def column(self, name: str) -> list:
        """One column of the manifest; boxes in px of the crops."""
        if name in ("box", "eyes"):
            return [self.record(i)[name] for i in range(len(self))]
        return self.source.column(name)

    def stamp(self) -> str:
        """That of the source."""
        return self.source.stamp()

    def load(self, i: int) -> Image.Image:
        """The face of the sample, RGB. Raises BadImage where the picture cannot be decoded."""
        return cut_face(self.source.load(i), self._boxes[i], self.padding)


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


def cut_face(image: Image.Image, box: list[float] | None, padding: float) -> Image.Image:
    """The region of a face, as far as it lies in the picture; the whole picture without a box."""
    if box is None:
        return image
    x1, y1, x2, y2 = face_region(box, padding)
    return image.crop((max(0, x1), max(0, y1), min(image.width, x2), min(image.height, y2)))


def _shift(box: list[float], left: int, top: int, limits: tuple[int, int]) -> list[float]:
    moved = np.array(box) - (left, top, left, top)
    return moved.clip(0, (*limits, *limits)).tolist()
