"""Faces of drawn characters, and their eyes, in whole pictures.

    CascadeFinder   OpenCV's cascade of local binary patterns: precise, frontal faces only
    NetworkFinder   a detection network, run at several sizes of the picture; also turned faces
    DetectorFinder  a detector trained by main_detect.py (models_finders)
    StoredFinder    what another program found, from a JSON file
    UnionFinder     several of them; of overlapping faces the best

A finder is opened from a line of text with `models_finders.open_finder`. Profiles, faces upside down and animals are
mostly missed by all of them. Neither the cascade nor the network looks for eyes: theirs are put where eyes mostly are
in boxes framed as that finder frames them, then moved a little to where the picture has most edges. So a closed, hidden
or averted eye gets a box too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from util.run.errors import UserError
from util.run.untrusted import read_json

Box = tuple[float, float, float, float]
Scored = tuple[np.ndarray, np.ndarray]  # boxes (n, 4) x1 y1 x2 y2, scores (n,)
SAME_FACE = 0.2  # IoU above which two boxes are taken for one face
FLOOR = 0.05  # share of true faces below which boxes are not worth keeping
MIN_SCORE = 0.25  # about where F1 is best, on iCartoonFace train and val
REACH = 0.25  # how far a guessed eye may be moved, in its own size
EYE_CELLS = 24  # sampling of an eye box, cells a side
MOVE_COST = 0.05  # of a move by the eye's whole size, in the unit of the mean gradient


@dataclass(frozen=True)
class Face:
    """A face in a picture. Boxes are x1 y1 x2 y2 in px of the picture and lie in it; score: 0..1.

    eyes: none, one or two boxes.
    """

    box: Box
    score: float
    eyes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Framing:
    """How the boxes and scores of a finder relate to faces, measured once on real pictures.

    scale: of the box's width and height about its centre. eyes: boxes (left and right in the picture) in a mended box,
    which is the unit square. raw, share: at the finder's own score raw[i], share[i] of its boxes were faces (IoU
    >= 0.3) on iCartoonFace train and val; linear in between. Boxes of a share below FLOOR are no faces.
    """

    scale: tuple[float, float]
    eyes: tuple[Box, Box]
    raw: tuple[float, ...]
    share: tuple[float, ...]

    def faces(self, image: Image.Image, boxes: np.ndarray, scores: np.ndarray) -> list[Face]:
        """Faces in a picture from a finder's boxes (n, 4) and its own scores (n,)."""
        shares = np.interp(scores, self.raw, self.share)
        boxes, shares = boxes[shares >= FLOOR], shares[shares >= FLOOR]
        size = (boxes[:, 2:] - boxes[:, :2]) * np.array(self.scale)
        corner = (boxes[:, :2] + boxes[:, 2:] - size) / 2
        eyes = corner[:, None, None] + np.array(self.eyes).reshape(2, 2, 2) * size[:, None, None]
        grey = np.asarray(image.convert("L"))
        return [
            Face(tuple(box), float(score), tuple(settle_eye(grey, eye.ravel()) for eye in pair))
            for box, score, pair in zip(np.hstack((corner, corner + size)).tolist(), shares, eyes, strict=True)
        ]


# Scales and scores: iCartoonFace detection, train and val. Eyes: machine-made boxes of moeimouto, train.
CASCADE_FRAMING = Framing(
    scale=(0.65, 0.65),
    eyes=((0.015, 0.22, 0.353, 0.55), (0.647, 0.22, 0.985, 0.55)),
    raw=(2, 3, 4, 5, 9, 15, 28, 60),
    share=(0.38, 0.44, 0.54, 0.85, 0.86, 0.95, 0.96, 1.0),
)
FACEBOXES_FRAMING = Framing(
    scale=(1.0, 1.0),
    eyes=((0.054, 0.337, 0.363, 0.566), (0.637, 0.337, 0.946, 0.566)),
    raw=(0.03, 0.06, 0.095, 0.136, 0.178, 0.222, 0.34, 0.45, 0.55, 0.75, 0.92, 1.0),
    share=(0.005, 0.037, 0.08, 0.15, 0.2, 0.28, 0.42, 0.5, 0.6, 0.74, 0.87, 1.0),
)


