"""Neck, shoulders and clothes; arms and legs for figures far enough away to show them."""

import numpy as np

from util.toonfaces.figure import Figure
from util.toonfaces.geometry import ellipse, mirror, placed, points, sausage, spline
from util.toonfaces.style import Colour, mix

_TORSO = points((0.34, 1.4), (0.6, 1.5), (1.02, 1.66), (1.28, 1.95), (1.2, 2.5), (1.0, 3.1), (1.02, 3.7))
_TORSO = np.concatenate([spline(_TORSO, n=3), mirror(spline(_TORSO, n=3))])
_SLEEVE = sausage(points((1.16, 2.0), (1.46, 2.9), (1.4, 3.9)), 0.52)
_FIST = ellipse((1.4, 4.1), (0.2, 0.28), 10)


def draw_body(fig: Figure) -> None:
    """Neck, shoulders and the outfit."""
    neck = points((-0.27, 0.75), (0.27, 0.75), (0.25, 1.35), (0.5, 1.75), (-0.5, 1.75), (-0.25, 1.35))
    fig.solid(fig.body.flat(neck, 0.1), fig.skin)
    shadow = points((-0.27, 0.75), (0.27, 0.75), (0.26, 1.2), (0.0, 1.42), (-0.26, 1.2))
    fig.canvas.fill(fig.body.flat(shadow, 0.1), fig.style.shadow(fig.skin, 1.2))
    _OUTFIT[fig.look.outfit](fig)


def _torso(fig: Figure, colour: Colour) -> None:
    if fig.view.centre[1] + 2.6 * fig.view.unit < fig.canvas.height:
        _draw_legs(fig)
    for side in (-1, 1):
        fig.solid(fig.body.flat(_FIST * (side, 1)), fig.skin)
        fig.solid(fig.body.flat(_SLEEVE * (side, 1)), colour)
    fig.solid(fig.body.flat(_TORSO), colour)
    for side in (-1, 1):  # the sleeve joins the body without a line
        fig.canvas.fill(fig.body.flat(ellipse((side * 1.1, 1.98), (0.26, 0.26), 12)), colour)


def _draw_legs(fig: Figure) -> None:
    """Legs and a skirt: seen only where the figure is small."""
    shoe, cloth = fig.style.tone((70, 52, 56)), fig.style.shadow(fig.trim, 0.6)
    for side in (-1, 1):
        fig.solid(fig.body.flat(points((0.1, 8.4), (0.6, 8.4), (0.95, 8.95), (0.1, 8.95)) * (side, 1)), shoe)
        fig.solid(fig.body.flat(points((0.14, 4.8), (0.8, 4.8), (0.62, 8.5), (0.22, 8.5)) * (side, 1)), fig.skin)
        sock = points((0.16, 6.8), (0.72, 6.8), (0.62, 8.5), (0.22, 8.5)) * (side, 1)
        fig.solid(fig.body.flat(sock), fig.style.tone((250, 250, 252)))
    skirt = points((-0.95, 3.5), (0.95, 3.5), (1.6, 5.3), (0.55, 5.45), (-0.55, 5.45), (-1.6, 5.3))
    fig.solid(fig.body.flat(skirt), cloth)
    for x in (-0.5, 0.0, 0.5):
        pleat = fig.body.flat(points((x, 3.8), (x * 1.7, 5.4)))
        fig.strand(pleat, fig.style.line_of(cloth), fig.style.line, (0.2, 1.0))


def _panel(fig: Figure, shape: np.ndarray, colour, line: float = 0.8, depth: float = 0.1) -> None:
    fig.solid(fig.body.flat(shape, depth), colour, line=line)


def _skin_gap(fig: Figure, width: float, depth: float) -> None:
    gap = points((-width, 1.36), (width, 1.36), (0.0, 1.4 + depth))
    fig.canvas.fill(fig.body.flat(gap, 0.1), fig.skin)


def _sailor(fig: Figure) -> None:
    white = fig.style.tone((246, 245, 248))
    _torso(fig, white)
    _skin_gap(fig, 0.36, 0.55)
    for side in (-1, 1):
        collar = points((side * 0.3, 1.34), (side * 0.72, 1.46), (side * 1.0, 1.78), (side * 0.1, 2.2), (0.0, 2.0))
        _panel(fig, collar, fig.cloth)
        stripe = points((side * 0.84, 1.74), (side * 0.1, 2.06))
        fig.strand(fig.body.flat(stripe, 0.1), white, 0.05, (1, 1))
    for side in (-1, 1):
        _panel(fig, points((0, 2.02), (side * 0.36, 1.94), (side * 0.4, 2.26), (0, 2.16)), fig.trim)


