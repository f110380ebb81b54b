"""A prepared folder whose pictures are annotated by hand: its own, or one that a prepare script wrote.

    folder = Annotations("runs/annotations")
    draft = folder.open(folder.names()[0])
    folder.save(draft)

A new picture is stored as images/KEY.png, KEY being a hash of its pixels: no name of a visitor becomes a path, and the
same picture is there once. Rows of other pictures, and what the tab does not show of a row, stay as they are.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from util.data.images import BadImage, decode_image
from util.data.manifest import MANIFEST_NAME, read_manifest, write_manifest
from util.data.prepare import fit_box
from util.data.sources import MAPS_FOLDER
from util.run.errors import UserError
from util.run.files import write_atomically

WRITER = "visualize.demo"
FIELDS = ("identity", "style", "pose", "occlusion")  # of a row that the tab shows, beside the box
SPLIT = "train"  # of a new picture
MOST_NAMES = 1000  # of pictures that a page lists

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Label:
    """A face as it is annotated. box: x1 y1 x2 y2, px of the picture. rest: the other columns of its row."""

    box: Box | None
    identity: str | None = None
    style: str | None = None
    pose: str | None = None
    occlusion: str | None = None
    rest: dict = field(default_factory=dict)

    def row(self) -> dict:
        """The row, as far as the face knows it."""
        shown = {name: getattr(self, name) for name in FIELDS}
        return {**self.rest, **shown, "box": None if self.box is None else list(self.box)}


@dataclass(frozen=True)
class Draft:
    """A picture and its faces. file_name: None for a picture that is not in the folder yet."""

    picture: Image.Image
    labels: tuple[Label, ...]
    file_name: str | None = None


class Annotations:
    """A prepared folder that is changed picture by picture; it need not be there yet."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def _rows(self) -> tuple[list[dict], str | None, dict]:
        """All rows, the image_root, and the rest of the file's metadata."""
        if not (self.folder / MANIFEST_NAME).is_file():
            return [], None, {"writer": WRITER}
        manifest = read_manifest(self.folder)
        metadata = dict(manifest.metadata)
        return manifest.table.to_pylist(), metadata.pop("image_root", None), metadata

    def names(self, most: int = MOST_NAMES) -> list[str]:
        """The file names of its pictures, in the order of the rows."""
        return list(dict.fromkeys(row["file_name"] for row in self._rows()[0]))[:most]

    def open(self, file_name: str, max_pixels: int) -> Draft:
        """A picture of the folder with its faces. UserError where there is none, or it cannot be read."""
        rows, root, _ = self._rows()
        own = [row for row in rows if row["file_name"] == file_name]
        if not own:
            raise UserError(f"{file_name} is not in {self.folder}: pick a picture from the list")
        try:
            picture = decode_image(self.folder / (root or "") / file_name, max_pixels)
        except BadImage as error:
            raise UserError(f"{file_name} cannot be read ({error.reason}): restore it") from error
        labels = [_label(row) for row in own]
        return Draft(picture, tuple(labels), file_name)

    def save(self, draft: Draft) -> str:
        """Write a picture and its faces; returns its file name. Boxes are cut at the picture's border.

        UserError where there is no face, a box has no inside, the folder's pictures lie elsewhere and the picture is
        new, or the folder has semantic maps, which go by row, and the number of rows would change.
        """
        rows, root, metadata = self._rows()
        if not draft.labels:
            raise UserError("there is no face: add one first")
        fresh = [_checked(label, number, draft.picture.size) for number, label in enumerate(draft.labels, start=1)]
        name = draft.file_name or self._store(draft.picture, root)
        places = [place for place, row in enumerate(rows) if row["file_name"] == name]
        if len(places) != len(fresh) and (self.folder / MAPS_FOLDER).exists():
            raise UserError(
                f"{self.folder} has semantic maps, which go by row: the number of faces cannot change there"
            )
        split = rows[places[0]]["split"] if places else SPLIT
        own = _with_ids(fresh, name, split, {row["sample_id"] for row in rows if row["file_name"] != name})
        first = places[0] if places else len(rows)
        others_before = [row for row in rows[:first] if row["file_name"] != name]
        others_after = [row for row in rows[first:] if row["file_name"] != name]
        write_manifest(self.folder, [*others_before, *own, *others_after], root, metadata)
        return name

    def _store(self, picture: Image.Image, root: str | None) -> str:
        if root is not None:
            raise UserError(f"the pictures of {self.folder} lie elsewhere: give another --annotations for new ones")
        size = "x".join(map(str, picture.size)).encode()
        name = f"images/{hashlib.blake2b(size + picture.tobytes(), digest_size=12).hexdigest()}.png"
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda part: picture.save(part, "PNG"))
        return name


def _label(row: dict) -> Label:
    rest = {name: value for name, value in row.items() if name not in (*FIELDS, "box")}
    return Label(None if row["box"] is None else tuple(row["box"]), *(row[name] for name in FIELDS), rest)


def _checked(label: Label, number: int, size: tuple[int, int]) -> dict:
    row = label.row()
    if label.box is None:
        raise UserError(f"face {number} has no box: click two opposite corners of it")
    row["box"], reason = fit_box(label.box, size)
    if row["box"] is None:
        raise UserError(f"face {number}: {reason}; click two opposite corners of it")
    return row


def _with_ids(rows: Sequence[dict], name: str, split: str, taken: set[str]) -> list[dict]:
    """The rows with what each needs: a sample_id that no other has, file name, split, source."""
    stem, ids = Path(name).stem, {row["sample_id"] for row in rows if row.get("sample_id")}
    free = (f"{stem}_{number}" for number in range(len(rows) + len(ids) + len(taken) + 1))
    free = (text for text in free if text not in ids and text not in taken)
    return [
        {"source": stem, "split": split, **row, "file_name": name, "sample_id": row.get("sample_id") or next(free)}
        for row in rows
    ]
