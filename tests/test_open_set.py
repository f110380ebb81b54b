"""Open-set figures: against loops over every threshold, scikit-learn and closed forms.

Run: python -m pytest tests/test_open_set.py
"""

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc

from util.benchmark.bootstrap import multiplicities
from util.benchmark.open_set import chosen_threshold, open_set_report, oscr, oscr_curve, sensitivity

FPRS = (0.001, 0.01, 0.1)


def probes(known: int = 150, unknown: int = 120, *, seed: int = 0, decimals: int | None = None, distance: float = 1.5):
    """known_max, known_correct, unknown_max; a sure probe is more often right. decimals: many scores are equal."""
    rng = np.random.default_rng(seed)
    scores = [rng.normal(distance, 1, known), rng.normal(0, 1, unknown)]
    scores = scores if decimals is None else [part.round(decimals) for part in scores]
    return scores[0], rng.random(known) < 1 / (1 + np.exp(-1 - scores[0])), scores[1]


def report(known_max, correct, unknown_max, **options) -> dict:
    groups = [np.arange(len(part)) % 12 for part in (known_max, unknown_max)]
    return open_set_report(known_max, correct, unknown_max, *groups, **{"replicates": 5, **options})


def brute_oscr(known_max, correct, unknown_max) -> float:
    """Dhamija's curve at every threshold there is: at each score, between neighbours, and beyond the ends."""
    scores = np.unique(np.concatenate([known_max, unknown_max]))
    thresholds = [-np.inf, *scores, *((scores[1:] + scores[:-1]) / 2), scores[0] - 1, scores[-1] + 1]
    points = []
    for t in thresholds:
        ccr = sum(1 for s, right in zip(known_max, correct, strict=True) if right and s > t) / len(known_max)
        points.append((sum(1 for s in unknown_max if s >= t) / len(unknown_max), ccr))
    points.sort()
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))


def brute_dir(known_max, hit, unknown_max, fpr: float) -> float:
    """The best share of hits over all thresholds that keep the false accepts."""
    best = 0.0
    for t in np.unique(unknown_max):
        if sum(unknown_max > t) / len(unknown_max) <= fpr + 1e-12:
            best = max(best, sum(1 for s, h in zip(known_max, hit, strict=True) if h and s > t) / len(known_max))
    return best


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_oscr_is_the_loop_over_thresholds(decimals):
    for seed in range(3):
        data = probes(60, 50, seed=seed, decimals=decimals)
        assert oscr(*data) == pytest.approx(brute_oscr(*data), abs=1e-12)
        assert report(*data)["oscr"] == oscr(*data)
        curve = oscr_curve(*data)
        assert np.trapezoid(curve["ccr"], curve["fpr"]) == pytest.approx(oscr(*data), abs=1e-12)


@pytest.mark.parametrize("decimals", [None, 1])
def test_the_curve_ends_in_the_closed_set_accuracy(decimals):
    known_max, correct, unknown_max = data = probes(decimals=decimals)
    curve = oscr_curve(*data)
    assert (curve["fpr"][0], curve["ccr"][0]) == (0, 0)
    assert (curve["fpr"][-1], curve["ccr"][-1]) == (1, correct.mean())
    assert report(*data)["closed_set_accuracy"] == correct.mean()
    assert (np.diff(curve["fpr"]) >= 0).all() and (np.diff(curve["ccr"]) >= 0).all()
    for fpr, ccr, t in zip(curve["fpr"][2:-1:2], curve["ccr"][2:-1:2], curve["threshold"][2:-1:2], strict=True):
        assert fpr == pytest.approx(np.mean(unknown_max >= t)) and ccr == np.mean(correct & (known_max > t))


def test_oscr_and_auroc_meet_where_every_probe_is_right():
    known_max, correct, unknown_max = probes()
    everything = np.ones_like(correct)
    found = report(known_max, everything, unknown_max)
    assert found["oscr"] == pytest.approx(found["auroc"], abs=1e-12)
    assert report(known_max, correct, unknown_max)["oscr"] < min(found["auroc"], correct.mean())
    none = report(known_max, ~everything, unknown_max)
    assert none["oscr"] == 0 and none["dir_at_far"]["0.1"] == 0 and none["auroc"] == found["auroc"]


def test_equal_scores_count_against():
    ones = np.ones(20)
    found = report(ones, ones > 0, ones)
    assert found["oscr"] == 0 and found["auroc"] == 0.5 and found["fpr95"] == 1
    assert (
        found["dir_at_far"]["0.1"]
        == found["tpr_at_fpr"]["0.1"]
        == found["operating_points"]["0.1"]["realised_fpr"]
        == 0
    )


