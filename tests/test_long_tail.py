"""Long-tailed subsets, and accuracy by frequency, against scipy, scikit-learn and plain loops.

Run: python -m pytest tests/test_long_tail.py
"""

import json
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import f1_score

from util.benchmark.bootstrap import multiplicities
from util.benchmark.long_tail import (
    frequency_curve,
    long_tail_report,
    long_tail_subsample,
    power_law_counts,
    spearman,
)

# --- a long tail made to order ----------------------------------------------------------------------------------


@pytest.mark.parametrize("imbalance", [1, 10, 50, 200])
def test_counts_fall_off_by_rank(imbalance):
    counts = power_law_counts(np.full(30, 400), imbalance)
    want = 400 * imbalance ** (-np.arange(30) / 29)
    np.testing.assert_allclose(np.sort(counts)[::-1], want, atol=0.5)
    assert counts.max() == 400 and counts.max() / counts.min() == pytest.approx(imbalance, rel=0.02)


def test_counts_never_exceed_what_there_is():
    sizes = np.array([0, 3, 500, 1, 40, 0, 7, 120])
    for seed in range(20):
        counts = power_law_counts(sizes, 50, seed=seed)
        assert (counts <= sizes).all() and (counts[sizes > 0] >= 1).all()
        falling = np.rint(500 * 50.0 ** (-np.arange(6) / 5))  # six classes have images
        below = counts[(counts < sizes) & (counts > 1)]
        assert set(below) <= set(falling)
    assert sorted(power_law_counts(np.array([20, 20, 20]), 50)) == [1, 3, 20]  # 0.4 would be none
    assert power_law_counts(np.array([9]), 50).tolist() == [9]
    assert power_law_counts(np.zeros(3, dtype=np.int64), 50).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="1 or more"):
        power_law_counts(sizes, 0.5)


def test_the_seed_says_who_is_frequent():
    sizes = np.full(40, 100)
    first, again, other = (power_law_counts(sizes, 50, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.array_equal(np.sort(first), np.sort(other))
    often = np.mean([power_law_counts(sizes, 50, seed=seed) for seed in range(400)], axis=0)
    assert often.std() < 0.1 * often.mean()  # no class is favoured


def test_a_subset_has_those_counts_and_is_nested():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1, 2, 4, 5], [80, 80, 60, 80, 9]))
    sizes = np.bincount(labels)
    mild, strong = (long_tail_subsample(labels, imbalance=imbalance, seed=3) for imbalance in (5, 50))
    for rows, imbalance in ((mild, 5), (strong, 50)):
        assert (np.diff(rows) > 0).all()
        assert np.array_equal(np.bincount(labels[rows], minlength=6), power_law_counts(sizes, imbalance, seed=3))
    assert set(strong) < set(mild)
    assert np.array_equal(strong, long_tail_subsample(labels, imbalance=50, seed=3))
    assert not np.array_equal(strong, long_tail_subsample(labels, imbalance=50, seed=4))
    assert len(long_tail_subsample(np.empty(0, dtype=np.int64))) == 0


def test_images_of_a_class_are_drawn_evenly():
    labels = np.repeat([0, 1], 20)
    often = np.zeros(40)
    for seed in range(600):
        often[long_tail_subsample(labels, imbalance=4, seed=seed)] += 1
    kept = often / 600  # each class is kept whole or to a quarter, each with probability one half
    assert np.abs(kept - 0.625).max() < 0.1


# --- figures ----------------------------------------------------------------------------------------------------


