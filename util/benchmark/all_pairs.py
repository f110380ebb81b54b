"""Verification on every pair of a data set, which no list could hold: five thousand million of 100,000 pictures.

Tiles of the similarity matrix are streamed twice. The first pass counts scores in bins, the second collects those in
the few bins that hold a threshold, so that thresholds, TPRs and the EER are exact and memory does not grow with the
pairs. Both passes see the same numbers, because they multiply the same tiles: a product of another shape rounds
differently.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from util.benchmark.bootstrap import REPLICATES
from util.benchmark.pairs import pair_scores, uniform_pairs
from util.benchmark.verification import (
    CI_NEGATIVES,
    CI_POSITIVES,
    FPRS,
    equal_error,
    false_accepts,
    pair_intervals,
    rate_key,
    too_few,
    warning,
)

EDGES = 1 << 15  # quantiles of each kind of pair, of a sample, that bound the bins


def all_pairs_report(
    embeddings: np.ndarray, labels: np.ndarray, *, fprs: Sequence[float] = FPRS, block: int = 4096,
    replicates: int = REPLICATES, seed: int = 0, progress: Callable[[int], object] | None = None,
) -> dict:  # fmt: skip
    """`verification_report` over all pairs of rows, each once, from embeddings.

    embeddings: (N, D) float32, rows L2-normalised. labels: (N,) identity codes. block: rows of a tile, which takes
    4 block^2 bytes. progress: called with the number of pairs after each tile; each pair counts twice in all.

    Thresholds are exact, each a float32 score of a pair, and with them realised FPR, TPR and EER. The AUC counts a
    positive and a negative in one bin as equal; bins are quantiles of a sample, and "auc_error_bound" states how
    far off it can be for that, some 1e-5. Intervals are those of `verification_report` on a seeded sample, 250,000
    of the positive and 1,000,000 of the negative pairs, hence a little wide. No kind of pair is held in
    memory as a whole. ValueError for rows that are not finite or not of length 1.
    """
    embeddings, labels = np.asarray(embeddings, dtype=np.float32), np.asarray(labels)
    _check(embeddings, labels, block)
    sample = uniform_pairs(labels, positives=CI_POSITIVES, negatives=CI_NEGATIVES, seed=seed)
    if sample.same.all() or not sample.same.any():
        return {"skipped": f"no pairs of {'two identities' if sample.same.any() else 'one identity'}"}
    scores = pair_scores(embeddings, sample.a, sample.b)
    edges = _edges(scores[sample.same], scores[~sample.same])
    tiles = _Tiles(embeddings, labels, block, progress)
    bins = _Bins(edges, *tiles.count(edges))
    bins.fill(tiles.collect(bins.several_values([bins.crossing(), *bins.of_thresholds(fprs).values()])))
    figures = pair_intervals(
        scores, sample.same, labels[sample.a], labels[sample.b], fprs=fprs, replicates=replicates, seed=seed
    )
    report = {
        **bins.auc(), "auc_ci95": figures["auc"], "eer": bins.eer(), "eer_ci95": figures["eer"],
        "tpr_at_fpr": {}, "tpr_at_fpr_ci95": {}, "operating_points": {},
        "positives": bins.positives, "negatives": bins.negatives, "ci_pairs": figures["pairs"],
    }  # fmt: skip
    for fpr in fprs:
        key = rate_key(fpr)
        tpr, point = bins.at(fpr)
        report["tpr_at_fpr"][key], report["operating_points"][key] = tpr, point
        report["tpr_at_fpr_ci95"][key] = None if "skipped" in point else figures[key]
    return report


def _check(embeddings: np.ndarray, labels: np.ndarray, block: int) -> None:
    if len(embeddings) != len(labels):
        raise ValueError(f"{len(embeddings)} embeddings, but {len(labels)} labels")
    for start in range(0, len(embeddings), block):
        length = np.linalg.norm(embeddings[start : start + block], axis=1)
        if not (np.abs(length - 1) < 1e-3).all():
            raise ValueError("embeddings must be finite and L2-normalised")


def _edges(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Ascending edges, float32, from -inf: quantiles of both kinds, and the next number after each.

    The second makes a value that many pairs share (of equal pictures, of a collapsed model) a bin of its own.
    """
    quantiles = [np.sort(kind)[np.linspace(0, len(kind) - 1, EDGES).astype(np.int64)] for kind in (positive, negative)]
    edges = np.unique(np.concatenate(quantiles))
    return np.unique(np.concatenate([[np.float32(-np.inf)], edges, np.nextafter(edges, np.float32(np.inf))]))