@pytest.mark.parametrize("decimals", [None, 1])
def test_rates_at_a_far_are_the_loop_over_thresholds(decimals):
    known_max, correct, unknown_max = probes(200, 1000, decimals=decimals)
    rng = np.random.default_rng(1)
    mate_rank = np.where(correct, 1, rng.integers(2, 12, 200))
    mate_score = np.where(correct, known_max, known_max - rng.random(200))
    found = report(known_max, correct, unknown_max, mate_rank=mate_rank, mate_score=mate_score)
    for fpr in FPRS:
        key = f"{fpr:g}"
        assert found["tpr_at_fpr"][key] == brute_dir(known_max, known_max > -99, unknown_max, fpr)
        assert found["ccr_at_fpr"][key] == found["dir_at_far"][key] == brute_dir(known_max, correct, unknown_max, fpr)
        assert found["dir_at_far_rank5"][key] == brute_dir(mate_score, mate_rank <= 5, unknown_max, fpr)
        assert found["dir_at_far"][key] <= found["dir_at_far_rank5"][key]
        assert found["operating_points"][key]["realised_fpr"] <= fpr
    assert "dir_at_far_rank5" not in report(known_max, correct, unknown_max)


@pytest.mark.parametrize("decimals", [None, 1])
def test_auroc_and_fpr95_are_scikit_learns(decimals):
    known_max, correct, unknown_max = probes(decimals=decimals)
    found = report(known_max, correct, unknown_max)
    truth, scores = np.repeat([1, 0], [150, 120]), np.concatenate([known_max, unknown_max])
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    fpr, tpr, _ = sklearn_roc(truth, scores, drop_intermediate=False)
    assert found["fpr95"] == pytest.approx(fpr[np.argmax(tpr >= 0.95 - 1e-12)], abs=1e-12)


def test_normal_distributions_have_the_figures_of_the_textbook():
    known_max, _, unknown_max = probes(100_000, 100_000, distance=2.0)
    right = np.random.default_rng(5).random(100_000) < 0.8  # right or wrong whatever the score
    found = report(known_max, right, unknown_max, replicates=2)
    assert found["auroc"] == pytest.approx(norm.cdf(math.sqrt(2)), abs=0.003)
    assert found["oscr"] == pytest.approx(0.8 * norm.cdf(math.sqrt(2)), abs=0.006)
    assert found["fpr95"] == pytest.approx(norm.sf(2 + norm.ppf(0.05)), abs=0.01)
    for fpr in FPRS:
        assert found["dir_at_far"][f"{fpr:g}"] == pytest.approx(0.8 * norm.sf(norm.isf(fpr) - 2), abs=0.015)


def test_the_order_of_the_probes_changes_nothing():
    known_max, correct, unknown_max = probes(decimals=1)
    groups = np.arange(150) % 12, np.arange(120) % 7
    rng = np.random.default_rng(0)
    a, b = rng.permutation(150), rng.permutation(120)
    options = {"replicates": 20, "val": probes(seed=1, decimals=1)}
    one = open_set_report(known_max, correct, unknown_max, *groups, **options)
    other = open_set_report(known_max[a], correct[a], unknown_max[b], groups[0][a], groups[1][b], **options)
    assert one == other


# --- thresholds -------------------------------------------------------------------------------------------------


def test_a_threshold_is_set_on_validation_and_tried_on_the_test():
    val, test = probes(300, 400, seed=1), probes(seed=2)
    found = report(*test, val=val)
    chosen = found["threshold"]
    assert sum(val[2] > chosen["value"]) == 4 and chosen["value"] in val[2]  # FAR 0.01 of 400
    assert chosen["far_target"] == 0.01 and "4 of 400" in chosen["rule"]
    assert chosen["val"] == {"dir": np.mean(val[1] & (val[0] > chosen["value"])), "far": 0.01}
    assert chosen["test"]["dir"] == np.mean(test[1] & (test[0] > chosen["value"]))
    assert chosen["test"]["far"] == np.mean(test[2] > chosen["value"])
    low, high = chosen["test"]["dir_ci95"]
    assert low <= chosen["test"]["dir"] <= high
    other = report(*probes(seed=9), val=val)
    assert other["threshold"]["value"] == chosen["value"]  # whatever the test holds


def test_with_few_validation_probes_a_larger_far_is_taken_and_said():
    chosen = chosen_threshold(probes(30, 40))
    assert chosen["far_target"] == 0.1 and "FAR 0.01 needs more" in chosen["rule"] and chosen["val"]["far"] == 0.1
    assert "10 negatives or more" in chosen_threshold(probes(30, 9))["skipped"]
    assert "no unknown" in chosen_threshold(probes(30, 0))["skipped"]
    found = report(*probes())
    assert "no validation probes" in found["threshold"]["skipped"]
    assert found["threshold_sensitivity"] == found["threshold"]


