"""Figures on scores of pairs: against brute force, scikit-learn and closed forms; the pair list they come from.

Run: python -m pytest tests/test_verification.py
"""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc

from util.benchmark import verification
from util.benchmark.bootstrap import multiplicities
from util.benchmark.pairs import KINDS, all_positive_pairs, pair_scores, sample_pairs, uniform_pairs
from util.benchmark.verification import (
    Ranks,
    accuracy_at,
    best_threshold,
    false_accepts,
    roc_curve,
    verification_report,
)


def gaussian(positives: int, negatives: int, distance: float = 1.5, seed: int = 0, decimals: int | None = None):
    """Scores and `same` of pairs, all of identities of their own; decimals: round, so that many are equal."""
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.normal(distance, 1, positives), rng.normal(0, 1, negatives)])
    scores = scores if decimals is None else scores.round(decimals)
    order = rng.permutation(len(scores))
    return scores[order].astype(np.float32), (np.arange(len(scores)) < positives)[order]


def identities_of(same: np.ndarray, identities: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.integers(0, identities, len(same))
    return a, np.where(same, a, (a + rng.integers(1, identities, len(same))) % identities)


def report(scores, same, **options) -> dict:
    return verification_report(scores, same, *identities_of(same), **{"replicates": 5, **options})


def brute_tpr(positive, negative, fpr: float) -> float:
    """From the definition: the lowest threshold among the negatives that lets in at most that share of them."""
    allowed = [t for t in negative if sum(negative > t) <= fpr * len(negative) + 1e-9]
    return float(np.mean(positive > min(allowed)))


def sklearn_eer(scores, same) -> float:
    fpr, tpr, _ = sklearn_roc(same, scores, drop_intermediate=False)
    steps = np.linspace(0, 1, len(fpr))  # along the curve, where both rates are functions
    crossing = brentq(lambda s: np.interp(s, steps, fpr) + np.interp(s, steps, tpr) - 1, 0, 1, xtol=1e-14)
    return float(np.interp(crossing, steps, fpr))


# --- one curve --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_auc_and_eer_are_scikit_learns(decimals):
    scores, same = gaussian(300, 900, decimals=decimals)
    found = report(scores, same)
    assert found["auc"] == pytest.approx(roc_auc_score(same, scores), abs=1e-12)
    assert found["eer"] == pytest.approx(sklearn_eer(scores, same), abs=1e-9)
    assert (found["positives"], found["negatives"]) == (300, 900)


def test_auc_and_eer_of_two_normal_distributions():
    distance, n = 1.5, 200_000
    ranks = Ranks(*(np.random.default_rng(i).normal(mean, 1, n) for i, mean in enumerate((distance, 0))))
    assert ranks.roc().auc() == pytest.approx(norm.cdf(distance / math.sqrt(2)), abs=4 / math.sqrt(12 * n) * 1.5)
    assert ranks.roc().eer() == pytest.approx(norm.cdf(-distance / 2), abs=4 * 0.5 / math.sqrt(n))
    for fpr in (0.001, 0.01, 0.1):
        assert ranks.roc().tpr(fpr) == pytest.approx(norm.sf(norm.isf(fpr) - distance), abs=0.015)


def test_equal_scores_are_half_won_and_half_wrong():
    roc = Ranks(np.zeros(4), np.zeros(6)).roc()
    assert roc.auc() == 0.5 and roc.eer() == 0.5
    roc = Ranks(np.array([1.0, 2.0]), np.array([-1.0, 0.0])).roc()
    assert roc.auc() == 1 and roc.eer() == 0
    roc = Ranks(np.array([-1.0, 0.0]), np.array([1.0, 2.0])).roc()
    assert roc.auc() == 0 and roc.eer() == 1


@pytest.mark.parametrize("decimals", [None, 1])
def test_tpr_at_fpr_is_the_definition(decimals):
    scores, same = gaussian(200, 1000, decimals=decimals)
    found = report(scores, same, fprs=(0.001, 0.0025, 0.01, 0.1))
    for fpr in (0.001, 0.0025, 0.01, 0.1):
        point = found["operating_points"][f"{fpr:g}"]
        assert found["tpr_at_fpr"][f"{fpr:g}"] == brute_tpr(scores[same], scores[~same], fpr)
        assert point["threshold"] in scores[~same] and point["k"] == math.floor(1000 * fpr)
        assert point["realised_fpr"] == np.mean(scores[~same] > np.float32(point["threshold"])) <= fpr
        if decimals is None:
            assert point["realised_fpr"] == point["k"] / 1000


def test_k_is_not_a_victim_of_floating_point():
    assert 0.001 * 3000 != 3 or 0.07 * 100 != 7  # the point of it
    for fpr, n, k in ((0.001, 3000, 3), (0.07, 100, 7), (0.29, 100, 29), (0.1, 30, 3), (0.001, 999, 0)):
        assert false_accepts(fpr, n) == k
    assert false_accepts(0.1, 4_999_999_995) == 499_999_999
    for fpr in (0, 1, -0.1):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            false_accepts(fpr, 100)


def test_too_few_negatives_are_refused_and_few_are_warned_of():
    scores, same = gaussian(50, 999)
    found = report(scores, same)
    assert (
        "1000 negatives or more (10000 for a steady figure), there are 999" in found["tpr_at_fpr"]["0.001"]["skipped"]
    )
    assert found["tpr_at_fpr_ci95"]["0.001"] is None and "skipped" in found["operating_points"]["0.001"]
    assert (
        found["operating_points"]["0.01"]["k"] == 9
        and "9 false accepts" in found["operating_points"]["0.01"]["warning"]
    )
    assert "warning" not in found["operating_points"]["0.1"]


def test_pairs_that_cannot_be_scored_are_not_passed_over():
    scores, same = gaussian(20, 30)
    scores[3] = np.nan
    with pytest.raises(ValueError, match="1 scores are NaN"):
        report(scores, same)
    scores, same = gaussian(20, 30)
    a, b = identities_of(same)
    with pytest.raises(ValueError, match="does not agree"):
        verification_report(scores, ~same, a, b)
    assert report(scores[same], same[same]) == {"skipped": "no pairs of two identities"}
    assert report(scores[~same], same[~same]) == {"skipped": "no pairs of one identity"}


def test_the_order_of_the_pairs_changes_nothing():
    scores, same = gaussian(300, 2000, decimals=2)
    a, b = identities_of(same)
    order = np.random.default_rng(1).permutation(len(scores))
    one = verification_report(scores, same, a, b, replicates=20)
    other = verification_report(scores[order], same[order], b[order], a[order], replicates=20)
    assert one == other


# --- weights and intervals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [None, 1])
def test_weights_are_repetitions(decimals):
    scores, same = gaussian(120, 700, decimals=decimals)
    rng = np.random.default_rng(2)
    ranks = Ranks(scores[same], scores[~same])
    for _ in range(5):
        weights = [rng.poisson(1, count) for count in (120, 700)]
        roc = ranks.roc(weights[0][ranks.positive_order], weights[1][ranks.negative_order])
        repeated = Ranks(np.repeat(scores[same], weights[0]), np.repeat(scores[~same], weights[1])).roc()
        assert (roc.positives, roc.negatives) == (weights[0].sum(), weights[1].sum())
        assert roc.auc() == pytest.approx(repeated.auc(), abs=1e-12)
        assert roc.eer() == pytest.approx(repeated.eer(), abs=1e-12)
        assert roc.pairs_won() == repeated.pairs_won()
        for rate in (0.002, 0.01, 0.1, 0.95):
            assert roc.threshold(rate) == repeated.threshold(rate)
            assert roc.tpr(rate) == repeated.tpr(rate)
            assert roc.fpr_at_tpr(rate) == repeated.fpr_at_tpr(rate)
    empty = ranks.roc(np.zeros(120, dtype=int), np.zeros(700, dtype=int))
    assert all(math.isnan(value) for value in (empty.auc(), empty.eer(), empty.tpr(0.1), empty.fpr_at_tpr(0.95)))


def test_intervals_are_those_of_repeated_pairs():
    """Against a bootstrap spelt out: draw identities, repeat each pair by the product of its identities' counts."""
    scores, same = gaussian(100, 800)
    a, b = identities_of(same, 12)
    drawn = {"auc": [], "eer": [], "0.1": []}
    for weights in multiplicities(12, 15, 7):
        times = np.where(same, weights[a], weights[a] * weights[b])
        repeated, kind = np.repeat(scores, times), np.repeat(same, times)
        drawn["auc"].append(roc_auc_score(kind, repeated))
        drawn["eer"].append(sklearn_eer(repeated, kind))
        drawn["0.1"].append(brute_tpr(repeated[kind], repeated[~kind], 0.1))
    found = verification_report(scores, same, a, b, replicates=15, seed=7)
    expected = {name: np.quantile(values, [0.025, 0.975]) for name, values in drawn.items()}
    np.testing.assert_allclose(found["auc_ci95"], expected["auc"], atol=1e-9)
    np.testing.assert_allclose(found["eer_ci95"], expected["eer"], atol=1e-9)
    np.testing.assert_allclose(found["tpr_at_fpr_ci95"]["0.1"], expected["0.1"], atol=1e-9)


def test_many_pairs_of_few_identities_do_not_make_an_interval_narrow():
    """Scores that depend on the identity alone: a thousand pairs of each say no more than one."""
    a = np.repeat(np.arange(10), 1000)
    quality = np.random.default_rng(0).normal(0, 1, 10)
    same = np.concatenate([np.ones(10_000, bool), np.zeros(2000, bool)])
    other = np.arange(2000)
    scores = np.concatenate([quality[a], np.random.default_rng(1).normal(0, 1, 2000)])
    codes = np.concatenate([a, other % 10]), np.concatenate([a, (other + 1 + other // 10 % 9) % 10])
    low, high = verification_report(scores, same, *codes, replicates=200)["auc_ci95"]
    assert high - low > 0.2  # independent pairs would give 0.03
    assert verification_report(scores, same, *codes, replicates=50) == verification_report(
        scores, same, *codes, replicates=50
    )


def test_intervals_of_long_lists_are_from_a_part_of_them(monkeypatch):
    scores, same = gaussian(4000, 9000)
    a, b = identities_of(same, 400)
    whole = verification_report(scores, same, a, b, replicates=100)
    assert whole["ci_pairs"] == {"positives": 4000, "negatives": 9000}
    monkeypatch.setattr(verification, "CI_POSITIVES", 1000)
    monkeypatch.setattr(verification, "CI_NEGATIVES", 3000)
    part = verification_report(scores, same, a, b, replicates=100)
    assert part["ci_pairs"] == {"positives": 1000, "negatives": 3000}
    assert part["auc"] == whole["auc"] and part["tpr_at_fpr"] == whole["tpr_at_fpr"]
    assert np.diff(part["auc_ci95"]) > np.diff(whole["auc_ci95"])


# --- curves and thresholds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [None, 2])
def test_points_of_the_curve_are_on_the_curve(decimals):
    scores, same = gaussian(3000, 20_000, decimals=decimals)
    curve = roc_curve(scores, same, points=50)
    assert len(curve["fpr"]) <= 160
    for fpr, tpr, threshold in zip(*curve.values(), strict=True):
        assert fpr == np.mean(scores[~same] >= threshold) and tpr == np.mean(scores[same] >= threshold)
    for name in ("fpr", "tpr"):
        assert curve[name][0] == 0 and curve[name][-1] == 1 and (np.diff(curve[name]) >= 0).all()
    assert (np.diff(curve["threshold"]) < 0).all()
    assert np.trapezoid(curve["tpr"], curve["fpr"]) == pytest.approx(roc_auc_score(same, scores), abs=1e-3)
    assert curve["fpr"][curve["fpr"] > 0].min() < 3e-4  # the left end of a logarithmic axis is there
    full = roc_curve(scores[:500], same[:500])
    assert np.trapezoid(full["tpr"], full["fpr"]) == pytest.approx(roc_auc_score(same[:500], scores[:500]), abs=1e-12)


@pytest.mark.parametrize("decimals", [None, 1])
def test_the_best_threshold_is_the_best(decimals):
    scores, same = gaussian(80, 400, decimals=decimals)
    threshold = best_threshold(scores, same)
    tried = [*scores, *(scores + 1e-6), -9.0]
    best = max(accuracy_at(float(t), scores, same)["balanced_accuracy"] for t in tried)
    assert accuracy_at(threshold, scores, same)["balanced_accuracy"] == pytest.approx(best, abs=1e-12)
    assert threshold not in scores  # between two scores: neither is on the edge
    for fpr in (0.01, 0.1):
        threshold = best_threshold(scores, same, fpr=fpr)
        rates = accuracy_at(threshold, scores, same)
        assert rates["fpr"] <= fpr and rates["tpr"] == brute_tpr(scores[same], scores[~same], fpr)
        assert rates["accuracy"] == np.mean((scores > np.float32(threshold)) == same)


def test_a_threshold_needs_pairs_to_choose_from():
    scores, same = gaussian(5, 50)
    with pytest.raises(ValueError, match="needs 100 negatives"):
        best_threshold(scores, same, fpr=0.01)
    with pytest.raises(ValueError, match="positive and negative"):
        best_threshold(scores[same], same[same])
    with pytest.raises(ValueError, match="positive and negative"):
        accuracy_at(0.5, scores[same], same[same])


def test_a_threshold_between_float32_scores_separates_them():
    low = np.float32(0.1)
    high = np.nextafter(low, np.float32(1))
    scores, same = np.array([low, high]), np.array([False, True])
    threshold = best_threshold(scores, same)
    assert accuracy_at(threshold, scores, same)["accuracy"] == 1
    roc = Ranks(scores[same], scores[~same]).roc()
    assert roc.tpr_above(threshold) == 1 and roc.fpr_above(threshold) == 0
    assert roc.at_least(threshold) == (0, 1)


# --- the pair list ----------------------------------------------------------------------------------------------


def as_set(pairs) -> set[tuple[int, int]]:
    return set(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True))


def test_a_pair_list_is_what_it_says():
    labels = np.random.default_rng(0).integers(0, 20, 400)
    pairs = sample_pairs(labels, seed=3, positives_per_identity=25, negatives=5000)
    assert (pairs.a < pairs.b).all() and len(as_set(pairs)) == len(pairs)
    assert ((labels[pairs.a] == labels[pairs.b]) == pairs.same).all()
    assert np.bincount(labels[pairs.a[pairs.same]]).tolist() == [25] * 20
    assert np.bincount(pairs.kind).tolist() == [500, 5000] and (pairs.same == (pairs.kind == 0)).all()
    again = sample_pairs(labels, seed=3, positives_per_identity=25, negatives=5000)
    other = sample_pairs(labels, seed=4, positives_per_identity=25, negatives=5000)
    assert as_set(pairs) == as_set(again) != as_set(other)
    assert len(as_set(pairs) & as_set(other)) < 1000


@pytest.mark.parametrize("hard", [False, True])
def test_a_small_set_gives_every_pair_once(hard):
    labels = np.array([5, 5, 7, 7, 7, 9])
    looks = np.arange(6.0)[:, None] if hard else None
    pairs = sample_pairs(labels, seed=0, negatives=1000, signatures=looks)
    everything = {(i, j): labels[i] == labels[j] for i, j in combinations(range(6), 2)}
    assert {(a, b): same for a, b, same in zip(pairs.a, pairs.b, pairs.same, strict=True)} == everything
    assert len(pairs) == 15 and (pairs.kind == 2).sum() == 2 * hard  # round(0.2 * 11)


@pytest.mark.parametrize("labels", [[], [1], [1, 1], [1, 2]])
def test_sets_too_small_for_a_kind_of_pair(labels):
    labels = np.array(labels, dtype=np.int64)
    pairs = sample_pairs(labels, seed=0)
    assert pairs.same.tolist() == ([bool(labels[0] == labels[1])] if len(labels) == 2 else [])


def test_random_negatives_are_uniform():
    """Every pair of two identities is drawn equally often, whatever the sizes of the identities."""
    labels = np.array([0] * 5 + [1] * 3 + [2] * 2 + [3])[np.random.default_rng(0).permutation(11)]
    counts = {pair: 0 for pair in combinations(range(11), 2) if labels[pair[0]] != labels[pair[1]]}
    for negatives in (8, 30):  # few of them, and more than half, which are drawn in another way
        for seed in range(400):
            pairs = sample_pairs(labels, seed=seed, negatives=negatives)
            for pair in zip(pairs.a[~pairs.same].tolist(), pairs.b[~pairs.same].tolist(), strict=True):
                counts[pair] += 1
    expected = 400 * 38 / len(counts)
    assert len(counts) == 41 and max(abs(count - expected) for count in counts.values()) < 5 * math.sqrt(expected)


def test_positives_are_capped_and_uniform():
    labels = np.array([0] * 12 + [1] * 3)
    drawn = np.zeros((15, 15), dtype=int)
    for seed in range(500):
        a, b = all_positive_pairs(labels, 6, seed)
        assert len(a) == 6 + 3 and (labels[a] == labels[b]).all()
        drawn[a, b] += 1
    rare, often = drawn[12:, 12:], drawn[:12, :12][np.triu_indices(12, 1)]
    assert rare[np.triu_indices(3, 1)].tolist() == [500] * 3
    expected = 500 * 6 / 66
    assert abs(often - expected).max() < 4.5 * math.sqrt(expected)
    everything = all_positive_pairs(labels, None, 0)
    assert len(everything[0]) == 66 + 3 == len(set(zip(*everything, strict=True)))


def test_a_uniform_sample_is_uniform_in_both_kinds():
    labels = np.array([0] * 6 + [1] * 3 + [2])[np.random.default_rng(0).permutation(10)]
    drawn = np.zeros((10, 10), dtype=int)
    for seed in range(600):
        pairs = uniform_pairs(labels, positives=5, negatives=4, seed=seed)
        assert len(pairs) == 9 and pairs.kind.tolist() == [0] * 5 + [1] * 4 and len(as_set(pairs)) == 9
        assert ((labels[pairs.a] == labels[pairs.b]) == pairs.same).all()
        drawn[np.minimum(pairs.a, pairs.b), np.maximum(pairs.a, pairs.b)] += 1
    same = labels[:, None] == labels
    for kind, number, total in ((same, 5, 18), (~same, 4, 27)):
        counts, expected = drawn[kind & (np.triu(np.ones((10, 10)), 1) > 0)], 600 * number / total
        assert len(counts) == total and abs(counts - expected).max() < 4.5 * math.sqrt(expected)
    assert len(uniform_pairs(labels, positives=99, negatives=99, seed=0)) == 45
    assert len(uniform_pairs(labels[:0], positives=9, negatives=9, seed=0)) == 0


def test_hard_negatives_are_the_nearest_by_signature():
    """Six colours, shared by characters: hard negatives share a colour, random ones seldom do."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 60, 3000)
    colours = np.stack(np.unravel_index(labels % 6, (2, 2, 2)), axis=1)
    looks = colours + rng.normal(0, 0.01, (3000, 3))
    pairs = sample_pairs(labels, seed=0, negatives=10_000, signatures=looks, hard_share=0.3)
    assert np.bincount(pairs.kind)[1:].tolist() == [7000, 3000] and len(as_set(pairs)) == len(pairs)
    assert ((labels[pairs.a] == labels[pairs.b]) == pairs.same).all()
    colour = labels % 6
    alike = [np.mean((colour[pairs.a] == colour[pairs.b])[pairs.kind == kind]) for kind in (1, 2)]
    assert alike[1] == 1 and alike[0] < 0.25
    distance = np.linalg.norm(looks[pairs.a] - looks[pairs.b], axis=1)
    others = np.linalg.norm(looks[:, None] - looks[None], axis=2)
    others[labels[:, None] == labels] = np.inf
    assert np.median(distance[pairs.kind == 2]) < np.median(
        np.sort(others, axis=1)[:, 9]
    )  # about as near as the ten nearest
    assert KINDS == ("positive", "random", "hard")


def test_hard_negatives_of_equal_signatures_are_spread():
    """Pictures of one colour are all equally near: no row may be everybody's neighbour."""
    labels = np.arange(900) % 90
    pairs = sample_pairs(labels, seed=0, negatives=5000, signatures=np.zeros((900, 2)), hard_share=1.0)
    assert (pairs.kind == 2).sum() == 5000
    assert np.bincount(np.concatenate([pairs.a, pairs.b])[np.tile(~pairs.same, 2)], minlength=900).max() < 60
    with pytest.raises(ValueError, match="finite"):
        sample_pairs(labels, seed=0, signatures=np.full((900, 2), np.nan))


def test_a_frequent_identity_does_not_hide_its_neighbours():
    labels = np.array([0] * 2000 + list(range(1, 101)))
    looks = np.random.default_rng(0).normal(0, 1, (2100, 2))
    pairs = sample_pairs(labels, seed=0, negatives=10_000, signatures=looks, hard_share=0.02)
    assert (pairs.kind == 2).sum() == 200
    involved = labels[np.concatenate([pairs.a, pairs.b])[np.tile(pairs.kind == 2, 2)]]
    assert len(np.unique(involved)) > 60


def test_scores_of_pairs_are_cosines_whatever_the_block():
    rng = np.random.default_rng(0)
    embeddings = rng.normal(0, 1, (50, 33)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    a, b = rng.integers(0, 50, 333), rng.integers(0, 50, 333)
    scores = pair_scores(embeddings, a, b)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, (embeddings.astype(np.float64) @ embeddings.T)[a, b], atol=1e-6)
    for block in (1, 7, 333):
        assert np.array_equal(pair_scores(embeddings, a, b, block=block), scores)
    embeddings[a[0]] = np.nan
    assert np.isnan(pair_scores(embeddings, a, b)[0])
    assert len(pair_scores(embeddings, a[:0], b[:0])) == 0
