"""Faces grouped by whom they show, without any name: clusters of embeddings.

Agglomerative clustering by average linkage: two clusters are joined while the mean cosine over all their pairs is at
least `similarity`. HDBSCAN (Campello et al., PAKDD 2013) needs no such number, and leaves out what is in no dense
region. Which of them finds more is in RESULTS.md.
"""

import numpy as np

from util.run.seed import rng_for
from util.transfer.gallery import unit

METHODS = ("agglomerative", "hdbscan")
MOST = 10_000  # embeddings that are clustered at once: their distances take 400 MB
_BLOCK = 4096


def cluster_faces(
    embeddings: np.ndarray, *, method: str = "agglomerative", similarity: float = 0.34, least: int = 2, seed: int = 0
) -> np.ndarray:
    """Cluster numbers (N,) int64 from 1, the largest cluster first; a face that is like no other has its own.

    embeddings: (N, D), any length. similarity: mean cosine at which agglomerative clusters are still joined, -1..1.
    least: faces that make a cluster of HDBSCAN, from 2. Of more than MOST faces a seeded choice is clustered; each of
    the others goes to the cluster whose mean direction is nearest, if that is as near as `similarity`, else it stays
    by itself. ValueError for embeddings that are not finite, and an unknown method.
    """
    embeddings = unit(np.asarray(embeddings, dtype=np.float32))
    if not np.isfinite(embeddings).all():
        raise ValueError("embeddings that are not finite cannot be clustered")
    if len(embeddings) <= MOST:
        return by_size(_cluster(embeddings, method, similarity, least))
    order = rng_for(seed, "clustered faces").permutation(len(embeddings))
    first, rest = np.sort(order[:MOST]), np.sort(order[MOST:])
    found = np.empty(len(embeddings), dtype=np.int64)
    found[first] = by_size(_cluster(embeddings[first], method, similarity, least)) - 1
    found[rest] = _join(embeddings[rest], embeddings[first], found[first], similarity)
    return by_size(found)


def _cluster(embeddings: np.ndarray, method: str, similarity: float, least: int) -> np.ndarray:
    """Cluster numbers (n,), in any order, of unit embeddings (n, D)."""
    from sklearn.cluster import HDBSCAN, AgglomerativeClustering  # slow to import

    if method not in METHODS:
        raise ValueError(f"clustering {method!r} is not known: choose from {', '.join(METHODS)}")
    if len(embeddings) < max(2, least if method == "hdbscan" else 2):
        return np.arange(len(embeddings))
    if method == "agglomerative":
        options = {"n_clusters": None, "metric": "cosine", "linkage": "average"}
        return AgglomerativeClustering(distance_threshold=1 - similarity, **options).fit_predict(embeddings)
    # on unit vectors Euclidean distance orders pairs as the cosine does
    found = HDBSCAN(min_cluster_size=least, min_samples=1, copy=True).fit_predict(embeddings.astype(np.float64))
    alone = found < 0
    found[alone] = found.max() + 1 + np.arange(alone.sum())
    return found


def _join(embeddings: np.ndarray, others: np.ndarray, clusters: np.ndarray, similarity: float) -> np.ndarray:
    """The cluster (n,) of `others` whose mean direction is nearest to each embedding; numbers of their own beyond."""
    centres = np.zeros((clusters.max() + 1, others.shape[1]), dtype=np.float32)
    np.add.at(centres, clusters, others)
    centres = unit(centres)
    joined = len(centres) + np.arange(len(embeddings))
    for start in range(0, len(embeddings), _BLOCK):
        part = slice(start, start + _BLOCK)
        cosines = embeddings[part] @ centres.T
        near = cosines.max(axis=1) >= similarity
        joined[part][near] = cosines.argmax(axis=1)[near]
    return joined


def by_size(clusters: np.ndarray) -> np.ndarray:
    """The same clusters, numbered from 1 by falling size; of equally large ones that of the first sample first."""
    _, first, codes, sizes = np.unique(clusters, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.arange(1, len(order) + 1)
    return numbers[codes]
