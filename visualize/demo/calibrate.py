"""The numbers that the demo's recogniser ships with: a threshold for unknown faces, a probability for two faces.

Both come from characters that the recogniser was never trained on, seen as the demo sees them, and are checked on
others.
"""

from collections.abc import Sequence

import numpy as np

from util.benchmark.open_set import chosen_threshold
from util.benchmark.pairs import Pairs, pair_scores, uniform_pairs
from util.run.errors import UserError
from util.run.seed import rng_for
from util.transfer.gallery import unit
from visualize.demo.weights import Calibration

SHOTS = 3  # pictures of each enrolled character in a trial, as in the gallery that a new demo begins with
TRIALS = 20  # galleries: half of the characters enrolled in each
PAIRS = 20_000  # of each kind, at most
FAR = 0.1  # share of the unknown faces that are named: with a few enrolled pictures much less would name nobody


def calibrate(embeddings: np.ndarray, labels: np.ndarray, data: str, seed: int = 0) -> Calibration:
    """Platt scaling (logistic regression on the cosine, both kinds of pairs weighing the same).

    embeddings: (N, D), any length. labels: (N,) identity codes, two or more. data: what they are of, in words.
    """
    from sklearn.linear_model import LogisticRegression

    pairs, scores = _pairs(embeddings, labels, seed)
    fitted = LogisticRegression(C=1e4, class_weight="balanced").fit(scores[:, None], pairs.same)
    slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    if slope <= 0:
        raise UserError(f"pictures of one character are no more alike than others in {data}: train the recogniser more")
    return Calibration(slope, intercept, {"data": data, "pairs": len(pairs)})


def check(calibration: Calibration, embeddings: np.ndarray, labels: np.ndarray, seed: int = 0) -> dict[str, float]:
    """{"accuracy", "log_loss", "ece"} on pairs of other characters, both kinds weighing the same.

    accuracy: balanced, of calling pairs the same from one half. ece: expected calibration error in ten bins
    (arXiv 1706.04599).
    """
    pairs, scores = _pairs(embeddings, labels, seed)
    probability = np.array([calibration.probability(score) for score in scores.tolist()])
    weight = np.where(pairs.same, 0.5 / pairs.same.sum(), 0.5 / (~pairs.same).sum())
    of_truth = np.where(pairs.same, probability, 1 - probability).clip(1e-12)
    bins = np.minimum((10 * probability).astype(int), 9)
    gaps = [abs((weight * (pairs.same - probability))[bins == number].sum()) for number in range(10)]
    return {
        "accuracy": float(weight[(probability >= 0.5) == pairs.same].sum()),
        "log_loss": float(-(weight * np.log(of_truth)).sum()),
        "ece": float(sum(gaps)),
    }


def _pairs(embeddings: np.ndarray, labels: np.ndarray, seed: int) -> tuple[Pairs, np.ndarray]:
    pairs = uniform_pairs(np.asarray(labels), positives=PAIRS, negatives=PAIRS, seed=seed)
    if pairs.same.all() or not pairs.same.any():
        raise UserError("calibration needs two characters or more with two pictures or more each: give other data")
    return pairs, pair_scores(unit(np.asarray(embeddings, np.float32)), pairs.a, pairs.b)


def open_set_trials(embeddings: np.ndarray, labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, ...]:
    """(known_max, known_correct, unknown_max) of galleries as the demo keeps them, for `chosen_threshold`.

    In each of TRIALS half of the characters, by lot, are enrolled with SHOTS pictures; all other pictures are probes.
    """
    units, labels = unit(np.asarray(embeddings, np.float64)), np.asarray(labels)
    codes = np.unique(labels)
    known_max, correct, unknown_max = [], [], []
    for trial in range(TRIALS):
        rng = rng_for(seed, "demo gallery", trial)
        enrolled = rng.permutation(codes)[: max(1, len(codes) // 2)]
        shots = [rng.permutation(np.flatnonzero(labels == code))[:SHOTS] for code in enrolled]
        similar = units @ unit(np.stack([units[rows].mean(0) for rows in shots])).T
        is_known = np.isin(labels, enrolled)
        is_known[np.concatenate(shots)] = False
        best = similar.max(1)
        known_max.append(best[is_known])
        correct.append(enrolled[similar.argmax(1)][is_known] == labels[is_known])
        unknown_max.append(best[~np.isin(labels, enrolled)])
    return tuple(np.concatenate(part) for part in (known_max, correct, unknown_max))


def threshold_of(trials: Sequence[np.ndarray], far: float = FAR) -> dict:
    """`chosen_threshold` at the demo's rate, for `>=`. UserError where there are too few pictures for one."""
    chosen = chosen_threshold(tuple(trials), far=far)
    if "skipped" in chosen:
        raise UserError(f"no threshold can be set ({chosen['skipped']}): give data with more identities")
    # that rule names what is above the threshold, the gallery also what equals it
    return {**chosen, "value": float(np.nextafter(chosen["value"], np.inf))}


def rates_at(threshold: float, trials: Sequence[np.ndarray]) -> dict[str, float]:
    """{"dir", "far"}: known faces that are named rightly, unknown ones that are named, fractions in 0..1."""
    known, correct, unknown = trials
    return {"dir": float(np.mean(correct & (known >= threshold))), "far": float(np.mean(unknown >= threshold))}