def settle_eye(grey: np.ndarray, box: np.ndarray) -> Box:
    """Move a guessed eye box (4,), px, by up to a quarter of its size to where the picture (H, W) has most edges.

    In drawings nothing in a face has as many as the eyes. Far moves cost a little; the size is kept.
    """
    size = box[2:] - box[:2]
    left, top, right, bottom = np.rint(np.concatenate((box[:2] - REACH * size, box[2:] + REACH * size))).astype(int)
    rows, columns = np.arange(top, max(bottom, top + 2)), np.arange(left, max(right, left + 2))
    near = grey[np.ix_(rows.clip(0, grey.shape[0] - 1), columns.clip(0, grey.shape[1] - 1))]
    span = EYE_CELLS + 2 * round(REACH * EYE_CELLS)
    small = np.asarray(Image.fromarray(near).resize((span, span), Image.Resampling.BILINEAR), np.float64) / 255
    edges = np.hypot(*np.gradient(small))
    windows = np.lib.stride_tricks.sliding_window_view(edges, (EYE_CELLS, EYE_CELLS)).mean((2, 3))
    shifts = np.linspace(-REACH, REACH, len(windows))
    cost = MOVE_COST * (shifts[:, None] ** 2 + shifts**2)
    y, x = np.unravel_index((windows - cost).argmax(), windows.shape)
    moved = np.tile(np.array([shifts[x], shifts[y]]) * size, 2) + box
    return tuple(moved.tolist())


class Finder(Protocol):
    """Finds faces. needs_name: whether it has to be told the picture's name. It can be pickled before its first use."""

    needs_name: bool

    def find(self, image: Image.Image, name: str | None = None) -> list[Face]:
        """All faces in an RGB picture, in any order; boxes may reach beyond it. name: its file_name."""
        ...


class CascadeFinder:
    """OpenCV's cascade classifier. It needs OpenCV below 5; the file is read at the first picture.

    A face has to look at the viewer, and its side to be a twentieth of the picture's long side or more. The score comes
    from the number of windows that agree. Raises UserError where the file is no cascade.
    """

    needs_name = False
    side = 320  # long side of the picture that is searched, px
    step = 1.05  # ratio of the sizes that are tried
    least = 24  # side of the smallest face in the searched picture, px

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"cascade {path} does not exist: give an OpenCV cascade, such as lbpcascade_animeface.xml")

    def __getstate__(self) -> dict:
        return {"path": self.path}  # OpenCV's classifier cannot be pickled

    @cached_property
    def _classifier(self):
        import cv2  # heavy

        if not hasattr(cv2, "CascadeClassifier"):
            raise UserError("this OpenCV has no cascades: install opencv-python-headless below 5")
        try:
            classifier = cv2.CascadeClassifier(str(self.path))
        except (cv2.error, SystemError) as error:
            raise UserError(f"{self.path} is no OpenCV cascade: give one, such as lbpcascade_animeface.xml") from error
        if classifier.empty():
            raise UserError(f"{self.path} is no OpenCV cascade: give one, such as lbpcascade_animeface.xml")
        return classifier

    def raw(self, image: Image.Image) -> Scored:
        """Boxes (n, 4) in px of the picture as the cascade frames them, and how many windows agree on each (n,)."""
        small, factor = resized(image.convert("L"), self.side)
        grey = np.asarray(small)
        least = (self.least, self.least)
        boxes, votes = self._classifier.detectMultiScale2(grey, scaleFactor=self.step, minNeighbors=1, minSize=least)
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes / factor, np.asarray(votes, np.float64).reshape(-1)

    def find(self, image: Image.Image, name: str | None = None) -> list[Face]:
        """The faces of a picture."""
        return CASCADE_FRAMING.faces(image, *self.raw(image))


class NetworkFinder:
    """A detection network, run on the picture at several sizes: it is blind to faces far larger than its priors.

    detect: takes RGB uint8 (1, 3, H, W), gives [(boxes (n, 4) px, scores (n,))] (models_faceboxes.FaceBoxes.detect).
    sides: long sides in px that the picture is brought to.
    """

    needs_name = False

    def __init__(
        self,
        detect: Callable[[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]],
        device: torch.device | str = "cpu",
        sides: Sequence[int] = (256, 512, 1024),
        framing: Framing = FACEBOXES_FRAMING,
    ):
        self.detect, self.device, self.sides, self.framing = detect, device, tuple(sides), framing

    def raw(self, image: Image.Image) -> Scored:
        """Boxes (n, 4) in px of the picture as the network frames them, and their scores in 0..1 (n,)."""
        found = [self._at(image, side) for side in self.sides]
        return vote(np.concatenate([boxes for boxes, _ in found]), np.concatenate([scores for _, scores in found]))

    def _at(self, image: Image.Image, side: int) -> Scored:
        scaled, factor = resized(image, side)
        pixels = torch.from_numpy(np.array(scaled)).permute(2, 0, 1)[None].to(self.device)
        boxes, scores = self.detect(pixels)[0]
        return boxes.cpu().double().numpy() / factor, scores.cpu().double().numpy()

    def find(self, image: Image.Image, name: str | None = None) -> list[Face]:
        """The faces of a picture."""
        return self.framing.faces(image, *self.raw(image))


