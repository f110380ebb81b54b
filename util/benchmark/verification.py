"""Verification: are these two pictures of one character? Figures on the scores of pairs.

A score is a similarity, higher = more alike. "Positive" pairs show one identity, "negative" ones two. A pair is
accepted when its score is above a threshold: TPR is the share of positives accepted, FPR that of negatives.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from util.benchmark.bootstrap import REPLICATES, intervals
from util.run.seed import rng_for

FPRS = (0.001, 0.01, 0.1)
STEADY = 10  # false accepts below which the TPR at an FPR hangs on a few pairs
CI_POSITIVES, CI_NEGATIVES = 250_000, 1_000_000


def verification_report(
    scores: np.ndarray, same: np.ndarray, identity_a: np.ndarray, identity_b: np.ndarray,
    *, fprs: Sequence[float] = FPRS, replicates: int = REPLICATES, seed: int = 0,
) -> dict:  # fmt: skip
    """ROC-AUC, EER and TPR at fixed FPRs of a list of pairs, with intervals by bootstrap over identities.

    scores: (P,). same: (P,) bool. identity_a, identity_b: (P,) int codes, equal exactly where `same` is true.
    fprs: fractions above 0 and below 1. Returns

    - auc: P(positive > negative) + P(equal) / 2;
    - eer: where FPR = 1 - TPR, linear between the two points of the ROC on either side;
    - tpr_at_fpr: {"0.001": TPR or {"skipped": why}, ...}, exact: see `Roc.threshold`;
    - operating_points: {"0.001": {threshold, realised_fpr, k, negatives} or {"skipped": why}, ...}, with a "warning"
      where k < 10; such a threshold is the test set's own: take one from `best_threshold` on validation pairs for use;
    - positives, negatives: counts; each figure's sibling NAME_ci95: [low, high] or None;
    - ci_pairs: the pairs that the intervals are from: at most 250,000 positive and 1,000,000 negative ones, a seeded
      choice, so that a replicate takes milliseconds. With fewer pairs an interval is wider, never narrower.

    A replicate counts a pair as often as both its identities were drawn (the product), a positive one as often as
    its identity. {"skipped": why} where a kind of pair is missing. ValueError for scores that are NaN.
    """
    positive, negative = split_scores(scores, same)
    if not np.array_equal(identity_a == identity_b, same):
        raise ValueError("`same` does not agree with the identities of the pairs")
    if not len(positive) or not len(negative):
        return {"skipped": f"no pairs of {'one identity' if not len(positive) else 'two identities'}"}
    roc = Ranks(positive, negative).roc()
    points = {rate_key(fpr): operating_point(roc, fpr) for fpr in fprs}
    figures = pair_intervals(scores, same, identity_a, identity_b, fprs=fprs, replicates=replicates, seed=seed)
    return {
        "auc": roc.auc(), "eer": roc.eer(), "auc_ci95": figures["auc"], "eer_ci95": figures["eer"],
        "tpr_at_fpr": {
            key: point if "skipped" in point else roc.tpr_above(point["threshold"]) for key, point in points.items()
        },
        "tpr_at_fpr_ci95": {key: None if "skipped" in points[key] else figures[key] for key in points},
        "operating_points": points, "positives": len(positive), "negatives": len(negative),
        "ci_pairs": figures["pairs"],
    }  # fmt: skip


def pair_intervals(
    scores: np.ndarray, same: np.ndarray, identity_a: np.ndarray, identity_b: np.ndarray,
    *, fprs: Sequence[float], replicates: int, seed: int,
) -> dict:  # fmt: skip
    """{"auc", "eer", "0.001", ...: [low, high] or None, "pairs": counts}: the intervals of `verification_report`."""
    rows = [_some(np.flatnonzero(same), CI_POSITIVES, seed), _some(np.flatnonzero(~same), CI_NEGATIVES, seed)]
    ranks = Ranks(scores[rows[0]], scores[rows[1]])
    p, n = rows[0][ranks.positive_order], rows[1][ranks.negative_order]
    _, codes = np.unique(np.concatenate([identity_a[p], identity_a[n], identity_b[n]]), return_inverse=True)
    of_p, a, b = np.split(codes, [len(p), len(p) + len(n)])

    def statistic(weights: np.ndarray) -> dict[str, float]:
        roc = ranks.roc(weights[of_p], weights[a] * weights[b])
        return {"auc": roc.auc(), "eer": roc.eer()} | {rate_key(fpr): roc.tpr(fpr) for fpr in fprs}

    found = intervals(statistic, int(codes.max()) + 1, replicates=replicates, seed=seed)
    return found | {"pairs": {"positives": len(p), "negatives": len(n)}}


def operating_point(roc: "Roc", fpr: float) -> dict:
    """{threshold, realised_fpr, k, negatives} of the exact rule, maybe a "warning"; or {"skipped": why}."""
    k = false_accepts(fpr, roc.negatives)
    if k < 1:
        return {"skipped": too_few(fpr, roc.negatives)}
    threshold = roc.threshold(fpr)
    point = {"threshold": threshold, "realised_fpr": roc.fpr_above(threshold), "k": k, "negatives": roc.negatives}
    return point | warning(fpr, k)


def warning(fpr: float, k: int) -> dict:
    """{"warning": ...} where fewer than 10 false accepts carry a figure, else {}."""
    if k >= STEADY:
        return {}
    return {"warning": f"FPR {fpr:g} hangs on {k} false accepts: {STEADY} or more give a steady figure"}


def too_few(fpr: float, negatives: int) -> str:
    """Why the TPR at an FPR is refused."""
    least = math.ceil(1 / Fraction(repr(float(fpr))))
    return f"FPR {fpr:g} needs {least} negatives or more ({STEADY * least} for a steady figure), there are {negatives}"


def rate_key(rate: float) -> str:
    """The name of a rate in result files: 0.001 -> "0.001"."""
    return f"{rate:g}"


def false_accepts(fpr: float, negatives: int) -> int:
    """k = floor(FPR * negatives) as on paper: 0.001 * 3000 is 3, whatever floating point makes of it.

    ValueError unless 0 < FPR < 1.
    """
    if not 0 < fpr < 1:
        raise ValueError(f"an FPR of {fpr} has no threshold: it must be above 0 and below 1")
    return math.floor(Fraction(repr(float(fpr))) * int(negatives))


def split_scores(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the positive and of the negative pairs; ValueError if one is NaN."""
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} scores are NaN: leave those pairs out, and count them")
    same = np.asarray(same, dtype=bool)
    return scores[same], scores[~same]


