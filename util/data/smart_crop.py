"""Where the character is in wide or tall art, without a detector: a saliency map of a small thumbnail.

Drawn faces are flat light skin broken by strong lines (eyes, bangs, mouth), so skin colour times edge density
carries most of the weight; plain edge density and colour contrast with the surround stand in for characters
that have no such skin. The weights were chosen on real screenshots and illustrations with known face boxes
(`python -m visualize.crops` shows what they do).
"""

import numpy as np
from PIL import Image

_THUMB = 96  # long side, px: a face in a wide shot still covers some cells
_FACE, _EDGES, _CONTRAST = 4.0, 0.25, 0.25
_SKIN_LAB, _SKIN_SPREAD = (82.0, 10.0, 14.0), (14.0, 8.0, 9.0)  # mean and deviation of drawn skin
# Where characters stand when nothing else is known, fractions of the axis from the left or the top, and how far
# from there they still are likely.
_PRIOR = {0: 0.5, 1: 0.3}
_PRIOR_SPREAD = 0.25
_EVEN = 0.01  # saliency that every place has, so that a plain picture is cut at the usual place
_ROW_PRIOR, _ROW_SPREAD = 0.45, 0.35  # in wide art: subtitles and floors lie low, skies and titles high

_LEVELS = np.arange(256) / 255.0
_SRGB_TO_LINEAR = np.where(_LEVELS > 0.04045, ((_LEVELS + 0.055) / 1.055) ** 2.4, _LEVELS / 12.92).astype(np.float32)
_WHITE = np.float32([[0.95047], [1.0], [1.08883]])
_TO_XYZ = np.float32([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_TO_XYZ = _TO_XYZ / _WHITE


def salient_centre(image: Image.Image, length: float, axis: int) -> float:
    """Where to centre a window on the most salient part of an RGB image.

    length: of the window along `axis`, px (it spans the other axis). axis: 0 is x, 1 is y. Returns px. Deterministic.
    """
    scale = _THUMB / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    thumb = np.asarray(image.resize(size, Image.Resampling.BOX, reducing_gap=2.0))
    heat = saliency(thumb)
    if axis == 0:
        heat = heat * _bell(len(heat), _ROW_PRIOR, _ROW_SPREAD)[:, None]
    profile = heat.mean(axis)
    cells = len(profile)
    window = min(max(1, round(cells * length / image.size[axis])), cells)
    cumulated = np.concatenate([[0.0], np.cumsum(profile)])
    mass = cumulated[window:] - cumulated[:-window]
    centres = (np.arange(len(mass)) + window / 2) / cells
    mass = (mass + _EVEN * window) * np.exp(-0.5 * ((centres - _PRIOR[axis]) / _PRIOR_SPREAD) ** 2)
    return float(centres[int(mass.argmax())]) * image.size[axis]


def saliency(thumb: np.ndarray) -> np.ndarray:
    """How likely each pixel belongs to a character: (h, w) float32 >= 0, without unit, from uint8 RGB (h, w, 3)."""
    lab = rgb_to_lab(thumb)
    side = max(thumb.shape[:2])
    smooth = _blur(lab, 1)
    surrounds = [_blur(lab, side // 12), _blur(lab, side // 4)]
    contrast = sum(np.linalg.norm(smooth - surround, axis=2) for surround in surrounds) / 80.0
    radius = side // 24
    edges = _blur(np.minimum(_gradient(lab[..., 0]), 60.0), radius) / 30.0
    distance = (lab - np.float32(_SKIN_LAB)) / np.float32(_SKIN_SPREAD)
    skin = _blur(np.exp(-0.5 * (distance**2).sum(2)), radius)
    # edges count up to a level that a face reaches: text on a light ground has more
    face = skin * np.minimum(edges, 1.0) * 2.0
    return _FACE * face + _EDGES * edges + _CONTRAST * contrast


def rgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65), float32 (h, w, 3), of uint8 sRGB (h, w, 3)."""
    ratio = _SRGB_TO_LINEAR[rgb] @ _TO_XYZ.T
    x, y, z = np.moveaxis(np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16.0 / 116.0), -1, 0)
    return np.stack([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)], axis=-1)


def _gradient(grey: np.ndarray) -> np.ndarray:
    dx, dy = np.zeros_like(grey), np.zeros_like(grey)
    dx[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    dy[1:-1] = grey[2:] - grey[:-2]
    return np.hypot(dx, dy)


def _blur(values: np.ndarray, radius: int) -> np.ndarray:
    """Mean over a square of side 2 * radius + 1, cut at the borders."""
    return _box_mean(_box_mean(values, radius, 0), radius, 1)


def _box_mean(values: np.ndarray, radius: int, axis: int) -> np.ndarray:
    length = values.shape[axis]
    pad = [(0, 0)] * values.ndim
    pad[axis] = (1, 0)
    sums = np.pad(np.cumsum(values, axis=axis, dtype=np.float32), pad)
    place = np.arange(length)
    low, high = np.maximum(place - radius, 0), np.minimum(place + radius + 1, length)
    counts = (high - low).reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    return (sums.take(high, axis) - sums.take(low, axis)) / counts.astype(np.float32)


def _bell(count: int, centre: float, spread: float) -> np.ndarray:
    place = (np.arange(count) + 0.5) / count
    return np.exp(-0.5 * ((place - centre) / spread) ** 2)
