"""Closed-set identification: who of the known identities is it?"""

import numpy as np


def classification_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Top-1 and Top-5 accuracy and macro-F1, fractions in 0..1.

    logits: (N, C) class scores, any scale. labels: (N,) class numbers. Macro-F1 is the mean over all C classes, of
    which one that is neither predicted nor there counts 0. Equal scores count against the true class, and a sample
    with a score that is no number is wrong.
    """
    from sklearn.metrics import f1_score  # slow to import

    if not len(labels):
        raise ValueError("no labelled samples to score")
    valid = ~np.isnan(logits).any(axis=1)
    true = np.take_along_axis(logits, labels[:, None], axis=1)
    rank = np.where(valid, (logits >= true).sum(axis=1), logits.shape[1] + 6)  # 1 = best
    predicted = np.where(valid, logits.argmax(axis=1), -1)
    return {
        "top1": float(np.mean(rank <= 1)),
        "top5": float(np.mean(rank <= 5)),
        "macro_f1": float(
            f1_score(labels, predicted, labels=np.arange(logits.shape[1]), average="macro", zero_division=0)
        ),
    }