def naming(rng, train_counts: np.ndarray, probes: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Labels of probes and whom they are taken for: the more training images the better."""
    labels = rng.integers(0, len(train_counts), probes)
    right = rng.random(probes) < 0.2 + 0.25 * np.log10(train_counts[labels] + 1)
    return np.where(right, labels, rng.integers(0, len(train_counts), probes)), labels


@pytest.fixture(scope="module")
def tail():
    rng = np.random.default_rng(0)
    train_counts = np.concatenate([[101, 100, 20, 19, 1, 5000], rng.integers(1, 300, 24)])
    return (train_counts, *naming(rng, train_counts))


def plain(train_counts, predicted, labels, weights=None) -> dict[str, float]:
    """The figures by loops over classes, each taken `weights` times."""
    weights = np.ones(len(train_counts), dtype=int) if weights is None else weights
    groups = {"head": [], "mid": [], "tail": []}
    frequency, accuracy = [], []
    for number, count in enumerate(train_counts):
        own = predicted[labels == number] == number
        if not len(own) or not count:
            continue
        name = "head" if count > 100 else "mid" if count >= 20 else "tail"
        groups[name] += [own.mean()] * weights[number]
        frequency += [count] * weights[number]
        accuracy += [own.mean()] * weights[number]
    present = np.isin(np.arange(len(train_counts)), labels)
    f1 = []
    for number in range(len(train_counts)):
        others = (present.sum() - 1) / (weights[present].sum() - weights[number])
        shares = np.where(labels == number, 1, weights[labels] * others)
        f1.append(f1_score(labels == number, predicted == number, sample_weight=shares, zero_division=0))
    return {name: np.mean(values) for name, values in groups.items() if values} | {
        "macro_f1": (weights @ f1) / weights[present].sum() * present.mean(),
        "spearman_frequency_accuracy": spearmanr(frequency, accuracy)[0],
    }


def test_figures_are_those_of_loops_scipy_and_scikit_learn(tail):
    train_counts, predicted, labels = tail
    got = long_tail_report(train_counts, predicted, labels, replicates=20)
    want = plain(train_counts, predicted, labels)
    assert {name: got[name] for name in want} == pytest.approx(want)
    assert want["head"] > want["tail"]
    f1 = f1_score(labels, predicted, labels=np.arange(30), average="macro", zero_division=0)
    assert got["macro_f1"] == pytest.approx(f1)
    assert sum(got["classes"].values()) == 30 and got["classes"]["untrained"] == 0
    assert json.loads(json.dumps(got)) == got


def test_intervals_are_those_of_classes_drawn_anew_within_their_group(tail):
    train_counts, predicted, labels = tail
    got = long_tail_report(train_counts, predicted, labels, replicates=25, seed=5)
    group = np.select([train_counts > 100, train_counts >= 20], [0, 1], 2)
    samples = [plain(*tail, weights) for weights in multiplicities(30, 25, 5, group)]
    for name in ("head", "mid", "tail", "macro_f1", "spearman_frequency_accuracy"):
        want = np.quantile([sample[name] for sample in samples], [0.025, 0.975])
        np.testing.assert_allclose(got[f"{name}_ci95"], want, atol=1e-12)
        assert want[0] < got[name] < want[1], name


def test_the_bounds_are_those_of_the_paper():
    train_counts = np.array([101, 100, 20, 19, 1, 0])
    got = long_tail_report(train_counts, np.arange(6), np.arange(6), replicates=5)
    assert got["classes"] == {"head": 1, "mid": 2, "tail": 2, "untrained": 1}
    assert got["thresholds"] == {"many": 100, "few": 20, "definition": got["thresholds"]["definition"]}
    other = long_tail_report(train_counts, np.arange(6), np.arange(6), many=99, few=21, replicates=5)
    assert other["classes"] == {"head": 2, "mid": 0, "tail": 3, "untrained": 1}
    assert other["mid"] == {"skipped": "no class with probes has 21 to 99 training images"}
    assert other["mid_ci95"] is None and other["head"] == 1


def test_classes_count_once_however_many_probes_they_have():
    labels = np.array([0] * 9 + [1])
    predicted = np.array([0] * 9 + [0])
    got = long_tail_report(np.array([5, 6, 500]), predicted, labels, replicates=5)
    assert got["tail"] == 0.5 and got["head"] == {"skipped": "no class with probes has more than 100 training images"}
    assert got["classes"] == {"head": 0, "mid": 0, "tail": 2, "untrained": 0}


def test_a_class_without_training_images_is_in_no_group(tail):
    train_counts, predicted, labels = tail
    train_counts = np.where(np.arange(30) == 7, 0, train_counts)
    got = long_tail_report(train_counts, predicted, labels, replicates=5)
    want = plain(train_counts, predicted, labels)
    assert {name: got[name] for name in want} == pytest.approx(want)
    assert got["classes"]["untrained"] == 1


def test_a_flat_side_has_no_correlation():
    labels = np.arange(6).repeat(4)
    rng = np.random.default_rng(0)
    predicted = np.where(rng.random(24) < 0.5, labels, 0)
    same_size = long_tail_report(np.full(6, 30), predicted, labels, replicates=5)
    assert same_size["spearman_frequency_accuracy"] is None is same_size["spearman_frequency_accuracy_ci95"]
    assert same_size["spearman_skipped"] == "every class has the same number of training images"
    perfect = long_tail_report(np.arange(1, 7), labels, labels, replicates=5)
    assert perfect["spearman_frequency_accuracy"] is None and perfect["tail"] == 1
    assert perfect["spearman_skipped"] == "every class has the same accuracy"
    assert "spearman_skipped" not in long_tail_report(np.arange(1, 7), predicted, labels, replicates=5)
    alone = long_tail_report(np.array([3, 3]), np.zeros(4, dtype=int), np.zeros(4, dtype=int), replicates=5)
    assert alone["spearman_frequency_accuracy"] is None and alone["tail"] == 1 and alone["tail_ci95"] is None
    json.dumps([same_size, perfect, alone], allow_nan=False)


def test_the_order_of_the_probes_does_not_matter(tail):
    train_counts, predicted, labels = tail
    order = np.random.default_rng(1).permutation(len(labels))
    one = long_tail_report(train_counts, predicted, labels, replicates=10)
    assert long_tail_report(train_counts, predicted[order], labels[order], replicates=10) == one
    assert frequency_curve(train_counts, predicted[order], labels[order]) == frequency_curve(*tail)


@pytest.mark.parametrize("levels", [3, 1000])
def test_rank_correlation_is_scipys(levels):
    rng = np.random.default_rng(levels)
    x, y = rng.integers(0, levels, 60), rng.integers(0, levels, 60)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y)[0])
    assert spearman(x, np.exp(x / levels)) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)
    assert np.isnan(spearman(x, np.ones(60)))


def test_the_curve_puts_every_class_in_one_bin(tail):
    train_counts, predicted, labels = tail
    accuracy = np.array([(predicted[labels == number] == number).mean() for number in range(30)])
    for bins in (1, 5, 12):
        curve = frequency_curve(train_counts, predicted, labels, bins)
        assert sum(point["classes"] for point in curve) == 30 and len(curve) <= bins
        edges = np.geomspace(train_counts.min(), train_counts.max(), bins + 1)
        previous = 0
        for point in curve:
            inside = (train_counts >= point["low"]) & (train_counts <= point["high"])
            assert inside.sum() == point["classes"] and point["low"] > previous
            assert point["accuracy"] == pytest.approx(accuracy[inside].mean())
            assert point["std"] == pytest.approx(accuracy[inside].std())
            assert point["frequency"] == pytest.approx(np.exp(np.log(train_counts[inside]).mean()))
            assert any(low - 1e-6 <= point["low"] and point["high"] <= high + 1e-6 for low, high in pairwise(edges))
            previous = point["high"]
    assert curve[0]["low"] == 1 and curve[-1]["high"] == 5000


def test_the_curve_of_one_frequency_is_a_point():
    labels = np.array([0, 1, 1, 3])
    curve = frequency_curve(np.array([7, 7, 9, 0]), np.array([0, 0, 1, 3]), labels)
    assert [(point["low"], point["high"], point["classes"]) for point in curve] == [(7, 7, 2)]
    assert curve[0]["accuracy"] == 0.75
    assert frequency_curve(np.zeros(4, dtype=int), labels, labels) == []


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match="no labelled samples"):
        long_tail_report(np.ones(3), np.empty(0, dtype=int), np.empty(0, dtype=int))
    with pytest.raises(ValueError, match=r"class numbers in 0\.\.2"):
        long_tail_report(np.ones(3), np.array([0]), np.array([3]))
