"""Ranking figures against brute force, scikit-learn, and the rule of iCartoonFace as its scorer walks it.

Run: python -m pytest tests/test_retrieval.py
"""

import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve

from util.benchmark.bootstrap import mean_interval
from util.benchmark.retrieval import (
    icartoonface_ranks,
    icartoonface_report,
    precision_recall_curves,
    retrieval_ranks,
    retrieval_report,
)


def unit_rows(rng, *shape) -> np.ndarray:
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def sign_rows(rng, *shape) -> np.ndarray:
    """Rows of +-1/4 (D = 16): of length 1, products are exact and often equal."""
    return rng.choice([-0.25, 0.25], size=shape).astype(np.float32)


# --- retrieval --------------------------------------------------------------------------------------------------


def walk(scores: np.ndarray, relevant: np.ndarray) -> tuple[float, int]:
    """AP and the first mate's rank by walking down one ranking, whoever is no mate first among equals."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], relevant[i]))
    precisions, found, first = [], 0, 0
    for place, image in enumerate(order, start=1):
        if relevant[image]:
            found += 1
            first = first or place
            precisions.append(found / place)
    return (float(np.mean(precisions)) if precisions else np.nan), first


@pytest.mark.parametrize("rows", [unit_rows, sign_rows])
@pytest.mark.parametrize("same_set", [False, True])
@pytest.mark.parametrize("block", [None, 1, 13])
def test_ranks_are_those_of_a_walk_down_the_ranking(rows, same_set, block):
    rng = np.random.default_rng(0)
    gallery, labels = rows(rng, 90, 16), rng.integers(0, 12, 90)
    labels[0] = 12  # an image without a mate
    queries, query_labels = (gallery, labels) if same_set else (rows(rng, 40, 16), rng.integers(0, 15, 40))
    precision, first = retrieval_ranks(queries, query_labels, gallery, labels, same_set=same_set, block=block)
    assert first.dtype == np.int64
    for q, (query, label) in enumerate(zip(queries, query_labels, strict=True)):
        others = np.arange(90) != q if same_set else np.ones(90, dtype=bool)
        want = walk((gallery @ query)[others], (labels == label)[others])
        assert (precision[q], first[q]) == pytest.approx(want, nan_ok=True)
    assert (first == 0).any() and np.array_equal(first == 0, np.isnan(precision))


def test_mean_average_precision_is_scikit_learns():
    rng = np.random.default_rng(1)
    gallery, labels = unit_rows(rng, 150, 16), rng.integers(0, 10, 150)
    queries, query_labels = unit_rows(rng, 60, 16), rng.integers(0, 11, 60)
    got = retrieval_report(queries, query_labels, gallery, labels, same_set=False, replicates=100, seed=3)
    mated = query_labels < 10
    values = np.array(
        [
            average_precision_score(labels == c, gallery @ q)
            for q, c in zip(queries, query_labels, strict=True)
            if c < 10
        ]
    )
    assert got["map"] == pytest.approx(values.mean())
    assert got["map_ci95"] == pytest.approx(mean_interval(values, query_labels[mated], replicates=100, seed=3))
    best = labels[np.argsort(-(queries @ gallery.T), axis=1)] == query_labels[:, None]
    for k in (1, 5):
        hits = best[mated, :k].any(axis=1)
        assert got[f"rank{k}"] == pytest.approx(hits.mean())
        assert got[f"rank{k}_ci95"] == pytest.approx(mean_interval(hits, query_labels[mated], replicates=100, seed=3))
    assert (got["queries"], got["excluded_queries"]) == (mated.sum(), 60 - mated.sum())
    assert json.loads(json.dumps(got)) == got


def test_the_image_itself_is_no_mate():
    x = np.eye(4, dtype=np.float32)
    labels = np.array([0, 0, 1, 1])
    apart = retrieval_report(x, labels, x, labels, same_set=False, replicates=5)
    assert apart["rank1"] == 1
    alone = retrieval_report(x, labels, x, labels, same_set=True, replicates=5)  # all others score 0: mate last of 3
    assert alone["rank1"] == 0 and alone["rank5"] == 1 and alone["map"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="the queries have to be the gallery"):
        retrieval_report(x, labels, x, labels[::-1], same_set=True)


def test_the_order_of_rows_does_not_matter():
    rng = np.random.default_rng(2)
    x, labels = sign_rows(rng, 70, 16), rng.integers(0, 9, 70)
    order = rng.permutation(70)
    options = {"same_set": True, "replicates": 20}
    one, other = (retrieval_report(x[o], labels[o], x[o], labels[o], **options) for o in (np.arange(70), order))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert other[name] == pytest.approx(value)


def test_without_any_mate_retrieval_is_skipped():
    x = np.eye(3, dtype=np.float32)
    assert "skipped" in retrieval_report(x, np.arange(3), x, np.arange(3), same_set=True)
    assert "skipped" in retrieval_report(x, np.arange(3), x[:0], np.arange(0), same_set=False)


def test_numbers_that_are_not_finite_are_refused():
    x, labels = np.eye(3, dtype=np.float32), np.zeros(3, dtype=np.int64)
    broken = np.where(x == 1, np.nan, x)
    for pair in ((broken, x), (x, broken)):
        with pytest.raises(ValueError, match="not finite"):
            retrieval_report(pair[0], labels, pair[1], labels, same_set=False)
    with pytest.raises(ValueError, match="not finite"):
        icartoonface_ranks(broken, np.array([[0, 1]]), np.array([2]))


# --- iCartoonFace -----------------------------------------------------------------------------------------------


def official_walk(embeddings: np.ndarray, pairs: np.ndarray, distractors: np.ndarray, first: str) -> np.ndarray:
    """Right or wrong for each pair as the official scorer decides: rank every image by cosine distance to the anchor,
    walk down, skip whoever is no distractor; right if the mate comes before a distractor. (P,) bool.

    first: who comes first among equals, "distractors" or "others".
    """
    x = embeddings.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    distance = 1 - x @ x.T
    is_distractor = np.isin(np.arange(len(x)), distractors)
    tie = ~is_distractor if first == "distractors" else is_distractor
    decisions = []
    for anchor, mate in pairs:
        for image in np.lexsort((tie, distance[anchor])):
            if image == mate:
                decisions.append(True)
                break
            if is_distractor[image]:
                decisions.append(False)
                break
    return np.array(decisions)


def cartoon_test(rng, rows, people: int = 15, distractors: int = 40):
    """Embeddings, all ordered pairs of images of one identity, distractor rows, identities (-1 = distractor)."""
    identities = np.concatenate([np.repeat(np.arange(people), rng.integers(2, 6, people)), np.full(distractors, -1)])
    identities = rng.permutation(identities)
    embeddings = rows(rng, len(identities), 16)
    if rows is unit_rows:
        embeddings += 1.2 * np.append(unit_rows(rng, people, 16), np.zeros((1, 16)), axis=0)[identities]
    same = (identities[:, None] == identities) & (identities >= 0) & ~np.eye(len(identities), dtype=bool)
    return embeddings.astype(np.float32), rng.permutation(np.argwhere(same)), np.flatnonzero(identities < 0), identities


def test_decisions_are_the_official_ones():
    x, pairs, distractors, _ = cartoon_test(np.random.default_rng(0), unit_rows)
    right = icartoonface_ranks(x, pairs, distractors) == 1
    assert 0.1 < right.mean() < 0.9
    for first in ("distractors", "others"):  # nobody is equal to anybody here
        assert np.array_equal(right, official_walk(x, pairs, distractors, first))


def test_equal_scores_count_against_the_mate():
    x, pairs, distractors, _ = cartoon_test(np.random.default_rng(1), sign_rows, distractors=8)
    right = icartoonface_ranks(x, pairs, distractors) == 1
    assert np.array_equal(right, official_walk(x, pairs, distractors, "distractors"))
    kinder = official_walk(x, pairs, distractors, "others")
    assert (kinder & ~right).any() and not (right & ~kinder).any()


@pytest.mark.parametrize("dim", [7, 64, 513])
def test_a_duplicate_of_the_mate_among_the_distractors_makes_the_pair_wrong(dim):
    """Cosines of one picture twice may differ in the last bit, by where in a matrix product they are computed."""
    rng = np.random.default_rng(dim)
    x = unit_rows(rng, 243, dim)
    x[123:] = x[3:123]  # 120 mates of each of the pictures 0, 1, 2, and the same pictures as distractors
    pairs = np.array([[anchor, mate] for anchor in range(3) for mate in range(3, 123)])
    ranks = icartoonface_ranks(x, pairs, np.arange(123, 243)).reshape(3, 120)
    assert (np.sort(ranks, axis=1) == np.arange(2, 122)).all()


def test_ranks_count_the_distractors_that_are_no_farther():
    rng = np.random.default_rng(3)
    x, pairs, distractors, _ = cartoon_test(rng, unit_rows)
    y = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    want = [1 + sum(y[a] @ y[d] >= y[a] @ y[b] for d in distractors) for a, b in pairs]
    assert icartoonface_ranks(x, pairs, distractors).tolist() == want
    scaled = x * rng.uniform(0.1, 10, size=(len(x), 1)).astype(np.float32)  # the norm is of no account
    assert np.array_equal(icartoonface_ranks(scaled, pairs, distractors), want)


def test_many_anchors_are_the_same_as_each_alone():
    rng = np.random.default_rng(4)
    x, pairs, distractors, _ = cartoon_test(rng, unit_rows, people=120, distractors=30)
    assert len(np.unique(pairs[:, 0])) > 300  # more than one block
    alone = np.concatenate([icartoonface_ranks(x, pair[None], distractors) for pair in pairs])
    assert np.array_equal(icartoonface_ranks(x, pairs, distractors), alone)


def test_the_report_is_the_mean_over_listed_ordered_pairs():
    rng = np.random.default_rng(5)
    x, pairs, distractors, identities = cartoon_test(rng, unit_rows)
    pairs = pairs[: len(pairs) // 2]  # a list that is not symmetric
    ranks = icartoonface_ranks(x, pairs, distractors)
    got = icartoonface_report(x, pairs, distractors, identities, replicates=80, seed=2)
    for name, values in (("rank1", ranks == 1), ("rank5", ranks <= 5), ("mrr", 1 / ranks)):
        assert got[name] == pytest.approx(values.mean())
        want = mean_interval(values, identities[pairs[:, 0]], replicates=80, seed=2)
        assert got[f"{name}_ci95"] == pytest.approx(want)
    assert (got["pairs"], got["distractors"]) == (len(pairs), len(distractors))
    assert "official" in got["variant"]
    order = rng.permutation(len(x))
    place = np.argsort(order)
    moved = icartoonface_report(x[order], place[pairs], place[distractors], identities[order], replicates=80, seed=2)
    assert moved == got


def test_pairs_that_make_no_sense_are_refused():
    x = np.eye(5, dtype=np.float32)
    for pairs, distractors in (([[0, 0]], [3]), ([[0, 3]], [3]), (np.empty((0, 2), int), [3]), ([[0, 1]], [])):
        with pytest.raises(ValueError, match="pair"):
            icartoonface_ranks(x, np.array(pairs), np.array(distractors, dtype=np.int64))


# --- precision and recall ---------------------------------------------------------------------------------------


def scored(rng, samples: int, classes: int, levels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = rng.normal(size=(samples, classes)), rng.integers(0, classes - 1, samples)  # the last has none
    scores[np.arange(samples), labels] += 1.5
    return (scores if levels is None else np.round(scores * levels / 4)).astype(np.float32), labels


@pytest.mark.parametrize("levels", [None, 3])
def test_average_precision_is_scikit_learns_with_and_without_ties(levels):
    rng = np.random.default_rng(0)
    scores, labels = scored(rng, 120, 9, levels)
    truth = np.eye(9, dtype=int)[labels]
    got = precision_recall_curves(scores, labels)
    assert got["micro_ap"] == pytest.approx(average_precision_score(truth, scores, average="micro"))
    want = [average_precision_score(truth[:, c], scores[:, c]) for c in range(8)]
    np.testing.assert_allclose(got["class_ap"][:8], want)
    assert np.isnan(got["class_ap"][8]) and got["classes_without_images"] == 1
    assert got["macro_ap"] == pytest.approx(np.mean(want))


@pytest.mark.parametrize("levels", [None, 3])
def test_the_curve_is_scikit_learns_thinned(levels):
    rng = np.random.default_rng(1)
    scores, labels = scored(rng, 200, 7, levels)
    precision, recall, _ = precision_recall_curve(np.eye(7, dtype=int)[labels].ravel(), scores.ravel())
    points = {(round(r, 9), round(p, 9)) for r, p in zip(recall, precision, strict=True)}
    for count in (1000, 20):
        got = precision_recall_curves(scores, labels, points=count)
        mine = [(round(r, 9), round(p, 9)) for r, p in zip(got["recall"], got["precision"], strict=True)]
        assert set(mine) <= points and (np.diff(got["recall"]) > 0).all()
        assert got["recall"][-1] == 1 and len(mine) <= count
    assert len(precision_recall_curves(scores, labels, points=1000)["recall"]) == len(np.unique(recall[recall > 0]))


def test_the_order_of_images_does_not_matter_and_nan_is_refused():
    rng = np.random.default_rng(2)
    scores, labels = scored(rng, 80, 5)
    order = rng.permutation(80)
    one, other = precision_recall_curves(scores, labels), precision_recall_curves(scores[order], labels[order])
    for name in one:
        np.testing.assert_allclose(other[name], one[name])
    scores[3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        precision_recall_curves(scores, labels)
