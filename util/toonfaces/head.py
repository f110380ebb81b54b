"""The face's outline and shading, ears, nose and mouth."""

import numpy as np

from util.toonfaces.canvas import BODY
from util.toonfaces.figure import Figure
from util.toonfaces.geometry import ellipse, mirror, points, spline
from util.toonfaces.style import mix

# Half outlines from the temple to the chin: cheek, jaw and chin decide the face's shape.
_FACES = {
    "round": points((0.86, -0.5), (0.93, -0.02), (0.95, 0.32), (0.84, 0.68), (0.53, 0.96), (0.2, 1.07), (0.0, 1.09)),
    "oval": points((0.84, -0.5), (0.91, -0.02), (0.9, 0.32), (0.77, 0.68), (0.45, 0.99), (0.15, 1.15), (0.0, 1.18)),
    "pointed": points((0.85, -0.5), (0.92, -0.02), (0.9, 0.3), (0.72, 0.66), (0.37, 0.97), (0.09, 1.16), (0.0, 1.19)),
    "square": points((0.84, -0.5), (0.9, -0.02), (0.91, 0.34), (0.84, 0.7), (0.58, 1.0), (0.27, 1.14), (0.0, 1.16)),
}
_SCALP = points((0.0, -1.02), (0.5, -0.92))
# The part of the face that the light does not reach.
_DUSK = points((1.3, -0.6), (0.84, -0.1), (0.82, 0.3), (0.66, 0.62), (0.3, 0.98), (0.0, 1.12), (0.3, 1.5), (1.3, 1.4))
_DUSK = spline(_DUSK, closed=True, n=3)
_EAR = points((0.86, 0.0), (1.0, -0.08), (1.1, 0.02), (1.08, 0.24), (0.97, 0.45), (0.86, 0.42))
_EAR = spline(_EAR, closed=True, n=3)
_EAR_HOLLOW = spline(points((0.95, 0.06), (1.02, 0.1), (0.98, 0.28)), n=3)
BLUSH = (244, 120, 130)


def face_outline(fig: Figure) -> np.ndarray:
    """The outline of the skin of the face, px. The chin stands out further than the temples, so it turns further."""
    half = np.concatenate([_SCALP, _FACES[fig.traits.face]])
    half = half * np.stack([np.ones(len(half)), np.where(half[:, 1] > 0.3, fig.style.chin, 1.0)], axis=1)
    shape = spline(np.concatenate([half, mirror(half[1:-1])]), closed=True, n=4)
    turn = fig.view.sines[0]
    shape[:, 0] *= np.where(shape[:, 0] * turn > 0, 1 - 0.16 * abs(turn), 1.0)
    return fig.view.flat(shape, np.interp(shape[:, 1], (-1.0, -0.3, 0.3, 1.1), (0.1, 0.16, 0.22, 0.5)))


def draw_ear(fig: Figure, side: int) -> None:
    """One ear; the near one belongs over the face, the far one behind it."""
    depth = -0.12
    fig.solid(fig.view.flat(_EAR * (side, 1), depth), fig.skin, line=0.8)
    fig.strand(fig.view.flat(_EAR_HOLLOW * (side, 1), depth), fig.style.shadow(fig.skin, 1.4), 0.04)


def draw_face(fig: Figure, outline: np.ndarray) -> None:
    """The skin with the shadow at the side away from the light, and blushing cheeks."""
    fig.canvas.fill(outline, fig.skin, BODY)
    side = -fig.look.light_side
    with fig.canvas.clip(outline) as tile:
        dark = fig.style.shadow(fig.skin, 0.9)
        tile.fill(fig.view.flat(_DUSK * (side, 1), 0.28), dark)
        _blush(fig, tile)
        if fig.style.hatch:
            _hatch_cheek(fig, tile, side)
    fig.canvas.outline(outline, fig.line(), fig.style.line_of(fig.skin))


def _blush(fig: Figure, tile) -> None:
    strength = min(1.0, fig.style.blush * 0.5 + fig.look.expression.blush)
    if strength <= 0.05:
        return
    colour = mix(fig.skin, fig.style.tone(BLUSH), 0.75)
    for side in (-1, 1):
        for size, alpha in ((1.0, 0.3), (0.65, 0.35)):
            spot = ellipse((side * 0.56, 0.6), (0.24 * size, 0.13 * size), 16)
            tile.fill(fig.view.surface(spot), colour, alpha=alpha * strength)
        if fig.look.expression.blush >= 0.4 or fig.style.hatch:
            for k in range(3):
                x = side * 0.56 + (k - 1) * 0.11
                mark = fig.view.surface(points((x + 0.03, 0.53), (x - 0.03, 0.67)))
                tile.stroke(mark, max(0.5, 0.025 * fig.view.unit), fig.style.line_of(colour), alpha=0.7)


