"""The long tail: how well are characters recognised that have few training images, against those that have many?"""

import numpy as np

from util.benchmark.bootstrap import REPLICATES, with_intervals
from util.benchmark.identification import checked_labels, macro_f1_statistic
from util.run.seed import rng_for

MANY, FEW = 100, 20
BANDS = ("head", "mid", "tail")
_DEFINITION = "Liu et al. 2019 (arXiv 1904.05160), the paper's bounds; its code has >= 100 and <= 20"


# --- a long tail made to order ----------------------------------------------------------------------------------


def power_law_counts(sizes: np.ndarray, imbalance: float = 50, *, seed: int = 0) -> np.ndarray:
    """Images of each class, (C,) int64, in a subset whose sizes fall off by rank: n_max, ..., n_max / imbalance.

    sizes: (C,) images there are, n_max the largest. The class of rank r = 0..C-1 keeps n_max * imbalance^(-r / (C - 1))
    (the profile of long-tailed CIFAR, Cui et al. 2019, arXiv 1901.05555), at least 1 and never more than it has. The
    seed draws which class has which rank, so frequency has nothing to do with what a character looks like. Classes
    without images keep none and have no rank. The imbalance that comes out differs where a class has fewer images than
    its place asks for. ValueError for an imbalance below 1.
    """
    if imbalance < 1:
        raise ValueError(f"imbalance is the largest class over the smallest, 1 or more, not {imbalance}")
    sizes = np.asarray(sizes, dtype=np.int64)
    counts, present = np.zeros_like(sizes), np.flatnonzero(sizes)
    if len(present):
        ranked = rng_for(seed, "long tail", "ranks").permutation(present)
        falling = sizes.max() * float(imbalance) ** (-np.arange(len(ranked)) / max(1, len(ranked) - 1))
        counts[ranked] = np.clip(np.rint(falling), 1, sizes[ranked])
    return counts


def long_tail_subsample(labels: np.ndarray, *, imbalance: float = 50, seed: int = 0) -> np.ndarray:
    """Rows (n,), ascending, of a long-tailed subset (`power_law_counts`) of samples with class numbers `labels` (N,).

    Under one seed, the images that a class keeps at a larger imbalance are among those it keeps at a smaller one.
    """
    labels = checked_labels(labels, len(labels))
    counts = power_law_counts(np.bincount(labels), imbalance, seed=seed)
    own = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    kept = [
        rng_for(seed, "long tail", int(number)).permutation(own[number])[: counts[number]]
        for number in np.flatnonzero(counts)
    ]
    return np.sort(np.concatenate(kept)) if kept else np.empty(0, dtype=np.int64)


def band_names(counts: np.ndarray, many: int = MANY, few: int = FEW) -> np.ndarray:
    """The band of each class by its training images (C,): "head" above `many`, "tail" below `few`, "mid" between."""
    return np.select([counts > many, counts >= few], BANDS[:2], BANDS[2])


# --- figures ----------------------------------------------------------------------------------------------------


