"""Pictures made harder in one known way each, for the stress tests: colours, quality, covered parts.

    view = stress_view(EvalCrop((128, 128)), "eyes")        # the default strength
    view = StressView(EvalCrop((128, 128)), "blur", 0.04)   # any strength

A view is a transform `(image, record, rng) -> uint8 (3, H, W)` like the crop it wraps. Lengths are fractions of the
crop, so that a stress means the same picture at 128 px and at 448 px (but JPEG, whose blocks are 8 px).
"""

import functools
import io
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from util.data.augment import View

Box = tuple[float, float, float, float]

FILL = 128  # of covered parts: mid-grey, which tells nothing of what it hides and is near 0 once standardised
# Where the eyes are if they are not known: fractions x1, y1, x2, y2 of the face box, else of the crop. Both cover 98 to
# 100 % of the eyes' area in each of four sets (4,751 pairs of eyes found by a detector in three sets of face crops, 58
# drawn by ToonFaces). Sets differ in how much hair their crops hold, so the band of the crop takes 39 % of it.
EYES_IN_FACE: Box = (0.0, 0.12, 1.0, 0.76)
EYES_IN_CROP: Box = (0.15, 0.25, 0.85, 0.80)
FACE_IN_CROP: Box = (0.15, 0.25, 0.85, 0.75)  # for the hair, where there is no face box: its top decides

_VERSION = 1  # of what this file does with the pictures: part of a view's repr, hence of the feature cache's key


@dataclass(frozen=True)
class Stress:
    """A named stress. strength: the default, in the unit that `meaning` gives; severities: weaker to stronger ones.

    grid: cells along a side, for patches. group: the block of the report it belongs to.
    """

    kind: str
    strength: float
    severities: tuple[float, ...]
    meaning: str
    group: str
    grid: int = 7


_ANGLES = (15, 30, 60, 90, 120, 180)
_FRACTIONS = (0.1, 0.2, 0.3, 0.5, 0.7)
_DEGREES, _COVERED = "degrees around the colour wheel, lightness kept", "fraction of the cells of a grid, covered"

STRESSES: dict[str, Stress] = {
    "hue_30": Stress("hue", 30, _ANGLES, _DEGREES, "colour_shift"),
    "hue_90": Stress("hue", 90, _ANGLES, _DEGREES, "colour_shift"),
    "hue_180": Stress("hue", 180, _ANGLES, _DEGREES, "colour_shift"),
    "hue_270": Stress("hue", 270, _ANGLES, _DEGREES, "colour_shift"),
    "grey": Stress("grey", 1.0, (0.25, 0.5, 0.75, 1.0), "share of the saturation taken out", "colour_shift"),
    "lines": Stress("lines", 0.03, (0.01, 0.03, 0.06), "widest line, fraction of the short side", "style"),
    "blur": Stress("blur", 0.02, (0.005, 0.01, 0.02, 0.04), "deviation, fraction of the short side", "quality"),
    "jpeg": Stress("jpeg", 15, (50, 30, 15, 5), "quality of the encoder, 1 to 95", "quality"),
    "downscale": Stress("downscale", 0.25, (0.5, 0.25, 0.125), "fraction of the sides that is kept", "quality"),
    "eyes": Stress("eyes", 0.25, (0.0, 0.25, 0.5), "margin around an eye box, fraction of its sides", "occlusion"),
    "hair": Stress("hair", 0.15, (0.0, 0.15, 0.3), "how far below the top of the face, face heights", "occlusion"),
    "patches_4": Stress("patches", 0.3, _FRACTIONS, _COVERED, "occlusion", grid=4),
    "patches_14": Stress("patches", 0.3, _FRACTIONS, _COVERED, "occlusion", grid=14),
}
# what a strength may be, both ends included
_RANGES = {
    "hue": (-360, 360), "grey": (0, 1), "lines": (0.001, 0.5), "blur": (0, 0.5), "jpeg": (1, 95),
    "downscale": (0.01, 1), "eyes": (0, 10), "hair": (0, 1), "patches": (0, 1),
}  # fmt: skip


class StressView:
    """A crop, then one stress: `(image, record, rng) -> uint8 (3, H, W)`. A function of its arguments alone.

    crop: EvalCrop or TrainCrop. kind: of a Stress. strength: in the unit of that kind; ValueError outside its range.
    grid: cells along a side, for "patches".
    """

    def __init__(self, crop, kind: str, strength: float, grid: int = 7):
        if kind not in _RANGES:
            raise ValueError(f"stress {kind!r} is not one of {', '.join(_RANGES)}")
        low, high = _RANGES[kind]
        if not low <= strength <= high:
            raise ValueError(f"strength {strength} of {kind!r} is not in {low} to {high}")
        self.crop, self.kind, self.strength, self.grid = crop, kind, strength, grid

    def __call__(self, image: Image.Image, record: dict, rng: np.random.Generator) -> torch.Tensor:
        geometry = self.crop.draw(image, record, rng)
        pixels = geometry.apply(image, self.crop.size)
        match self.kind:
            case "eyes" | "hair":
                return cover(pixels, hidden_boxes(self.kind, geometry, self.crop.size, record, self.strength))
            case "patches":
                return cover(pixels, patch_boxes(self.crop.size, self.grid, self.strength, rng))
        return _CHANGES[self.kind](pixels, self.strength)

    def __repr__(self) -> str:
        grid = f", grid={self.grid}" if self.kind == "patches" else ""
        return f"StressView({self.crop!r}, {self.kind!r}, {float(self.strength)!r}{grid}, version={_VERSION})"


