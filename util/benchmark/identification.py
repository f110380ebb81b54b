"""Closed-set identification: who of the known identities is it?

Decisions (the nearest class centres, a k-NN vote, the scores of a head) come as class numbers, best first; the
figures are computed from those. Similarity is streamed in blocks: memory does not grow with probes x classes.
"""

from collections.abc import Callable

import numpy as np
import torch

from util.benchmark.bootstrap import REPLICATES, with_intervals

NOBODY = -1  # in a ranking: no class at this place
BLOCK_SCORES = 1 << 26  # scores held at a time: 256 MB of float32
_WIDTH = 256  # columns of a chunk in `_best`

# --- decisions --------------------------------------------------------------------------------------------------


def class_centres(embeddings: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The centre of each class, (C, D) float32: the L2-normalised mean of its rows.

    embeddings: (N, D), rows L2-normalised. labels: (N,) class numbers in 0..C-1. A class without samples gets a row of
    NaN, which `nearest_classes` refuses unless it is told to leave such classes out: who calls it counts them.
    A class whose rows cancel out exactly gets a row of zeros. ValueError for embeddings that are not finite.
    """
    embeddings, labels = checked_embeddings(embeddings), checked_labels(labels, len(embeddings), classes)
    counts = np.bincount(labels, minlength=classes)
    sums = torch.zeros(classes, embeddings.shape[1], dtype=torch.float64)
    for rows in blocks(len(embeddings), 1 << 14):
        sums.index_add_(0, torch.from_numpy(labels[rows]), tensor(embeddings[rows]).double())
    centres = torch.nn.functional.normalize(sums, dim=1).float().numpy()
    centres[counts == 0] = np.nan
    return centres


def nearest_classes(
    probes: np.ndarray, centres: np.ndarray, k: int = 5, *, skip_empty: bool = False, block: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar class centres of each probe, best first: (N, k) int64 class numbers, (N, k) float32 scores.

    probes: (N, D), centres: (C, D), rows L2-normalised; the score is the cosine. Equal scores: the lower class
    number first, for the truth is not known here. With fewer than k classes, that many columns. skip_empty: classes
    whose centre is a row of NaN are nobody's answer, and places that they would be needed for are NOBODY (-1) with
    score -inf; without it they are refused. block: probes at a time (default: as many as make 256 MB of scores); it
    bounds memory and changes nothing else. ValueError for numbers that are not finite, and where no class is left.
    """
    probes, centres = checked_embeddings(probes, "probes"), np.asarray(centres)
    k = min(k, len(centres))
    numbers = np.arange(len(centres))
    if skip_empty:
        numbers = np.flatnonzero(~np.isnan(centres).all(axis=1))
        centres = centres if len(numbers) == len(centres) else centres[numbers]
    places, scores = _nearest(probes, checked_embeddings(centres, "centres"), k, block)
    missing = ((0, 0), (0, k - places.shape[1]))
    return np.pad(numbers[places], missing, constant_values=NOBODY), np.pad(scores, missing, constant_values=-np.inf)


def _nearest(probes: np.ndarray, rows: np.ndarray, k: int, block: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Places (N, k) and scores (N, k) of the rows (M, D) with the largest product, M > 0."""
    if not len(rows):
        raise ValueError("nothing to compare the probes with")
    k = min(k, len(rows))
    chunks = -(-len(rows) // _WIDTH)
    block = block or max(1, min(8192, BLOCK_SCORES // len(rows)))
    products = torch.full((min(block, len(probes)), chunks * _WIDTH), -torch.inf)  # the padding is never the best
    columns = tensor(rows).T
    places = np.empty((len(probes), k), dtype=np.int64)
    scores = np.empty((len(probes), k), dtype=np.float32)
    for part in blocks(len(probes), block):
        own = products[: part.stop - part.start]
        torch.mm(tensor(probes[part]), columns, out=own[:, : len(rows)])
        best, values = _best(own, k)
        places[part], scores[part] = best.numpy(), values.numpy()
    return places, scores


def _best(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns and values of the k largest of each row, best first, equal ones by column. Overwrites them by -inf.

    scores: (B, chunks * _WIDTH), at least k of each row above -inf. Only chunks that hold a winner are searched:
    several times faster than torch.topk over many columns, which also leaves open which of equal scores it gives.
    """
    chunks = scores.view(len(scores), -1, _WIDTH)
    rows, tops = torch.arange(len(scores)), chunks.amax(dim=2)
    columns = torch.empty(len(scores), k, dtype=torch.int64)
    values = scores.new_empty(len(scores), k)
    for place in range(k):
        chunk = tops.argmax(dim=1)
        inside = chunks[rows, chunk]
        values[:, place], column = inside.max(dim=1)
        columns[:, place] = chunk * _WIDTH + column
        inside[rows, column] = chunks[rows, chunk, column] = -torch.inf
        tops[rows, chunk] = inside.amax(dim=1)
    return columns, values


def knn_classes(
    probes: np.ndarray,
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    neighbours: int = 20,
    temperature: float = 0.07,
    k: int = 5,
    *,
    block: int | None = None,
) -> np.ndarray:
    """Class numbers (N, k), best first, by the vote of the nearest gallery images, each weighing exp(cosine / T).

    The k-NN of Wu et al. 2018 (arXiv 1805.01978) and DINO (arXiv 2104.14294). probes: (N, D), gallery: (G, D), rows
    L2-normalised. gallery_labels: (G,) class numbers. Equal votes: the lower class number first. Where the neighbours
    are of fewer than k classes the places left are NOBODY (-1), which is wrong for every probe: with fewer than five
    classes, Top-5 of this method is not certain. A gallery smaller than `neighbours` votes as a whole.
    """
    gallery_labels = checked_labels(gallery_labels, len(gallery))
    probes, gallery = checked_embeddings(probes, "probes"), checked_embeddings(gallery, "gallery")
    places, cosines = _nearest(probes, gallery, neighbours, block)
    ranked = np.full((len(probes), k), NOBODY, dtype=np.int64)
    for rows in blocks(len(probes), 4096):
        voters = gallery_labels[places[rows]]
        weights = np.exp((cosines[rows] - cosines[rows, :1]).astype(np.float64) / temperature)  # 1 for the nearest
        same = voters[:, :, None] == voters[:, None]
        votes = (same * weights[:, None]).sum(axis=2)
        votes[np.tril(same, -1).any(axis=2)] = -np.inf  # each class once, where it comes first
        order = np.lexsort((voters, -votes), axis=1)[:, :k]
        found = np.isfinite(np.take_along_axis(votes, order, axis=1))
        ranked[rows, : order.shape[1]] = np.where(found, np.take_along_axis(voters, order, axis=1), NOBODY)
    return ranked


def rank_classes(logits: np.ndarray, k: int = 5, labels: np.ndarray | None = None) -> np.ndarray:
    """The k classes with the highest scores, best first: (N, k) int64, or (N, C) where there are fewer than k.

    logits: (N, C), any scale. Equal scores: the lower class number first; where `labels` (N,) are given the true class
    comes after all that equal it, so that a head gains nothing by ties. A row with a NaN ranks NOBODY (-1).
    """
    classes = logits.shape[1]
    k = min(k, classes)
    if labels is not None:
        labels = checked_labels(labels, len(logits), classes)
    ranked = np.empty((len(logits), k), dtype=np.int64)
    for rows in blocks(len(logits), max(1, BLOCK_SCORES // (4 * classes))):
        part = np.array(logits[rows], dtype=np.promote_types(logits.dtype, np.float32))
        valid = ~np.isnan(part).any(axis=1, keepdims=True)
        part = np.nan_to_num(part, copy=False)  # infinite scores become the largest finite ones: -inf is "taken"
        order = _best_columns(part, k) if labels is None else _truth_last(part, labels[rows], k)
        ranked[rows] = np.where(valid, order, NOBODY)
    return ranked


def _best_columns(scores: np.ndarray, k: int) -> np.ndarray:
    padding = (0, -scores.shape[1] % _WIDTH)
    return _best(torch.nn.functional.pad(torch.from_numpy(scores), padding, value=-torch.inf), k)[0].numpy()


def _truth_last(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """`_best_columns` with the true class behind the classes that equal it. Overwrites the true scores."""
    true = labels[:, None]
    rank = (scores >= np.take_along_axis(scores, true, axis=1)).sum(axis=1, keepdims=True)
    np.put_along_axis(scores, true, -np.inf, axis=1)
    others, place = _best_columns(scores, k), np.arange(1, k + 1)
    behind = np.roll(others, 1, axis=1)
    return np.where(place < rank, others, np.where(place == rank, true, behind))


# --- figures ----------------------------------------------------------------------------------------------------


def closed_set_report(
    ranked: np.ndarray, labels: np.ndarray, classes: int, *, replicates: int = REPLICATES, seed: int = 0
) -> dict[str, float | int | list[float] | None]:
    """Closed-set figures of a ranking, each with NAME_ci95 by bootstrap over identities.

    ranked: (N, k) class numbers, best first; NOBODY (-1) is wrong; k >= 5, or all classes where there are fewer (Top-5
    is then 1 by the meaning of a rank). labels: (N,) true class numbers in 0..classes-1; a probe whose class the
    ranking cannot name is left out, and counted, by who calls. Returns "top1", "top5"; "balanced_accuracy": recall,
    averaged over the classes that have probes; "macro_f1": F1, averaged over all `classes`, of which one without
    probes counts 0; "probes", "classes", "classes_without_probes".
    """
    statistic, present = _closed_set_statistic(ranked, labels, classes)
    return with_intervals(statistic, len(present), replicates=replicates, seed=seed) | {
        "classes": classes,
        "classes_without_probes": classes - len(present),
        "probes": len(ranked),
    }


def classification_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Top-1 and Top-5 accuracy and macro-F1, fractions in 0..1.

    logits: (N, C) class scores, any scale. labels: (N,) class numbers. Macro-F1 is the mean over all C classes, of
    which one that is neither predicted nor there counts 0. Equal scores count against the true class, and a sample
    with a score that is no number is wrong.
    """
    statistic, present = _closed_set_statistic(rank_classes(logits, 5, labels), labels, logits.shape[1])
    scores = statistic(np.ones(len(present)))
    return {name: scores[name] for name in ("top1", "top5", "macro_f1")}


def _closed_set_statistic(ranked: np.ndarray, labels: np.ndarray, classes: int) -> tuple[Callable, np.ndarray]:
    """The figures as a function of how often each class with probes is drawn, and the numbers of those classes."""
    if not len(labels):
        raise ValueError("no labelled samples to score")
    if ranked.shape[1] < min(5, classes):
        raise ValueError(f"Top-5 among {classes} classes needs {min(5, classes)} ranked ones, not {ranked.shape[1]}")
    labels = checked_labels(labels, len(ranked), classes)
    hits = ranked == labels[:, None]
    present, images = np.unique(labels, return_counts=True)
    top1, top5 = (np.bincount(labels, hits[:, :k].any(axis=1), classes)[present] for k in (1, 5))
    macro_f1 = macro_f1_statistic(ranked[:, 0], labels, classes)

    def statistic(weights: np.ndarray) -> dict[str, float]:
        drawn = weights @ images
        return {
            "top1": float(weights @ top1 / drawn),
            "top5": float(weights @ top5 / drawn),
            "macro_f1": macro_f1(weights),
            "balanced_accuracy": float(weights @ (top1 / images) / weights.sum()),
        }

    return statistic, present


def macro_f1_statistic(predicted: np.ndarray, labels: np.ndarray, classes: int) -> Callable[[np.ndarray], float]:
    """Macro-F1 over all classes as a function of how often each class with probes (ascending) is drawn.

    The F1 of a class is that of its own images, once, among those of the others, as often as they are drawn but in all
    as many classes as there are others: a class that is drawn twice counts twice in the mean, and is not made easier
    by it. A class without probes is always there and always 0. With every class drawn once it is scikit-learn's,
    zero_division=0.
    """
    true, claimed_by, counts = confusion_counts(predicted, labels, classes)
    present, images = np.unique(labels, return_counts=True)
    hits = np.bincount(true, counts * (true == claimed_by), classes)[present]
    errors, row = counts * (true != claimed_by), np.searchsorted(present, true)

    def macro_f1(weights: np.ndarray) -> float:
        taken_for_it = np.bincount(claimed_by, errors * weights[row], classes)[present]
        others = (len(present) - 1) / np.maximum(weights.sum() - weights, 1)
        f1 = 2 * hits / (images + hits + taken_for_it * others)
        return float(weights @ f1 / weights.sum() * len(present) / classes)

    return macro_f1


# --- who is taken for whom --------------------------------------------------------------------------------------


def confusion_counts(
    predicted: np.ndarray, labels: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cells of the confusion matrix that are not 0: true classes, predicted classes, images; each (K,) int64.

    predicted: (N,) class numbers; NOBODY (-1) is in no cell. In ascending order of (true, predicted).
    """
    labels, predicted = checked_labels(labels, len(predicted), classes), np.asarray(predicted, dtype=np.int64)
    if len(predicted) and not (predicted.min() >= NOBODY and predicted.max() < classes):
        raise ValueError(f"predicted classes must be in 0..{classes - 1}, or {NOBODY} for nobody")
    named = predicted != NOBODY
    cells, counts = np.unique(labels[named] * classes + predicted[named], return_counts=True)
    return cells // classes, cells % classes, counts


def per_class_table(predicted: np.ndarray, labels: np.ndarray, classes: int) -> list[dict]:
    """A row for each class: "class", "images", "precision", "recall", "f1", "most_confused_with", "confusions".

    precision is None for a class that is never predicted, recall for one without images; f1 is then 0, as in
    macro-F1. most_confused_with: the other class that most of its images are taken for (the lower number of equals),
    "confusions" of them; None and 0 where there is none.
    """
    true, claimed, counts = confusion_counts(predicted, labels, classes)
    images = np.bincount(labels, minlength=classes)
    claims = np.bincount(claimed, counts, classes)
    hits = np.bincount(true, counts * (true == claimed), classes)
    wrong = np.flatnonzero(true != claimed)
    wrong = wrong[np.lexsort((-claimed[wrong], counts[wrong]))]  # the last one of a class is its worst
    worst = dict(zip(true[wrong].tolist(), wrong.tolist(), strict=True))
    return [
        {
            "class": number,
            "images": int(images[number]),
            "precision": float(hits[number] / claims[number]) if claims[number] else None,
            "recall": float(hits[number] / images[number]) if images[number] else None,
            "f1": float(2 * hits[number] / max(1, images[number] + claims[number])),
            "most_confused_with": int(claimed[worst[number]]) if number in worst else None,
            "confusions": int(counts[worst[number]]) if number in worst else 0,
        }
        for number in range(classes)
    ]


def cluster_order(confusions: tuple[np.ndarray, np.ndarray, np.ndarray], classes: int) -> np.ndarray:
    """Class numbers (C,) in an order that puts classes which are taken for one another beside each other.

    confusions: of `confusion_counts`. The leaves of an average-linkage tree, two classes being as near as the mean of
    the two rates at which one is taken for the other. Memory is about 30 C^2 bytes (3 263 classes: 0.3 GB, a second).
    """
    from scipy.cluster.hierarchy import leaves_list, linkage  # slow to import
    from scipy.spatial.distance import squareform

    if classes < 2:
        return np.arange(classes)
    true, claimed, counts = confusions
    rates = np.zeros((classes, classes))
    rates[true, claimed] = counts / np.bincount(true, counts, classes)[true]
    distance = 1 - (rates + rates.T) / 2
    np.fill_diagonal(distance, 0)
    return leaves_list(linkage(squareform(distance, checks=False), "average")).astype(np.int64)


# --- arrays -----------------------------------------------------------------------------------------------------


def checked_embeddings(embeddings: np.ndarray, name: str = "embeddings") -> np.ndarray:
    """The array (N, D) as it is; ValueError where it has another shape or a number that is not finite."""
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2:
        raise ValueError(f"{name} must be (N, D), not {embeddings.shape}")
    for rows in blocks(len(embeddings), 1 << 16):
        if not np.isfinite(embeddings[rows]).all():
            raise ValueError(f"{name} hold a number that is not finite: leave such rows out, and count them")
    return embeddings


def checked_labels(labels: np.ndarray, samples: int, classes: int | None = None) -> np.ndarray:
    """Class numbers (N,) int64; ValueError where there are not `samples` of them, or one is outside 0..classes-1."""
    labels = np.asarray(labels, dtype=np.int64)
    if labels.shape != (samples,):
        raise ValueError(f"labels must be ({samples},), not {labels.shape}")
    if samples and not (labels.min() >= 0 and (classes is None or labels.max() < classes)):
        raise ValueError("labels must be class numbers" + ("" if classes is None else f" in 0..{classes - 1}"))
    return labels


def blocks(samples: int, size: int) -> list[slice]:
    """0..samples-1 in slices of `size`, the last one of what is left."""
    return [slice(first, min(first + size, samples)) for first in range(0, samples, size)]


def tensor(array: np.ndarray) -> torch.Tensor:
    """The array as float32 for torch; a copy where the array cannot be shared (a read-only memory map, say)."""
    array = np.ascontiguousarray(array, dtype=np.float32)
    return torch.from_numpy(array if array.flags.writeable else array.copy())
