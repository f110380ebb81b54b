"""A cascade of resolutions: every picture is seen small, and those whose decision is unsure once more, larger.

How sure a decision is: the margin of the best class over the second, in the unit of the scores. Small margins send a
picture on to the next stage, the last of which decides whatever it sees.
"""

import numpy as np

from util.benchmark.bootstrap import mean_interval

SURE = float(np.nextafter(np.finfo(np.float64).max, 0))  # a margin over nobody: below a threshold of infinity


def margins_of(scores: np.ndarray) -> np.ndarray:
    """How much the best class is above the second: (N,) float64, from 0; NaN where a score is.

    scores: (N, C) with C of 2 or more, -inf for classes that are nobody's answer.
    """
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores must be (N, C) with C > 1, not {scores.shape}")
    second, best = np.partition(scores.astype(np.float64), (-2, -1), axis=1)[:, -2:].T
    with np.errstate(invalid="ignore"):  # nobody against nobody
        return best - second


def decided_at(margins: np.ndarray, threshold: float) -> np.ndarray:
    """The stage (N,) int64 that decides each picture: the first whose margin reaches the threshold, else the last.

    margins: (S, N), stages from cheap to dear; NaN is unsure. threshold: 0: the first stage decides wherever it has a
    margin; infinity: always the last.
    """
    sure = np.minimum(margins, SURE) >= threshold
    sure[-1] = True
    return sure.argmax(axis=0)


def choose_threshold(correct: np.ndarray, margins: np.ndarray, most_lost: float = 0.0) -> float:
    """The smallest threshold from which on the cascade loses at most `most_lost` of accuracy against its last stage.

    correct: (S, N) bool, whether each stage names a picture rightly, on validation. margins: (S, N). most_lost: in
    0..1. "From which on": every larger threshold keeps to it as well, so that it is no lucky dip of a curve; smaller
    thresholds are cheaper. Finite: beyond the largest margin nothing is told apart. ValueError without pictures.
    """
    correct, margins = np.asarray(correct), np.asarray(margins)
    stages, images = correct.shape
    if margins.shape != correct.shape or not images or not stages:
        raise ValueError(f"correct {correct.shape} and margins {margins.shape} must be one shape (S, N), S, N > 0")
    # a picture passes stage s once the threshold exceeds the largest margin that it has had until there
    passed = np.minimum(np.fmax.accumulate(np.fmax(margins[:-1], -1.0), axis=0), SURE).ravel()
    gained = np.diff(correct.astype(np.int64), axis=0).ravel()
    values, places = np.unique(passed, return_inverse=True)
    # lost[i]: by a threshold above i of the values, against the last stage
    after = np.concatenate([[0], np.cumsum(np.bincount(places, weights=gained, minlength=len(values)))])
    lost = after[-1] - after
    too_much = np.flatnonzero(lost > most_lost * images + 1e-9)
    first = too_much[-1] + 1 if len(too_much) else 0
    if first == 0 or values[first - 1] < 0:
        return 0.0
    if first == len(values):
        return float(np.nextafter(values[-1], np.inf))
    return float(max((values[first - 1] + values[first]) / 2, np.nextafter(values[first - 1], np.inf)))


def cascade_report(
    predicted: np.ndarray,
    margins: np.ndarray,
    labels: np.ndarray,
    threshold: float,
    gmacs: np.ndarray,
    images_per_s: np.ndarray,
    groups: np.ndarray,
    **options,
) -> dict:
    """What a cascade does at a threshold, against its last stage for all pictures.

    predicted: (S, N) class numbers by each stage. margins: (S, N). labels: (N,). gmacs, images_per_s: (S,), of one
    picture at each stage; a picture pays for every stage that it has been through. groups: (N,), options: of the
    bootstrap. Returns {"top1", "top1_highest", "lost": the difference, each with its "_ci95"; "share": (S,) of the
    pictures, decided at each stage; "gmacs", "gmacs_highest": mean of a picture; "images_per_s",
    "images_per_s_highest": by the stages' own speeds, without what choosing costs}.
    """
    stage = decided_at(margins, threshold)
    highest = predicted[-1] == labels
    correct = predicted[stage, np.arange(len(stage))] == labels
    report = {"top1": correct, "top1_highest": highest, "lost": highest.astype(np.float64) - correct}
    intervals = {f"{name}_ci95": mean_interval(values, groups, **options) for name, values in report.items()}
    return {
        **{name: float(values.mean()) for name, values in report.items()},
        **intervals,
        "share": (np.bincount(stage, minlength=len(predicted)) / len(stage)).tolist(),
        "gmacs": float(np.cumsum(gmacs)[stage].mean()),
        "gmacs_highest": float(gmacs[-1]),
        "images_per_s": float(1 / np.cumsum(1 / np.asarray(images_per_s))[stage].mean()),
        "images_per_s_highest": float(images_per_s[-1]),
    }
