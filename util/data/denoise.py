"""Wrong identities in a training set: which rows to leave out, by four rules. Pure functions on arrays.

    duplicates   the same picture again, nearly the same, or the same under several identities
    centroid     far from its identity's centre, or nearer another one
    confident    confident learning on out-of-sample probabilities (Northcutt et al., arXiv 1911.00068)
    subcentre    in a part of its identity that lies farther off than the next identity does; the idea of sub-centre
                 ArcFace (Deng et al., ECCV 2020), with k-means in place of trained sub-centres

Embeddings are (N, D) with L2-normalised rows, labels (N,) int64 class numbers in 0..C-1. No rule depends on the order
of the rows. Classes below `floor` rows are not judged, because their centre or their probabilities would be those of
the very rows in question, and `spare` keeps the others from falling below it. Filters by centre eat rare identities all
the same: `removed_by_band` tells how much.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from util.benchmark.leakage import components
from util.benchmark.long_tail import BANDS
from util.data.near_split import name_groups
from util.run.seed import rng_for

FLOOR = 5  # rows of a class below which nothing is judged
_PRIOR = 10.0  # rows that the common spread counts for beside a class's own
_BLOCK_SCORES = 1 << 24  # similarities held at a time: 64 MB of float32


class Flags(NamedTuple):
    """What a rule holds against each row. reason: (N,) object, str or None. score: (N,) float64, larger is worse."""

    reason: np.ndarray
    score: np.ndarray

    @property
    def flagged(self) -> np.ndarray:
        """(N,) bool."""
        return np.array([reason is not None for reason in self.reason], dtype=bool)


def no_flags(count: int) -> Flags:
    """Nothing against any of `count` rows."""
    return Flags(np.full(count, None, dtype=object), np.full(count, -np.inf))


def spare(flags: Flags, labels: np.ndarray, floor: int | np.ndarray) -> Flags:
    """The flags without those that would leave a class fewer than `floor` rows; the worst rows stay flagged.

    floor: one number, or one for each class (C,). A class that has fewer rows to begin with keeps them all.
    """
    reason, flagged = flags.reason.copy(), flags.flagged
    for rows in rows_by_class(labels):
        own, least = rows[flagged[rows]], floor if np.ndim(floor) == 0 else floor[labels[rows[0]]]
        excess = min(least - (len(rows) - len(own)), len(own))
        if excess > 0:
            reason[own[np.argsort(flags.score[own], kind="stable")[:excess]]] = None
    return Flags(reason, flags.score)


def rows_by_class(labels: np.ndarray) -> list[np.ndarray]:
    """The rows of each class that has any, ascending by class number."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if len(order) else []


# --- duplicates -------------------------------------------------------------------------------------------------


def duplicate_flags(
    pictures: Sequence[Hashable], labels: np.ndarray, ids: Sequence[str], near: tuple[Sequence, Sequence] = ((), ())
) -> Flags:
    """Rows that show a picture again. pictures: (N,) what tells two apart, such as a digest. ids: (N,) unique names.

    Of the rows of one picture and one identity the first by name is kept. Where one picture has several identities
    nobody can tell which is right: all its rows are flagged, but for the last row of an identity. near: pairs of rows
    that are nearly the same; of those of one identity, what is near to a kept row is flagged, by name again. Near
    pictures of two identities are left: there are characters who look alike.
    """
    flags = no_flags(len(labels))
    order = np.argsort(np.asarray(ids, dtype=str), kind="stable").tolist()
    flags.score[order] = np.arange(len(order))
    rows_of, neighbours = defaultdict(list), defaultdict(list)
    for row in order:
        rows_of[pictures[row]].append(row)
    for rows in rows_of.values():
        if len(set(labels[rows].tolist())) > 1:
            flags.reason[rows] = "same picture under several identities"
        else:
            flags.reason[rows[1:]] = "same picture as another"
    for one, other in zip(*near, strict=True):
        if labels[one] == labels[other]:
            neighbours[int(one)].append(int(other))
            neighbours[int(other)].append(int(one))
    for row in order:
        earlier = (other for other in neighbours[row] if flags.score[other] < flags.score[row])
        if flags.reason[row] is None and any(flags.reason[other] is None for other in earlier):
            flags.reason[row] = "nearly the same picture as another"
    return spare(flags, labels, 1)


