"""The hair behind the head and what hangs from it: tails, buns, drills, braids."""

from functools import lru_cache

import numpy as np

from util.toonfaces.figure import Figure
from util.toonfaces.geometry import ellipse, lock_edge, mirror, placed, points, ribbon, spline
from util.toonfaces.identity import Identity
from util.toonfaces.style import mix

_BEHIND = -0.3  # depth of what lies behind the head
_HOLLOW = points((0.0, 0.3), (0.72, 0.4), (0.84, 1.1), (0.74, 2.4), (0.6, 4.0))  # the dark behind the neck
_HOLLOW = spline(np.concatenate([_HOLLOW, mirror(_HOLLOW)]), n=3)
_STRAND = spline(points((1.0, 0.1), (1.05, 0.9), (1.1, 1.7), (1.12, 2.6)), n=4)


def _sheet(fig: Figure, half: np.ndarray, hem: np.ndarray | None, smooth: bool = True) -> None:
    """A mass of hair behind the head. half: its right outline from the top down; hem: its lower edge, right to left."""
    right = spline(half, n=4) if smooth else half
    parts = [right, mirror(right)] if hem is None else [right, hem, mirror(right)]
    shape = fig.view.flat(np.concatenate(parts), _BEHIND)
    fig.solid(shape, fig.style.shadow(fig.hair, 0.35))
    with fig.canvas.clip(shape) as tile:
        tile.fill(fig.view.flat(_HOLLOW, _BEHIND), fig.style.shadow(fig.hair, 1.5))
        for x in (-1.08, -0.96, 0.96, 1.08):
            path = fig.view.flat(_STRAND * (x, 1), _BEHIND)
            tile.stroke(path, max(0.6, 0.9 * fig.line()), fig.style.shadow(fig.hair, 1.8), (0.0, 0.3), 0.4)


@lru_cache(maxsize=256)
def _hem(identity: Identity, left: float, y: float, count: int, depth: float, bulge: float = 0.5) -> np.ndarray:
    """Locks along a lower edge from x = -left to x = left, returned right to left."""
    rng = identity.rng("hem")
    x = np.linspace(left, -left, 2 * count + 1)
    sag = y + 0.1 * (1 - (x / left) ** 2)
    drop = np.where(np.arange(2 * count + 1) % 2, depth, 0.0) * rng.uniform(0.7, 1.3, 2 * count + 1)
    edge = np.stack([x, sag + drop], axis=1)
    return lock_edge(edge[0::2], edge[1::2], bulge)


def _bob(fig: Figure) -> None:
    half = points((0.0, -1.2), (0.72, -1.0), (1.1, -0.4), (1.27, 0.25), (1.22, 0.75), (1.0, 1.08))
    _sheet(fig, half, _hem(fig.identity, 1.0, 1.08, 6, 0.1))


def _short(fig: Figure) -> None:
    half = points((0.0, -1.2), (0.72, -1.0), (1.06, -0.4), (1.15, 0.2), (1.0, 0.66))
    _sheet(fig, half, _hem(fig.identity, 1.0, 0.66, 7, 0.26, 0.2))


def _spiky(fig: Figure) -> None:
    valleys = points((0.7, -1.0), (1.12, -0.5), (1.14, -0.1), (1.1, 0.3), (0.98, 0.7))
    tips = points((1.4, -0.86), (1.5, -0.28), (1.5, 0.3), (1.28, 0.82))
    edge = lock_edge(valleys, tips, 0.1, 4)
    _sheet(fig, edge, _hem(fig.identity, 0.98, 0.7, 5, 0.34, 0.05), smooth=False)


def _long(fig: Figure) -> None:
    half = points((0.0, -1.2), (0.72, -1.0), (1.1, -0.4), (1.22, 0.4), (1.25, 1.2), (1.34, 2.2), (1.4, 4.5))
    _sheet(fig, half, None)


def _wavy(fig: Figure) -> None:
    y = np.linspace(-0.4, 4.4, 17)
    widening = 1.12 + 0.08 * np.clip(y + 0.4, 0, 1) + 0.16 * np.clip(y, 0, 2.5)
    wave = 0.13 * np.sin(y * 4.2) * np.clip(y + 0.3, 0, 1)
    half = np.concatenate([points((0.0, -1.2), (0.72, -1.0)), np.stack([widening + wave, y], axis=1)])
    _sheet(fig, half, None)


def _flip(fig: Figure) -> None:
    half = points((0.0, -1.2), (0.72, -1.0), (1.1, -0.4), (1.16, 0.3), (1.12, 0.72), (1.3, 1.0), (1.68, 1.0))
    under = spline(points((1.68, 1.0), (1.36, 1.32), (1.0, 1.2)), n=4)
    hem = _hem(fig.identity, 1.0, 1.2, 5, 0.1)
    _sheet(fig, half, np.concatenate([under, hem, mirror(under)]))


def _cropped(fig: Figure) -> None:
    """What is left at the back of the head when the rest is tied up."""
    half = points((0.0, -1.2), (0.72, -1.0), (1.06, -0.4), (1.1, 0.2), (0.9, 0.6), (0.6, 0.9))
    _sheet(fig, half, _hem(fig.identity, 0.6, 0.9, 4, 0.06))