def _some(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    if len(rows) <= most:
        return rows
    return rows[rng_for(seed, len(rows), "interval pairs").choice(len(rows), most, replace=False, shuffle=False)]


# --- the ROC ----------------------------------------------------------------------------------------------------


class Ranks:
    """Scores of positives and negatives, sorted once, so that each replicate of a bootstrap is cumulative sums.

    positive: (P,). negative: (N,). positive_order, negative_order: rows in ascending order of score, which is the
    order in which `roc` takes weights.
    """

    def __init__(self, positive: np.ndarray, negative: np.ndarray):
        self.positive_order, self.negative_order = (np.argsort(s) for s in (positive, negative))
        self.positive, self.negative = positive[self.positive_order], negative[self.negative_order]
        # how many negatives lie below each positive, and how many are not above it
        self.below = np.searchsorted(self.negative, self.positive, "left")
        self.up_to = np.searchsorted(self.negative, self.positive, "right")
        self.values = np.unique(np.concatenate([self.positive, self.negative]))

    def roc(self, positive_weights: np.ndarray | None = None, negative_weights: np.ndarray | None = None) -> "Roc":
        """The curve when each score counts as often as its weight says, int (P,) and (N,), ascending; default: once."""
        return Roc(self, *(_cumulate(w, len(s)) for w, s in (
            (positive_weights, self.positive), (negative_weights, self.negative),
        )))  # fmt: skip


def _cumulate(weights: np.ndarray | None, count: int) -> np.ndarray:
    if weights is None:
        return np.arange(count + 1)
    total = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(weights, out=total[1:])
    return total


class Roc:
    """Figures of one curve. Each is NaN where positives or negatives have no weight."""

    def __init__(self, ranks: Ranks, positive_sums: np.ndarray, negative_sums: np.ndarray):
        """positive_sums (P + 1,), negative_sums (N + 1,): cumulative weights from the lowest score."""
        self.ranks, self._p, self._n = ranks, positive_sums, negative_sums
        self.positives, self.negatives = int(positive_sums[-1]), int(negative_sums[-1])

    def auc(self) -> float:
        """Area under the ROC: P(positive > negative) + P(equal) / 2."""
        if not self.positives or not self.negatives:
            return math.nan
        beaten = self._n[self.ranks.below] + self._n[self.ranks.up_to]  # twice: below, and half of the equal ones
        return float(np.diff(self._p) @ beaten) / 2 / (self.positives * self.negatives)

    def threshold(self, fpr: float) -> float | None:
        """The (k + 1)-th largest negative, k = floor(FPR * negatives); None where k < 1.

        Accepting what is above it lets in k negatives at most, however many are equal.
        """
        k = false_accepts(fpr, self.negatives)
        if k < 1:
            return None
        return float(self.ranks.negative[np.searchsorted(self._n, self.negatives - k - 1, "right") - 1])

    def tpr(self, fpr: float) -> float:
        """Share of the positives above `threshold`; NaN where that is refused."""
        threshold = self.threshold(fpr)
        return math.nan if threshold is None else self.tpr_above(threshold)

    def tpr_above(self, threshold: float) -> float:
        """Share of the positives with a score above a threshold."""
        return self.positives_above(threshold) / self.positives if self.positives else math.nan

    def fpr_above(self, threshold: float) -> float:
        """Share of the negatives with a score above a threshold."""
        above = _from(self.ranks.negative, self._n, threshold, "right")
        return above / self.negatives if self.negatives else math.nan

    def positives_above(self, threshold: float) -> int:
        """Weight of the positives with a score above a threshold."""
        return _from(self.ranks.positive, self._p, threshold, "right")

    def pairs_won(self) -> int:
        """Weight of the pairs in which a positive outscores a negative; equal scores do not count."""
        return int(np.diff(self._p) @ self._n[self.ranks.below])

    def fpr_at_tpr(self, tpr: float) -> float:
        """FPR of the strictest vertex of the ROC that has this TPR or more, fraction above 0 and up to 1."""
        if not self.positives or not self.negatives:
            return math.nan
        needed = math.ceil(Fraction(repr(float(tpr))) * self.positives)
        row = np.searchsorted(self._p, self.positives - needed, "right") - 1
        return self.at_least(self.ranks.positive[row])[0]

    def at_least(self, threshold: float) -> tuple[float, float]:
        """(FPR, TPR) of the ROC's vertex at a threshold, which lets in the scores equal to it."""
        return (
            _from(self.ranks.negative, self._n, threshold, "left") / self.negatives,
            _from(self.ranks.positive, self._p, threshold, "left") / self.positives,
        )

    def eer(self) -> float:
        """Equal error rate: where FPR = 1 - TPR, linear between the vertices on either side."""
        if not self.positives or not self.negatives:
            return math.nan
        values = self.ranks.values
        low, high = 0, len(values)  # at `low` FPR >= 1 - TPR, at `high` not: everything, and nothing, is accepted
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sum(self.at_least(values[middle])) >= 1 else (low, middle)
        before = self.at_least(values[high]) if high < len(values) else (0.0, 0.0)
        return equal_error(before, self.at_least(values[low]))


def _from(ascending: np.ndarray, sums: np.ndarray, threshold: float, side: str) -> int:
    """Weight of the scores at or above a threshold ("left"), or above it ("right")."""
    # in the scores' own type: beside a float64 all of them would be converted; rounding moves it past no score
    rounded = ascending.dtype.type(threshold)
    gap = float(rounded) - float(threshold)  # as float64: beside a NumPy float32 a Python float would be rounded too
    side = "left" if gap > 0 else "right" if gap < 0 else side
    return int(sums[-1] - sums[np.searchsorted(ascending, rounded, side)])


def equal_error(before: tuple[float, float], after: tuple[float, float]) -> float:
    """The FPR at which the segment between two points (FPR, TPR) of a ROC meets FPR = 1 - TPR."""
    gap = [fpr + tpr - 1 for fpr, tpr in (before, after)]  # below 0 before the crossing, 0 or above after it
    share = -gap[0] / (gap[1] - gap[0])
    return before[0] + share * (after[0] - before[0])


def roc_curve(scores: np.ndarray, same: np.ndarray, *, points: int = 1000) -> dict[str, np.ndarray]:
    """{"fpr", "tpr", "threshold"}, each (n,), from (0, 0) at +inf to (1, 1): vertices of the ROC for a figure.

    All are points of the curve (threshold t accepts s >= t); of more than about 3 x `points` those are kept that
    an even grid of TPR, of FPR, or of log FPR meets, so that the curve is whole on a linear and a logarithmic axis.
    """
    positive, negative = (np.sort(kind) for kind in split_scores(scores, same))
    if not len(positive) or not len(negative):
        raise ValueError("a ROC needs positive and negative pairs")
    thresholds = np.unique(np.concatenate([positive, negative]))[::-1]
    fpr, tpr = (_counts_at(thresholds, kind) / len(kind) for kind in (negative, positive))
    if len(thresholds) > 3 * points:
        grid = np.linspace(0, 1, points)
        logarithmic = np.geomspace(1 / len(negative), 1, points)
        kept = [np.searchsorted(tpr, grid), np.searchsorted(fpr, grid), np.searchsorted(fpr, logarithmic)]
        kept = np.unique(np.minimum(np.concatenate(kept), len(thresholds) - 1))
        thresholds, fpr, tpr = thresholds[kept], fpr[kept], tpr[kept]
    return {
        "fpr": np.concatenate([[0.0], fpr]), "tpr": np.concatenate([[0.0], tpr]),
        "threshold": np.concatenate([[np.inf], thresholds.astype(np.float64)]),
    }  # fmt: skip


def _counts_at(thresholds: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """How many scores are at or above each threshold."""
    return len(ascending) - np.searchsorted(ascending, thresholds, "left")


# --- thresholds for use: chosen on validation pairs, tried on test pairs -----------------------------------------


def best_threshold(scores: np.ndarray, same: np.ndarray, *, fpr: float | None = None) -> float:
    """A threshold from validation pairs: accept scores above it.

    fpr: keep this FPR, exactly, as `Roc.threshold` does. None: the highest balanced accuracy, (TPR + TNR) / 2, which
    does not hang on how many negatives were drawn; halfway to the next score, and the highest of equally good ones.
    ValueError where a kind of pair is missing or too rare for `fpr`.
    """
    positive, negative = split_scores(scores, same)
    if not len(positive) or not len(negative):
        raise ValueError("a threshold needs positive and negative pairs")
    if fpr is not None:
        threshold = Ranks(positive, negative).roc().threshold(fpr)
        if threshold is None:
            raise ValueError(too_few(fpr, len(negative)))
        return threshold
    values = np.unique(scores)[::-1]
    accepts, false = (_counts_at(values, np.sort(kind)) for kind in (positive, negative))
    best = int(np.argmax(accepts * len(negative) - false * len(positive)))  # the first of equals: the highest
    accepted = float(values[best])
    below = float(values[best + 1]) if best + 1 < len(values) else np.nextafter(accepted, -np.inf)
    middle = (accepted + below) / 2
    return float(middle if middle < accepted else below)


def accuracy_at(threshold: float, scores: np.ndarray, same: np.ndarray) -> dict[str, float]:
    """{"accuracy", "balanced_accuracy", "tpr", "fpr"} of accepting scores above a threshold, fractions in 0..1."""
    positive, negative = split_scores(scores, same)
    if not len(positive) or not len(negative):
        raise ValueError("an accuracy needs positive and negative pairs")
    tpr, fpr = (float(np.mean(kind.astype(np.float64) > threshold)) for kind in (positive, negative))
    right = tpr * len(positive) + (1 - fpr) * len(negative)
    return {"accuracy": right / len(scores), "balanced_accuracy": (tpr + 1 - fpr) / 2, "tpr": tpr, "fpr": fpr}