def long_tail_report(
    train_counts: np.ndarray,
    predicted: np.ndarray,
    labels: np.ndarray,
    *,
    many: int = MANY,
    few: int = FEW,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict:
    """Accuracy by how many training images a class has, with NAME_ci95 by bootstrap over classes.

    train_counts: (C,) training images of each class. predicted: (N,) class numbers, -1 = nobody. labels: (N,) true
    class numbers. Returns "head" (more than `many` images), "mid" (`few` to `many`, both included), "tail" (fewer than
    `few`, at least one): accuracy averaged over the classes of the group that have probes, as in Liu et al. 2019 (arXiv
    1904.05160); {"skipped": why} for a group without such classes. "macro_f1": over all C classes, as in the closed
    set. "spearman_frequency_accuracy": rank correlation of training images and accuracy over classes with both; None,
    with the reason under "spearman_skipped", where either is the same for all. "classes": {"head", "mid", "tail",
    "untrained"}: classes with probes in each group; the untrained, which have no training image, are in no group and
    not in the correlation. "thresholds": {"many", "few", "definition"}.
    """
    train_counts = np.asarray(train_counts, dtype=np.int64)
    present, accuracy = class_accuracies(predicted, labels, len(train_counts))
    frequency = train_counts[present]
    group = np.where(frequency > 0, band_names(frequency, many, few), "untrained")
    members = {name: group == name for name in (*BANDS, "untrained")}
    macro_f1, trained = macro_f1_statistic(predicted, labels, len(train_counts)), frequency > 0

    def statistic(weights: np.ndarray) -> dict[str, float]:
        drawn = np.repeat(np.arange(len(weights)), weights * trained)
        means = {name: accuracy[drawn[members[name][drawn]]].mean() for name in BANDS if members[name].any()}
        correlation = spearman(frequency[drawn], accuracy[drawn])
        return means | {"macro_f1": macro_f1(weights), "spearman_frequency_accuracy": correlation}

    report = with_intervals(statistic, len(present), strata=group, replicates=replicates, seed=seed)
    sizes = {"head": f"more than {many}", "mid": f"{few} to {many}", "tail": f"1 to {few - 1}"}
    for name in BANDS:
        if not members[name].any():
            report[name] = {"skipped": f"no class with probes has {sizes[name]} training images"}
        if members[name].sum() < 2:  # a single class is drawn every time, which is no interval
            report[f"{name}_ci95"] = None
    if np.isnan(report["spearman_frequency_accuracy"]):
        same = "number of training images" if len(np.unique(frequency[trained])) < 2 else "accuracy"
        report |= {"spearman_frequency_accuracy": None, "spearman_frequency_accuracy_ci95": None}
        report["spearman_skipped"] = f"every class has the same {same}"
    return report | {
        "classes": {name: int(inside.sum()) for name, inside in members.items()},
        "thresholds": {"many": many, "few": few, "definition": _DEFINITION},
    }


def frequency_curve(train_counts: np.ndarray, predicted: np.ndarray, labels: np.ndarray, bins: int = 12) -> list[dict]:
    """Accuracy against training images, for a figure: a dict for each bin that holds a class, ascending.

    Arrays as in `long_tail_report`. `bins` intervals of the number of training images, equally wide in its logarithm,
    from the rarest class with probes to the most frequent one. A dict: "low", "high": fewest and most training images
    of its classes; "frequency": their geometric mean; "classes"; "accuracy": averaged over them; "std": population.
    """
    present, accuracy = class_accuracies(predicted, labels, len(train_counts))
    frequency = np.asarray(train_counts)[present]
    accuracy, frequency = accuracy[frequency > 0], frequency[frequency > 0]
    if not len(frequency):
        return []
    logs = np.log(frequency)
    width = (logs.max() - logs.min()) / bins or 1.0
    place = np.minimum(((logs - logs.min()) / width).astype(np.int64), bins - 1)
    return [
        {
            "low": int(frequency[place == number].min()),
            "high": int(frequency[place == number].max()),
            "frequency": float(np.exp(logs[place == number].mean())),
            "classes": int((place == number).sum()),
            "accuracy": float(accuracy[place == number].mean()),
            "std": float(accuracy[place == number].std()),
        }
        for number in np.unique(place)
    ]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of two (N,) arrays, equal values sharing their mean rank; NaN if one is flat."""
    from scipy.stats import rankdata  # slow to import

    x, y = (rankdata(values) - (len(values) + 1) / 2 for values in (x, y))
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm > 0 else float("nan")


def class_accuracies(predicted: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The classes with probes, ascending, and the share of the probes of each that is named right."""
    if not len(labels):
        raise ValueError("no labelled samples to score")
    labels = checked_labels(labels, len(predicted), classes)
    present, images = np.unique(labels, return_counts=True)
    hits = np.bincount(labels, np.asarray(predicted) == labels, classes)[present]
    return present, hits / images
