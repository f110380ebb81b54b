"""Correct what is known of the faces of a picture, and write it to a prepared folder.

The state of a page is a `Draft` and which of its faces is chosen; every function here takes them and gives new ones.
"""

from dataclasses import dataclass, replace

from PIL import Image

from util.run.errors import UserError
from util.toonfaces.look import OCCLUSIONS, POSES
from util.toonfaces.style import STYLES
from visualize.demo.annotations import FIELDS, Draft, Label
from visualize.demo.enrol import names
from visualize.demo.models import Models
from visualize.demo.pictures import boxed, open_upload
from visualize.demo.recognise import UNKNOWN, recognise

CHOICES = {"style": tuple(STYLES), "pose": POSES, "occlusion": OCCLUSIONS}
CORNERS = ("x1", "y1", "x2", "y2")
LEAST = 4  # px, side of a box that two clicks make: less is a slip of the hand


@dataclass(frozen=True)
class Page:
    """draft: the picture and its faces. chosen: number of the face at hand, from 0; -1: none.

    corner: x, y in px, where the first of two clicks was; None between boxes.
    """

    draft: Draft
    chosen: int = -1
    corner: tuple[float, float] | None = None

    @property
    def label(self) -> Label | None:
        """The face at hand."""
        return self.draft.labels[self.chosen] if self.chosen >= 0 else None

    def with_labels(self, labels: tuple[Label, ...], chosen: int) -> "Page":
        """The same picture with other faces."""
        return Page(replace(self.draft, labels=labels), chosen)


def start(models: Models, picture: Image.Image) -> Page:
    """A new picture: the faces that are found, and the names of those that the gallery knows."""
    named = [one for one in recognise(models, picture) if one.face]
    labels = tuple(
        Label(one.face.box, None if one.name == UNKNOWN else one.name, rest=_eyes(one.face)) for one in named
    )
    return Page(Draft(picture, labels), 0 if labels else -1)


def _eyes(face) -> dict:
    return {"eyes": [list(eye) for eye in face.eyes]} if face.eyes else {}


def choose(page: Page, number: int) -> Page:
    """Turn to another face."""
    return replace(page, chosen=number if 0 <= number < len(page.draft.labels) else -1, corner=None)


def add(page: Page) -> Page:
    """A further face, without a box yet."""
    labels = (*page.draft.labels, Label(None))
    return page.with_labels(labels, len(labels) - 1)


def remove(page: Page) -> Page:
    """Forget the face at hand."""
    if page.label is None:
        raise UserError("no face is chosen: pick the one to remove")
    labels = page.draft.labels[: page.chosen] + page.draft.labels[page.chosen + 1 :]
    return page.with_labels(labels, min(page.chosen, len(labels) - 1))


def click(page: Page, x: float, y: float) -> Page:
    """A click into the picture, px of it: two of them are opposite corners of the box of the face at hand."""
    if page.label is None:
        raise UserError("no face is chosen: add one, then click two opposite corners of it")
    if page.corner is None:
        return replace(page, corner=(x, y))
    (left, right), (top, bottom) = sorted((page.corner[0], x)), sorted((page.corner[1], y))
    if right - left < LEAST or bottom - top < LEAST:
        raise UserError("the two clicks are too close to be corners of a face: click again")
    return change(page, box=(left, top, right, bottom))


def change(page: Page, **values) -> Page:
    """Give the face at hand other values: a box, or any of FIELDS; empty text means not known.

    With a new box the eyes are no longer known.
    """
    if page.label is None:
        raise UserError("no face is chosen: pick one, or add one")
    values = {name: value.strip() or None if isinstance(value, str) else value for name, value in values.items()}
    label = replace(page.label, **values)
    if label.box != page.label.box:
        label = replace(label, rest={name: value for name, value in label.rest.items() if name != "eyes"})
    labels = (*page.draft.labels[: page.chosen], label, *page.draft.labels[page.chosen + 1 :])
    return page.with_labels(labels, page.chosen)


def draw(page: Page) -> Image.Image:
    """The picture with its boxes, numbered; that of the face at hand has a star."""
    labels = [(number, one) for number, one in enumerate(page.draft.labels) if one.box]
    captions = [f"{number + 1}{'*' * (number == page.chosen)} {one.identity or ''}".strip() for number, one in labels]
    return boxed(page.draft.picture, [one.box for _, one in labels], captions)


def scale_of(page: Page) -> float:
    """px of the picture for each px of what `draw` shows."""
    return page.draft.picture.width / draw(page).width


def save(models: Models, page: Page) -> tuple[Page, str]:
    """Write the picture and its faces into the folder; returns the page as it is there, and a line."""
    with models.lock:
        name = models.annotations.save(page.draft)
        draft = models.annotations.open(name, models.limits.max_pixels)
    faces = len(draft.labels)
    return Page(draft, page.chosen), f"{faces} face{'s' * (faces > 1)} of {name} written to {models.annotations.folder}"


def listed(models: Models) -> list[str]:
    """The pictures of the folder."""
    with models.lock:
        return models.annotations.names()


def fields(page: Page) -> list:
    """What the form shows of the face at hand: its FIELDS, then the four numbers of its box."""
    label = page.label
    box = (None,) * 4 if label is None or label.box is None else [round(value, 1) for value in label.box]
    return [None if label is None else getattr(label, name) for name in FIELDS] + list(box)


def open_new(models: Models, upload: str | None) -> tuple[Page, str]:
    """A page for an upload, and a line."""
    page = start(models, open_upload(upload, models.limits))
    found = len(page.draft.labels)
    hint = "correct them, then save" if found else "add one, then click two opposite corners of it"
    return page, f"{found or 'no'} face{'s' * (found != 1)} found: {hint}"


def open_stored(models: Models, name: str | None) -> tuple[Page, str]:
    """A page for a picture of the folder, and a line."""
    if not name:
        raise UserError("no picture is chosen: pick one from the list")
    with models.lock:
        draft = models.annotations.open(name, models.limits.max_pixels)
    return Page(draft, 0), f"{name} has {len(draft.labels)} face{'s' * (len(draft.labels) > 1)}"


def known_names(models: Models, page: Page | None) -> list[str]:
    """Names to choose an identity from: the gallery's, and those on the page."""
    own = {label.identity for label in page.draft.labels if label.identity} if page else set()
    return sorted({*names(models), *own})
