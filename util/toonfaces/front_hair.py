"""The hair in front: the cap over the skull with its fringe, side locks, stray locks."""

from functools import lru_cache

import numpy as np

from util.toonfaces.canvas import FRONT
from util.toonfaces.figure import Figure
from util.toonfaces.fringe import Fringe
from util.toonfaces.geometry import bezier, ellipse, lock_edge, placed, points, ribbon, spline, swell
from util.toonfaces.identity import Identity
from util.toonfaces.style import mix

# Where the hair falls over the ears and the sides of the face.
COVERED_EARS = ("bob", "long", "wavy", "flip", "drills")
_CROWN = np.array([0.0, -1.22])  # where all strands start
_DUSK = points((0.72, -1.0), (0.92, -0.45), (0.84, 0.3), (1.4, 0.5), (1.5, -1.0), (0.9, -1.4))  # away from the light
_DUSK = spline(_DUSK, closed=True, n=4)


def cast_shadow(fig: Figure, fringe: Fringe, outline: np.ndarray) -> None:
    """The shadow of the fringe on the forehead."""
    edge = fig.view.hair(placed(fringe.edge, (0.0, 0.09)))
    top = fig.view.hair(points((1.1, -1.1), (-1.1, -1.1)))
    with fig.canvas.clip(outline) as tile:
        tile.fill(np.concatenate([edge, top]), fig.style.shadow(fig.skin))


@lru_cache(maxsize=256)
def _cap_arc(identity: Identity) -> np.ndarray:
    """The outline of the hair over the skull, from the left temple to the right one, model units."""
    centre, radii = (0.0, -0.12), (1.14, 1.2)
    if identity.traits.hair != "spiky":
        return ellipse(centre, radii, 33, 0.46, 0.58)
    ring = ellipse(centre, radii, 15, 0.46, 0.58)
    tips = (ring[1::2] - centre) * identity.rng("spikes").uniform(1.22, 1.42, (7, 1)) + centre
    return lock_edge(ring[0::2], placed(tips, (0.16 * identity.side, -0.04)), 0.3, 4)


def _side_edge(fig: Figure, side: int) -> np.ndarray:
    """The hairline from the temple to where the cap's outline ends, px: around the ear, or down over it."""
    if fig.traits.hair in COVERED_EARS:
        front = fig.view.hair(spline(points((1.0, 0.2), (0.96, 0.5), (0.98, 0.86)) * (side, 1), n=3))
        back = fig.view.flat(points((1.06, 0.98), (1.12, 0.8), (1.18, 0.9), (1.19, 0.4)) * (side, 1), -0.04)
        return np.concatenate([front, back])
    return fig.view.flat(points((0.97, -0.04), (1.06, 0.0)) * (side, 1), -0.1)


def draw_fringe(fig: Figure, fringe: Fringe) -> None:
    """Cap and fringe in one piece, then the locks' shadows, the highlight ring and the lines."""
    arc = fig.view.flat(_cap_arc(fig.identity), -0.04)
    edge = np.concatenate([_side_edge(fig, -1)[::-1], fig.view.hair(fringe.edge), _side_edge(fig, 1)])
    whole = np.concatenate([arc, edge[::-1]])
    fig.canvas.fill(whole, fig.hair, FRONT)
    with fig.canvas.clip(whole) as tile:
        dusk = fig.view.flat(_DUSK * (-fig.look.light_side, 1), 0.1)
        tile.fill(dusk, fig.style.shadow(fig.hair, 0.55))
    _shade_locks(fig, fringe)
    _gloss(fig)
    ink = fig.style.line_of(fig.hair)
    fig.canvas.stroke(edge, fig.line(0.9), ink, (0.6, 0.6))
    fig.canvas.stroke(arc, fig.line(1.15), ink, (0.7, 0.7), label=FRONT)
    _strands(fig, fringe, ink)


def _shade_locks(fig: Figure, fringe: Fringe) -> None:
    """A wedge of shadow down the side of each lock that is away from the light."""
    away = -fig.look.light_side
    dark = fig.style.shadow(fig.hair, 0.8)
    valleys, tips = (fringe.valleys[1:] if away > 0 else fringe.valleys[:-1]), fringe.tips
    roots = valleys + (_CROWN - valleys) * 0.3
    middles = placed(valleys * 0.35 + tips * 0.65, (-0.04 * away, -0.06))
    for valley, tip, root, middle in zip(valleys, tips, roots, middles, strict=True):
        outer = bezier(np.array([[valley, swell(valley, tip, fringe.bulge), tip]]), 4)
        inner = bezier(np.array([[tip, middle, root]]), 4)
        fig.canvas.fill(fig.view.hair(np.concatenate([root[None], outer, inner])), dark)


def _gloss(fig: Figure) -> None:
    """The highlight ring: leaf-shaped glints that point to the crown, at one height around the head."""
    leaves, x = _glints(fig.identity)
    bright = fig.style.light(fig.hair)
    faint = mix(fig.hair, bright, 0.5)
    places = fig.view.hair(leaves.reshape(-1, 2)).reshape(leaves.shape)
    for leaf, lit in zip(places, x * fig.look.light_side > -0.35, strict=True):
        fig.canvas.fill(leaf, bright if lit else faint)


