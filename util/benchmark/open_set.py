"""Open set: probes of known identities, which the gallery holds, among probes of unknown ones.

A probe's score is that of its best identity, higher = surer. It is named when its score is above a threshold. A known
probe wants to be named, and rightly; an unknown one does not want to be named at all.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from util.benchmark.bootstrap import REPLICATES, intervals
from util.benchmark.verification import FPRS, Ranks, false_accepts, operating_point, rate_key, too_few

OFFSETS = (0.01, 0.02, 0.05, 0.1, 0.2)  # of the threshold, as a fraction of it
FAR = 0.01  # at which the threshold is set on validation probes, if there are enough of them


def open_set_report(
    known_max: np.ndarray, known_correct: np.ndarray, unknown_max: np.ndarray,
    known_groups: np.ndarray, unknown_groups: np.ndarray,
    *, fprs: Sequence[float] = FPRS, val: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    mate_rank: np.ndarray | None = None, mate_score: np.ndarray | None = None, far: float = FAR,
    offsets: Sequence[float] = OFFSETS, replicates: int = REPLICATES, seed: int = 0,
) -> dict:  # fmt: skip
    """How well unknown probes are told from known ones, and known ones named, with intervals over identities.

    known_max: (K,) best score of each known probe. known_correct: (K,) bool, whether it is the right identity's.
    unknown_max: (U,). known_groups, unknown_groups: (K,), (U,) codes of the probes' identities; a code that is in both
    means two identities. fprs: fractions above 0 and below 1. Returns

    - auroc: P(known > unknown) + P(equal) / 2; fpr95: share of the unknown not below the threshold that lets in 95 %
      of the known;
    - oscr: area under CCR over FPR (Dhamija et al. 2018, arXiv 1811.04110), see `oscr`;
    - tpr_at_fpr, ccr_at_fpr: {"0.001": share or {"skipped": why}, ...} of the known probes above the threshold, and of
      those both above it and right; threshold by the exact rule of `Roc.threshold` on the unknown probes of the test;
    - dir_at_far: detection and identification rate at rank 1, which is CCR by another name; given mate_rank (K,) from 1
      and mate_score (K,), of the true identity, also dir_at_far_rank5 (mate_rank <= 5 and mate_score above);
    - operating_points: {"0.001": {threshold, realised_fpr, k, negatives} or {"skipped"}};
    - threshold, threshold_sensitivity: what a threshold set on `val` does on the test, see `chosen_threshold` and
      `sensitivity`. val: (known_max, known_correct, unknown_max) of validation probes, whose unknown identities must
      not be those of the test; without it {"skipped": why};
    - known, unknown: counts of probes; closed_set_accuracy: CCR at FPR 1; each figure's sibling NAME_ci95.

    Replicates draw known and unknown identities apart. {"skipped": why} where a kind of probe is missing.
    ValueError for scores that are NaN.
    """
    known_max, unknown_max = np.asarray(known_max), np.asarray(unknown_max)
    known_correct = np.asarray(known_correct, dtype=bool)
    _check(known_max, unknown_max, *(() if mate_score is None else (mate_score,)), *(() if val is None else val[::2]))
    if not len(known_max) or not len(unknown_max):
        return {"skipped": f"no {'known' if not len(known_max) else 'unknown'} probes"}
    chosen = chosen_threshold(val, fprs=fprs, far=far)
    mates = None if mate_rank is None else (np.asarray(mate_rank), np.asarray(mate_score))
    curve = _OpenSet(known_max, known_correct, unknown_max, mates)
    points = {rate_key(fpr): operating_point(curve.ranks.roc(), fpr) for fpr in fprs}
    fixed = chosen.get("value")
    figures = curve.figures(fprs, fixed)
    found = _intervals(curve, known_groups, unknown_groups, fprs, fixed, replicates, seed)
    report = {"known": len(known_max), "unknown": len(unknown_max), "operating_points": points}
    for name in ("auroc", "oscr", "fpr95", "closed_set_accuracy"):
        report |= {name: figures[name], f"{name}_ci95": found[name]}
    for name in ("tpr_at_fpr", "ccr_at_fpr", "dir_at_far") + ("dir_at_far_rank5",) * (mates is not None):
        refused = {key: point for key, point in points.items() if "skipped" in point}
        report[name] = {key: refused.get(key) or figures[name, key] for key in points}
        report[f"{name}_ci95"] = {key: None if key in refused else found[name, key] for key in points}
    if fixed is None:
        return report | {"threshold": chosen, "threshold_sensitivity": chosen}
    test = {name: figures["fixed", name] for name in ("dir", "far")}
    test |= {f"{name}_ci95": found["fixed", name] for name in ("dir", "far")}
    rows = sensitivity(fixed, known_max, known_correct, unknown_max, offsets)
    report["threshold"] = chosen | {"test": test, "slope_ddir_dt": _slope(rows, fixed)}
    return report | {"threshold_sensitivity": rows}


def oscr(known_max: np.ndarray, known_correct: np.ndarray, unknown_max: np.ndarray) -> float:
    """Area under CCR over FPR, 0..1 (open-set classification rate, Dhamija et al. 2018, arXiv 1811.04110).

    CCR(t): share of the known probes (K,) that are right and score above t; FPR(t): share of the unknown ones (U,)
    that score t or more. With every real t a point of the curve, the trapezoids add up to the chance that a
    known probe is right and outscores an unknown one; equal scores count against. The curve ends at FPR 1 in the
    closed-set accuracy, and with every known probe right and no equal scores the area is the AUROC.
    """
    return _OpenSet(np.asarray(known_max), np.asarray(known_correct, bool), np.asarray(unknown_max)).figures(())["oscr"]


def oscr_curve(known_max: np.ndarray, known_correct: np.ndarray, unknown_max: np.ndarray) -> dict[str, np.ndarray]:
    """{"fpr", "ccr", "threshold"}, each (n,), for a figure: the curve of `oscr` as straight lines, from (0, 0).

    Two points for each distinct score of the unknown probes, before and after it lets them in, then FPR 1 at -inf.
    """
    scores = np.unique(unknown_max)[::-1].astype(np.float64)
    right = np.sort(np.asarray(known_max, np.float64)[np.asarray(known_correct, bool)])
    ccr = (len(right) - np.searchsorted(right, scores, "right")) / len(known_max)
    fpr = 1 - np.searchsorted(np.sort(unknown_max).astype(np.float64), scores, "left") / len(unknown_max)
    return {
        "fpr": np.r_[0, np.stack([np.r_[0, fpr[:-1]], fpr], axis=1).ravel(), 1],
        "ccr": np.r_[0, np.repeat(ccr, 2), len(right) / len(known_max)],
        "threshold": np.r_[np.inf, np.repeat(scores, 2), -np.inf],
    }


def chosen_threshold(
    val: tuple[np.ndarray, np.ndarray, np.ndarray] | None, *, fprs: Sequence[float] = FPRS, far: float = FAR
) -> dict:
    """A threshold from validation probes: {"value", "far_target", "rule", "val": {"dir", "far"}} or {"skipped": why}.

    val: (known_max, known_correct, unknown_max). The exact rule of `Roc.threshold` at the FAR `far`, or, with
    too few unknown probes for that, at the next larger rate of `fprs`; the rule says which.
    """
    if val is None:
        return {"skipped": "no validation probes of unknown identities: a threshold taken from the test would flatter"}
    known, correct, unknown = np.asarray(val[0]), np.asarray(val[1], dtype=bool), np.asarray(val[2])
    if not len(known) or not len(unknown):
        return {"skipped": f"no {'known' if not len(known) else 'unknown'} probes for validation"}
    rates = [far, *sorted(fpr for fpr in fprs if fpr > far)]
    target = next((rate for rate in rates if false_accepts(rate, len(unknown)) > 0), None)
    if target is None:
        return {"skipped": f"on validation probes, {too_few(rates[-1], len(unknown))}"}
    k = false_accepts(target, len(unknown))
    value = Ranks(known, unknown).roc().threshold(target)
    rule = f"on validation, {k} of {len(unknown)} unknown probes at most are named (FAR {target:g})"
    if target != far:
        rule += f"; FAR {far:g} needs more unknown probes"
    rates_there = {"dir": float(np.mean(correct & _above(known, value))), "far": float(np.mean(_above(unknown, value)))}
    return {"value": value, "far_target": target, "rule": rule, "val": rates_there}


def sensitivity(
    threshold: float, known_max: np.ndarray, known_correct: np.ndarray, unknown_max: np.ndarray,
    offsets: Sequence[float] = OFFSETS,
) -> list[dict[str, float]]:  # fmt: skip
    """What a threshold that is off by a fraction of itself does: [{"offset", "threshold", "dir", "far", "f1"}, ...].

    Ascending, with both signs of each offset and 0. dir: known probes named rightly; far: unknown ones named; f1:
    harmonic mean of dir and precision, the share of right names among all names given.
    """
    rows = []
    for offset in sorted({0.0, *offsets, *(-offset for offset in offsets)}):
        value = threshold + offset * abs(threshold)
        right = int(np.sum(known_correct & _above(known_max, value)))
        wrongly = int(np.sum(_above(unknown_max, value)))
        named = int(np.sum(_above(known_max, value))) + wrongly
        rows.append({
            "offset": offset, "threshold": value, "dir": right / len(known_max), "far": wrongly / len(unknown_max),
            "f1": 2 * right / (len(known_max) + named),
        })  # fmt: skip
    return rows


def _slope(rows: list[dict[str, float]], threshold: float) -> float | None:
    """dDIR/dt at the threshold, per unit of score: the central difference over the smallest offset; None at 0."""
    middle = next(i for i, row in enumerate(rows) if row["offset"] == 0)
    if not threshold or len(rows) < 3:
        return None
    before, after = rows[middle - 1], rows[middle + 1]
    return (after["dir"] - before["dir"]) / (after["threshold"] - before["threshold"])


def _check(*scores: np.ndarray) -> None:
    for part in scores:
        if np.isnan(part).any():
            raise ValueError(f"{int(np.isnan(part).sum())} scores are NaN: leave those probes out, and count them")


def _above(scores: np.ndarray, threshold: float) -> np.ndarray:
    return np.asarray(scores).astype(np.float64) > threshold  # a threshold in float32 might be another one


class _OpenSet:
    """Scores sorted once, so that every replicate is cumulative sums."""

    def __init__(
        self, known_max: np.ndarray, known_correct: np.ndarray, unknown_max: np.ndarray,
        mates: tuple[np.ndarray, np.ndarray] | None = None,
    ):  # fmt: skip
        """mates: rank, from 1, and score (K,) of the true identity."""
        self.ranks = Ranks(known_max, unknown_max)
        self.right = known_correct[self.ranks.positive_order]
        self.mates = None if mates is None else tuple(part[self.ranks.positive_order] for part in mates)

    def figures(
        self, fprs: Sequence[float], fixed: float | None = None,
        known: np.ndarray | None = None, unknown: np.ndarray | None = None,
    ) -> Mapping:  # fmt: skip
        """Every figure, when each probe counts as often as its weight says: known (K,), unknown (U,), as they came.

        {"auroc", "oscr", "fpr95", "closed_set_accuracy"}, (family, rate), and at the threshold `fixed`
        ("fixed", "dir" | "far"). NaN where a figure is not to be had.
        """
        ranks, total = self.ranks, len(self.right) if known is None else int(known.sum())
        known = np.ones(total, dtype=np.int64) if known is None else known[ranks.positive_order]
        unknown = None if unknown is None else unknown[ranks.negative_order]
        roc, right = ranks.roc(known, unknown), ranks.roc(known * self.right, unknown)
        figures = {
            "auroc": roc.auc(), "oscr": right.pairs_won() / (total * roc.negatives), "fpr95": roc.fpr_at_tpr(0.95),
            "closed_set_accuracy": right.positives / total,
        }  # fmt: skip
        for fpr in fprs:
            key, threshold = rate_key(fpr), roc.threshold(fpr)
            refused = threshold is None
            figures["tpr_at_fpr", key] = math.nan if refused else roc.tpr_above(threshold)
            named = math.nan if refused else right.positives_above(threshold) / total
            figures["ccr_at_fpr", key] = figures["dir_at_far", key] = named
            if self.mates:
                rank, score = self.mates
                among = math.nan if refused else float(known @ ((rank <= 5) & _above(score, threshold))) / total
                figures["dir_at_far_rank5", key] = among
        if fixed is not None:
            figures["fixed", "dir"] = right.positives_above(fixed) / total
            figures["fixed", "far"] = roc.fpr_above(fixed)
        return figures


def _intervals(
    curve: _OpenSet, known_groups: np.ndarray, unknown_groups: np.ndarray, fprs: Sequence[float],
    fixed: float | None, replicates: int, seed: int,
) -> Mapping:  # fmt: skip
    """{figure: [low, high] or None}. None where known or unknown probes are all of one identity."""
    known_names, known = np.unique(known_groups, return_inverse=True)
    unknown_names, unknown = np.unique(unknown_groups, return_inverse=True)
    strata = np.repeat([0, 1], [len(known_names), len(unknown_names)])
    unknown = unknown + len(known_names)
    if min(len(known_names), len(unknown_names)) < 2:
        return dict.fromkeys(curve.figures(fprs, fixed))
    return intervals(
        lambda weights: curve.figures(fprs, fixed, weights[known], weights[unknown]),
        len(strata), strata=strata, replicates=replicates, seed=seed,
    )  # fmt: skip
