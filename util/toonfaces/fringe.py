"""Fringes: where the locks over the forehead begin and end, for each of the nine kinds."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from util.toonfaces.geometry import lock_edge, points
from util.toonfaces.identity import Identity

TEMPLE = (1.03, 0.16)


@dataclass(frozen=True)
class Fringe:
    """Locks from the left temple to the right one, model units."""

    valleys: np.ndarray  # (K + 1, 2)
    tips: np.ndarray  # (K, 2)
    bulge: float = 0.55

    @cached_property
    def edge(self) -> np.ndarray:
        return lock_edge(self.valleys, self.tips, self.bulge)


def _row(count: int, low: float, high: float, rng, x_jitter=0.03, y_jitter=0.05, round_sides=0.16):
    """Evenly spread locks whose tips are near y = low and valleys near y = high, lower at the temples."""
    x = np.linspace(-TEMPLE[0], TEMPLE[0], 2 * count + 1)
    x[1:-1] += rng.uniform(-x_jitter, x_jitter, 2 * count - 1)
    arch = round_sides * np.abs(x) ** 3
    y = np.where(np.arange(2 * count + 1) % 2, low, high) + arch + rng.uniform(-y_jitter, y_jitter, 2 * count + 1)
    edge = np.stack([x, y], axis=1)
    edge[0], edge[-1] = (-TEMPLE[0], TEMPLE[1]), TEMPLE
    return edge[0::2], edge[1::2]


def _blunt(rng, side):
    return Fringe(*_row(9, -0.03, -0.1, rng, 0.02, 0.012, 0.2), bulge=0.9)


def _side(rng, side):
    valleys, tips = _row(6, 0.06, -0.3, rng, 0.04, 0.05)
    part = -0.45 * side
    sweep = np.where(tips[:, 0] * side > part * side, 1, -0.5) * side
    tips[:, 0] += 0.2 * sweep
    tips[:, 1] += 0.16 * (tips[:, 0] * side)
    valleys[1:-1, 1] += 0.1 * valleys[1:-1, 0] * side
    near = np.argmin(np.abs(valleys[:, 0] - part))
    valleys[near, 1] = -0.72
    return Fringe(valleys, tips, 0.65)


def _parted(rng, side):
    x = np.array([-0.98, -0.68, -0.36, 0.36, 0.68, 0.98])
    tips = np.stack([x * 1.02, np.array([0.36, 0.12, -0.16, -0.16, 0.12, 0.36])], axis=1)
    valleys = points((-TEMPLE[0], 0.16), (-0.84, -0.08), (-0.54, -0.2), (0, -0.92), (0.54, -0.2), (0.84, -0.08), TEMPLE)
    return Fringe(valleys, tips + rng.uniform(-0.03, 0.03, tips.shape), 0.75)


def _between_eyes(rng, side):
    tips = points(
        (-0.98, 0.34), (-0.72, 0.1), (-0.36, -0.04), (0.02 * side, 0.48), (0.36, -0.04), (0.72, 0.1), (0.98, 0.34)
    )
    valleys = points(
        (-TEMPLE[0], 0.16),
        (-0.86, -0.14),
        (-0.54, -0.32),
        (-0.16, -0.38),
        (0.16, -0.38),
        (0.54, -0.32),
        (0.86, -0.14),
        TEMPLE,
    )
    return Fringe(valleys, tips + rng.uniform(-0.03, 0.03, tips.shape), 0.5)


def _spiky(rng, side):
    valleys, tips = _row(6, 0.1, -0.46, rng, 0.06, 0.1)
    tips[:, 0] += 0.12 * side
    return Fringe(valleys, tips, 0.12)


def _wispy(rng, side):
    valleys, tips = _row(7, 0.04, -0.5, rng, 0.05, 0.06)
    valleys[1:-1, 0] += 0.02
    return Fringe(valleys, tips, -0.35)


def _swept_back(rng, side):
    # a bare forehead: the hairline itself, its corners bare, and one strand that has come loose
    tips = points((-0.96, 0.1), (-0.16, -0.66), (0.42, 0.06), (0.96, 0.1))
    valleys = points((-TEMPLE[0], 0.16), (-0.66, -0.62), (0.2, -0.74), (0.36, -0.74), TEMPLE)
    tips, valleys = (tips, valleys) if side > 0 else (tips[::-1] * (-1, 1), valleys[::-1] * (-1, 1))
    return Fringe(valleys, tips + rng.uniform(-0.02, 0.02, tips.shape), 0.6)


def _curtain(rng, side):
    tips = points((-0.94, 0.8), (-0.78, 0.52), (-0.5, 0.06), (0.5, 0.06), (0.78, 0.52), (0.94, 0.8))
    valleys = points(
        (-TEMPLE[0], 0.3), (-0.9, 0.24), (-0.7, 0.0), (0.06 * side, -0.66), (0.7, 0.0), (0.9, 0.24), (TEMPLE[0], 0.3)
    )
    return Fringe(valleys, tips + rng.uniform(-0.03, 0.03, tips.shape), 0.8)


def _over_eye(rng, side):
    tips = points((-0.95, 0.3), (-0.66, 0.0), (-0.3, -0.1), (0.3, 0.4), (0.58, 0.82), (0.96, 0.62))
    valleys = points((-TEMPLE[0], 0.16), (-0.82, -0.16), (-0.5, -0.34), (-0.2, -0.7), (0.24, 0.1), (0.8, 0.3), TEMPLE)
    tips = tips + rng.uniform(-0.03, 0.03, tips.shape)
    if side < 0:
        valleys, tips = valleys[::-1] * (-1, 1), tips[::-1] * (-1, 1)
    return Fringe(valleys, tips, 0.7)


_LAYOUT = {
    "blunt": _blunt, "side": _side, "parted": _parted, "between_eyes": _between_eyes, "spiky": _spiky,
    "wispy": _wispy, "swept_back": _swept_back, "curtain": _curtain, "over_eye": _over_eye,
}  # fmt: skip


@lru_cache(maxsize=256)
def fringe_of(identity: Identity) -> Fringe:
    """The character's fringe: the same locks in every picture."""
    return _LAYOUT[identity.traits.bangs](identity.rng("fringe"), identity.side)
