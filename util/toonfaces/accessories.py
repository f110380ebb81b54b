"""What a character always wears: the shapes that tell it from others with the same hair."""

import numpy as np

from util.toonfaces.eyes import EYE_X, EYE_Y
from util.toonfaces.figure import Figure
from util.toonfaces.geometry import ellipse, placed, points, ribbon, spline
from util.toonfaces.style import WHITE, mix


def draw_head_accessory(fig: Figure) -> None:
    """The accessory on the hair; a hat hides those at the top of the head."""
    _HEAD[fig.traits.head_accessory](fig)


def draw_behind_head(fig: Figure) -> None:
    """Ears and horns grow from under the hair."""
    if fig.traits.head_accessory == "cat_ears":
        _cat_ears(fig)
    elif fig.traits.head_accessory == "horns":
        _horns(fig)


def draw_face_accessory(fig: Figure) -> None:
    """Glasses, earrings and marks, over the eyes and under the fringe."""
    _FACE[fig.traits.face_accessory](fig)


def _flat(fig: Figure, shape, depth=0.15):
    return fig.view.flat(shape, depth)


def _loop_pair(fig: Figure, centre, size: float, tilt: float, colour, depth: float) -> None:
    """A bow: two loops, two ends, a knot."""

    def place(shape):
        return _flat(fig, placed(shape, centre, tilt, size), depth)

    dark = fig.style.shadow(colour, 1.0)
    for side in (-1, 1):
        end = points((0.0, 0.0), (0.3, 0.5), (0.52, 0.86), (0.62, 0.52), (0.2, 0.1)) * (side, 1)
        fig.solid(place(end), dark, front=True, line=0.8)
    for side in (-1, 1):
        loop = points((0.05, 0.0), (0.45, -0.42), (0.92, -0.46), (1.0, 0.0), (0.9, 0.4), (0.45, 0.26)) * (side, 1)
        fig.solid(place(spline(loop, closed=True, n=3)), colour, front=True)
        fold = points((0.15, 0.02), (0.5, -0.06), (0.75, 0.02), (0.5, 0.14)) * (side, 1)
        fig.canvas.fill(place(fold), dark)
    fig.solid(place(ellipse((0, 0), (0.2, 0.24), 12)), colour, front=True)


def _ribbon(fig: Figure) -> None:
    _loop_pair(fig, (0.86 * fig.identity.side, -0.78), 0.46, -0.5 * fig.identity.side, fig.accent, 0.2)


def _bow(fig: Figure) -> None:
    _loop_pair(fig, (0.0, -1.34), 0.72, 0.0, fig.accent, 0.0)


def _hairpin(fig: Figure) -> None:
    side = fig.identity.side
    for start, end in (((0.42, -0.42), (0.8, -0.2)), ((0.46, -0.16), (0.78, -0.46))):
        path = fig.view.hair(points(start, end) * (side, 1))
        width = 0.13 * fig.view.unit
        fig.solid(ribbon(path, width), fig.accent, front=True, line=0.7)


def _flower(fig: Figure) -> None:
    centre = np.array([0.8 * fig.identity.side, -0.6])
    for k in range(5):
        angle = 2 * np.pi * (k / 5 + 0.05)
        petal = ellipse(centre + 0.2 * np.array([np.cos(angle), np.sin(angle)]), (0.18, 0.18), 12)
        fig.solid(_flat(fig, petal, 0.45), fig.accent, front=True, line=0.7)
    fig.solid(
        _flat(fig, ellipse(centre, (0.12, 0.12), 10), 0.45), fig.style.tone((250, 220, 110)), front=True, line=0.6
    )


def _hairband(fig: Figure) -> None:
    angle = np.linspace(-1.0, 1.0, 21)
    lower = np.stack([1.1 * np.sin(angle * 1.45), -0.1 - 0.82 * np.cos(angle * 1.45)], axis=1)
    upper = np.stack([1.15 * np.sin(angle * 1.45), -0.1 - 1.04 * np.cos(angle * 1.45)], axis=1)
    band = np.concatenate([fig.view.hair(lower), fig.view.hair(upper)[::-1]])
    fig.solid(band, fig.accent, front=True, line=0.9)


def _headphones(fig: Figure) -> None:
    steel = fig.style.tone((70, 70, 82))
    angle = np.linspace(-1.0, 1.0, 25) * 1.7
    arc = np.stack([1.22 * np.sin(angle), -0.06 - 1.3 * np.cos(angle)], axis=1)
    fig.solid(_flat(fig, ribbon(arc, 0.17), -0.05), steel, front=True)
    for side in (-1, 1):
        centre = (1.14 * side, 0.16)
        fig.solid(_flat(fig, ellipse(centre, (0.25, 0.38), 18), -0.05), steel, front=True)
        fig.solid(_flat(fig, ellipse((1.18 * side, 0.16), (0.15, 0.26), 16), -0.05), fig.accent, front=True, line=0.7)


