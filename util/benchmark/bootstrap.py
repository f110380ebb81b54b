"""Confidence intervals by bootstrap over identities: pictures of one character are not independent of one another.

A statistic is handed how often each identity was drawn, and gives its value for that sample of identities. Drawing
is keyed by (seed, replicate), so two models that are compared under one seed see the same identities: the difference
of two statistics in one call has a paired interval (Efron and Tibshirani 1993, percentile interval).
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from util.run.seed import rng_for

REPLICATES = 1000
LEVEL = 0.95


def multiplicities(groups: int, replicates: int, seed: int, strata: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """How often each identity is drawn, (groups,) int64, in each replicate.

    strata: (groups,) int numbers; identities are drawn within each of them (known and unknown ones, say), so that
    every replicate has as many of each kind as the data.
    """
    members = [np.arange(groups)] if strata is None else [np.flatnonzero(strata == kind) for kind in np.unique(strata)]
    for replicate in range(replicates):
        rng = rng_for(seed, replicate, "bootstrap")
        drawn = np.concatenate([rng.choice(own, len(own)) for own in members])
        yield np.bincount(drawn, minlength=groups)


def intervals(
    statistic: Callable[[np.ndarray], Mapping[str, float]],
    groups: int,
    *,
    strata: np.ndarray | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, list[float] | None]:
    """{name: [low, high]} for each figure that `statistic` gives for multiplicities (groups,).

    None where no interval can be had: fewer than two identities, or a figure that is NaN in more than half of the
    replicates (a NaN means that a replicate lacks what the figure needs; it is left out).
    """
    if groups < 2:
        return dict.fromkeys(statistic(np.ones(groups, dtype=np.int64)))
    drawn: dict[str, list[float]] = {}
    for weights in multiplicities(groups, replicates, seed, strata):
        for name, value in statistic(weights).items():
            drawn.setdefault(name, []).append(value)
    return {name: _percentiles(np.array(values, dtype=np.float64), level) for name, values in drawn.items()}


def with_intervals(statistic: Callable, groups: int, **options) -> dict[str, float | list[float] | None]:
    """{NAME: value, NAME_ci95: [low, high] or None} of a statistic as `bootstrap.intervals` takes it."""
    found = intervals(statistic, groups, **options)
    report: dict = {}
    for name, value in statistic(np.ones(groups, dtype=np.int64)).items():
        report |= {name: float(value), f"{name}_ci95": found[name]}
    return report


def mean_interval(values: np.ndarray, groups: np.ndarray, **options) -> list[float] | None:
    """[low, high] of the mean of `values` (N,), whose samples belong to the identities `groups` (N,), any codes."""
    _, codes = np.unique(groups, return_inverse=True)
    counts = np.bincount(codes)
    sums = np.bincount(codes, weights=values)
    return intervals(lambda weights: {"mean": weights @ sums / (weights @ counts)}, len(counts), **options)["mean"]


def _percentiles(values: np.ndarray, level: float) -> list[float] | None:
    valid = values[~np.isnan(values)]
    if 2 * len(valid) < len(values):
        return None
    return np.quantile(valid, [(1 - level) / 2, (1 + level) / 2]).tolist()
