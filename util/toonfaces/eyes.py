"""Eyes and brows: what makes a face an anime face, and the first thing a recogniser looks at."""

from dataclasses import dataclass

import numpy as np

from util.toonfaces.figure import Figure
from util.toonfaces.geometry import ellipse, placed, points, ribbon, spline
from util.toonfaces.style import WHITE, mix

EYE_X, EYE_Y = 0.45, 0.24  # the middle of an eye opening


@dataclass(frozen=True)
class EyeShape:
    """Lids in model units, for an eye whose outer corner is at x > 0."""

    width: float
    height: float
    corner: float  # the outer corner is lower than the inner one by this
    peak: float  # where the upper lid is highest, -1 inner .. 1 outer
    flat: float  # 0: a round upper lid, 1: a straight one
    iris: float  # width of the iris, relative
    lower: float  # how round the lower lid is


EYE_SHAPES = {
    "round": EyeShape(0.54, 0.58, 0.0, 0.0, 0.1, 1.05, 1.0),
    "tall": EyeShape(0.46, 0.66, 0.0, -0.05, 0.2, 1.0, 0.9),
    "almond": EyeShape(0.6, 0.46, -0.04, 0.05, 0.2, 0.95, 0.8),
    "upturned": EyeShape(0.58, 0.5, -0.16, 0.2, 0.35, 0.95, 0.85),
    "droopy": EyeShape(0.56, 0.52, 0.13, -0.15, 0.2, 1.0, 0.95),
    "half_lidded": EyeShape(0.57, 0.42, 0.02, 0.0, 0.95, 1.08, 1.0),
}


@dataclass(frozen=True)
class _Lids:
    """An eye ready to draw: model-unit curves on the face, from the inner to the outer corner."""

    upper: np.ndarray
    lower: np.ndarray
    middle: tuple[float, float]
    height: float  # half of the opening's, before the mood


def _lids(fig: Figure, side: int) -> _Lids:
    shape, mood = EYE_SHAPES[fig.traits.eyes], fig.look.expression
    size = fig.identity.eye_size
    width = shape.width * fig.style.eye_width * size / 2
    height = shape.height * fig.style.eye_height * size / 2
    x, y = EYE_X + fig.identity.eye_gap, EYE_Y
    top = -height * mood.open
    lid = 1 - 0.22 * (1 - shape.flat)  # how high the lid still is half way to a corner
    inner = 0.16 * height + mood.slant * 0.5
    outer = 0.02 * height + shape.corner - mood.slant * 0.3
    upper = points(
        (-width, inner),
        (-0.62 * width, (top * lid * 0.86) * 0.78 + inner * 0.35 + mood.slant * 0.6),
        (shape.peak * width, top + mood.slant * 0.25),
        (0.66 * width, top * lid * 0.84 + outer * 0.5 - mood.slant * 0.1),
        (width, outer),
    )
    low = height * shape.lower
    lower = points(
        (-width, inner),
        (-0.5 * width, 0.84 * low),
        (0.1 * width, low),
        (0.62 * width, 0.8 * low + outer * 0.4),
        (width, outer),
    )
    upper, lower = (placed(spline(lid, n=5), (x, y)) * (side, 1) for lid in (upper, lower))
    return _Lids(upper, lower, (x * side, y), height)


def draw_eyes(fig: Figure) -> None:
    """Both eyes; their boxes, px, go to `fig.eyes`."""
    for side in (-1, 1):
        shut = fig.look.expression.shut
        if shut and (shut != "wink" or side == fig.look.hidden_side):
            drawn = _draw_shut(fig, side, "up" if shut == "wink" else shut)
        else:
            drawn = _draw_open(fig, side)
        low, high = drawn.min(axis=0) - 0.75, drawn.max(axis=0) + 0.75
        fig.eyes[side] = (*low.tolist(), *high.tolist())