# --- the two passes ---------------------------------------------------------------------------------------------


class _Tiles:
    """The upper triangle of the similarity matrix in tiles, rows in order of identity.

    In that order all positives lie near the diagonal: other tiles need no mask. A tile is split among threads.
    """

    def __init__(
        self, embeddings: np.ndarray, labels: np.ndarray, block: int, progress: Callable[[int], object] | None
    ):
        order = np.argsort(labels, kind="stable")
        self._rows, self._order = embeddings, order
        self._labels, self._block, self._progress = labels[order], block, progress

    def count(self, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many positives and how many negatives are at or above each edge, two (E,) int64."""

        def at_least(scores: np.ndarray) -> np.ndarray:
            scores.sort()  # with one sort any edges cost next to nothing, unlike a histogram's even bins
            return len(scores) - np.searchsorted(scores, edges, "left")

        totals = np.zeros((2, len(edges)), dtype=np.int64)
        for kind, counts in self._each(at_least):
            totals[kind] += counts
        return totals[0], totals[1]

    def collect(self, spans: dict[int, tuple[np.ndarray, np.ndarray]]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """{name: (positives, negatives)}: all scores in each span low <= score < high, {name: (low, high)}."""
        bounds = np.array(list(spans.values()), dtype=np.float32).reshape(-1, 2)

        def inside(scores: np.ndarray) -> list[np.ndarray]:
            scores.sort()
            return [scores[low:high].copy() for low, high in np.searchsorted(scores, bounds, "left")]

        found = [[[np.empty(0, np.float32)] for _ in spans] for _ in range(2)]
        for kind, parts in self._each(inside) if spans else ():
            for held, part in zip(found[kind], parts, strict=True):
                held.append(part)
        return {
            name: (np.concatenate(positive), np.concatenate(negative))
            for name, positive, negative in zip(spans, *found, strict=True)
        }

    def _each(self, work: Callable[[np.ndarray], object]) -> Iterator[tuple[int, object]]:
        """(kind, work(scores)): kind 0 positives, 1 negatives; `work` may overwrite the scores, and runs in threads."""
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:
            for positive, negative in self._scores():
                yield 0, work(positive)
                yield from ((1, result) for result in pool.map(work, np.array_split(negative, threads)))
                if self._progress:
                    self._progress(len(positive) + len(negative))

    def _scores(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(positives, negatives) of each tile, float32, valid until the next tile."""
        total, size, dim = len(self._order), self._block, self._rows.shape[1]
        # the same memory for every tile, so that nothing about a product differs between the passes
        left, right, products = torch.empty(size, dim), torch.empty(size, dim), torch.empty(size * size)
        for top in range(0, total, size):
            rows = slice(top, min(top + size, total))
            a = self._gather(rows, left)
            for start in range(top, total, size):
                columns = slice(start, min(start + size, total))
                b = self._gather(columns, right)
                tile = products[: len(a) * len(b)].view(len(a), len(b))
                torch.mm(a, b.T, out=tile)
                if start > top and self._labels[rows.stop - 1] != self._labels[start]:
                    yield np.empty(0, np.float32), tile.view(-1).numpy()
                else:
                    yield self._split(tile.numpy(), rows, columns)

    def _gather(self, places: slice, out: torch.Tensor) -> torch.Tensor:
        out = out[: places.stop - places.start]
        np.take(self._rows, self._order[places], axis=0, out=out.numpy(), mode="clip")
        return out

    def _split(self, tile: np.ndarray, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        same = self._labels[rows, None] == self._labels[None, columns]
        if rows == columns:
            upper = np.triu(np.ones_like(same), 1)
            return tile[same & upper], tile[upper & ~same]
        return tile[same], tile[~same]


# --- figures from counts ----------------------------------------------------------------------------------------


class _Bins:
    """Counts of both kinds: bin i holds edges[i] <= score < edges[i + 1]; the scores in a few bins are known."""

    def __init__(self, edges: np.ndarray, positive: np.ndarray, negative: np.ndarray):
        """positive, negative: (E,) int64, how many are at or above each edge."""
        self._edges = np.append(edges, np.float32(np.inf))
        self._counts = [np.append(counts, 0) for counts in (positive, negative)]
        self.positives, self.negatives = int(positive[0]), int(negative[0])
        self._single = self._edges[1:] == np.nextafter(self._edges[:-1], np.float32(np.inf))
        self._scores: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def holding(self, place: int) -> int:
        """The bin of the place-th largest negative, from 1."""
        return int(np.count_nonzero(self._counts[1] >= place)) - 1

    def crossing(self) -> int:
        """The bin in which FPR reaches 1 - TPR."""
        return int(np.count_nonzero(sum(self._rates(*self._counts)) >= 1)) - 1

    def of_thresholds(self, fprs: Sequence[float]) -> dict[float, int]:
        """{FPR: the bin of its threshold}, where there are negatives enough for one."""
        accepted = {fpr: false_accepts(fpr, self.negatives) for fpr in fprs}
        return {fpr: self.holding(k + 1) for fpr, k in accepted.items() if k > 0}

    def several_values(self, bins: Sequence[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """{bin: (low, high)} of those that can hold more than one value."""
        return {i: (self._edges[i], self._edges[i + 1]) for i in sorted(set(bins)) if not self._single[i]}

    def fill(self, scores: dict[int, tuple[np.ndarray, np.ndarray]]) -> None:
        """Take the scores (positives, negatives) of bins. RuntimeError if they are not those that were counted."""
        for i, kinds in scores.items():
            if any(len(own) != counts[i] - counts[i + 1] for own, counts in zip(kinds, self._counts, strict=True)):
                raise RuntimeError(
                    "matrix products do not repeat on this machine: two passes over the same tiles differ"
                )
        self._scores = scores

    def auc(self) -> dict[str, float]:
        """{"auc", "auc_error_bound"}: scores in one bin count as equal, which is wrong by half their pairs at most."""
        positive, negative = (-np.diff(counts).astype(np.float64) for counts in self._counts)
        below = self.negatives - self._counts[1][:-1]
        unsure = positive * negative / 2
        pairs = self.positives * self.negatives
        bound = unsure[~self._single].sum() / pairs
        return {"auc": float((positive @ below + unsure.sum()) / pairs), "auc_error_bound": float(bound)}

    def eer(self) -> float:
        """Equal error rate, linear between the vertices of the ROC on either side."""
        _, positive, negative = self._vertices(self.crossing())
        fpr, tpr = self._rates(positive, negative)
        after = int(np.argmax(fpr + tpr >= 1))
        return float(equal_error((fpr[after - 1], tpr[after - 1]), (fpr[after], tpr[after])))

    def at(self, fpr: float) -> tuple[float | dict, dict]:
        """TPR at an FPR and its operating point; {"skipped": why} twice where there are too few negatives."""
        k = false_accepts(fpr, self.negatives)
        if k < 1:
            skipped = {"skipped": too_few(fpr, self.negatives)}
            return skipped, skipped
        values, positive, negative = self._vertices(self.holding(k + 1))
        place = int(np.argmax(negative > k))  # the first vertex that lets in the (k + 1)-th; the one before holds
        realised, tpr = self._rates(positive[place - 1], negative[place - 1])
        point = {"threshold": float(values[place]), "realised_fpr": float(realised)}
        return float(tpr), point | {"k": k, "negatives": self.negatives} | warning(fpr, k)

    def _vertices(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(values, positives, negatives), descending: values in bin i, and how many are at or above each.

        The first vertex is that of the next value above the bin, which is given as +inf.
        """
        if i in self._scores:
            values = np.unique(np.concatenate(self._scores[i]))[::-1]
            inside = [len(kind) - np.searchsorted(np.sort(kind), values, "left") for kind in self._scores[i]]
        else:
            values = self._edges[i : i + 1]
            inside = [counts[i : i + 1] - counts[i + 1] for counts in self._counts]
        positive, negative = (
            counts[i + 1] + np.append(0, own) for counts, own in zip(self._counts, inside, strict=True)
        )
        return np.append(np.float32(np.inf), values), positive, negative

    def _rates(self, positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return negative / self.negatives, positive / self.positives