def _tail(fig: Figure, path: np.ndarray, widths: tuple[float, ...], depth: float, on_body: bool = False) -> None:
    """A bundle of hair along a path, model units, with shadow, gloss and strands. on_body: it lies on the shoulders."""
    view = fig.body if on_body else fig.view
    line = spline(path, n=6)
    n = len(line)
    outline = ribbon(line, np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(widths)), widths))
    fig.solid(view.flat(outline, depth), fig.hair)
    dark, bright = outline[:n], outline[n:][::-1]
    if np.mean(dark[:, 0] - bright[:, 0]) * fig.look.light_side > 0:
        dark, bright = bright, dark

    def across(t: float) -> np.ndarray:  # a line along the tail: 0 is its edge in the dark, 1 the one in the light
        return view.flat(dark * (1 - t) + bright * t, depth)

    fig.canvas.fill(np.concatenate([across(0.0), across(0.32)[::-1]]), fig.style.shadow(fig.hair, 0.8))
    glint = slice(n // 4, n // 2)
    shine = np.concatenate([across(0.65)[glint], across(0.82)[glint][::-1]])
    fig.canvas.fill(shine, mix(fig.hair, fig.style.light(fig.hair), 0.7))
    for t in (0.38, 0.65):
        strand = across(t)[n // 8 : -n // 8]
        fig.strand(strand, fig.style.line_of(fig.hair), fig.style.line * 0.75, (0.5, 0.0), 0.2)


def _tie(fig: Figure, x: float, y: float, depth: float, size: float, on_body: bool = False) -> None:
    view = fig.body if on_body else fig.view
    fig.solid(view.flat(ellipse((x, y), (size, size * 0.8), 12), depth), fig.accent)


def _twintails(fig: Figure) -> None:
    _cropped(fig)
    for side in (-1, 1):
        path = points((0.92, -0.78), (1.4, -0.92), (1.72, -0.3), (1.74, 0.7), (1.5, 1.5), (1.62, 2.1)) * (side, 1)
        _tail(fig, path, (0.16, 0.46, 0.62, 0.6, 0.42, 0.02), -0.15)
        _tie(fig, side * 0.98, -0.82, -0.1, 0.17)


def _ponytail(fig: Figure) -> None:
    _cropped(fig)
    path = points((0.35, -1.2), (0.95, -1.66), (1.55, -1.2), (1.72, -0.2), (1.55, 0.8), (1.72, 1.6))
    _tail(fig, path * (fig.identity.side, 1), (0.2, 0.44, 0.62, 0.66, 0.5, 0.02), -0.25)
    _tie(fig, 0.5 * fig.identity.side, -1.3, -0.2, 0.17)


def _buns(fig: Figure) -> None:
    _cropped(fig)
    for side in (-1, 1):
        x, y = side * 0.84, -1.12
        fig.solid(fig.view.flat(ellipse((x, y), (0.46, 0.44)), -0.1), fig.hair)
        dusk = ellipse((x - 0.1 * fig.look.light_side, y + 0.12), (0.3, 0.26), 16)
        fig.canvas.fill(fig.view.flat(dusk, -0.1), fig.style.shadow(fig.hair, 0.7))
        for size in (0.3, 0.16):
            swirl = ellipse((x, y), (size, size), 14, 0.1 if side > 0 else 0.4, 0.62)
            fig.strand(fig.view.flat(swirl, -0.1), fig.style.line_of(fig.hair), fig.style.line * 0.9, (0.0, 0.4))


def _drill(fig: Figure, side: int) -> None:
    """A ringlet: slanting rings that grow narrower, each over the next."""
    for k in range(6, -1, -1):
        centre, width = (side * (1.22 + 0.03 * k), 0.1 + 0.31 * k), 0.36 - 0.042 * k
        ring = placed(ellipse((0, 0), (width, 0.26), 18), centre, -0.34 * side)
        fig.solid(fig.view.flat(ring), fig.hair, line=0.9)
        dusk = placed(ellipse((-0.1 * fig.look.light_side, 0.08), (width * 0.62, 0.12), 12), centre, -0.34 * side)
        fig.canvas.fill(fig.view.flat(dusk), fig.style.shadow(fig.hair, 0.9))
    _tie(fig, side * 1.08, -0.18, 0.0, 0.16)


def _braid(fig: Figure, side: int) -> None:
    """A plait: pairs of leaves, each pair over the one below."""
    for k in range(7, -1, -1):
        x, y, size = side * (0.98 - 0.02 * k), 0.78 + 0.23 * k, 0.24 - 0.012 * k
        for lean in (-1, 1):
            leaf = ellipse((0, 0), (size * 0.95, size * 0.62), 14)
            leaf = placed(leaf, (x + lean * size * 0.42, y), 0.64 * lean)
            lit = lean * fig.look.light_side > 0
            fig.solid(fig.body.flat(leaf, 0.2), fig.hair if lit else fig.style.shadow(fig.hair, 0.6), line=0.8)
    _tie(fig, side * 0.84, 2.55, 0.2, 0.13, on_body=True)


def _low_tail(fig: Figure, side: int) -> None:
    path = points((0.86, 0.62), (1.14, 1.0), (1.12, 1.6), (0.98, 2.2), (1.04, 2.9)) * (side, 1)
    _tail(fig, path, (0.2, 0.44, 0.5, 0.4, 0.1), 0.1, on_body=True)
    _tie(fig, side * 0.92, 0.74, 0.1, 0.15, on_body=True)


_BACK = {
    "bob": _bob, "short": _short, "spiky": _spiky, "long": _long, "wavy": _wavy, "flip": _flip,
    "twintails": _twintails, "low_tails": _cropped, "ponytail": _ponytail, "buns": _buns, "drills": _cropped,
    "braids": _cropped,
}  # fmt: skip
_HANGING = {"low_tails": _low_tail, "drills": _drill, "braids": _braid}


def draw_back_hair(fig: Figure) -> None:
    """Everything behind the head and the shoulders."""
    _BACK[fig.traits.hair](fig)


def draw_hanging_hair(fig: Figure) -> None:
    """Everything that falls over the shoulders, in front of the body and behind the face."""
    if fig.traits.hair in _HANGING:
        for side in (-1, 1):
            _HANGING[fig.traits.hair](fig, side)
