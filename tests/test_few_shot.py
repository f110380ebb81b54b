"""Few-shot episodes and their accuracies against plain loops, scikit-learn, and what they have to keep to.

Run: python -m pytest tests/test_few_shot.py
"""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from util.benchmark.bootstrap import mean_interval
from util.benchmark.few_shot import (
    METHODS,
    Episodes,
    episode_accuracies,
    episodes,
    few_shot_report,
    logistic_scores,
    paired_difference,
    summarise,
)
from util.run.errors import UserError

SIZES = (30, 25, 40, 22, 21, 20, 19, 3, 1, 60)


@pytest.fixture(scope="module")
def people() -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, 12) that are not centred, and labels, which are no class numbers, in disorder."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(100 + 7 * np.arange(len(SIZES)), SIZES))
    x = rng.normal(size=(107 + 7 * len(SIZES), 12))[labels] + 1.5 * rng.normal(size=(len(labels), 12)) + 1.0
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels


# --- episodes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ways", "shots"), [(5, 1), (5, 5), (3, 2), (6, 4)])
def test_an_episode_is_of_different_images_of_its_classes(people, ways, shots):
    _, labels = people
    drawn = episodes(labels, ways=ways, shots=shots, count=200)
    queries = drawn.query.shape[2]
    assert drawn.support.shape == (200, ways, shots) and drawn.query.shape == (200, ways, queries) and queries == 15
    assert drawn.classes.shape == (200, ways)
    for support, query, classes in zip(drawn.support, drawn.query, drawn.classes, strict=True):
        assert len(set(classes)) == ways
        rows = np.concatenate([support, query], axis=1)
        assert len(np.unique(rows)) == rows.size
        assert (labels[rows] == classes[:, None]).all()
    names, sizes = np.unique(labels, return_counts=True)
    assert drawn.eligible.tolist() == names[sizes >= shots + 15].tolist()
    assert drawn.excluded == (sizes < shots + 15).sum() and set(drawn.classes.flat) == set(drawn.eligible)


def test_classes_and_images_are_drawn_evenly(people):
    _, labels = people
    drawn = episodes(labels, ways=5, shots=1, count=3000)
    often = np.array([(drawn.classes == name).any(axis=1).mean() for name in drawn.eligible])
    assert np.abs(often - 5 / 8).max() < 0.04  # 8 classes, sd 0.009
    largest = np.flatnonzero(labels == np.bincount(labels).argmax())  # 60 images, drawn as support 1875 times
    shares = np.bincount(drawn.support.ravel(), minlength=len(labels))[largest]
    assert abs(shares.sum() - 1875) < 150 and shares.min() > 10 and shares.max() < 60


def test_episodes_follow_the_seed_and_nothing_else(people):
    _, labels = people
    first, again, other = (episodes(labels, ways=5, shots=1, count=40, seed=seed) for seed in (0, 0, 1))
    for name in ("support", "query", "classes"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))
    longer = episodes(labels, ways=5, shots=1, count=90)
    assert np.array_equal(longer.query[:40], first.query)
    renamed = episodes(labels * 2 - 5, ways=5, shots=1, count=40)  # names are of no account, their order is
    assert np.array_equal(renamed.query, first.query) and np.array_equal(renamed.classes, first.classes * 2 - 5)


def test_small_classes_mean_fewer_queries():
    labels = np.repeat(np.arange(8), [30, 30, 30, 8, 8, 7, 3, 2])
    drawn = episodes(labels, ways=3, shots=2, count=5)  # at 15 queries 3 of the 7 classes with 3 or more images remain
    assert drawn.query.shape[2] == 6  # at 6 there are 5, at 7 there would be 3
    assert drawn.eligible.tolist() == [0, 1, 2, 3, 4] and drawn.excluded == 3
    all_but_one = episodes(labels, ways=7, shots=2, count=5)
    assert all_but_one.query.shape[2] == 1 and all_but_one.excluded == 1
    assert episodes(np.repeat(np.arange(4), 50), ways=3, shots=5, queries=4, count=5).query.shape[2] == 4


