"""Closed-set figures against scikit-learn's, and the cases that it does not speak of.

Run: python -m pytest tests/test_identification.py
"""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, top_k_accuracy_score

from util.benchmark.identification import classification_scores


@pytest.mark.parametrize(("samples", "classes"), [(200, 12), (37, 6), (1, 9), (60, 40)])
def test_figures_equal_scikit_learns(samples, classes):
    rng = np.random.default_rng(samples)
    logits, labels = rng.normal(size=(samples, classes)), rng.integers(0, classes, samples)
    logits[np.arange(samples), labels] += 1.0
    got = classification_scores(logits, labels)
    everyone = np.arange(classes)
    predicted = logits.argmax(1)
    assert got["top1"] == pytest.approx(accuracy_score(labels, predicted))
    assert got["top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=everyone))
    f1 = f1_score(labels, predicted, labels=everyone, average="macro", zero_division=0)
    assert got["macro_f1"] == pytest.approx(f1)
    assert all(isinstance(value, float) for value in got.values())


def test_macro_f1_is_the_mean_over_all_classes_there_could_be():
    logits = np.eye(4)[[0, 0, 1, 1]]
    # class 0: precision 1/2, recall 1; class 1: the same; classes 2 and 3 never occur
    got = classification_scores(logits, np.array([0, 1, 1, 0]))
    assert got["macro_f1"] == pytest.approx((0.5 + 0.5 + 0 + 0) / 4)
    assert got["top1"] == 0.5


def test_equal_scores_count_against_the_true_class():
    labels = np.array([0, 1, 2])
    assert classification_scores(np.zeros((3, 7)), labels)["top1"] == 0
    assert classification_scores(np.zeros((3, 7)), labels)["top5"] == 0
    four_above = np.array([[1.0, 2, 2, 2, 2, 0, 0]])
    assert classification_scores(four_above, np.array([0]))["top5"] == 1
    assert classification_scores(np.where(four_above == 0, [[1.0]], four_above), np.array([0]))["top5"] == 0
    shared_lead = np.array([[3.0, 3, 0, 0, 0, 0, 0]])
    for label in (0, 1):
        got = classification_scores(shared_lead, np.array([label]))
        assert (got["top1"], got["top5"]) == (0, 1)


def test_fewer_than_five_classes_make_top5_certain():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 3)), rng.integers(0, 3, 50)
    got = classification_scores(logits, labels)
    assert got["top5"] == 1 and got["top1"] == pytest.approx(accuracy_score(labels, logits.argmax(1)))


@pytest.mark.parametrize("classes", [3, 8])
def test_rows_of_nan_are_wrong(classes):
    labels = np.array([0, 1, 0, 2])
    logits = np.eye(classes)[labels] + np.arange(classes) * 1e-3
    assert classification_scores(logits, labels)["top1"] == 1
    logits[[0, 2]] = np.nan
    got = classification_scores(logits, labels)
    assert got["top1"] == 0.5 and got["top5"] == 0.5


def test_rows_of_nan_are_wrong_for_f1_too():
    got = classification_scores(np.full((4, 3), np.nan), np.zeros(4, dtype=np.int64))
    assert got["macro_f1"] == 0


def test_one_nan_among_the_scores_makes_a_row_wrong():
    got = classification_scores(np.array([[1.0, np.nan, 0.0]]), np.array([0]))
    assert got["top1"] == got["top5"] == got["macro_f1"] == 0


def test_no_samples_are_an_error():
    with pytest.raises(ValueError, match="no labelled samples"):
        classification_scores(np.zeros((0, 3)), np.zeros(0, dtype=np.int64))