def link_groups(
    ids: Sequence[str], *columns: Sequence[Hashable | None], pairs: tuple[Sequence, Sequence] = ((), ())
) -> list[str]:
    """A group for each row, called as its first member: rows that share a value in any column, or are a pair.

    ids: (N,) unique names. columns: N values each, such as the source or a digest of the picture; None links nothing.
    """
    one, other = ([int(row) for row in side] for side in pairs)
    for column in columns:
        first: dict[Hashable, int] = {}
        for row, value in enumerate(column):
            if value is not None:
                one.append(row)
                other.append(first.setdefault(value, row))
    linked = components(len(ids), np.array(one, dtype=np.int64), np.array(other, dtype=np.int64))
    return name_groups(ids, linked.tolist())


# --- centroid ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Centroids:
    """Centres of identities, and how close and how decidedly closer than to others their rows lie.

    directions: (C, D) float32, L2-normalised. low: (C,) the least cosine with its centre that is usual for a row of
    the class. low_gap: (C,) the least usual gap, its cosine less that with the nearest other centre. judged: (C,)
    bool, classes of `floor` rows and more. own, other: (N,) these cosines of the rows it was fitted on, `own` with
    the centre of the others of the class.
    """

    directions: np.ndarray
    low: np.ndarray
    low_gap: np.ndarray
    judged: np.ndarray
    own: np.ndarray
    other: np.ndarray

    @property
    def agreement(self) -> float:
        """Share of the rows, those with another judged class to go to, that lie nearer to their own centre; or NaN."""
        asked = np.isfinite(self.other)
        return float((self.own > self.other)[asked].mean()) if asked.any() else float("nan")


def fit_centroids(
    embeddings: np.ndarray, labels: np.ndarray, classes: int, *, sds: float = 2.0, drop: float = 0.1, floor: int = FLOOR
) -> Centroids:
    """Robust centres: the mean of each class, then the mean without the share `drop` of its rows that fit worst.

    A row is measured against the centre of the others, for a rare identity's own row would pull the centre to itself.
    What is usual is the median less `sds` spreads. The spread is 1.4826 x the median absolute deviation, which wrong
    rows do not widen as they do a standard deviation, drawn towards the common one where a class is small.
    """
    own, kept = np.zeros(len(labels)), np.ones(len(labels), dtype=bool)
    centres = _normalised(_class_sums(embeddings, labels, classes))
    for rows in rows_by_class(labels):
        fit = embeddings[rows] @ centres[labels[rows[0]]]
        kept[rows[np.argsort(fit, kind="stable")[: int(drop * len(rows))]]] = False
    sums = _class_sums(embeddings[kept], labels[kept], classes)
    for rows in rows_by_class(labels):
        others = sums[labels[rows[0]]] - np.where(kept[rows, None], embeddings[rows], 0.0)
        own[rows] = (embeddings[rows] * _normalised(others)).sum(axis=1)
    directions = _normalised(sums).astype(np.float32)
    counts = np.bincount(labels, minlength=classes)
    judged = counts >= floor
    other = nearest_other(embeddings, labels, directions, judged)
    low = _least_usual(own, labels, counts, judged, sds)
    low_gap = _least_usual(np.minimum(own - other, 2.0), labels, counts, judged, sds)
    return Centroids(directions, low, low_gap, judged, own, other)


def centroid_flags(
    labels: np.ndarray, centroids: Centroids, own: np.ndarray, other: np.ndarray, margin: float = 0.1
) -> Flags:
    """Flags for rows far from their centre, or nearer another one by more than `margin` (cosine).

    own, other: (N,) cosines with the row's own centre and with the nearest other; those of `centroids` for the rows
    it was fitted on. Far is below `low`. Nearer another counts only where the gap is unusual for the class, below
    `low_gap`: an encoder that mixes up two identities would strip both of half their rows else. Rows of classes that
    are not judged are never flagged.
    """
    flags = no_flags(len(labels))
    judged, gap = centroids.judged[labels], own - other
    far = judged & (own < centroids.low[labels])
    lost = judged & (gap < -margin) & (gap < centroids.low_gap[labels])
    flags.score[:] = np.maximum(centroids.low[labels] - own, -gap - margin)
    flags.reason[far] = "far from its centre"
    flags.reason[lost] = "nearer another centre"
    return flags


