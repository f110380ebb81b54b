"""Hats: they hide the top of the head and what a character wears there."""

import numpy as np

from util.toonfaces.canvas import FRONT
from util.toonfaces.figure import Figure
from util.toonfaces.geometry import ellipse, mirror, points, spline
from util.toonfaces.style import Colour

# Right halves, from the top down.
_BEANIE = points((0.0, -1.72), (0.7, -1.55), (1.2, -1.0), (1.24, -0.42))
_CAP = points((0.0, -1.58), (0.62, -1.48), (1.12, -1.05), (1.2, -0.45))
_VISOR = points((0.0, -0.74), (0.5, -0.68), (0.98, -0.5), (0.8, -0.14), (0.0, -0.02))
_STRAW = points((0.0, -1.64), (0.5, -1.62), (0.9, -1.3), (0.98, -0.72))
_HAT_BAND = points((0.0, -0.9), (0.94, -1.02), (0.99, -0.74), (0.0, -0.6))
# Whole outlines of what is not symmetric.
_WITCH = points(
    (-1.02, -0.7), (-0.72, -1.3), (-0.4, -1.9), (0.1, -2.3), (0.62, -2.36), (0.36, -2.0), (0.66, -1.3), (1.02, -0.7),
)  # fmt: skip
_BERET = points(
    (-1.12, -0.72), (-1.3, -1.1), (-0.8, -1.56), (0.2, -1.74), (1.2, -1.6), (1.56, -1.1), (1.2, -0.74), (0.0, -0.9),
)  # fmt: skip


def draw_hat(fig: Figure) -> None:
    """The hat of the look, in the colours of the clothes."""
    _HAT[fig.look.hat](fig)


def _both(half: np.ndarray) -> np.ndarray:
    return np.concatenate([half, mirror(half)[:-1]])


def _dome(fig: Figure, half: np.ndarray, colour: Colour) -> None:
    fig.solid(fig.view.flat(_both(spline(half, n=5))), colour, front=True)


def _beanie(fig: Figure) -> None:
    _dome(fig, _BEANIE, fig.cloth)
    for x in (-0.7, -0.25, 0.25, 0.7):
        rib = fig.view.flat(spline(points((x * 0.6, -1.55), (x, -1.1), (x * 1.2, -0.6)), n=4), 0.3)
        fig.strand(rib, fig.style.shadow(fig.cloth), 0.045)
    _turn_up(fig, fig.trim, -0.36, 0.34)
    fig.solid(fig.view.flat(ellipse((0, -1.82), (0.26, 0.24), 16)), fig.trim, front=True)


def _turn_up(fig: Figure, colour: Colour, low: float, height: float) -> None:
    """A band around the head, curved as the head is, and square at its ends."""
    x = np.linspace(-1.17, 1.17, 19)
    lower = fig.view.hair(np.stack([x, low + 0.06 * (1 - x * x)], axis=1))
    upper = fig.view.hair(np.stack([x, low - height + 0.02 * (1 - x * x)], axis=1))
    left = fig.view.flat(points((-1.25, low - height), (-1.26, low)))
    right = fig.view.flat(points((1.26, low), (1.25, low - height)))
    fig.solid(np.concatenate([left, lower, right, upper[::-1]]), colour, front=True)


def _cap(fig: Figure) -> None:
    _dome(fig, _CAP, fig.cloth)
    for x in (-0.45, 0.45):
        seam = fig.view.flat(spline(points((x * 0.2, -1.55), (x, -1.1), (x * 1.3, -0.5)), n=4), 0.3)
        fig.strand(seam, fig.style.line_of(fig.cloth), 0.025)
    fig.solid(fig.view.surface(spline(_both(_VISOR), closed=True, n=3), depth=1.1), fig.trim, front=True)
    fig.solid(fig.view.surface(ellipse((0, -1.0), (0.2, 0.18), 14), depth=0.9), fig.trim, front=True, line=0.7)


def _witch(fig: Figure) -> None:
    brim = ellipse((0, -0.72), (1.86, 0.44), 32)
    fig.solid(fig.view.flat(brim, 0.1), fig.style.shadow(fig.cloth, 0.8), front=True)
    fig.solid(fig.view.flat(spline(_WITCH * (fig.look.hidden_side, 1), n=4)), fig.cloth, front=True)
    fig.solid(fig.view.flat(_both(_HAT_BAND)), fig.trim, front=True)


def _straw(fig: Figure) -> None:
    straw = fig.style.tone((240, 212, 140))
    fig.solid(fig.view.flat(ellipse((0, -0.68), (1.9, 0.5), 32), 0.1), straw, front=True)
    _dome(fig, _STRAW, straw)
    fig.solid(fig.view.flat(_both(_HAT_BAND)), fig.trim, front=True)
    for k in range(3):
        ring = ellipse((0, -0.68), (1.5 - 0.2 * k, 0.4 - 0.06 * k), 20, 0.05, 0.4)
        fig.strand(fig.view.flat(ring, 0.1), fig.style.shadow(straw, 1.2), 0.025)


def _beret(fig: Figure) -> None:
    side = (fig.look.hidden_side, 1)
    fig.solid(fig.view.flat(spline(_BERET * side, closed=True, n=4)), fig.cloth, front=True)
    stalk = fig.view.flat(points((0.1, -1.7), (0.16, -1.92)) * side)
    fig.strand(stalk, fig.style.line_of(fig.cloth), 0.1, (1, 1), label=FRONT)
    fold = spline(points((-1.0, -0.84), (0.0, -1.0), (1.1, -0.88)) * side, n=5)
    fig.strand(fig.view.flat(fold, 0.2), fig.style.shadow(fig.cloth, 1.3), 0.08)


_HAT = {"beanie": _beanie, "cap": _cap, "witch": _witch, "straw": _straw, "beret": _beret}