def _hatch_cheek(fig: Figure, tile, side: int) -> None:
    colour = fig.style.shadow(fig.skin, 2.0)
    for k in range(7):
        y = 0.15 + 0.13 * k
        start = points((side * 0.62, y + 0.12), (side * 1.0, y - 0.18))
        tile.stroke(fig.view.flat(start, 0.28), max(0.5, 0.02 * fig.view.unit), colour, (0.3, 1.0))


def draw_nose(fig: Figure) -> None:
    """A touch of shadow under the tip; it stands out, so it leads the turn of the head."""
    side = 1 if fig.view.yaw >= 0 else -1
    path = points((0.0, 0.5), (0.045 * side, 0.585), (-0.02 * side, 0.61))
    ink = fig.style.line_of(fig.style.shadow(fig.skin, 1.5))
    width = 0.045 if fig.style.name == "shounen" else 0.036
    place = fig.view.surface(spline(path, n=3), depth=0.74)
    fig.strand(place, mix(ink, fig.skin, 0.25), width, (0.2, 0.6), 0.6)


def draw_mouth(fig: Figure) -> None:
    """The mouth of the expression, at the same height for all: 0.83 below the middle of the head."""
    MOUTH[fig.look.expression.mouth](fig)


def _mouth_line(fig: Figure, path, width: float = 0.04) -> None:
    ink = fig.style.line_of(mix(fig.skin, (150, 50, 50), 0.6))
    fig.strand(fig.view.surface(spline(points(*path), n=4)), ink, width, (0.3, 0.3))


def _mouth_hole(fig: Figure, shape: np.ndarray, teeth: float, tongue: float) -> None:
    hole = fig.view.surface(shape)
    inside = fig.style.tone((150, 48, 58))
    fig.canvas.fill(hole, inside)
    with fig.canvas.clip(hole) as tile:
        low, high = shape[:, 1].min(), shape[:, 1].max()
        if tongue:
            spot = ellipse((0.0, high + 0.02), (0.16, (high - low) * tongue), 14)
            tile.fill(fig.view.surface(spot), fig.style.tone((238, 128, 128)))
        if teeth:
            strip = points((-0.5, low - 0.1), (0.5, low - 0.1), (0.5, low + teeth), (-0.5, low + teeth))
            tile.fill(fig.view.surface(strip), (255, 255, 255))
    fig.canvas.outline(hole, fig.line(0.9), fig.style.line_of(inside))


def _open(fig: Figure, width: float, height: float, top: float, teeth: float) -> None:
    upper = points((-width, 0.78), (0.0, 0.78 + top), (width, 0.78))
    half = points((width, 0.78), (width * 0.62, 0.78 + height * 0.8), (0.0, 0.78 + height))
    lower = np.concatenate([half, mirror(half[:-1])])
    _mouth_hole(fig, np.concatenate([spline(upper, n=4), spline(lower, n=4)]), teeth, 0.45)


MOUTH = {
    "line": lambda fig: _mouth_line(fig, ((-0.13, 0.83), (0.0, 0.85), (0.13, 0.83))),
    "smile": lambda fig: _mouth_line(fig, ((-0.18, 0.79), (-0.08, 0.86), (0.08, 0.86), (0.18, 0.79))),
    "frown": lambda fig: _mouth_line(fig, ((-0.15, 0.87), (-0.05, 0.82), (0.06, 0.82), (0.15, 0.87)), 0.05),
    "wave": lambda fig: _mouth_line(fig, ((-0.15, 0.86), (-0.07, 0.82), (0.0, 0.85), (0.07, 0.82), (0.15, 0.86))),
    "cat": lambda fig: _mouth_line(fig, ((-0.2, 0.79), (-0.1, 0.87), (0.0, 0.81), (0.1, 0.87), (0.2, 0.79))),
    "open": lambda fig: _open(fig, 0.16, 0.2, 0.02, 0.0),
    "grin": lambda fig: _open(fig, 0.25, 0.26, 0.03, 0.07),
    "o": lambda fig: _mouth_hole(fig, ellipse((0.0, 0.86), (0.09, 0.12), 16), 0.0, 0.3),
}  # fmt: skip
