"""Whether a long run stays as it is: trends of what it holds, and its speed at the end against that at the start.

A trend is a least-squares slope over the steps with a 95 % interval. Readings of memory follow each other closely, so
the interval counts only as many of them as are independent: n (1 - r) / (1 + r) for a lag-1 correlation r of the
residuals. A run that was resumed consists of segments, one a process: each has a level of its own, all share the slope.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from util.run.seed import rng_for

FLAT, GROWS, UNDECIDED = "flat", "grows", "undecided"
EQUAL, SLOWER, FASTER = "equal", "slower", "faster"
_REPLICATES = 2000
LEAST_READINGS, LEAST_FREEDOM = 100, 10  # with fewer, the interval is too narrow to decide by


class Trend(NamedTuple):
    """slope: per step. low, high: ends of its 95 % interval, of so many degrees of `freedom`. level: mean."""

    slope: float
    low: float
    high: float
    level: float
    freedom: float


def trend(steps: Sequence[float], values: Sequence[float], segments: Sequence[int]) -> Trend:
    """The slope of readings (N,) at `steps` (N,), ascending, of processes `segments` (N,). ValueError for too few."""
    from scipy.stats import t as student

    x, y, segments = np.asarray(steps, float), np.asarray(values, float), np.asarray(segments)
    level, parts = float(y.mean()) if len(y) else 0.0, []
    for segment in np.unique(segments):
        own = segments == segment
        parts.append((x[own] - x[own].mean(), y[own] - y[own].mean()))
    spread = sum(float(a @ a) for a, _ in parts)
    if len(x) < 2 * len(parts) + 4 or not spread:
        raise ValueError(f"{len(x)} readings in {len(parts)} processes are too few for a trend")
    slope = sum(float(a @ b) for a, b in parts) / spread
    rest = [b - slope * a for a, b in parts]
    squares = sum(float(part @ part) for part in rest)
    neighbours = sum(float(part[1:] @ part[:-1]) for part in rest)
    correlation = min(max(neighbours / squares, 0.0), 0.99) if squares else 0.0
    inflation = (1 + correlation) / (1 - correlation)
    freedom = max(1.0, len(x) / inflation - len(parts) - 1)
    error = np.sqrt(squares / (len(x) - len(parts) - 1) / spread * inflation)
    half = float(student.ppf(0.975, freedom)) * error
    return Trend(slope, slope - half, slope + half, level, freedom)


def judge_growth(
    steps: Sequence[float], values: Sequence[float], segments: Sequence[int], *, bound: float, over: float
) -> dict:
    """What `values` gain over so many steps, with its interval, against `bound`, and a verdict.

    "flat": even the upper end is below the bound. "grows": even the lower end is above it. "undecided": neither, the
    run is too short (fewer than 100 readings, or 10 effective degrees of freedom) or too noisy to say.
    Arrays as in `trend`.
    """
    found = trend(steps, values, segments)
    gain = [over * found.slope, over * found.low, over * found.high]
    verdict = UNDECIDED
    if len(steps) >= LEAST_READINGS and found.freedom >= LEAST_FREEDOM:
        verdict = FLAT if gain[2] < bound else GROWS if gain[1] > bound else UNDECIDED
    return {
        "level": found.level,
        "per_step": found.slope,
        "per_step_ci95": [found.low, found.high],
        "over_steps": over,
        "gain": gain[0],
        "gain_ci95": gain[1:],
        "bound": bound,
        "verdict": verdict,
    }


def judge_speed(costs: Sequence[float], *, share: float = 0.1, tolerance: float = 0.05, seed: int = 0) -> dict:
    """The cost of a step in the last windows against the first ones, with a bootstrap interval over windows.

    costs: (N,) seconds per step of each window, in order. share: of the windows at either end, at least three.
    "ratio": of the medians, above 1: slower at the end. "equal": its interval lies within 1 +- tolerance; "slower" or
    "faster": wholly beyond; else "undecided". ValueError for fewer than six windows.
    """
    costs = np.asarray(costs, float)
    count = max(3, round(share * len(costs)))
    if len(costs) < 2 * count:
        raise ValueError(f"{len(costs)} windows are too few to compare their ends")
    first, last = costs[:count], costs[-count:]
    rng = rng_for(seed, "speed")
    drawn = [np.median(part[rng.integers(count, size=(_REPLICATES, count))], axis=1) for part in (first, last)]
    low, high = np.quantile(drawn[1] / drawn[0], (0.025, 0.975)).tolist()
    verdict = UNDECIDED
    if 1 - tolerance <= low and high <= 1 + tolerance:
        verdict = EQUAL
    elif low > 1 + tolerance:
        verdict = SLOWER
    elif high < 1 - tolerance:
        verdict = FASTER
    return {
        "first": float(np.median(first)),
        "last": float(np.median(last)),
        "ratio": float(np.median(last) / np.median(first)),
        "ratio_ci95": [low, high],
        "windows_at_each_end": count,
        "tolerance": tolerance,
        "verdict": verdict,
    }


def settled(segments: Sequence[int], share: float) -> np.ndarray:
    """Which readings (N,) bool come after the first `share`, 0..1, of their process's: before, it fills its caches."""
    segments = np.asarray(segments)
    kept = np.zeros(len(segments), bool)
    for segment in np.unique(segments):
        own = np.flatnonzero(segments == segment)
        kept[own[int(np.ceil(share * len(own))) :]] = True
    return kept
