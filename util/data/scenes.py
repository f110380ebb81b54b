"""Whole pictures with all their faces and eyes, for detection; random views of them, and views for a detector.

A prepared folder has a row for each face, and several rows may share a picture; here a sample is a picture.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from util.data.augment import IMAGENET_MEAN, View
from util.data.images import Picture, size_of
from util.data.sources import Source, column_array
from util.run.errors import UserError

CLASSES = ("face", "eye")
PAD = tuple(round(255 * value) for value in IMAGENET_MEAN)  # grey levels beside a picture: nothing, for a network
_LEAST_SIDE = 2.0  # px of the view below which a box cannot be learned
_LEAST_PART = 0.4  # of a box that must be left in a view


class Scenes:
    """A source of whole pictures. `record(i)["boxes"]`: (n, 4) float32, x1 y1 x2 y2, px; "labels": (n,) int64, places
    in CLASSES; "known": (2,) bool, whether all boxes of a class are there.

    Boxes without area, and the parts of boxes that lie outside the picture, are left out, and counted in `dropped`.
    """

    def __init__(self, source: Source):
        self.source, self.name = source, source.name
        names = column_array(source, "file_name").to_pylist()
        if None in names:
            raise UserError(f"{source.name} does not say which faces share a picture: give a prepared folder")
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            rows.setdefault(name, []).append(row)
        self.files = list(rows)
        boxes, eyes = (source.column(name) for name in ("box", "eyes"))
        if not any(boxes):
            raise UserError(f"{source.name} has no face boxes to learn from or to compare with: give data with `box`")
        has_eyes, self.dropped = any(eyes), 0
        self._rows = [np.array(own) for own in rows.values()]
        self._truth = [self._of([boxes[i] for i in own], [eyes[i] for i in own], has_eyes) for own in rows.values()]
        self.most = max(len(labels) for _, labels, _ in self._truth)
        self.faces = sum(int((labels == 0).sum()) for _, labels, _ in self._truth)
        digest = hashlib.blake2b(source.fingerprint.encode(), digest_size=8)
        for part in (part for truth in self._truth for part in truth):
            digest.update(part.tobytes())
        self.fingerprint = digest.hexdigest()

    def _of(self, boxes: list, eyes: list, has_eyes: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        faces = [box for box in boxes if box]
        own_eyes = [eye for box, some in zip(boxes, eyes, strict=True) for eye in some or () if box]
        # eyes of some faces only would teach that the others have none
        known = has_eyes and all(some for box, some in zip(boxes, eyes, strict=True) if box)
        found = np.array([*faces, *(own_eyes if known else ())], np.float32).reshape(-1, 4)
        labels = np.array([0] * len(faces) + [1] * (len(found) - len(faces)), np.int64)
        solid = (found[:, 2:] > found[:, :2]).all(1)
        self.dropped += int((~solid).sum())
        return found[solid], labels[solid], np.array([True, known])

    def __len__(self) -> int:
        return len(self.files)

    def record(self, i: int) -> Mapping:
        """What is in the picture."""
        boxes, labels, known = self._truth[i]
        return {"file_name": self.files[i], "boxes": boxes, "labels": labels, "known": known}

    def load(self, i: int) -> Image.Image:
        """The picture, RGB. Raises BadImage where it cannot be decoded."""
        return self.source.load(int(self._rows[i][0]))

    def stamp(self) -> str:
        """That of the source."""
        return self.source.stamp()


class SceneView:
    """A random view with all its boxes: `(picture, record of Scenes, rng) -> {"image", "boxes", "labels", "known"}`.

    The picture is scaled so that it just fits, times a factor that is log-uniform in `scale` (large scale jitter, arXiv
    2012.07177), and cut or padded to `size` (H, W), px. A cut keeps a face drawn at random, if it can. Boxes of
    which less than 40 % is left go. most: rows of "boxes" (most, 4) and "labels" (most,), of which the unused are -1.
    """

    def __init__(self, size, most: int, scale=(0.5, 2.0), jitter: float = 0.0, flip: bool = True):
        self.size, self.most, self.scale, self.jitter, self.flip = tuple(size), most, tuple(scale), jitter, flip

    def __call__(self, picture: Picture, record: Mapping, rng: np.random.Generator) -> dict:
        x, y, flip = self._geometry(size_of(picture), record, rng)
        colours = rng.uniform(max(0.0, 1 - self.jitter), 1 + self.jitter, 3).tolist() if self.jitter else (1.0,) * 3
        view = View((x.low, y.low, x.high, y.high), flip, *colours)
        left = self.size[1] - x.at - x.length if flip else x.at
        canvas = padding(self.size)
        canvas[:, y.at : y.at + y.length, left : left + x.length] = view.apply(picture, (y.length, x.length))
        boxes = np.stack([span.place(record["boxes"][:, i]) for i, span in enumerate((x, y, x, y))], 1)
        if flip:
            boxes = np.stack([self.size[1] - boxes[:, 2], boxes[:, 1], self.size[1] - boxes[:, 0], boxes[:, 3]], 1)
        shown = (left, y.at, left + x.length, y.at + y.length)
        known = torch.from_numpy(record["known"])
        return {"image": canvas, **self._padded(*_visible(boxes, record["labels"], shown)), "known": known}

    def _geometry(self, picture_size: tuple[int, int], record: Mapping, rng: np.random.Generator):
        """Which part of the picture is shown where: its columns, its rows, and whether it is mirrored."""
        (width, height), (rows, columns) = picture_size, self.size
        factor = min(columns / width, rows / height) * float(np.exp(rng.uniform(*np.log(self.scale))))
        faces = record["boxes"][record["labels"] == 0]
        x1, y1, x2, y2 = faces[rng.integers(len(faces))] if len(faces) else (0, 0, width, height)
        x = draw_span(width, columns, factor, (x1, x2), rng)
        y = draw_span(height, rows, factor, (y1, y2), rng)
        return x, y, self.flip and rng.random() < 0.5

    def _padded(self, boxes: np.ndarray, labels: np.ndarray) -> dict[str, torch.Tensor]:
        all_boxes, all_labels = torch.full((self.most, 4), -1.0), torch.full((self.most,), -1)
        all_boxes[: len(boxes)], all_labels[: len(labels)] = torch.from_numpy(boxes), torch.from_numpy(labels)
        return {"boxes": all_boxes, "labels": all_labels}


@dataclass(frozen=True)
class Span:
    """One direction of a view: px low..high of the picture are shown on `length` px from `at` on."""

    low: int
    high: int
    at: int
    length: int

    def place(self, values: np.ndarray) -> np.ndarray:
        """Coordinates in the picture, px -> in the view, px."""
        return (values - self.low) * np.float32(self.length / (self.high - self.low)) + self.at


def draw_span(side: int, room: int, factor: float, kept: tuple[float, float], rng: np.random.Generator) -> Span:
    """One direction of a random view. side, room: of the picture and of the view, px. factor: between the two.

    A picture that fits is put anywhere; of one that does not, a part is shown that has `kept` (first and last px) in
    it, or as much of that as the view can hold.
    """
    length = max(1, round(side * factor))
    if length <= room:
        return Span(0, side, int(rng.integers(room - length + 1)), length)
    window = max(1, min(side, round(room / factor)))
    ends = sorted((int(np.ceil(kept[1])) - window, int(kept[0])))
    least, most = (min(max(0, end), side - window) for end in ends)
    low = int(rng.integers(least, most + 1))
    return Span(low, low + window, 0, room)


def _visible(boxes: np.ndarray, labels: np.ndarray, shown: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n, 4) cut to what is shown, x1 y1 x2 y2, and their labels; without those that are hardly left."""
    cut = np.stack([boxes[:, i].clip(shown[i % 2], shown[i % 2 + 2]) for i in range(4)], 1)
    sides, whole = cut[:, 2:] - cut[:, :2], (boxes[:, 2:] - boxes[:, :2]).prod(1)
    left = (sides.min(1, initial=np.inf) >= _LEAST_SIDE) & (sides.prod(1) >= _LEAST_PART * whole)
    return cut[left].astype(np.float32), labels[left]


def padding(size: tuple[int, int]) -> torch.Tensor:
    """An empty canvas of `size` (H, W): uint8 (3, H, W)."""
    return torch.tensor(PAD, dtype=torch.uint8)[:, None, None].repeat(1, *size)


def letterbox(picture: Image.Image, size: int, multiple: int) -> tuple[torch.Tensor, tuple[float, float]]:
    """A picture whose longer side is `size` px, padded right and below until its sides divide by `multiple`.

    Returns uint8 (3, H, W), and the factors (x, y) from px of the picture to px of the result.
    """
    factor = size / max(picture.size)
    width, height = (max(1, round(side * factor)) for side in picture.size)
    canvas = padding(tuple(-(-side // multiple) * multiple for side in (height, width)))
    canvas[:, :height, :width] = View((0, 0, *picture.size)).apply(picture, (height, width))
    return canvas, (width / picture.width, height / picture.height)
