"""Nearest neighbours by the cosine of embeddings, exactly and in blocks."""

import numpy as np
import torch

_BLOCK = 1024  # queries compared at a time


def nearest(
    queries: np.ndarray, gallery: np.ndarray, k: int, same: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of the gallery (M, D) most like each query (N, D): their numbers (N, k) and cosines (N, k), falling.

    Rows have length 1. Equal ones come in the order of their numbers. same: what the queries (N,) and the gallery (M,)
    are, any codes that no two rows of the gallery share; a row of the code of the query is left out. ValueError where
    fewer than k are left.
    """
    if len(gallery) - (same is not None) < k:
        raise ValueError(f"{k} neighbours of {len(gallery)} pictures are too many")
    found, cosines = [], []
    columns = torch.from_numpy(np.ascontiguousarray(gallery)).T
    for first in range(0, len(queries), _BLOCK):
        scores = (torch.from_numpy(np.ascontiguousarray(queries[first : first + _BLOCK])) @ columns).numpy()
        if same is not None:
            scores[same[0][first : first + _BLOCK, None] == same[1][None]] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        found.append(order)
        cosines.append(np.take_along_axis(scores, order, axis=1))
    return np.concatenate(found), np.concatenate(cosines)