def _cat_ears(fig: Figure) -> None:
    pink = fig.style.tone((250, 178, 184))
    for side in (-1, 1):
        ear = points((0.18, -1.12), (0.42, -1.5), (0.9, -1.92), (1.02, -1.4), (1.02, -0.76)) * (side, 1)
        fig.solid(_flat(fig, spline(ear, n=4), -0.1), fig.hair, front=True)
        inner = points((0.46, -1.2), (0.6, -1.48), (0.85, -1.7), (0.9, -1.36), (0.88, -0.98)) * (side, 1)
        fig.canvas.fill(_flat(fig, spline(inner, n=4), -0.1), pink)


def _horns(fig: Figure) -> None:
    bone = fig.style.tone((236, 222, 196))
    for side in (-1, 1):
        path = spline(points((0.52, -1.0), (0.84, -1.42), (0.82, -1.78), (0.56, -2.0)) * (side, 1), n=5)
        width = np.linspace(0.36, 0.02, len(path))
        fig.solid(_flat(fig, ribbon(path, width), -0.05), bone, front=True)
        for k in (5, 8, 11):
            ring = np.stack([path[k] + (-0.12, 0.02), path[k] + (0.12, -0.02)])
            fig.strand(_flat(fig, ring, -0.05), fig.style.shadow(bone, 1.4), 0.04, (0.6, 0.6))


def _glasses(fig: Figure) -> None:
    frame = fig.style.tone(mix((50, 40, 60), (180, 50, 60), 1.0 if fig.identity.accent == "red" else 0.0))
    width = max(0.7, 0.05 * fig.view.unit)
    for side in (-1, 1):
        lens = points(
            (0.14, 0.1), (0.2, -0.06), (0.46, -0.1), (0.78, -0.04), (0.8, 0.3), (0.62, 0.56), (0.36, 0.58), (0.18, 0.42)
        )
        rim = fig.view.surface(spline(lens * (side, 1), closed=True, n=3), depth=0.72)
        fig.canvas.fill(rim, WHITE, alpha=0.14)
        fig.canvas.outline(rim, width, frame)
        temple = points((0.8 * side, 0.08), (1.02 * side, 0.04))
        fig.strand(fig.view.surface(temple, depth=0.7), frame, 0.05, (1, 1))
    bridge = fig.view.surface(spline(points((-0.15, 0.18), (0.0, 0.12), (0.15, 0.18)), n=3), depth=0.74)
    fig.strand(bridge, frame, 0.055, (1, 1))


def _earrings(fig: Figure) -> None:
    for side in (-1, 1):
        gem = points((0.98, 0.44), (1.12, 0.66), (0.98, 0.92), (0.84, 0.66)) * (side, 1)
        fig.solid(_flat(fig, gem, 0.0), fig.accent, front=True, line=0.7)
        fig.canvas.fill(
            _flat(fig, points((0.98, 0.54), (1.04, 0.66), (0.98, 0.7), (0.93, 0.64)) * (side, 1), 0.0), WHITE
        )


def _mole(fig: Figure) -> None:
    spot = ellipse(((EYE_X + 0.16) * fig.identity.side, EYE_Y + 0.4), (0.045, 0.045), 8)
    fig.canvas.fill(fig.view.surface(spot), mix(fig.style.ink, (40, 20, 20), 0.5))


def _freckles(fig: Figure) -> None:
    colour = mix(fig.skin, fig.style.tone((176, 92, 58)), 0.7)
    for x, y in ((0.3, 0.6), (0.42, 0.55), (0.54, 0.62), (0.64, 0.55), (0.45, 0.69), (0.1, 0.57)):
        for side in (-1, 1):
            spot = ellipse((x * side, y), (0.032, 0.032), 6)
            fig.canvas.fill(fig.view.surface(spot), colour)


def _plaster(fig: Figure) -> None:
    side = fig.identity.side
    band = points((0.36, 0.62), (0.78, 0.5), (0.82, 0.64), (0.4, 0.76)) * (side, 1)
    place = fig.view.surface(band)
    fig.canvas.inked(place, fig.style.tone((248, 222, 160)), fig.style.line_of(fig.skin), fig.line(0.7))
    pad = points((0.52, 0.6), (0.62, 0.57), (0.65, 0.67), (0.55, 0.7)) * (side, 1)
    fig.canvas.fill(fig.view.surface(pad), fig.style.tone((226, 176, 110)))


def _nothing(fig: Figure) -> None:
    pass


_HEAD = {
    "none": _nothing, "ribbon": _ribbon, "bow": _bow, "hairpin": _hairpin, "flower": _flower, "hairband": _hairband,
    "headphones": _headphones, "cat_ears": _nothing, "horns": _nothing,
}  # fmt: skip
_FACE = {
    "none": _nothing, "glasses": _glasses, "earrings": _earrings, "mole": _mole, "freckles": _freckles,
    "plaster": _plaster,
}  # fmt: skip
