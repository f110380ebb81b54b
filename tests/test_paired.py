"""Paired differences: intervals over samples, and over seeds and samples.

Run: python -m pytest tests/test_paired.py
"""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from util.benchmark.bootstrap import mean_interval
from util.benchmark.paired import compare, difference, holm, two_way_error


def test_a_paired_difference_by_hand():
    a, b = [np.array([1.0, 0, 1, 0]), np.array([0.0, 0, 1, 1])], [np.array([1.0, 1, 1, 0]), np.array([1.0, 1, 1, 1])]
    found = compare(a, b, np.arange(4), scale=100.0)
    assert (found["a"], found["b"], found["difference"]) == (50.0, 87.5, 37.5)
    assert found["difference_of_each_pair"] == [25.0, 50.0] and found["samples"] == 4
    low, high = found["difference_ci95_samples"]
    assert 0 <= low < 37.5 < high <= 100
    assert found["interval_over"] == "seeds and samples"
    assert found["difference_ci95"][0] < low and found["difference_ci95"][1] > high


def test_one_seed_has_the_bootstrap_over_groups():
    rng = np.random.default_rng(0)
    groups = np.array([f"c{i % 7}" for i in range(50)])
    a, b = rng.normal(size=(2, 1, 50))
    found = difference(a, b, groups)
    assert found.mean == pytest.approx((b - a).mean()) and found.p is None and found.over == "samples"
    assert found.ci95 == pytest.approx(mean_interval((b - a)[0], groups))
    assert found.sign == 0 and difference(a, a + 1, groups).sign == 1 and difference(a, a - 1, groups).sign == -1
    assert difference(a[:, :1], b[:, :1], groups[:1]).ci95 is None


def test_samples_without_a_value_are_left_out():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 3, 20))
    full = difference(a[:, 4:], b[:, 4:], np.arange(16))
    a[0, 0] = a[2, 1] = b[1, 2] = np.nan
    b[0, 3] = np.inf
    assert difference(a, b, np.arange(20)) == full and full.samples == 16
    with pytest.raises(ValueError, match="no sample"):
        difference(a * np.nan, b, np.arange(20))
    with pytest.raises(ValueError, match="same seeds and samples"):
        difference(a, b[:2], np.arange(20))


def test_the_error_of_a_balanced_layout_is_the_analysis_of_variance():
    """Against mean squares from their definition, with degrees of freedom by Satterthwaite."""
    rng = np.random.default_rng(2)
    d = rng.normal(size=(4, 1)) + rng.normal(size=(1, 30)) + 0.5 * rng.normal(size=(4, 30))
    rows, columns = d.mean(axis=1, keepdims=True), d.mean(axis=0, keepdims=True)
    ms_seed = 30 * ((rows - d.mean()) ** 2).sum() / 3
    ms_sample = 4 * ((columns - d.mean()) ** 2).sum() / 29
    ms_rest = ((d - rows - columns + d.mean()) ** 2).sum() / (3 * 29)
    total = ms_seed + ms_sample - ms_rest
    error, freedom = two_way_error(d, np.arange(30))
    assert error == pytest.approx(np.sqrt(total / d.size))
    assert freedom == pytest.approx(total**2 / (ms_seed**2 / 3 + ms_sample**2 / 29 + ms_rest**2 / 87))


def test_one_figure_per_run_is_students_paired_test():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 6, 1))
    found = difference(a, b, np.array(["test"]))
    expected = stats.ttest_rel(b[:, 0], a[:, 0])
    assert found.p == pytest.approx(expected.pvalue) and found.over == "seeds"
    assert found.ci95 == pytest.approx(list(expected.confidence_interval(0.95)))
    assert found.ci95_samples is None


def test_many_seeds_of_one_mind_leave_the_variance_of_clusters():
    """Where the runs agree the interval is that of the groups: a bootstrap over them, here for unequal groups."""
    rng = np.random.default_rng(4)
    codes = np.repeat(np.arange(60), rng.integers(1, 9, 60))
    d = (rng.normal(size=60)[codes] + rng.normal(size=len(codes))) * np.ones((3, 1))
    found = difference(np.zeros_like(d), d, codes)
    width = np.diff(found.ci95)[0]
    assert width == pytest.approx(np.diff(found.ci95_samples)[0], rel=0.08)
    assert found.ci95 == pytest.approx(found.ci95_samples, abs=0.1 * width)


def test_a_difference_without_spread():
    same = np.ones((3, 4))
    found = difference(same, same, np.arange(4))
    assert found.ci95 == [0, 0] and found.p == 1 and found.sign == 0
    assert difference(same, same + 1, np.arange(4)).p == 0


@pytest.mark.parametrize("seed_spread", [0.0, 0.2, 1.0])
def test_the_interval_of_five_seeds_covers_the_truth(seed_spread):
    """In 95 % of simulated studies, with characters of unequal size; a bootstrap over samples alone does not."""
    rng = np.random.default_rng(5)
    codes = np.repeat(np.arange(25), rng.integers(1, 8, 25))
    covered, narrow, repeats = 0, 0, 300
    for _ in range(repeats):
        runs, characters = rng.normal(0, seed_spread, (5, 1)), rng.normal(0, 1, 25)[codes]
        d = 0.7 + runs + characters + rng.normal(0, 1, (5, len(codes)))
        found = difference(np.zeros_like(d), d, codes)
        covered += found.ci95[0] <= 0.7 <= found.ci95[1]
        narrow += found.ci95_samples[0] <= 0.7 <= found.ci95_samples[1]
    assert 0.91 <= covered / repeats <= 0.99
    assert seed_spread < 1 or narrow / repeats < 0.8


def test_holm_is_closed_testing_by_bonferroni():
    """A hypothesis falls where every set of hypotheses with it does: the definition, over all sets."""
    rng = np.random.default_rng(6)
    for _ in range(20):
        p = rng.random(5) ** 3
        sets = [s for size in range(1, 6) for s in combinations(range(5), size)]
        expected = [min(1, max(len(s) * p[list(s)].min() for s in sets if i in s)) for i in range(5)]
        assert holm(p) == pytest.approx(expected)
    assert holm([]) == [] and holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