def test_no_two_images_of_a_class_are_from_one_source():
    labels = np.repeat(np.arange(6), 20)
    sources = np.arange(120) // 4  # five pictures of each class, four faces cut from each
    drawn = episodes(labels, ways=5, shots=1, queries=15, count=50, seed=0, sources=sources)
    assert drawn.query.shape[2] == 4  # five sources, one of them is the support
    images = np.concatenate([drawn.support, drawn.query], axis=2)
    for own in images.reshape(-1, 5):
        assert len(set(sources[own].tolist())) == 5 and len(set(labels[own].tolist())) == 1
    assert len(np.unique(images)) == 120  # every image of a source has its turn
    with pytest.raises(UserError, match="2 or more images, and there are 0"):
        episodes(labels, ways=5, shots=1, count=5, seed=0, sources=labels)


def test_too_few_identities_are_an_error_of_one_line():
    labels = np.repeat(np.arange(6), [9, 9, 9, 9, 5, 1])
    with pytest.raises(UserError, match=r"5-way 5-shot episodes need 5 identities with 6 or more images, .* are 4: "):
        episodes(labels, ways=5, shots=5)
    assert len(episodes(labels, ways=5, shots=4, count=3).eligible) == 5


# --- accuracy ---------------------------------------------------------------------------------------------------


def judged(embeddings: np.ndarray, drawn: Episodes, mean: np.ndarray, judge) -> np.ndarray:
    """(E, ways) accuracies of a scikit-learn classifier, episode by episode, on centred and normalised features."""
    x = embeddings.astype(np.float64) - mean
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    accuracies = []
    for support, query in zip(drawn.support, drawn.query, strict=True):
        places = np.arange(len(support))
        judge.fit(x[support.ravel()], np.repeat(places, support.shape[1]))
        right = judge.predict(x[query.ravel()]).reshape(query.shape) == places[:, None]
        accuracies.append(right.mean(axis=1))
    return np.array(accuracies)


JUDGES = {
    "prototype": NearestCentroid(),
    "nearest": KNeighborsClassifier(1, algorithm="brute"),
    "logistic": LogisticRegression(tol=1e-8, max_iter=2000),
}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # scikit-learn's variance of a single shot
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("ways", "shots"), [(5, 1), (4, 5)])
def test_accuracies_are_scikit_learns(people, method, ways, shots):
    x, labels = people
    drawn = episodes(labels, ways=ways, shots=shots, count=60 if method != "logistic" else 15)
    for mean in (None, x.mean(axis=0)):
        got = episode_accuracies(x, drawn, method, mean)
        want = judged(x, drawn, 0 if mean is None else mean, JUDGES[method])
        assert got.shape == want.shape == (len(drawn.support), ways)
        np.testing.assert_allclose(got, want)
    assert 0.3 < got.mean() < 0.95


def test_the_base_mean_matters(people):
    x, labels = people
    drawn = episodes(labels, ways=5, shots=1, count=300)
    plain, centred = (episode_accuracies(x, drawn, base_mean=mean).mean() for mean in (None, x.mean(axis=0)))
    assert centred > plain + 0.01


@pytest.mark.parametrize(
    ("ways", "shots", "dim", "strength"), [(5, 1, 32, 1), (20, 5, 48, 1), (5, 5, 3, 20), (3, 2, 8, 0.1)]
)
def test_logistic_regression_reaches_scikit_learns_optimum(ways, shots, dim, strength):
    rng = np.random.default_rng(ways * shots)
    support = rng.normal(size=(3, ways, 1, dim)) + rng.normal(size=(3, ways, shots, dim)) + 2
    query = rng.normal(size=(3, 30, dim)) + 2
    got = logistic_scores(torch.tensor(support).float(), torch.tensor(query).float(), strength).softmax(dim=2)
    for episode in range(3):
        judge = LogisticRegression(C=strength, tol=1e-10, max_iter=20000)
        judge.fit(support[episode].reshape(-1, dim), np.repeat(np.arange(ways), shots))
        want = judge.predict_proba(query[episode])
        np.testing.assert_allclose(got[episode].numpy(), want, atol=1e-4)


def test_logistic_regression_says_when_it_has_not_converged():
    with pytest.raises(RuntimeError, match="not converged in 3 steps"):
        logistic_scores(torch.randn(1, 5, 2, 8), torch.randn(1, 4, 8), max_steps=3)