def nearest_other(embeddings: np.ndarray, labels: np.ndarray, directions: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """(N,) cosine of each row with the nearest centre of another class, of those that are judged; -inf without one."""
    numbers = np.flatnonzero(judged)
    best = np.full(len(labels), -np.inf)
    if not len(numbers):
        return best
    place = np.full(len(judged), -1)
    place[numbers] = np.arange(len(numbers))
    centres = directions[numbers]
    step = max(1, _BLOCK_SCORES // len(numbers))
    for first in range(0, len(labels), step):
        rows = slice(first, first + step)
        scores, own = embeddings[rows] @ centres.T, place[labels[rows]]
        inside = np.flatnonzero(own >= 0)
        scores[inside, own[inside]] = -np.inf
        best[rows] = scores.max(axis=1)
    return best


def _class_sums(embeddings: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    sums = np.zeros((classes, embeddings.shape[1]))
    np.add.at(sums, labels, embeddings)
    return sums


def _normalised(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def _least_usual(
    values: np.ndarray, labels: np.ndarray, counts: np.ndarray, judged: np.ndarray, sds: float
) -> np.ndarray:
    """The median less `sds` spreads of the values of each class, (C,)."""
    middle, variance = np.zeros(len(counts)), np.zeros(len(counts))
    for rows in rows_by_class(labels):
        number = labels[rows[0]]
        middle[number] = np.median(values[rows])
        variance[number] = (1.4826 * np.median(np.abs(values[rows] - middle[number]))) ** 2
    common = np.median(variance[judged]) if judged.any() else 0.0
    return middle - sds * np.sqrt((counts * variance + _PRIOR * common) / (counts + _PRIOR))


# --- confident learning -----------------------------------------------------------------------------------------


def grouped_folds(labels: np.ndarray, groups: Sequence[str], folds: int = 5, seed: int = 0) -> np.ndarray:
    """(N,) int64 fold of each row in 0..folds-1. A group is never split; the groups of a class are spread evenly.

    groups: (N,) names. A group with rows of several classes counts for the most frequent of them.
    """
    members = defaultdict(Counter)
    for label, group in zip(labels.tolist(), groups, strict=True):
        members[group][label] += 1
    homes = defaultdict(list)
    for group, found in members.items():
        homes[min(found, key=lambda label: (-found[label], label))].append(group)
    fold_of = {}
    for home, own in homes.items():
        rng = rng_for(seed, home, "folds")
        first = int(rng.integers(folds))
        for place, number in enumerate(rng.permutation(len(own))):
            fold_of[sorted(own)[number]] = (first + place) % folds
    return np.array([fold_of[group] for group in groups], dtype=np.int64)


def out_of_sample_probabilities(
    embeddings: np.ndarray, labels: np.ndarray, folds: np.ndarray, classes: int, strength: float = 1.0
) -> np.ndarray:
    """(N, C) float32: what a logistic regression on the other folds says of each row.

    strength: scikit-learn's C for features of unit variance. A row whose class is in no other fold cannot be judged:
    it is a row of NaN.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import

    features = embeddings * np.float32(np.sqrt(embeddings.shape[1]))
    probabilities = np.full((len(labels), classes), np.nan, dtype=np.float32)
    for fold in np.unique(folds):
        held_out, known = folds == fold, np.unique(labels[folds != fold])
        if len(known) < 2:
            continue
        model = LogisticRegression(C=strength, max_iter=300).fit(features[~held_out], labels[~held_out])
        rows = np.flatnonzero(held_out & np.isin(labels, known))
        if len(rows):
            probabilities[rows] = 0.0
            probabilities[np.ix_(rows, model.classes_)] = model.predict_proba(features[rows])
    return probabilities


def confident_joint(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(C, C) int64: rows labelled i that are confidently j (Northcutt et al., arXiv 1911.00068, eq. 1-2).

    probabilities: (N, C), out of sample; rows of NaN are left out. A row is confidently j where p_j reaches t_j, the
    mean of p_j over the rows labelled j; of several such j, the most probable.
    """
    classes = probabilities.shape[1]
    good = ~np.isnan(probabilities).any(axis=1)
    probabilities, labels = probabilities[good].astype(np.float64), labels[good]
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=classes)
    sums = np.bincount(labels, weights=own, minlength=classes)
    thresholds = np.divide(sums, counts, out=np.full(classes, np.inf), where=counts > 0)
    confident = np.where(probabilities >= thresholds, probabilities, -1.0)
    best = confident.argmax(axis=1) if len(labels) else np.zeros(0, dtype=np.int64)
    sure = confident.max(axis=1, initial=-1.0) >= 0
    joint = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(joint, (labels[sure], best[sure]), 1)
    return joint


def confident_flags(probabilities: np.ndarray, labels: np.ndarray, floor: int = FLOOR) -> Flags:
    """Rows that confident learning prunes by noise rate: of class i, as many as are j, those of largest p_j - p_i.

    The joint is calibrated so that its rows sum to the classes' counts. A row whose own class is the most probable
    is never flagged. Classes of fewer than `floor` rows that can be judged are left out, as rows and as columns.
    """
    flags = no_flags(len(labels))
    good = ~np.isnan(probabilities).any(axis=1)
    counts = np.bincount(labels[good], minlength=probabilities.shape[1])
    judged = np.flatnonzero(counts >= floor)
    rows = np.flatnonzero(good & (counts[labels] >= floor))
    if not len(rows):
        return flags
    shares, own = probabilities[np.ix_(rows, judged)], np.searchsorted(judged, labels[rows])
    joint = confident_joint(shares, own).astype(np.float64)
    confident = joint.sum(axis=1, keepdims=True)
    number = np.divide(joint * counts[judged][:, None], confident, out=np.zeros_like(joint), where=confident > 0)
    for members in rows_by_class(own):
        i = own[members[0]]
        margins = shares[members] - shares[members, i][:, None]
        mistaken = margins.max(axis=1) > 0
        for j in np.flatnonzero(np.rint(number[i])):
            if j == i:
                continue
            worst = np.argsort(-margins[:, j], kind="stable")[: int(np.rint(number[i, j]))]
            worst = worst[mistaken[worst]]
            flags.reason[rows[members[worst]]] = "confidently another identity"
            flags.score[rows[members[worst]]] = np.maximum(flags.score[rows[members[worst]]], margins[worst, j])
    return flags


# --- sub-centres ------------------------------------------------------------------------------------------------


def subcentre_flags(embeddings: np.ndarray, labels: np.ndarray, centroids: Centroids, parts: int = 3) -> Flags:
    """Rows of the parts of an identity that lie farther from its largest part than the nearest other identity does.

    Each judged class is cut into `parts` by spherical k-means. Sub-centre ArcFace drops every part but the largest,
    and can, because training merges the parts of a clean class; k-means cuts a clean class as well, so a part is
    dropped only where the cosine of its centre with the largest part's is below that of the nearest other centre.
    """
    flags = no_flags(len(labels))
    numbers = np.arange(len(centroids.judged))
    limits = nearest_other(centroids.directions, numbers, centroids.directions, centroids.judged)
    for rows in rows_by_class(labels):
        number = labels[rows[0]]
        if not centroids.judged[number] or not np.isfinite(limits[number]):
            continue
        part, centres = spherical_kmeans(embeddings[rows], parts)
        main = np.bincount(part, minlength=len(centres)).argmax()
        foreign = centres @ centres[main] < limits[number]
        foreign[main] = False
        chosen = rows[foreign[part]]
        flags.reason[chosen] = "in a part far from its identity"
        flags.score[chosen] = -(embeddings[chosen] @ centres[main])
    return flags


def spherical_kmeans(rows: np.ndarray, parts: int, iterations: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """(part of each row (n,), centres (k, D) float64, L2-normalised), k <= parts; rows (n, D) are L2-normalised.

    It starts from the row next to the mean, then from the row farthest from those chosen, so chance has no part in it.
    """
    rows = rows.astype(np.float64)
    chosen = [int((rows @ rows.mean(axis=0)).argmax())]
    while len(chosen) < min(parts, len(rows)):
        chosen.append(int((rows @ rows[chosen].T).max(axis=1).argmin()))
    centres, part = rows[chosen], None
    for _ in range(iterations):
        nearest = (rows @ centres.T).argmax(axis=1)
        if part is not None and np.array_equal(nearest, part):
            break
        part = nearest
        sums = _class_sums(rows, part, len(centres))
        empty = np.bincount(part, minlength=len(centres)) == 0
        centres = np.where(empty[:, None], centres, _normalised(sums))
    return part, centres


# --- what was removed -------------------------------------------------------------------------------------------


def removed_by_band(labels: np.ndarray, flagged: np.ndarray, bands: np.ndarray) -> dict[str, dict]:
    """{band: {"rows", "removed", "fraction"}}; labels (N,), flagged (N,) bool, bands (C,) names; fraction in 0..1."""

    def share(chosen: np.ndarray) -> dict:
        rows, removed = int(chosen.sum()), int((chosen & flagged).sum())
        return {"rows": rows, "removed": removed, "fraction": removed / rows if rows else None}

    own = bands[labels]
    return {band: share(own == band) for band in BANDS}
