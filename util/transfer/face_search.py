"""From a folder of pictures to embedded faces: decode ahead, find, cut, embed, keep; streamed, and resumed."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from util.data.augment import EvalCrop
from util.data.face_crop import visible_region
from util.data.faces import Face, Finder, find_faces
from util.data.images import SUFFIXES, BadImage, decode_image
from util.run.errors import UserError
from util.transfer.encoder import Encoder
from util.transfer.face_store import Faces, FaceStore, PictureFile

PICTURES = 64  # whose faces are embedded together, and written to one file
AHEAD = 8  # pictures that are decoded before they are asked for, for each thread


class WholeFinder:
    """For pictures that show one face each and nothing else: the whole picture is the face."""

    needs_name = False

    def find(self, image: Image.Image, name: str | None = None) -> list[Face]:
        """One face."""
        return [Face((0.0, 0.0, float(image.width), float(image.height)), 1.0)]


@dataclass(frozen=True)
class FaceSearch:
    """How faces are found and embedded. dim: D of the embeddings. crop: what the network is shown of a cut face.

    padding: around a face box, in its sides. min_score: of a face, 0..1. threads: that decode pictures.
    """

    finder: Finder
    encoder: Encoder
    dim: int
    crop: EvalCrop
    padding: float
    min_score: float
    threads: int = 2

    def run(self, folder: Path, pictures: Sequence[PictureFile], store: FaceStore, advance: Callable[[int], object]):
        """Find and embed the faces of all pictures that the store lacks. advance: told how many more are done."""
        todo = [picture for picture in pictures if picture not in store]
        with ThreadPoolExecutor(max(1, self.threads)) as pool:
            decoded = _ahead(pool, lambda picture: _decode(folder / picture.name), todo, AHEAD * max(1, self.threads))
            for start in range(0, len(todo), PICTURES):
                part = todo[start : start + PICTURES]
                found = [self._find(picture, next(decoded)) for picture in part]
                store.add(self._embed(found))
                advance(len(part))

    def _find(self, picture: PictureFile, image: Image.Image | BadImage):
        """(picture, faces, crops, why it is bad)."""
        if isinstance(image, BadImage):
            return picture, [], [], image.reason
        faces = find_faces(image, self.finder, picture.name, self.min_score)
        return picture, faces, [self.cut(image, face) for face in faces], ""

    def cut(self, image: Image.Image, face: Face) -> torch.Tensor:
        """What the network is shown of a face: uint8 (3, H, W)."""
        if isinstance(self.finder, WholeFinder):
            return self.crop(image, {})
        x1, y1, x2, y2 = visible_region(list(face.box), self.padding, image.size)
        inside = (np.array(face.box) - (x1, y1, x1, y1)).tolist()
        return self.crop(image.crop((x1, y1, x2, y2)), {"box": inside})

    def _embed(self, found: Sequence[tuple]) -> list[Faces]:
        crops = [crop for _, _, own, _ in found for crop in own]
        rows = self.encoder(torch.stack(crops)).cpu().numpy() if crops else np.empty((0, self.dim), np.float32)
        if not np.isfinite(rows).all():
            raise UserError("the network's embeddings are not finite: check --ckpt, or give --precision fp32")
        parts = np.split(rows, np.cumsum([len(own) for _, _, own, _ in found])[:-1])
        return [
            Faces(
                picture,
                np.array([face.box for face in faces], dtype=np.float32).reshape(-1, 4),
                np.array([face.score for face in faces], dtype=np.float32),
                own,
                bad,
            )
            for (picture, faces, _, bad), own in zip(found, parts, strict=True)
        ]


def list_pictures(folder: str | Path, leave_out: Sequence[Path]) -> list[PictureFile]:
    """The pictures under a folder, sorted by path; hidden ones, and those below `leave_out`, are none.

    UserError where there is no such folder, no picture, or a name that is no text.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one that holds pictures")
    pictures, outside = [], {path.resolve() for path in leave_out}
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (Path(place) / name).resolve() not in outside
        )
        for name in sorted(files):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                pictures.append((Path(place) / name).relative_to(folder).as_posix())
    if not pictures:
        raise UserError(f"{folder} holds no pictures: give a folder of {', '.join(sorted(SUFFIXES))} files")
    for name in pictures:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{folder}: the file name {name!r} is not valid UTF-8: rename it") from error
    return [PictureFile.of(folder, name) for name in pictures]


def _decode(path: Path) -> Image.Image | BadImage:
    try:
        return decode_image(path)
    except BadImage as error:
        return error


def _ahead(pool: ThreadPoolExecutor, work: Callable, items: Sequence, window: int) -> Iterator:
    """work(item) for each item, in order; at most `window` of them are worked on before they are asked for."""
    waiting: deque[Future] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