def stress_view(crop, name: str, strength: float | None = None) -> StressView:
    """The view of a stress of STRESSES, at its default strength or another."""
    stress = STRESSES[name]
    return StressView(crop, stress.kind, stress.strength if strength is None else strength, stress.grid)


def rotate_hue(pixels: torch.Tensor, degrees: float) -> torch.Tensor:
    """Turn the colours of uint8 (3, H, W) around the wheel of the U, V plane (BT.601); luma is kept.

    A turned colour that no screen can show at its luma keeps its hue and gives up saturation. 0 degrees is identity.
    """
    if degrees % 360 == 0:
        return pixels
    rgb = pixels.float()
    luma = _luma(rgb)
    chroma = torch.tensordot(_hue_matrix(degrees), rgb, dims=1)
    room = torch.where(chroma > 0, 255 - luma, luma) / chroma.abs().clamp_min(1e-6)
    chroma *= room.amin(dim=0).clamp_max(1)
    return _to_uint8(luma + chroma)


def _hue_matrix(degrees: float) -> torch.Tensor:
    """RGB -> (R - Y, G - Y, B - Y) of the turned colour: (3, 3)."""
    u_scale, v_scale = 0.492, 0.877
    red, green, blue = _LUMA.double()
    turn = math.radians(degrees)
    luma = torch.stack([red, green, blue])
    u = u_scale * (torch.tensor([0, 0, 1.0], dtype=torch.float64) - luma)
    v = v_scale * (torch.tensor([1.0, 0, 0], dtype=torch.float64) - luma)
    u, v = u * math.cos(turn) - v * math.sin(turn), u * math.sin(turn) + v * math.cos(turn)
    r_y, b_y = v / v_scale, u / u_scale
    return torch.stack([r_y, -(red * r_y + blue * b_y) / green, b_y]).float()


def to_grey(pixels: torch.Tensor, share: float = 1.0) -> torch.Tensor:
    """Move uint8 (3, H, W) towards its luma (BT.601) by a share of the way, 0..1."""
    rgb = pixels.float()
    return _to_uint8(rgb + share * (_luma(rgb) - rgb))


def to_lines(pixels: torch.Tensor, width: float) -> torch.Tensor:
    """Line art: the luma over its blur. Flat parts turn white, what is darker than its surround stays dark.

    width: deviation of the blur, fraction of the short side; lines up to about that width stay.
    """
    luma = _luma(pixels.float())
    surround = _gaussian(luma, width * min(luma.shape[1:]))
    return _to_uint8(255 * (luma + 1) / (surround + 1)).expand(3, -1, -1).contiguous()


def blur(pixels: torch.Tensor, deviation: float) -> torch.Tensor:
    """Gaussian blur of uint8 (3, H, W); deviation: fraction of the short side. The border is replicated."""
    return _to_uint8(_gaussian(pixels.float(), deviation * min(pixels.shape[1:]))) if deviation else pixels


def jpeg(pixels: torch.Tensor, quality: float) -> torch.Tensor:
    """Encode and decode uint8 (3, H, W) as a JPEG (4:2:0) of a quality, 1 to 95."""
    file = io.BytesIO()
    _to_image(pixels).save(file, "JPEG", quality=round(quality), subsampling="4:2:0")
    return _to_pixels(Image.open(file))


def downscale(pixels: torch.Tensor, scale: float) -> torch.Tensor:
    """Resample uint8 (3, H, W) to a fraction of its sides and back (bicubic, antialiased)."""
    height, width = pixels.shape[1:]
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    # by Pillow: PyTorch's uint8 resize, which the crops use, fails on a side of one pixel
    reduced = _to_image(pixels).resize(small, Image.Resampling.BICUBIC)
    return _to_pixels(reduced.resize((width, height), Image.Resampling.BICUBIC))


_CHANGES = {
    "hue": rotate_hue,
    "grey": to_grey,
    "lines": to_lines,
    "blur": blur,
    "jpeg": jpeg,
    "downscale": downscale,
}