class StoredFinder:
    """Faces from a file: {file_name: {"faces": [{"score", "face", "left_eye", "right_eye"}]}}.

    Boxes there are x, y, width, height in px; eyes may be missing. A picture
    that the file does not list, and a file of another form, is a UserError.
    """

    needs_name = True

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            listed = read_json(self.path)
            self._faces = {name: [_stored_face(face) for face in entry["faces"]] for name, entry in listed.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{path} holds no face boxes ({reason}): give JSON such as "
                '{"a.jpg": {"faces": [{"score": 0.9, "face": [x, y, width, height]}]}}'
            ) from error

    def find(self, image: Image.Image, name: str | None = None) -> list[Face]:
        """The faces that are listed for `name`."""
        if name is None or name not in self._faces:
            raise UserError(f"{self.path} does not list {name}: its names are relative to the folder it was made for")
        return self._faces[name]


def _stored_face(face: dict) -> Face:
    eyes = sorted(_corners(face[eye]) for eye in ("left_eye", "right_eye") if face.get(eye))
    return Face(_corners(face["face"]), float(face["score"]), tuple(eyes))


def _corners(box: Sequence[float]) -> Box:
    x, y, width, height = map(float, box)
    if not np.isfinite([x, y, x + width, y + height]).all():
        raise ValueError(f"{list(box)} is no box of finite numbers")
    return x, y, x + width, y + height


class UnionFinder:
    """All faces of several finders; where two overlap by more than SAME_FACE, the one with the better score."""

    def __init__(self, finders: Sequence[Finder]):
        self.finders = tuple(finders)
        self.needs_name = any(finder.needs_name for finder in self.finders)

    def find(self, image: Image.Image, name: str | None = None) -> list[Face]:
        """The faces of a picture."""
        faces = sorted((face for f in self.finders for face in f.find(image, name)), key=lambda face: -face.score)
        kept: list[Face] = []
        for face in faces:
            if not kept or overlaps([face.box], [other.box for other in kept]).max() <= SAME_FACE:
                kept.append(face)
        return kept


def find_faces(image: Image.Image, finder: Finder, name: str | None = None, min_score: float = MIN_SCORE) -> list[Face]:
    """The faces in a picture, best first; empty where none is found.

    image: of any mode. name: its file_name, for finders with `needs_name`. min_score: in 0..1, faces below are left
    out; scores of the cascade and the network are shares of true faces on broad cartoon pictures, see Framing.
    """
    image = image.convert("RGB")
    inside = [_clipped(face, image.size) for face in finder.find(image, name) if face.score >= min_score]
    return sorted((face for face in inside if face), key=lambda face: -face.score)


def _clipped(face: Face, size: tuple[int, int]) -> Face | None:
    """The part of a face that lies in a picture of `size` (width, height); None if nothing does."""
    box, *eyes = (_clip(box, size) for box in (face.box, *face.eyes))
    return replace(face, box=box, eyes=tuple(eye for eye in eyes if eye)) if box else None


def _clip(box: Box, size: tuple[int, int]) -> Box | None:
    x1, y1, x2, y2 = np.clip(box, 0, (*size, *size)).tolist()
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def resized(image: Image.Image, side: int) -> tuple[Image.Image, np.ndarray]:
    """The picture with its long side at `side` px, and the factors (x1, y1, x2, y2) from its px to the new ones."""
    size = [max(1, round(length * side / max(image.size))) for length in image.size]
    factors = np.array(size) / np.array(image.size)
    return image.resize(size, Image.Resampling.BILINEAR), np.tile(factors, 2)


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union (n, m) of boxes (n, 4) and others (m, 4), both x1 y1 x2 y2."""
    boxes, others = (np.asarray(b, np.float64).reshape(-1, 4) for b in (boxes, others))
    least = np.maximum(boxes[:, None, :2], others[None, :, :2])
    most = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (most - least).clip(0).prod(-1)
    areas, other_areas = ((b[:, 2:] - b[:, :2]).prod(-1) for b in (boxes, others))
    return shared / np.maximum(areas[:, None] + other_areas - shared, 1e-12)


def vote(boxes: np.ndarray, scores: np.ndarray, overlap: float = 0.45) -> Scored:
    """One box for each group of boxes (n, 4) that agree; scores (n,) in 0..1.

    A group is the best box that is left and all boxes left that overlap it by `overlap` (IoU) or more. Its box is
    their mean, weighted by score; its score 1 - prod(1 - score), so that agreement over sizes counts.
    """
    order = np.argsort(-scores, kind="stable")
    boxes, scores = boxes[order], scores[order]
    alike, left = overlaps(boxes, boxes) >= overlap, np.ones(len(boxes), bool)
    groups = []
    for best in range(len(boxes)):
        if left[best]:
            groups.append(np.flatnonzero(alike[best] & left))
            left[groups[-1]] = False
    means = [np.average(boxes[group], axis=0, weights=scores[group]) for group in groups]
    joint = [1 - np.prod(1 - scores[group]) for group in groups]
    return np.array(means).reshape(-1, 4), np.array(joint)
