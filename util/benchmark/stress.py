"""What a stress costs: accuracy beside that on the clean pictures of the same probes, with paired intervals."""

from collections.abc import Mapping

import numpy as np

from util.benchmark.bootstrap import intervals
from util.run.errors import UserError

UNLABELLED = "unlabelled"


def stress_report(
    clean_correct: np.ndarray, stressed: Mapping[str, np.ndarray], groups: np.ndarray, **options
) -> dict[str, dict]:
    """Accuracy under each stress, and how far it lies below that on the clean pictures.

    clean_correct: (N,) bool, the probe was named rightly. stressed: {stress: (N,) bool}, the same probes. groups: (N,)
    identity codes. options: of `bootstrap.intervals`. Returns {stress: {"top1", "top1_ci95", "drop", "drop_ci95",
    "relative_drop", "probes"}}: drop = clean - stressed, a difference of fractions, above 0 where the stress harms;
    relative_drop = drop / clean, None where nothing was right. Intervals come from the same draws of identities for
    the clean and the stressed accuracy, so that probes that are hard for other reasons do not widen them.
    """
    probes = len(clean_correct)
    if not probes:
        raise ValueError("no probes to compare")
    for name, correct in stressed.items():
        if len(correct) != probes:
            raise ValueError(f"{name!r} has {len(correct)} probes, the clean run {probes}")
    codes, counts = _identities(groups)
    right = {name: _sums(correct, codes) for name, correct in stressed.items()}
    clean = _sums(clean_correct, codes)

    def statistic(weights: np.ndarray) -> dict:
        total = weights @ counts
        top1 = {("top1", name): weights @ sums / total for name, sums in right.items()}
        drop = {("drop", name): weights @ (clean - sums) / total for name, sums in right.items()}
        return top1 | drop

    values, found = statistic(np.ones(len(counts))), intervals(statistic, len(counts), **options)
    base = clean.sum() / probes
    return {
        name: {
            "top1": float(values["top1", name]),
            "top1_ci95": found["top1", name],
            "drop": float(values["drop", name]),
            "drop_ci95": found["drop", name],
            "relative_drop": float(values["drop", name] / base) if base else None,
            "probes": probes,
        }
        for name in stressed
    }


def strata_report(
    correct: np.ndarray, strata: np.ndarray, groups: np.ndarray, reference: str | None = None, **options
) -> dict[str, dict | int]:
    """Accuracy in each stratum (style, pose, ...), and how far it lies below that of a reference.

    correct: (N,) bool. strata: (N,) str, None where it is not known. groups: (N,) identity codes. reference: the
    stratum to compare with, else all probes that have one. options: of `bootstrap.intervals`. Returns {stratum, in
    alphabetical order: {"top1", "top1_ci95", "drop", "drop_ci95", "probes", "identities"}} and "unlabelled", the
    number of probes without a stratum, which are in no figure. Intervals are None for a stratum of one identity.
    Strata hold different pictures, so a drop also shows which identities they hold, unlike that of `stress_report`.
    """
    known = np.array([stratum is not None for stratum in strata], dtype=bool)
    names = sorted({str(stratum) for stratum in strata[known]})
    if UNLABELLED in names:
        raise UserError(f"a stratum is called {UNLABELLED!r}, which stands for none: give it another name")
    if names and reference is not None and reference not in names:
        raise UserError(f"{reference!r} is not one of the strata {', '.join(names)}: choose one of them")
    report: dict[str, dict | int] = {}
    if names:
        report |= _strata(correct[known], strata[known], groups[known], names, reference, options)
    return report | {UNLABELLED: int((~known).sum())}


def _strata(correct, strata, groups, names, reference, options) -> dict[str, dict]:
    codes, all_counts = _identities(groups)
    counts = {name: _sums(strata == name, codes) for name in names}
    right = {name: _sums(correct & (strata == name), codes) for name in names}
    base_right, base_counts = (
        (_sums(correct, codes), all_counts) if reference is None else (right[reference], counts[reference])
    )

    def statistic(weights: np.ndarray) -> dict:
        base = _ratio(weights @ base_right, weights @ base_counts)
        top1 = {name: _ratio(weights @ right[name], weights @ counts[name]) for name in names}
        return {("top1", name): top1[name] for name in names} | {("drop", name): base - top1[name] for name in names}

    values, found = statistic(np.ones(len(all_counts))), intervals(statistic, len(all_counts), **options)
    report = {}
    for name in names:
        identities = int((counts[name] > 0).sum())
        report[name] = {"probes": int(counts[name].sum()), "identities": identities}
        for figure in ("top1", "drop"):
            report[name][figure] = float(values[figure, name])
            report[name][f"{figure}_ci95"] = found[figure, name] if identities > 1 else None
    return report


def _identities(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (N,) 0 to G - 1, and the samples of each (G,)."""
    _, codes = np.unique(groups, return_inverse=True)
    return codes, np.bincount(codes)


def _sums(chosen: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.bincount(codes, weights=chosen, minlength=codes.max() + 1)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else np.nan
