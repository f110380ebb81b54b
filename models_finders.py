"""Face finders of every kind, opened from a line of text.

finder = open_finder("detector:RUN/checkpoint-best.pth+cascade:lbpcascade_animeface.xml", device)
faces = find_faces(image, finder)       # util.data.faces
"""

import re

import numpy as np
import torch
from PIL import Image

from models_detect import PictureDetector, load_detector
from models_faceboxes import load_faceboxes
from util.benchmark.detection import EYE, FACE
from util.data.faces import CascadeFinder, Face, Finder, NetworkFinder, StoredFinder, UnionFinder
from util.run.errors import UserError

KINDS = ("detector:CHECKPOINT", "cascade:FILE.xml", "faceboxes:FILE.pth", "boxes:FILE.json")
WHOLE = "whole"  # in place of a finder, where each picture is a face and nothing else
_NAMES = tuple(kind.partition(":")[0] for kind in KINDS)


class DetectorFinder:
    """A trained detector as a face finder. An eye belongs to the face that its centre lies in, two at most.

    size: longer side of the input, px; None: as in training. min_score: of an eye, 0..1.
    """

    needs_name = False

    def __init__(self, detector: PictureDetector, size: int | None = None, min_score: float = 0.5):
        self.detector, self.size, self.min_score = detector, size, min_score

    def find(self, image: Image.Image, name: str | None = None) -> list[Face]:
        """The faces of a picture; an eye may belong to two that overlap."""
        found = self.detector.detect([image], self.size)[0]
        is_face, is_eye = found.labels == FACE, (found.labels == EYE) & (found.scores >= self.min_score)
        faces, eyes = (np.asarray(found.boxes, np.float64)[chosen] for chosen in (is_face, is_eye))
        eyes = eyes[np.argsort(-found.scores[is_eye], kind="stable")]
        centres = (eyes[:, :2] + eyes[:, 2:]) / 2
        inside = ((centres >= faces[:, None, :2]) & (centres <= faces[:, None, 2:])).all(-1)
        return [
            Face(tuple(box.tolist()), float(score), tuple(sorted(tuple(eye) for eye in eyes[own][:2].tolist())))
            for box, score, own in zip(faces, found.scores[is_face], inside, strict=True)
        ]


def open_finder(spec: str, device: torch.device | str = "cpu") -> Finder:
    """The face finder that `spec` describes: one of KINDS, or several with "+" between them, whose finds are united.

    device: where networks run. Raises UserError where the kind is unknown, or the file is missing or of another kind.
    """
    finders = [_open_one(part, device) for part in finder_parts(spec)]
    return finders[0] if len(finders) == 1 else UnionFinder(finders)


def finder_parts(spec: str) -> list[str]:
    """ "a:X+b:Y" to ["a:X", "b:Y"]; a plus sign within a file name does not divide it."""
    return re.split(rf"\+(?=(?:{'|'.join(_NAMES)}):)", spec)


def _open_one(part: str, device: torch.device | str) -> Finder:
    kind, _, file = part.partition(":")
    if not file or kind not in _NAMES:
        raise UserError(f"face finder {part!r} is not known: give {', '.join(KINDS)}, or several with + between them")
    if kind == "detector":
        return DetectorFinder(load_detector(file, device))
    if kind == "faceboxes":
        return NetworkFinder(load_faceboxes(file, device).detect, device)
    return CascadeFinder(file) if kind == "cascade" else StoredFinder(file)
