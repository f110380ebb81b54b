"""How well clusters agree with identities: B-cubed and pairwise precision, recall and F1.

Pure functions on arrays. A sample that belongs to no cluster has to be a cluster of its own: give it a number of its
own (`util.transfer.clusters` does).
"""

import numpy as np


def clustering_report(clusters: np.ndarray, identities: np.ndarray) -> dict:
    """{"bcubed": {...}, "pairwise": {...}, "clusters", "identities", "samples"}.

    clusters: (N,) numbers. identities: (N,) codes or names, of every sample.
    """
    counts = contingency(clusters, identities)
    return {
        "bcubed": bcubed(counts),
        "pairwise": pairwise(counts),
        "clusters": counts.shape[0],
        "identities": counts.shape[1],
        "samples": int(counts.sum()),
    }


def contingency(clusters: np.ndarray, identities: np.ndarray) -> np.ndarray:
    """(C, I) int64: samples of each identity in each cluster. ValueError for different lengths, or none at all."""
    if len(clusters) != len(identities) or not len(clusters):
        raise ValueError(f"{len(clusters)} clusters and {len(identities)} identities: one of each is needed per sample")
    rows, columns = (np.unique(values, return_inverse=True)[1] for values in (clusters, identities))
    counts = np.zeros((rows.max() + 1, columns.max() + 1), dtype=np.int64)
    np.add.at(counts, (rows, columns), 1)
    return counts


def bcubed(counts: np.ndarray) -> dict[str, float]:
    """B-cubed precision, recall and their harmonic mean (Bagga and Baldwin, ACL 1998), from a contingency table.

    Precision of a sample: the share of its cluster that shows its identity, itself included. Recall: the share of its
    identity that lies in its cluster. Both are means over samples (Amigo et al., Information Retrieval 2009).
    """
    squares = counts.astype(np.float64) ** 2
    precision = (squares / counts.sum(axis=1, keepdims=True)).sum() / counts.sum()
    recall = (squares / counts.sum(axis=0, keepdims=True)).sum() / counts.sum()
    return _with_f1(float(precision), float(recall))


def pairwise(counts: np.ndarray) -> dict[str, float | None]:
    """The same of pairs: is a pair within a cluster of one identity, is a pair of one identity within a cluster?

    None for a rate without any pair.
    """
    together = _pairs(counts).sum()
    claimed, true = _pairs(counts.sum(axis=1)).sum(), _pairs(counts.sum(axis=0)).sum()
    return _with_f1(
        float(together / claimed) if claimed else None,
        float(together / true) if true else None,
    )


def _pairs(sizes: np.ndarray) -> np.ndarray:
    return sizes * (sizes - 1) // 2


def _with_f1(precision: float | None, recall: float | None) -> dict[str, float | None]:
    if precision is None or recall is None:
        f1 = None
    else:
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}
