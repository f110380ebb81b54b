"""One picture of one character, with the truth about it."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops

from util.toonfaces.accessories import draw_behind_head, draw_face_accessory, draw_head_accessory
from util.toonfaces.background import paint_background
from util.toonfaces.body import draw_body
from util.toonfaces.canvas import FRONT, Canvas
from util.toonfaces.eyes import draw_brows, draw_eyes
from util.toonfaces.figure import Box, Figure
from util.toonfaces.fringe import fringe_of
from util.toonfaces.front_hair import cast_shadow, draw_ahoge, draw_fringe, draw_side_hair
from util.toonfaces.geometry import View
from util.toonfaces.hair import draw_back_hair, draw_hanging_hair
from util.toonfaces.head import draw_ear, draw_face, draw_mouth, draw_nose, face_outline
from util.toonfaces.identity import Identity
from util.toonfaces.look import Look
from util.toonfaces.occluders import draw_occlusion

_ANY = [0] + [255] * 255  # look-up tables of labels: any part of the figure, the parts in front, half a pixel or more
_IN_FRONT = [255 if label == FRONT else 0 for label in range(256)]
_HALF = [0] * 128 + [255] * 128
EYE_VISIBLE = 0.4  # an eye counts as visible if at least this fraction of its box is


@dataclass(frozen=True)
class Face:
    """Boxes x1, y1, x2, y2 in px: the whole face, hidden parts too, and the visible eyes; both cut at the frame."""

    box: Box
    eyes: list[Box]


@dataclass(frozen=True)
class Picture:
    """A picture of one character: RGB, its foreground mask (L, 0 or 255), and the truth about the face."""

    image: Image.Image
    mask: Image.Image
    face: Face


def draw_figure(canvas: Canvas, identity: Identity, look: Look, view: View, hide: frozenset = frozenset()) -> Figure:
    """Draw a character from back to front. hide: parts left out ("eyes", "face"), for tests of the truth."""
    fig = Figure(canvas, identity, look, view)
    near = -1 if view.yaw > 0 else 1
    outline, fringe = face_outline(fig), fringe_of(identity)
    fig.box = (*outline.min(axis=0).tolist(), *outline.max(axis=0).tolist())
    draw_behind_head(fig)
    draw_back_hair(fig)
    draw_body(fig)
    draw_hanging_hair(fig)
    draw_ear(fig, -near)
    if "face" not in hide:
        draw_face(fig, outline)
    draw_ear(fig, near)
    cast_shadow(fig, fringe, outline)
    draw_nose(fig)
    draw_mouth(fig)
    if "eyes" not in hide:
        draw_eyes(fig)
    draw_face_accessory(fig)
    draw_side_hair(fig)
    draw_fringe(fig, fringe)
    draw_brows(fig)
    draw_ahoge(fig)
    draw_head_accessory(fig)
    draw_occlusion(fig)
    return fig


def render_face(identity: Identity, look: Look, size: int = 128, hide: frozenset = frozenset()) -> Picture:
    """A square picture of `size` px."""
    scale = 3 if size <= 256 else 2
    canvas = Canvas(Image.new("RGB", (size * scale, size * scale)), scale)
    paint_background(canvas, look, size, size)
    fig = draw_figure(canvas, identity, look, look.view(size, size), hide)
    return Picture(finish(canvas.image, scale, look), to_mask(figure_mask(fig), scale), face_of(fig))


def figure_mask(fig: Figure) -> Image.Image:
    """The supersampled mask, 0 or 255, of all that belongs to a drawn figure."""
    return fig.canvas.labels.point(_ANY)


def finish(image: Image.Image, scale: int, look: Look) -> Image.Image:
    """The final picture from the supersampled one, in the light of the scene: its colour, and a slope from one
    side of the picture to the other."""
    pixels = np.asarray(image.reduce(scale), dtype=np.float32)
    height, width = pixels.shape[:2]
    angle = np.deg2rad(look.light_angle)
    x = np.linspace(-0.7, 0.7, width, dtype=np.float32) * np.float32(np.cos(angle))
    y = np.linspace(-0.7, 0.7, height, dtype=np.float32) * np.float32(np.sin(angle))
    slope = 1.0 + np.float32(look.contrast) * (y[:, None] + x[None])
    tint = np.array(look.light, dtype=np.float32) / 255
    lit = pixels * slope[:, :, None] * (tint * np.float32(1.03))
    if look.style.hatch:  # the grain of the paper
        lit += look.rng("grain").integers(-6, 7, (height, width, 1), dtype=np.int8)
    lit = np.maximum(lit, 0.0)
    return Image.fromarray(np.minimum(lit + 0.5, 255.0).astype(np.uint8))


def to_mask(figure: Image.Image, scale: int) -> Image.Image:
    """A mask of 0 and 255 from a supersampled one: a pixel belongs to the figure if half of it does."""
    return figure.reduce(scale).point(_HALF)


def face_of(fig: Figure, covered: Image.Image | None = None) -> Face:
    """The truth about a drawn figure. covered: supersampled mask (0 or 255) of what stands in front of it."""
    scale = fig.canvas.scale
    hidden = fig.canvas.labels.point(_IN_FRONT)
    if covered is not None:
        hidden = ImageChops.lighter(hidden, covered)
    frame = (fig.canvas.image.width / scale, fig.canvas.image.height / scale)
    eyes = [box for _, box in sorted(fig.eyes.items()) if seen_fraction(hidden, box, scale) >= EYE_VISIBLE]
    corners = np.array([fig.box, *fig.eyes.values()])  # lashes may stand out over the cheek
    whole = (*corners[:, :2].min(axis=0).tolist(), *corners[:, 2:].max(axis=0).tolist())
    return Face(_cut(whole, frame), [_cut(box, frame) for box in eyes])


def seen_fraction(hidden: Image.Image, box: Box, scale: int) -> float:
    """Which fraction of a box, px, is inside the picture and not hidden (supersampled mask, 0 or 255)."""
    x1, y1, x2, y2 = (round(v * scale) for v in box)
    area = max(1, (x2 - x1) * (y2 - y1))
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, hidden.width), min(y2, hidden.height)
    if x2 <= x1 or y2 <= y1:
        return 0.0
    return int((np.asarray(hidden.crop((x1, y1, x2, y2))) == 0).sum()) / area


def _cut(box: Box, frame: tuple[float, float]) -> Box:
    x1, y1, x2, y2 = box
    return (max(x1, 0.0), max(y1, 0.0), min(x2, frame[0]), min(y2, frame[1]))