def _shirt(fig: Figure) -> None:
    _torso(fig, fig.cloth)
    white = fig.style.tone((250, 250, 252))
    _panel(fig, points((-0.36, 1.38), (0.36, 1.38), (0.2, 2.6), (-0.2, 2.6)), white)
    _panel(fig, points((-0.1, 1.62), (0.1, 1.62), (0.16, 2.6), (-0.16, 2.6)), fig.trim)
    for side in (-1, 1):
        _panel(fig, points((side * 0.26, 1.26), (side * 0.44, 1.46), (side * 0.3, 1.84), (side * 0.02, 1.58)), white)
        lapel = points((side * 0.42, 1.42), (side * 0.62, 1.5), (side * 0.6, 1.9), (side * 0.2, 2.6))
        _panel(fig, lapel, fig.style.shadow(fig.cloth, 0.5))


def _hoodie(fig: Figure) -> None:
    _torso(fig, fig.cloth)
    outer, inner = ellipse((0, 1.5), (0.78, 0.36), 16, 0.0, 0.5), ellipse((0, 1.4), (0.4, 0.16), 12, 0.5, -0.5)
    _panel(fig, np.concatenate([outer, inner]), fig.style.shadow(fig.cloth, 0.35))
    for side in (-1, 1):
        cord = fig.body.flat(points((side * 0.24, 1.78), (side * 0.26, 2.05), (side * 0.23, 2.3)), 0.1)
        fig.strand(cord, fig.style.tone((248, 248, 248)), 0.07, (1, 1))


def _turtleneck(fig: Figure) -> None:
    _torso(fig, fig.cloth)
    _panel(fig, points((-0.34, 1.14), (0.34, 1.14), (0.42, 1.52), (0.0, 1.6), (-0.42, 1.52)), fig.cloth)
    for x in (-0.2, 0.0, 0.2):
        rib = fig.body.flat(points((x, 1.2), (x * 1.15, 1.5)), 0.1)
        fig.strand(rib, fig.style.shadow(fig.cloth, 0.8), 0.03, (1, 1))


def _kimono(fig: Figure) -> None:
    _torso(fig, fig.cloth)
    _skin_gap(fig, 0.36, 0.6)
    for side in (1, -1):
        band = points((side * 0.3, 1.28), (side * 0.5, 1.42), (side * -0.2, 2.5), (side * -0.44, 2.4))
        _panel(fig, band, fig.trim)


def _dress(fig: Figure) -> None:
    _torso(fig, fig.skin)
    x = np.linspace(-1.0, 1.0, 9)
    frill = np.stack([x, 1.98 - 0.2 * np.abs(x) ** 1.5 + np.where(np.arange(9) % 2, 0.08, 0.0)], axis=1)
    waist = points((1.24, 2.3), (1.0, 3.1), (1.05, 3.7), (-1.05, 3.7), (-1.0, 3.1), (-1.24, 2.3))
    _panel(fig, np.concatenate([frill, waist]), fig.cloth, depth=0.0)
    for side in (-1, 1):
        fig.solid(fig.body.flat(ellipse((side * 1.22, 2.05), (0.36, 0.32), 18)), fig.cloth)
    _panel(fig, np.concatenate([frill, placed(frill[::-1], (0.0, -0.17))]), fig.style.tone((252, 250, 252)), depth=0.05)
    _panel(fig, ellipse((0, 2.1), (0.13, 0.13), 12), fig.trim)


def _armour(fig: Figure) -> None:
    steel = fig.style.tone(mix((188, 194, 208), fig.look.cloth, 0.25))
    _torso(fig, fig.cloth)
    _panel(fig, points((-0.38, 1.3), (0.38, 1.3), (0.5, 1.62), (0, 1.78), (-0.5, 1.62)), steel)
    for side in (-1, 1):
        pad = ellipse((side * 1.15, 1.95), (0.48, 0.36), 20)
        _panel(fig, pad, steel)
        _panel(fig, ellipse((side * 1.12, 1.84), (0.26, 0.12), 12), fig.style.light(steel, 0.8), 0.0)


_OUTFIT = {
    "sailor": _sailor, "shirt": _shirt, "hoodie": _hoodie, "turtleneck": _turtleneck, "kimono": _kimono,
    "dress": _dress, "armour": _armour,
}  # fmt: skip