@pytest.mark.parametrize("threshold", [0.8, -0.8])
def test_sensitivity_is_the_metric_at_each_threshold(threshold):
    known_max, correct, unknown_max = probes()
    rows = sensitivity(threshold, known_max, correct, unknown_max, offsets=(0.05, 0.1))
    assert [row["offset"] for row in rows] == [-0.1, -0.05, 0, 0.05, 0.1]
    assert (np.diff([row["threshold"] for row in rows]) > 0).all()
    for row in rows:
        t = threshold + row["offset"] * abs(threshold)
        named = (known_max > t).sum() + (unknown_max > t).sum()
        right = (correct & (known_max > t)).sum()
        precision, recall = right / named, right / len(known_max)
        assert row["threshold"] == pytest.approx(t) and row["dir"] == recall
        assert row["far"] == np.mean(unknown_max > t)
        assert row["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert sensitivity(99.0, known_max, correct, unknown_max)[5]["f1"] == 0


def test_the_slope_is_that_of_the_distribution():
    """DIR(t) of a normal distribution with every probe right falls by its density."""
    rng = np.random.default_rng(0)
    known_max, unknown_max = rng.normal(3, 1, 200_000), rng.normal(0, 1, 200_000)
    right = np.ones(200_000, bool)
    found = report(known_max, right, unknown_max, val=(known_max, right, unknown_max), replicates=2)
    t = found["threshold"]["value"]
    assert found["threshold"]["slope_ddir_dt"] == pytest.approx(-norm.pdf(t - 3), rel=0.1)
    flat = report(known_max[:50], right[:50], unknown_max[:50], val=(known_max, right, np.zeros(100)), replicates=2)
    assert flat["threshold"]["value"] == 0 and flat["threshold"]["slope_ddir_dt"] is None


# --- intervals --------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_repeated_probes():
    """Against a bootstrap spelt out, which draws known and unknown identities apart."""
    known_max, correct, unknown_max = probes(80, 60, decimals=1)
    known_groups, unknown_groups = np.arange(80) % 9, np.arange(60) % 8
    threshold, replicates = 0.7, []
    val = (known_max, correct, np.r_[np.full(98, -5.0), threshold, 9.0])
    for weights in multiplicities(17, 25, 3, np.repeat([0, 1], [9, 8])):
        times = weights[:9][known_groups], weights[9:][unknown_groups]
        known, right, unknown = (
            np.repeat(known_max, times[0]),
            np.repeat(correct, times[0]),
            np.repeat(unknown_max, times[1]),
        )
        replicates.append({
            "auroc": roc_auc_score(np.repeat([1, 0], [len(known), len(unknown)]), np.r_[known, unknown]),
            "oscr": brute_oscr(known, right, unknown), "dir": brute_dir(known, right, unknown, 0.1),
            "tpr": brute_dir(known, known > -99, unknown, 0.1), "fixed": np.mean(right & (known > threshold)),
            "far": np.mean(unknown > threshold), "rank5": brute_dir(known, known % 0.2 < 0.1, unknown, 0.1),
        })  # fmt: skip
    found = open_set_report(
        known_max, correct, unknown_max, known_groups, unknown_groups, val=val, replicates=25, seed=3,
        mate_rank=np.where(known_max % 0.2 < 0.1, 5, 6), mate_score=known_max,
    )  # fmt: skip
    assert found["threshold"]["value"] == threshold
    intervals = {
        "auroc": found["auroc_ci95"], "oscr": found["oscr_ci95"], "dir": found["dir_at_far_ci95"]["0.1"],
        "tpr": found["tpr_at_fpr_ci95"]["0.1"], "fixed": found["threshold"]["test"]["dir_ci95"],
        "far": found["threshold"]["test"]["far_ci95"], "rank5": found["dir_at_far_rank5_ci95"]["0.1"],
    }  # fmt: skip
    for name, interval in intervals.items():
        expected = np.quantile([values[name] for values in replicates], [0.025, 0.975])
        np.testing.assert_allclose(interval, expected, atol=1e-12, err_msg=name)
    assert found["ccr_at_fpr_ci95"] == found["dir_at_far_ci95"]


def test_one_identity_gives_no_interval():
    known_max, correct, unknown_max = probes()
    groups = np.arange(150) % 12, np.zeros(120, int)
    found = open_set_report(known_max, correct, unknown_max, *groups, val=probes(seed=1), replicates=5)
    assert found["auroc_ci95"] is None and found["dir_at_far_ci95"]["0.1"] is None
    assert found["threshold"]["test"]["dir_ci95"] is None and 0 < found["auroc"] < 1


def test_what_cannot_be_reported_says_so():
    known_max, correct, unknown_max = probes(50, 60)
    found = report(known_max, correct, unknown_max)
    for name in ("tpr_at_fpr", "ccr_at_fpr", "dir_at_far", "operating_points"):
        assert "100 negatives or more" in found[name]["0.01"]["skipped"]
    assert found["dir_at_far_ci95"]["0.01"] is None and "warning" in found["operating_points"]["0.1"]
    assert report(known_max[:0], correct[:0], unknown_max) == {"skipped": "no known probes"}
    assert report(known_max, correct, unknown_max[:0]) == {"skipped": "no unknown probes"}
    broken = known_max.copy()
    broken[0] = np.nan
    for bad in (
        {"known_max": broken},
        {"unknown_max": broken},
        {"mate_rank": np.ones(50), "mate_score": broken},
        {"val": (broken, correct, unknown_max)},
    ):
        with pytest.raises(ValueError, match="1 scores are NaN"):
            report(**{"known_max": known_max, "correct": correct, "unknown_max": unknown_max, **bad})