def cover(pixels: torch.Tensor, boxes: Iterable[Box]) -> torch.Tensor:
    """Fill boxes (x1, y1, x2, y2, px of the crop) of uint8 (3, H, W) with grey: every pixel that one touches."""
    pixels = pixels.clone()
    height, width = pixels.shape[1:]
    for x1, y1, x2, y2 in boxes:
        left, top = max(0, math.floor(x1)), max(0, math.floor(y1))
        right, bottom = min(width, math.ceil(x2)), min(height, math.ceil(y2))
        if left < right and top < bottom:
            pixels[:, top:bottom, left:right] = FILL
    return pixels


def known_part(kind: str, record: dict) -> str:
    """By what the covered part of a sample is found: "eyes", "face box", or "crop" where neither is known."""
    if kind == "eyes" and record.get("eyes"):
        return "eyes"
    return "crop" if record.get("box") is None else "face box"


def known_parts(kind: str, records: Iterable[dict]) -> dict[str, int]:
    """How many samples have their "eyes" or "hair" covered by each of the ways of `known_part`."""
    counts = Counter(known_part(kind, record) for record in records)
    return {way: counts[way] for way in ("eyes", "face box", "crop") if kind == "eyes" or way != "eyes"}


def hidden_boxes(kind: str, geometry: View, size: tuple[int, int], record: dict, strength: float) -> list[Box]:
    """The boxes that cover the "eyes" or the "hair", px of the crop; parts outside the crop reach over its border.

    Eyes: each box of record["eyes"] with a margin; else EYES_IN_FACE of record["box"]; else EYES_IN_CROP.
    Hair: all above the top of the face, and a share of the face itself, for bangs; without box, of FACE_IN_CROP.
    """
    height, width = size
    way = known_part(kind, record)
    if way == "eyes":
        return [_grown(to_crop(box, geometry, size), strength) for box in record["eyes"]]
    face = to_crop(record["box"], geometry, size) if way == "face box" else None
    if kind == "eyes":
        return [_part(face, EYES_IN_FACE) if face else _part((0, 0, width, height), EYES_IN_CROP)]
    _, top, _, bottom = face or _part((0, 0, width, height), FACE_IN_CROP)
    return [(0, 0, width, top + strength * (bottom - top))]


def to_crop(box: Box, geometry: View, size: tuple[int, int]) -> Box:
    """A box in px of the stored image, in px of the crop of `size` (H, W) that a View makes of it."""
    left, top, right, bottom = geometry.box
    x_scale, y_scale = size[1] / (right - left), size[0] / (bottom - top)
    x1, x2 = (box[0] - left) * x_scale, (box[2] - left) * x_scale
    if geometry.flip:
        x1, x2 = size[1] - x2, size[1] - x1
    return x1, (box[1] - top) * y_scale, x2, (box[3] - top) * y_scale


def patch_boxes(size: tuple[int, int], grid: int, fraction: float, rng: np.random.Generator) -> list[Box]:
    """Boxes of a random choice of cells, round(fraction * grid^2) of them, that cut `size` (H, W) into a grid."""
    cells = rng.permutation(grid * grid)[: round(fraction * grid * grid)]
    ys, xs = (np.linspace(0, side, grid + 1).round().astype(int).tolist() for side in size)
    return [(xs[c % grid], ys[c // grid], xs[c % grid + 1], ys[c // grid + 1]) for c in cells.tolist()]


def _grown(box: Box, margin: float) -> Box:
    x, y = margin * (box[2] - box[0]), margin * (box[3] - box[1])
    return box[0] - x, box[1] - y, box[2] + x, box[3] + y


def _part(box: Box, part: Box) -> Box:
    width, height = box[2] - box[0], box[3] - box[1]
    return (
        box[0] + part[0] * width,
        box[1] + part[1] * height,
        box[0] + part[2] * width,
        box[1] + part[3] * height,
    )


_LUMA = torch.tensor([0.299, 0.587, 0.114])


def _luma(rgb: torch.Tensor) -> torch.Tensor:
    return torch.tensordot(_LUMA, rgb, dims=1)[None]


def _gaussian(values: torch.Tensor, deviation: float) -> torch.Tensor:
    """Blur float (C, H, W); the kernel ends at three deviations (px)."""
    rows, columns = (_blur_matrix(side, deviation) for side in values.shape[1:])
    return rows @ values @ columns.T


@functools.lru_cache(maxsize=8)  # two matrices of a stress serve all pictures
def _blur_matrix(side: int, deviation: float) -> torch.Tensor:
    """(side, side): a product with it is several times as fast on a CPU as a convolution of so few channels."""
    radius = int(3 * deviation + 0.5)
    steps = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (steps / deviation) ** 2)
    places = torch.arange(side)[:, None]
    reached = (places + steps).clamp(0, side - 1)
    weights = (kernel / kernel.sum()).expand(side, -1)
    return torch.zeros(side, side).index_put_((places.expand_as(reached), reached), weights, accumulate=True)


def _to_image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _to_pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _to_uint8(values: torch.Tensor) -> torch.Tensor:
    return values.add(0.5).clamp_(0, 255).to(torch.uint8)