def _draw_open(fig: Figure, side: int) -> np.ndarray:
    lids = _lids(fig, side)
    opening = fig.view.surface(np.concatenate([lids.upper, lids.lower[::-1]]))
    white = fig.style.tone((255, 255, 255))
    with fig.canvas.clip(opening) as tile:
        tile.fill(opening, white)
        _draw_iris(fig, tile, side, lids)
        shade = np.concatenate([lids.upper, placed(lids.upper[::-1], (0.0, 0.09))])
        tile.fill(fig.view.surface(shade), (96, 84, 128), alpha=0.3)
    ink = _lash_ink(fig)
    lower = lids.lower[len(lids.lower) // 3 :]
    fig.strand(fig.view.surface(lower), ink, 0.032, (0.0, 0.8), 0.8)
    return np.concatenate([opening, _draw_lashes(fig, side, lids.upper, ink)])


_STAR = points((0, -1), (0.22, -0.22), (1, 0), (0.22, 0.22), (0, 1), (-0.22, 0.22), (-1, 0), (-0.22, -0.22))


def _draw_iris(fig: Figure, tile, side: int, lids: _Lids) -> None:
    shape, mood = EYE_SHAPES[fig.traits.eyes], fig.look.expression
    colour = fig.iris
    rx = 0.216 * shape.iris * mood.pupil * fig.style.eye_width
    ry = min(lids.height * 0.98, 0.3 * fig.style.eye_height) * mood.pupil
    # The gaze leads the turn of the head a little.
    x = lids.middle[0] + 0.05 * fig.view.sines[0] - 0.015 * side
    y = lids.middle[1] + 0.03 - 0.05 * fig.view.sines[2]

    def disc(dx, dy, wide, tall, n=20):
        return fig.view.surface(ellipse((x + dx * rx, y + dy * ry), (wide * rx, tall * ry), n))

    dark = mix(colour, (24, 14, 40), 0.68)
    tile.fill(disc(0, 0, 1.0, 1.0), mix(dark, fig.style.ink, 0.4))
    tile.fill(disc(0, 0.05, 0.86, 0.9), mix(colour, dark, 0.35))
    tile.fill(disc(0, 0.3, 0.8, 0.66), colour)
    tile.fill(disc(0, 0.52, 0.64, 0.44), mix(colour, WHITE, 0.34))
    tile.fill(disc(0, 0.68, 0.44, 0.24), mix(colour, WHITE, 0.62))
    tile.fill(disc(0, -0.5, 0.84, 0.46), dark, alpha=0.75)
    tile.fill(disc(0, 0.04, 0.36, 0.44), mix(dark, (16, 8, 24), 0.6))
    light = -0.42 * fig.look.light_side
    tile.fill(disc(-light * 0.9, -0.42, 0.34, 0.3, 14), WHITE)
    if fig.style.sparkle > 1:
        tile.fill(disc(light * 1.0, 0.36, 0.17, 0.15, 10), WHITE)
    for k in range(fig.style.sparkle - 2):
        middle = (x + (0.42, -0.12)[k] * light * 2 * rx, y + (0.02, 0.72)[k] * ry)
        tile.fill(fig.view.surface(middle + _STAR * (0.3, 0.2)[k] * rx), WHITE)


def _lash_ink(fig: Figure):
    return mix(fig.style.ink, (20, 12, 20), 0.45 if not fig.style.hatch else 0.2)


def _draw_lashes(fig: Figure, side: int, upper: np.ndarray, ink) -> np.ndarray:
    """The upper lash line, swelling to the outer corner and ending in a wing; returns what it covers, px."""
    thick = fig.style.lash * fig.view.unit
    span = upper[-1] - upper[-4]
    wing = upper[-1] + (side * 0.075, 0.03 + 0.3 * min(0.0, span[1]))
    line = fig.view.surface(np.concatenate([upper - (0.0, 0.012), wing[None]]))
    pressure = np.interp(np.linspace(0, 1, len(line)), (0.0, 0.25, 0.75, 0.93, 1.0), (0.3, 0.8, 1.0, 0.8, 0.05))
    stroke = ribbon(line, thick * pressure)
    fig.canvas.fill(stroke, ink)
    covered = [stroke]
    for k in range(fig.style.lashes):
        root = upper[-3 - 3 * k]
        curl = points(
            (0, 0), (side * (0.06 - 0.01 * k), -0.025 - 0.0075 * k), (side * (0.12 - 0.02 * k), -0.1 - 0.015 * k)
        )
        lash = fig.view.surface(placed(spline(curl, n=3), root))
        fig.strand(lash, ink, 0.055, (1.0, 0.0), 0.0)
        covered.append(lash)
    fold = fig.view.surface(placed(upper[4:-3], (0.0, -0.1)))
    fig.strand(fold, mix(fig.style.line_of(fig.skin), fig.skin, 0.35), 0.024)
    covered.append(fold)
    return np.concatenate(covered)


def _draw_shut(fig: Figure, side: int, kind: str) -> np.ndarray:
    shape = EYE_SHAPES[fig.traits.eyes]
    width = shape.width * fig.style.eye_width * fig.identity.eye_size / 2
    x, y = EYE_X + fig.identity.eye_gap, EYE_Y + 0.12
    sag = 0.13 if kind == "down" else -0.2
    corner = shape.corner * 0.6
    path = points(
        (-width, 0.02),
        (-0.5 * width, sag * 0.72),
        (0.1 * width, sag),
        (0.6 * width, sag * 0.7 + corner * 0.6),
        (width, corner),
    )
    path = placed(spline(path, n=5), (x, y)) * (side, 1)
    place = fig.view.surface(path)
    ink = _lash_ink(fig)
    fig.strand(place, ink, fig.style.lash * 0.85, (0.3, 0.4), 0.6)
    half = fig.style.lash * 0.43 * fig.view.unit
    covered = [placed(place, (0, -half)), placed(place, (0, half))]
    for k in range(max(2, fig.style.lashes) if kind == "down" else 0):
        lash = points((0, 0), (side * (0.09 - 0.03 * k), 0.09))
        lash = fig.view.surface(placed(lash, path[-2 - 4 * k]))
        fig.strand(lash, ink, 0.05, (1.0, 0.0), 0.0)
        covered.append(lash)
    return np.concatenate(covered)


def draw_brows(fig: Figure) -> None:
    """Brows lie over the fringe, half transparent there, as the convention has it."""
    mood = fig.look.expression
    height = EYE_SHAPES[fig.traits.eyes].height * fig.style.eye_height
    thick = fig.style.brow * fig.identity.brow
    colour = mix(fig.hair, fig.style.ink, 0.55)
    for side in (-1, 1):
        y = EYE_Y - 0.5 * height - 0.2 - mood.brow_lift
        droop = EYE_SHAPES[fig.traits.eyes].corner * 0.35
        outer = y + 0.05 - 0.5 * mood.brow_slant + droop
        path = spline(points((0.2, y + 0.03 + mood.brow_slant), (0.45, y - 0.04), (0.7, outer)), n=4)
        place = fig.view.surface(placed(path, (fig.identity.eye_gap, 0.0)) * (side, 1))
        fig.strand(place, colour, thick, (0.75, 0.1), 0.35, alpha=0.82)
