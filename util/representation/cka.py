"""Centred kernel alignment (CKA) of two representations of the same pictures, with linear kernels (arXiv 1905.00414).

1: they differ by a rotation and a scale. It does not change under either.
"""

from collections.abc import Sequence

import numpy as np


def linear_cka(x: np.ndarray, y: np.ndarray, *, debiased: bool = False) -> float:
    """CKA of (N, D1) and (N, D2), rows of the same N pictures, 0..1; NaN where all rows of one are equal.

    |Y^T X|^2 / (|X^T X| |Y^T Y|) of centred columns, Frobenius norms (equation 5 of the paper's section 3). Of few
    pictures and many dimensions this is too high, whatever they hold; debiased: with the unbiased estimate of HSIC
    (arXiv 2010.15327, equation 3) instead, which is 0 on average for unrelated representations and needs N > 3.
    """
    return float(cka_matrix([x], [y], debiased=debiased)[0, 0])


def cka_matrix(first: Sequence[np.ndarray], second: Sequence[np.ndarray], *, debiased: bool = False) -> np.ndarray:
    """`linear_cka` of every layer of one network with every layer of another: (layers, layers)."""
    if {len(x) for x in first} != {len(y) for y in second} or len({len(x) for x in first}) != 1:
        raise ValueError("all representations must be of the same pictures")
    hsic = _hsic_unbiased if debiased else _hsic
    grams = [[_gram(x) for x in layers] for layers in (first, second)]
    own = [[hsic(gram, gram) for gram in layers] for layers in grams]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.array([
            [hsic(a, b) / np.sqrt(own[0][i] * own[1][j]) for j, b in enumerate(grams[1])]
            for i, a in enumerate(grams[0])
        ])  # fmt: skip


def _gram(x: np.ndarray) -> np.ndarray:
    """Inner products (N, N) of the rows, from the mean row."""
    x = np.asarray(x, dtype=np.float64)
    x = x - x.mean(axis=0)
    scale = np.abs(x).max(initial=0.0)
    x = x / scale if scale else x  # CKA does not depend on it, the sum of squares may overflow
    return x @ x.T


def _hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    return float((k * l).sum())


def _hsic_unbiased(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """HSIC_1 of Song et al., up to the factor N (N - 3), which cancels."""
    n = len(k)
    if n < 4:
        raise ValueError(f"the unbiased HSIC needs 4 pictures or more, not {n}")
    k, l = (gram - np.diag(np.diag(gram)) for gram in (k, l))  # noqa: E741
    mean_term = k.sum() * l.sum() / ((n - 1) * (n - 2))
    return float((k * l).sum() + mean_term - 2 / (n - 2) * k.sum(axis=0) @ l.sum(axis=0))