@pytest.mark.parametrize("method", METHODS)
def test_equal_scores_count_against_the_true_class(method):
    labels = np.repeat(np.arange(5), 20)
    drawn = episodes(labels, ways=5, shots=2, count=7)
    assert (episode_accuracies(np.ones((100, 4), dtype=np.float32), drawn, method) == 0).all()
    perfect = np.eye(5, dtype=np.float32)[labels]
    assert (episode_accuracies(perfect, drawn, method) == 1).all()


def test_many_episodes_are_the_same_as_each_alone(people):
    x, labels = people
    drawn = episodes(labels, ways=4, shots=2, count=120)  # more than are computed at a time
    whole = episode_accuracies(x, drawn)
    for number in (0, 49, 50, 119):
        alone = Episodes(drawn.support[[number]], drawn.query[[number]], drawn.classes[[number]], drawn.eligible, 0)
        assert np.array_equal(episode_accuracies(x, alone)[0], whole[number])


def test_embeddings_that_are_not_finite_are_refused(people):
    x, labels = people
    broken = x.copy()
    broken[5, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        episode_accuracies(broken, episodes(labels, ways=3, shots=1, count=2))
    with pytest.raises(ValueError, match="not finite"):
        few_shot_report(broken, labels)


# --- the report -------------------------------------------------------------------------------------------------


def test_the_report_holds_every_setting_and_method(people):
    x, labels = people
    mean = x.mean(axis=0)
    report = few_shot_report(x, labels, ((5, 1), (3, 5), (20, 1)), mean, count=50, replicates=40, seed=3)
    assert list(report) == ["5way_1shot", "3way_5shot", "20way_1shot"]
    assert "20 identities" in report["20way_1shot"]["skipped"]
    for name, ways, shots in (("5way_1shot", 5, 1), ("3way_5shot", 3, 5)):
        got, drawn = report[name], episodes(labels, ways=ways, shots=shots, count=50, seed=3)
        assert (got["episodes"], got["queries"], got["classes"]) == (50, 15, len(drawn.eligible))
        assert got["excluded_classes"] == drawn.excluded == len(SIZES) - got["classes"]
        for method in METHODS:
            figures = got if method == "prototype" else got[method]
            accuracies = episode_accuracies(x, drawn, method, mean)
            means = accuracies.mean(axis=1)
            assert figures["mean"] == pytest.approx(means.mean())
            assert figures["ci95"] == pytest.approx(1.96 * means.std(ddof=1) / np.sqrt(50))
            want = mean_interval(accuracies.ravel(), drawn.classes.ravel(), replicates=40, seed=3)
            assert figures["class_bootstrap_ci95"] == pytest.approx(want)
    assert json.loads(json.dumps(report)) == report


def test_the_headline_is_the_prototypes(people):
    x, labels = people
    got = few_shot_report(x, labels, ((5, 1),), methods=("nearest", "prototype"), count=5, replicates=5)["5way_1shot"]
    assert "nearest" in got and "prototype" not in got and "logistic" not in got
    with pytest.raises(ValueError, match="prototype"):
        few_shot_report(x, labels, methods=("nearest",))


def test_other_classes_would_differ_more_than_other_episodes():
    """With many episodes of few classes the interval over episodes is narrow, the one over classes is not."""
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(10), 40)
    spread = np.linspace(0.2, 3, 10)[labels][:, None]  # some classes are much harder than others
    x = (rng.normal(size=(10, 8))[labels] + spread * rng.normal(size=(400, 8))).astype(np.float32)
    got = few_shot_report(x, labels, ((5, 1),), methods=("prototype",), count=1000, replicates=200)["5way_1shot"]
    low, high = got["class_bootstrap_ci95"]
    assert low < got["mean"] < high and high - low > 5 * 2 * got["ci95"]


def test_a_paired_difference_is_narrower_than_two_means():
    rng = np.random.default_rng(2)
    hard = rng.uniform(0.2, 0.9, 500)
    a, b = hard + 0.03 + 0.01 * rng.normal(size=500), hard + 0.01 * rng.normal(size=500)
    got = paired_difference(a, b)
    assert got["mean"] == pytest.approx((a - b).mean()) and got["ci95"] < summarise(a)["ci95"] / 5
    assert got["ci95"] == pytest.approx(1.96 * (a - b).std(ddof=1) / np.sqrt(500))
    assert got["mean"] - got["ci95"] > 0
    with pytest.raises(ValueError, match="same episodes"):
        paired_difference(a, b[:-1])
    assert summarise(a[:1])["ci95"] is None
