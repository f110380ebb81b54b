"""Ranking figures: retrieval over a gallery, the official rule of iCartoonFace, precision-recall curves.

Similarity is streamed in blocks: memory does not grow with queries x gallery.
"""

import numpy as np

from util.benchmark.bootstrap import REPLICATES, with_intervals
from util.benchmark.identification import (
    BLOCK_SCORES,
    blocks,
    checked_embeddings,
    checked_labels,
    tensor,
)

_ROUNDING = 1e-12  # cosines in double precision that are nearer than this are equal
_OFFICIAL = "official iCartoonFace rule: every listed ordered pair against all distractors; ties count against the mate"

# --- a gallery --------------------------------------------------------------------------------------------------


def retrieval_report(
    queries: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    *,
    same_set: bool,
    block: int | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict:
    """Mean average precision and Rank-1, Rank-5 of retrieving the images of a query's identity, with NAME_ci95.

    Arrays and ties as in `retrieval_ranks`. Returns "map", "rank1", "rank5" (means over queries, fractions; intervals
    by bootstrap over the queries' identities), "queries": those that count, and "excluded_queries": those without a
    mate in the gallery. {"skipped": why} where no query has a mate. Not to be confused with the mAP of detection.
    """
    precision, first = retrieval_ranks(queries, query_labels, gallery, gallery_labels, same_set=same_set, block=block)
    mated = first > 0
    if not mated.any():
        return {"skipped": "no query has another image of its identity in the gallery"}
    figures = {"map": precision[mated], "rank1": first[mated] <= 1, "rank5": first[mated] <= 5}
    report = _means(figures, np.asarray(query_labels)[mated], replicates=replicates, seed=seed)
    return report | {"queries": int(mated.sum()), "excluded_queries": int((~mated).sum())}


def retrieval_ranks(
    queries: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    *,
    same_set: bool,
    block: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Average precision (Q,) float64 and the rank of the first mate (Q,) int64, 1 = best; NaN and 0 without a mate.

    queries: (Q, D), gallery: (G, D), rows L2-normalised. AP = 1/R sum_k P@k over the places k of the R mates. A mate
    comes after all images of others that score the same, whatever the order of the rows. same_set: the queries are the
    gallery, and no image is its own mate. block: queries at a time. ValueError for numbers that are not finite.
    """
    queries, gallery = checked_embeddings(queries, "queries"), checked_embeddings(gallery, "gallery")
    query_labels, gallery_labels = (
        checked_labels(query_labels, len(queries)),
        checked_labels(gallery_labels, len(gallery)),
    )
    if same_set and not (queries.shape == gallery.shape and np.array_equal(query_labels, gallery_labels)):
        raise ValueError("same_set: the queries have to be the gallery, in the same order")
    order = np.argsort(gallery_labels, kind="stable")
    first, last = (np.searchsorted(gallery_labels[order], query_labels, side) for side in ("left", "right"))
    precision, place = np.full(len(queries), np.nan), np.zeros(len(queries), dtype=np.int64)
    columns = tensor(gallery).T
    for rows in blocks(len(queries), block or max(1, BLOCK_SCORES // (4 * max(1, len(gallery))))):
        scores = (tensor(queries[rows]) @ columns).numpy()
        numbers = np.arange(rows.start, rows.stop)
        if same_set:
            scores[numbers - rows.start, numbers] = -np.inf
        mates = [scores[row, order[first[number] : last[number]]] for row, number in enumerate(numbers)]
        scores.sort(axis=1)
        for row, number in enumerate(numbers):
            own = np.sort(mates[row])[int(same_set) :]  # the image itself sorts first, by its -inf
            if len(own):
                precision[number], place[number] = _average_precision(own, scores[row])
    return precision, place


def _average_precision(mates: np.ndarray, everyone: np.ndarray) -> tuple[float, int]:
    """AP and the rank of the first mate, from ascending scores of the mates and of all images, mates included."""
    from_here = np.arange(len(mates), 0, -1)  # mates at this place or before it
    equal_or_better = len(mates) - np.searchsorted(mates, mates)
    others = len(everyone) - np.searchsorted(everyone, mates) - equal_or_better
    return float(np.mean(from_here / (from_here + others))), int(1 + others[-1])


def _means(values: dict[str, np.ndarray], groups: np.ndarray, **options) -> dict:
    """Means of per-sample figures (N,) with their intervals by bootstrap over the groups (N,), any codes."""
    _, codes, counts = np.unique(groups, return_inverse=True, return_counts=True)
    sums = {name: np.bincount(codes, own) for name, own in values.items()}
    return with_intervals(
        lambda weights: {name: weights @ own / (weights @ counts) for name, own in sums.items()}, len(counts), **options
    )


# --- iCartoonFace -----------------------------------------------------------------------------------------------


def icartoonface_report(
    embeddings: np.ndarray,
    pairs: np.ndarray,
    distractors: np.ndarray,
    identities: np.ndarray,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict:
    """Rank-1, Rank-5 and mean reciprocal rank of the iCartoonFace test (arXiv 1907.13394), with NAME_ci95.

    Arrays as in `icartoonface_ranks`. identities: (N,) codes of the rows; the bootstrap draws the anchors' identities,
    for the pairs of one are not independent. Returns "rank1", "rank5", "mrr", "pairs", "distractors", "variant".
    """
    ranks, pairs = icartoonface_ranks(embeddings, pairs, distractors), np.asarray(pairs)
    figures = {"rank1": ranks <= 1, "rank5": ranks <= 5, "mrr": 1 / ranks}
    report = _means(figures, np.asarray(identities)[pairs[:, 0]], replicates=replicates, seed=seed)
    return report | {"pairs": len(pairs), "distractors": len(distractors), "variant": _OFFICIAL}


def icartoonface_ranks(embeddings: np.ndarray, pairs: np.ndarray, distractors: np.ndarray) -> np.ndarray:
    """The rank of the mate among the distractors for each pair: (P,) int64, 1 + #{d: s(a, d) >= s(a, b)}.

    embeddings: (N, D), any norm; s is the cosine, in double precision like the official scorer's. pairs: (P, 2) rows
    (anchor a, mate b), as listed: (a, b) and (b, a) are two pairs. distractors: (M,) rows.

    The official scorer ranks all images for each anchor, walks down and skips whoever is no distractor; a pair is
    right if the mate comes before the first distractor. That is rank 1 here, without the ranking of all by all. They
    part where a distractor equals the mate to within rounding (a duplicate picture): the official answer depends on
    how its sort leaves equal items; here the pair is wrong, which is the official answer with distractors first.
    """
    embeddings, pairs, distractors = checked_embeddings(embeddings), np.asarray(pairs), np.asarray(distractors)
    if not (len(pairs) and len(distractors)):
        raise ValueError("the rule of iCartoonFace needs pairs and distractors")
    if np.isin(pairs, distractors).any() or (pairs[:, 0] == pairs[:, 1]).any():
        raise ValueError("a pair is of two different images, and neither is a distractor")
    unit = embeddings.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-300)
    anchors, owner = np.unique(pairs[:, 0], return_inverse=True)
    order = np.argsort(owner, kind="stable")
    ends = np.searchsorted(owner[order], np.arange(len(anchors) + 1))
    ranks = np.empty(len(pairs), dtype=np.int64)
    for part in blocks(len(anchors), 256):
        to_distractors = unit[anchors[part]] @ unit[distractors].T
        for row in range(part.start, part.stop):
            own = order[ends[row] : ends[row + 1]]
            to_mates = unit[pairs[own, 1]] @ unit[anchors[row]]
            ranks[own] = 1 + (to_distractors[row - part.start] >= to_mates[:, None] - _ROUNDING).sum(axis=1)
    return ranks


# --- curves -----------------------------------------------------------------------------------------------------


def precision_recall_curves(scores: np.ndarray, labels: np.ndarray, points: int = 200) -> dict:
    """Precision and recall of "this image is of this class" over all (image, class) decisions, and each class's AP.

    scores: (N, C), comparable between images (probabilities or cosines, say); a memory map will do, columns are read
    in blocks. labels: (N,) class numbers. Returns "precision", "recall": at most `points` of the micro-averaged curve,
    evenly spaced along it, thresholds descending, the last at recall 1; "micro_ap": its average precision, sum of
    (R_n - R_n-1) P_n over thresholds, as scikit-learn has it, of all thresholds; "class_ap": (C,) the same for each
    class, NaN without images; "macro_ap": their mean; "classes_without_images". ValueError for scores that are NaN.
    """
    samples, classes = scores.shape
    labels = checked_labels(labels, samples, classes)
    if not samples:
        raise ValueError("no labelled samples to score")
    thresholds = np.sort(np.take_along_axis(scores, labels[:, None], axis=1)[:, 0])  # recall changes at these alone
    claims, class_ap = np.zeros(samples, dtype=np.int64), np.full(classes, np.nan)
    for part in blocks(classes, max(1, BLOCK_SCORES // (4 * samples))):
        columns = np.ascontiguousarray(scores[:, part].T)
        if np.isnan(columns).any():
            raise ValueError("scores hold a NaN")
        true = [columns[number - part.start, labels == number] for number in range(part.start, part.stop)]
        columns.sort(axis=1)
        for number, own, column in zip(range(part.start, part.stop), true, columns, strict=True):
            claims += samples - np.searchsorted(column, thresholds)
            if len(own):
                own.sort()
                hits = len(own) - np.searchsorted(own, own)
                class_ap[number] = np.mean(hits / (samples - np.searchsorted(column, own)))
    hits = samples - np.searchsorted(thresholds, thresholds)
    chosen = np.unique(thresholds, return_index=True)[1][::-1]
    chosen = chosen[np.unique(np.linspace(0, len(chosen) - 1, points).round().astype(np.int64))]
    return {
        "precision": (hits / claims)[chosen],
        "recall": hits[chosen] / samples,
        "micro_ap": float(np.mean(hits / claims)),
        "class_ap": class_ap,
        "macro_ap": float(np.nanmean(class_ap)),
        "classes_without_images": int(np.isnan(class_ap).sum()),
    }
