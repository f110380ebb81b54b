"""Intervals by bootstrap over identities: against the closed form, their coverage, pairing, strata and gaps.

Run: python -m pytest tests/test_bootstrap.py
"""

import math

import numpy as np
import pytest
from scipy.stats import norm

from util.benchmark.bootstrap import intervals, mean_interval, multiplicities


def mean_of(values: np.ndarray):
    """The statistic of one value for each identity."""
    return lambda weights: {"mean": weights @ values / weights.sum()}


def test_as_many_identities_are_drawn_as_there_are():
    drawn = np.array(list(multiplicities(50, 2000, 0)))
    assert drawn.shape == (2000, 50) and (drawn.sum(axis=1) == 50).all() and drawn.min() == 0
    np.testing.assert_allclose(drawn.mean(axis=0), 1, atol=0.12)
    assert np.mean(drawn == 0) == pytest.approx((1 - 1 / 50) ** 50, abs=0.01)  # not drawn at all: about 1 / e
    assert abs(np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]) < 0.1  # replicates are independent


def test_the_seed_and_the_replicate_are_the_key():
    first = list(multiplicities(30, 5, seed=4))
    assert all(np.array_equal(a, b) for a, b in zip(first, multiplicities(30, 9, seed=4), strict=False))
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], next(multiplicities(30, 1, seed=5)))


def test_strata_keep_their_sizes():
    strata = np.array([0] * 10 + [7] * 3 + [2] * 20)
    drawn = np.array(list(multiplicities(33, 200, 0, strata)))
    for kind, size in ((0, 10), (7, 3), (2, 20)):
        assert (drawn[:, strata == kind].sum(axis=1) == size).all()
    assert len({tuple(row) for row in drawn[:, strata == 7]}) == 10  # every multiset of 3 out of 3
    values = np.where(strata == 2, 100.0, 0.0)
    low, high = intervals(mean_of(values), 33, strata=strata, replicates=50)["mean"]
    assert low == high == pytest.approx(2000 / 33)  # what differs between strata only does not vary
    low, high = intervals(mean_of(values), 33, replicates=200)["mean"]
    assert high - low > 20


def test_the_interval_of_a_mean_is_the_textbooks():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = intervals(mean_of(values), 400, replicates=4000)["mean"]
    error = values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() + norm.ppf(0.025) * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + norm.ppf(0.975) * error, abs=0.1 * error)
    narrow = intervals(mean_of(values), 400, replicates=4000, level=0.5)["mean"]
    assert narrow[1] - narrow[0] == pytest.approx(2 * norm.ppf(0.75) * error, rel=0.1)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Identities with an effect of their own, and five pictures each."""
    rng, hits = np.random.default_rng(1), {"identities": 0, "pictures": 0}
    for seed in range(200):
        effect = rng.normal(0, 1, 60)
        values = (effect[:, None] + rng.normal(0, 0.5, (60, 5))).ravel()
        for name, groups in (("identities", np.repeat(np.arange(60), 5)), ("pictures", np.arange(300))):
            low, high = mean_interval(values, groups, replicates=150, seed=seed)
            hits[name] += low <= 0 <= high
    assert 180 <= hits["identities"] <= 199  # 95 % of 200, within three standard errors
    assert hits["pictures"] < 150  # what happens to those who take pictures for independent


def test_a_difference_is_paired():
    """Two models that differ little on identities that differ much."""
    rng = np.random.default_rng(0)
    one = rng.normal(0.5, 0.2, 100)
    other = one + 0.02 + rng.normal(0, 0.01, 100)

    def statistic(weights):
        first, second = weights @ one / 100, weights @ other / 100
        return {"one": first, "other": second, "difference": second - first}

    found = intervals(statistic, 100, replicates=300)
    assert found["one"][1] > found["other"][0]  # apart, the intervals overlap
    low, high = found["difference"]
    assert 0.015 < low < 0.02 < high < 0.025
    assert intervals(mean_of(one), 100, replicates=300)["mean"] == pytest.approx(found["one"])  # one seed, one sample


def test_a_figure_that_a_replicate_lacks_is_left_out():
    def statistic(weights):
        seldom = math.nan if weights[0] == 0 else 1.0 + (weights[0] > 1)
        return {"seldom": seldom, "mostly_missing": math.nan if weights[0] < 2 else 1.0, "never": math.nan}

    found = intervals(statistic, 10, replicates=200)
    assert found == {"seldom": [1.0, 2.0], "mostly_missing": None, "never": None}


def test_one_identity_has_no_interval():
    assert intervals(lambda weights: {"a": 1.0, "b": 2.0}, 1) == {"a": None, "b": None}
    assert mean_interval(np.array([0.2, 0.4]), np.array([7, 7])) is None


def test_the_mean_weighs_pictures_and_takes_any_codes():
    """An identity of many pictures counts as often as it has pictures; codes may have gaps."""
    values, groups = np.array([1.0] * 8 + [0.0] * 2), np.array([900] * 8 + [-3] * 2)
    assert mean_interval(values, groups, replicates=100) == [0.0, 1.0]
    drawn = [weights @ [0, 8] / (weights @ [2, 8]) for weights in multiplicities(2, 100, 3)]
    assert mean_interval(values, groups, replicates=100, seed=3, level=0.5) == np.quantile(drawn, [0.25, 0.75]).tolist()
    rng = np.random.default_rng(0)
    order = rng.permutation(10)
    assert mean_interval(values[order], groups[order], seed=3, replicates=9) == mean_interval(
        values, groups, seed=3, replicates=9
    )