@lru_cache(maxsize=256)
def _glints(identity: Identity) -> tuple[np.ndarray, np.ndarray]:
    """The glints, (11, 4, 2), and where they are from left to right, (11,)."""
    rng = identity.rng("gloss")
    x = np.linspace(-0.8, 0.8, 11)
    middle = np.stack([x, -0.52 - 0.2 * (1 - x * x) + rng.uniform(-0.03, 0.03, 11)], axis=1)
    along = _CROWN - middle
    along *= (rng.uniform(0.08, 0.19, 11) / np.sqrt(along[:, 0] ** 2 + along[:, 1] ** 2))[:, None]
    across = np.array([0.075, 0.0])
    return np.stack([middle + along, middle + across, middle - 0.9 * along, middle - across], axis=1), x


def _strands(fig: Figure, fringe: Fringe, ink) -> None:
    for k, valley in enumerate(fringe.valleys[1:-1]):
        end = valley + (_CROWN - valley) * (0.34 + 0.16 * (k % 3))
        bend = (valley + end) / 2 + (0.05 * np.sign(valley[0]), 0.0)
        line = fig.view.hair(bezier(np.array([[valley, bend, end]]), 5))
        fig.strand(line, ink, fig.style.line * 0.85, (0.9, 0.0), 0.0)
    if fig.style.hatch:
        rng = fig.identity.rng("hatch")
        grey = mix(fig.hair, fig.style.ink, 0.55)
        for x in np.linspace(-0.9, 0.9, 15):
            foot = np.array([x, -0.35 + rng.uniform(-0.1, 0.12)])
            top = foot + (_CROWN - foot) * rng.uniform(0.25, 0.55)
            fig.strand(fig.view.hair(np.stack([foot, (foot + top) / 2 + (0.03 * x, 0), top])), grey, 0.022, (0.2, 0.2))


def draw_lock(fig: Figure, outer, inner, surface=True) -> None:
    """One hanging lock between two curves (from root to tip), with its shadow and a strand."""
    outer, inner = spline(outer, n=4), spline(inner, n=4)
    place = fig.view.hair if surface else (lambda shape: fig.view.flat(shape, 0.25))
    shape = place(np.concatenate([outer, inner[::-1]]))
    fig.canvas.fill(shape, fig.hair, FRONT)
    m = min(len(outer), len(inner))
    middle = outer[:m] * 0.45 + inner[:m] * 0.55
    dark_edge = inner if outer[m // 2, 0] * fig.look.light_side > 0 else outer
    fig.canvas.fill(
        place(np.concatenate([dark_edge[m // 4 :], middle[m // 4 :][::-1]])), fig.style.shadow(fig.hair, 0.8)
    )
    ink = fig.style.line_of(fig.hair)
    fig.strand(place(middle[m // 5 : -m // 5]), ink, fig.style.line * 0.7, (0.0, 0.5))
    fig.canvas.outline(shape, fig.line(0.85), ink, FRONT)


def draw_side_hair(fig: Figure) -> None:
    """What hangs beside the face, over the ears."""
    LOCKS[fig.traits.sidelocks](fig)


def _hanging(fig: Figure, tip: float, width: float) -> None:
    for side in (-1, 1):
        outer = points((1.06, -0.5), (1.1, 0.0), (1.06, tip * 0.55), (0.92, tip)) * (side, 1)
        inner = points((0.7, -0.5), (0.86 - 0.1 * width, 0.0), (1.02 - width, tip * 0.55), (0.92, tip)) * (side, 1)
        draw_lock(fig, outer, inner)


def _curled(fig: Figure) -> None:
    for side in (-1, 1):
        outer = points((1.06, -0.5), (1.1, 0.1), (1.0, 0.66), (1.08, 0.98), (1.36, 0.96), (1.38, 0.74)) * (side, 1)
        inner = points((0.72, -0.5), (0.84, 0.1), (0.74, 0.7), (0.92, 1.16), (1.38, 1.16), (1.38, 0.74)) * (side, 1)
        draw_lock(fig, outer, inner, surface=False)


LOCKS = {
    "none": lambda fig: _hanging(fig, 0.5, 0.2),
    "short": lambda fig: _hanging(fig, 0.72, 0.26),
    "long": lambda fig: _hanging(fig, 1.75, 0.36),
    "curled": _curled,
}


def draw_ahoge(fig: Figure) -> None:
    """Strands that stand up from the crown."""
    kind, side = fig.traits.ahoge, fig.identity.side
    if kind == "one":
        paths = [points((-0.06, -1.26), (0.02, -1.62), (0.32, -1.76), (0.56, -1.56)) * (side, 1)]
    elif kind == "two":
        paths = [points((0.05, -1.26), (0.2, -1.62), (0.5, -1.78), (0.8, -1.66)) * (s, 1) for s in (-1, 1)]
    else:
        return
    for path in paths:
        line = fig.view.flat(spline(path, n=5), 0.05)
        pressure = np.interp(np.linspace(0, 1, len(line)), (0, 0.45, 1), (0.1, 0.17, 0.01)) * fig.view.unit
        fig.solid(ribbon(line, pressure), fig.hair, front=True, line=0.9)


def draw_blown_bangs(fig: Figure) -> None:
    """Occlusion: locks blown over one eye, beyond the character's own fringe."""
    side = fig.look.hidden_side
    for shift, tip in ((-0.24, 0.5), (0.24, 0.82), (0.0, 0.66)):
        outer = points((0.12, -1.06), (0.62 + shift, -0.6), (0.74 + shift, 0.0), (0.56 + shift, tip)) * (side, 1)
        inner = points((0.12, -1.06), (0.3 + 0.6 * shift, -0.6), (0.3 + shift, 0.0), (0.56 + shift, tip)) * (side, 1)
        draw_lock(fig, outer, inner)
