"""How well a linear classifier names identities from the features of a layer."""

import warnings
from collections.abc import Sequence

import numpy as np

STRENGTHS = (0.01, 0.1, 1.0)  # C of scikit-learn, the inverse of the L2 penalty


def probe(
    train: tuple[np.ndarray, np.ndarray],
    val: tuple[np.ndarray, np.ndarray] | None,
    test: tuple[np.ndarray, np.ndarray],
    strengths: Sequence[float] = STRENGTHS,
) -> tuple[np.ndarray, float]:
    """Multinomial logistic regression on standardised features: which test pictures are named rightly, and its C.

    train, val, test: features (N, D) and labels (N,). C: the best on val, the smallest of equally good ones; without
    val the middle one. Returns ((N,) bool of test, C). Deterministic.
    """
    mean, std = train[0].mean(axis=0), train[0].std(axis=0)
    scale = np.where(std > 1e-12 * (1 + np.abs(mean)), std, 1.0)

    def standard(features: np.ndarray) -> np.ndarray:
        return ((features - mean) / scale).astype(np.float64)

    if val is None:
        strengths = [sorted(strengths)[len(strengths) // 2]]
    best, best_right = None, -1.0
    for strength in sorted(strengths):
        fitted = _fit(standard(train[0]), train[1], strength)
        right = 0.0 if val is None else float((fitted.predict(standard(val[0])) == val[1]).mean())
        if right > best_right:
            best, best_right, chosen = fitted, right, strength
    return best.predict(standard(test[0])) == test[1], float(chosen)


def _fit(features: np.ndarray, labels: np.ndarray, strength: float):
    from sklearn.exceptions import ConvergenceWarning  # slow to import
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # what is left after so many steps does not change who is named
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=200).fit(features, labels)
