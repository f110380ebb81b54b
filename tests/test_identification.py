"""Closed-set decisions and figures against scikit-learn's, and the cases that it does not speak of.

Run: python -m pytest tests/test_identification.py
"""

import json

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    recall_score,
    top_k_accuracy_score,
)
from sklearn.neighbors import KNeighborsClassifier

from util.benchmark.bootstrap import multiplicities
from util.benchmark.identification import (
    NOBODY,
    class_centres,
    classification_scores,
    closed_set_report,
    cluster_order,
    confusion_counts,
    knn_classes,
    nearest_classes,
    per_class_table,
    rank_classes,
)


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


# --- centres and nearest classes --------------------------------------------------------------------------------


def unit_rows(rng, *shape) -> np.ndarray:
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def identities(rng, images: int, classes: int, dim: int = 16, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, D) around a direction of their class, and class numbers; each class has a first image."""
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, images - classes)])
    x = unit_rows(rng, classes, dim)[labels] + spread * unit_rows(rng, images, dim)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels


def test_centres_are_the_directions_of_the_class_means():
    rng = np.random.default_rng(0)
    x, labels = identities(rng, 200, 11)
    labels[labels == 4] = 5
    got = class_centres(x, labels, 12)
    assert got.shape == (12, 16) and got.dtype == np.float32
    for number in range(12):
        if number in (4, 11):
            assert np.isnan(got[number]).all()
        else:
            mean = x[labels == number].astype(np.float64).mean(0)
            np.testing.assert_allclose(got[number], mean / np.linalg.norm(mean), atol=1e-6)
    order = rng.permutation(200)
    np.testing.assert_allclose(class_centres(x[order], labels[order], 12), got, atol=1e-6)


def test_rows_that_cancel_out_have_a_centre_of_zeros():
    x = np.array([[1, 0], [-1, 0], [0, 1]], dtype=np.float32)
    assert class_centres(x, np.array([0, 0, 1]), 2).tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize(("classes", "k"), [(3, 5), (255, 5), (256, 1), (257, 7), (1000, 20)])
def test_nearest_classes_are_those_of_a_full_sort(classes, k):
    rng = np.random.default_rng(classes)
    probes, centres = unit_rows(rng, 61, 24), unit_rows(rng, classes, 24)
    cosine = probes.astype(np.float64) @ centres.astype(np.float64).T
    want = np.argsort(-cosine, axis=1)[:, :k]
    for block in (None, 1, 7, 61, 100):
        numbers, scores = nearest_classes(probes, centres, k, block=block)
        assert numbers.dtype == np.int64 and scores.dtype == np.float32
        assert np.array_equal(numbers, want)
        np.testing.assert_allclose(scores, np.take_along_axis(cosine, want, axis=1), atol=1e-6)


def test_of_equal_scores_the_lower_class_number_comes_first():
    rng = np.random.default_rng(0)
    probes = rng.integers(-1, 2, size=(40, 6)).astype(np.float32)
    centres = rng.integers(-1, 2, size=(700, 6)).astype(np.float32)  # whole numbers: products are exact, ties many
    want = np.argsort(-(probes @ centres.T), axis=1, kind="stable")[:, :9]
    assert np.array_equal(nearest_classes(probes, centres, 9)[0], want)


def test_classes_without_samples_are_refused_or_never_named():
    rng = np.random.default_rng(1)
    probes, centres = unit_rows(rng, 30, 8), unit_rows(rng, 9, 8)
    empty = np.array([0, 5, 8])
    centres[empty] = np.nan
    with pytest.raises(ValueError, match="centres hold a number that is not finite"):
        nearest_classes(probes, centres)
    numbers, scores = nearest_classes(probes, centres, 8, skip_empty=True)
    rest = np.setdiff1d(np.arange(9), empty)
    want = rest[np.argsort(-(probes @ centres[rest].T), axis=1)]
    assert np.array_equal(numbers[:, :6], want)
    assert (numbers[:, 6:] == NOBODY).all() and np.isneginf(scores[:, 6:]).all()
    with pytest.raises(ValueError, match="nothing to compare"):
        nearest_classes(probes, np.full((4, 8), np.nan), skip_empty=True)
    centres[1, 3] = np.nan  # a damaged centre is no class without samples
    with pytest.raises(ValueError, match="not finite"):
        nearest_classes(probes, centres, skip_empty=True)


def test_no_probes_have_no_answers():
    numbers, scores = nearest_classes(np.zeros((0, 8)), np.eye(8))
    assert numbers.shape == scores.shape == (0, 5)


def test_read_only_embeddings_are_left_as_they_are(recwarn):
    rng = np.random.default_rng(2)
    probes, centres = unit_rows(rng, 5, 8), unit_rows(rng, 7, 8)
    before = probes.copy(), centres.copy()
    probes.flags.writeable = centres.flags.writeable = False
    nearest_classes(probes, centres)
    assert np.array_equal(probes, before[0]) and np.array_equal(centres, before[1])
    assert not [w for w in recwarn if "writable" in str(w.message)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_embeddings_that_are_not_finite_are_refused(bad):
    x, labels = np.eye(4, dtype=np.float32), np.arange(4)
    broken = x.copy()
    broken[2, 1] = bad
    for call in (
        lambda: class_centres(broken, labels, 4),
        lambda: nearest_classes(broken, x),
        lambda: knn_classes(broken, x, labels),
        lambda: knn_classes(x, broken, labels),
    ):
        with pytest.raises(ValueError, match="not finite"):
            call()
    with pytest.raises(ValueError, match=r"class numbers in 0\.\.2"):
        class_centres(x, labels, 3)
    with pytest.raises(ValueError, match="class numbers"):
        class_centres(x, labels - 1, 4)


# --- k-NN -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("neighbours", "temperature"), [(1, 0.07), (20, 0.07), (20, 1e-4), (20, 10.0), (500, 0.07)])
def test_the_vote_is_a_softmax_weighted_one(neighbours, temperature):
    rng = np.random.default_rng(neighbours)
    gallery, labels = identities(rng, 120, 9)
    probes, _ = identities(rng, 50, 9)
    got = knn_classes(probes, gallery, labels, neighbours, temperature, k=4)
    cosine = probes.astype(np.float64) @ gallery.astype(np.float64).T
    for row, ranked in zip(cosine, got, strict=True):
        votes: dict[int, float] = {}
        for image in np.argsort(-row)[:neighbours]:
            votes[labels[image]] = votes.get(labels[image], 0) + np.exp((row[image] - row.max()) / temperature)
        want = sorted(votes, key=lambda number: (-votes[number], number))[:4]
        assert ranked.tolist() == want + [NOBODY] * (4 - len(want))


def test_the_vote_is_scikit_learns_with_the_same_weights():
    rng = np.random.default_rng(5)
    gallery, labels = identities(rng, 300, 12)
    probes, _ = identities(rng, 80, 12)
    judge = KNeighborsClassifier(
        20, algorithm="brute", metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(gallery, labels)
    assert np.array_equal(knn_classes(probes, gallery, labels)[:, 0], judge.predict(probes))


def test_equal_votes_go_to_the_lower_class_number():
    gallery = np.eye(4, dtype=np.float32)
    probe = np.ones((1, 4), dtype=np.float32) / 2
    assert knn_classes(probe, gallery, np.array([7, 3, 5, 3]), k=3).tolist() == [[3, 5, 7]]
    assert knn_classes(probe, gallery, np.array([7, 3, 5, 9]), k=5).tolist() == [[3, 5, 7, 9, NOBODY]]


def test_the_order_of_the_gallery_does_not_matter():
    rng = np.random.default_rng(6)
    gallery, labels = identities(rng, 90, 7)
    probes, _ = identities(rng, 30, 7)
    order = rng.permutation(90)
    want = knn_classes(probes, gallery, labels)
    assert np.array_equal(knn_classes(probes, gallery[order], labels[order], block=4), want)


# --- rankings of a head -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_ranking_of_scores_is_a_stable_sort(dtype):
    rng = np.random.default_rng(0)
    logits = rng.integers(-9, 10, size=(50, 300)).astype(dtype)
    before = logits.copy()
    assert np.array_equal(rank_classes(logits, 6), np.argsort(-logits, axis=1, kind="stable")[:, :6])
    assert np.array_equal(rank_classes(logits[:, :3]), np.argsort(-logits[:, :3], axis=1, kind="stable"))
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("classes", [2, 4, 5, 6, 40, 300])
def test_with_labels_the_truth_comes_after_its_equals(classes):
    rng = np.random.default_rng(classes)
    logits = rng.integers(0, 4, size=(80, classes)).astype(np.float32)
    labels = rng.integers(0, classes, 80)
    got = rank_classes(logits, 5, labels)
    for row, (scores, label) in enumerate(zip(logits, labels, strict=True)):
        want = sorted(range(classes), key=lambda c: (-scores[c], c == label, c))[:5]
        assert got[row].tolist() == want


def test_infinite_scores_are_ranked_and_nan_is_not():
    logits = np.array([[-np.inf, 0, np.inf], [np.nan, 0, 1], [-np.inf, -np.inf, -np.inf]])
    for labels in (None, np.array([1, 1, 1])):
        got = rank_classes(logits, 5, labels).tolist()
        assert got[0] == [2, 1, 0] and got[1] == [NOBODY] * 3
        assert got[2] == ([0, 1, 2] if labels is None else [0, 2, 1])


# --- the report -------------------------------------------------------------------------------------------------


def ranking(rng, samples: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rankings (N, 5), labels and logits of probes of which about half are named right."""
    logits, labels = rng.normal(size=(samples, classes)), rng.integers(0, classes, samples)
    logits[np.arange(samples), labels] += 1.5
    return rank_classes(logits, 5, labels), labels, logits


def test_the_report_equals_scikit_learns():
    rng = np.random.default_rng(0)
    ranked, labels, logits = ranking(rng, 400, 30)
    ranked, labels, logits = (x[labels != 7] for x in (ranked, labels, logits))
    got = closed_set_report(ranked, labels, 30, replicates=50)
    assert got["top1"] == pytest.approx(accuracy_score(labels, ranked[:, 0]))
    assert got["top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=np.arange(30)))
    f1 = f1_score(labels, ranked[:, 0], labels=np.arange(30), average="macro", zero_division=0)
    assert got["macro_f1"] == pytest.approx(f1)
    recall = recall_score(labels, ranked[:, 0], labels=np.unique(labels), average="macro")
    assert got["balanced_accuracy"] == pytest.approx(recall)
    assert (got["classes"], got["classes_without_probes"], got["probes"]) == (30, 1, len(labels))
    scores = classification_scores(logits, labels)
    assert scores == {name: got[name] for name in ("top1", "top5", "macro_f1")}
    for name in ("top1", "top5", "macro_f1", "balanced_accuracy"):
        low, high = got[f"{name}_ci95"]
        assert low < got[name] < high and isinstance(got[name], float)
    assert json.loads(json.dumps(got)) == got


def f1_among(predicted: np.ndarray, labels: np.ndarray, number: int, weights: np.ndarray) -> float:
    """F1 of a class whose images come once, among 7 other classes that come in the proportion they are drawn in."""
    shares = np.where(labels == number, 1, weights[labels] * 7 / max(1, 8 - weights[number]))
    return f1_score(labels == number, predicted == number, sample_weight=shares, zero_division=0)


def test_intervals_are_those_of_whole_identities_drawn_anew():
    """Every replicate's figures, from the images of the drawn identities themselves, by scikit-learn."""
    rng = np.random.default_rng(3)
    ranked, labels, _ = ranking(rng, 150, 8)
    got = closed_set_report(ranked, labels, 8, replicates=60, seed=4)
    samples = []
    for weights in multiplicities(8, 60, 4):
        rows = np.repeat(np.arange(150), weights[labels])
        true, named = labels[rows], ranked[rows]
        f1 = [f1_among(ranked[:, 0], labels, number, weights) for number in range(8)]
        recall = recall_score(true, named[:, 0], labels=np.arange(8), average=None, zero_division=0)
        top5 = (named == true[:, None]).any(1).mean()
        samples.append([(named[:, 0] == true).mean(), top5, weights @ f1 / 8, weights @ recall / 8])
    want = np.quantile(samples, [0.025, 0.975], axis=0).T
    names = ("top1", "top5", "macro_f1", "balanced_accuracy")
    np.testing.assert_allclose(np.mean(samples, axis=0), [got[name] for name in names], atol=0.015)  # no bias
    np.testing.assert_allclose([got[f"{name}_ci95"] for name in names], want, atol=1e-12)


def test_the_order_of_the_probes_does_not_matter():
    rng = np.random.default_rng(1)
    ranked, labels, _ = ranking(rng, 200, 15)
    order = rng.permutation(200)
    options = {"classes": 15, "replicates": 20, "seed": 9}
    assert closed_set_report(ranked[order], labels[order], **options) == closed_set_report(ranked, labels, **options)


def test_nobody_is_wrong_and_short_rankings_are_refused():
    labels = np.array([0, 1, 2, 2])
    ranked = np.full((4, 5), NOBODY)
    ranked[0, 0], ranked[1, 1] = 0, 1
    got = closed_set_report(ranked, labels, 6, replicates=5)
    assert (got["top1"], got["top5"]) == (0.25, 0.5)
    assert got["macro_f1"] == pytest.approx(1 / 6) and got["balanced_accuracy"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="needs 5 ranked ones, not 4"):
        closed_set_report(ranked[:, :4], labels, 6)
    assert closed_set_report(rank_classes(np.eye(3)[labels]), labels, 3, replicates=5)["top5"] == 1
    with pytest.raises(ValueError, match=r"predicted classes must be in 0\.\.5"):
        closed_set_report(ranked + 6, labels, 6)
    with pytest.raises(ValueError, match="no labelled samples"):
        closed_set_report(ranked[:0], labels[:0], 6)


def test_one_identity_has_no_interval():
    got = closed_set_report(np.array([[1, 0], [0, 1]]), np.array([1, 1]), 2)
    assert got["top1"] == 0.5 and got["top1_ci95"] is None and got["balanced_accuracy_ci95"] is None
    assert got["macro_f1"] == pytest.approx((0 + 2 / 3) / 2)


# --- who is taken for whom --------------------------------------------------------------------------------------


def test_confusions_are_the_cells_of_scikit_learns_matrix():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 20, 300), rng.integers(0, 20, 300)
    true, claimed, counts = confusion_counts(predicted, labels, 25)
    matrix = np.zeros((25, 25), dtype=np.int64)
    matrix[true, claimed] = counts
    assert np.array_equal(matrix, confusion_matrix(labels, predicted, labels=np.arange(25)))
    assert (counts > 0).all() and (np.diff(true * 25 + claimed) > 0).all()
    predicted[:40] = NOBODY
    assert confusion_counts(predicted, labels, 25)[2].sum() == 260


def test_the_table_of_classes_equals_scikit_learns():
    rng = np.random.default_rng(1)
    ranked, labels, _ = ranking(rng, 300, 14)
    predicted = np.where(ranked[:, 0] == 3, 4, ranked[:, 0])  # 3 is never predicted
    predicted, labels = predicted[labels != 6], labels[labels != 6]  # 6 has no images
    table = per_class_table(predicted, labels, 16)  # 14 and 15 have neither
    precision, recall, f1, images = precision_recall_fscore_support(
        labels, predicted, labels=np.arange(16), zero_division=np.nan
    )
    assert [row["class"] for row in table] == list(range(16))
    assert [row["images"] for row in table] == images.tolist()
    for name, want in (("precision", precision), ("recall", recall)):
        got = np.array([row[name] for row in table], dtype=np.float64)  # None becomes NaN
        np.testing.assert_allclose(got, want)
    np.testing.assert_allclose([row["f1"] for row in table], np.nan_to_num(f1))
    assert np.mean([row["f1"] for row in table]) == pytest.approx(classification_f1(predicted, labels, 16))
    matrix = confusion_matrix(labels, predicted, labels=np.arange(16))
    np.fill_diagonal(matrix, 0)
    for row, wrong in zip(table, matrix, strict=True):
        assert row["confusions"] == wrong.max()
        assert row["most_confused_with"] == (int(wrong.argmax()) if wrong.any() else None)
    assert json.loads(json.dumps(table)) == table


def classification_f1(predicted: np.ndarray, labels: np.ndarray, classes: int) -> float:
    return classification_scores(np.eye(classes)[predicted], labels)["macro_f1"]


def test_images_that_nobody_is_named_for_count_in_the_table():
    table = per_class_table(np.array([NOBODY, 0, 1, 0]), np.array([0, 0, 0, 1]), 2)
    assert table[0] == {
        "class": 0, "images": 3, "precision": 0.5, "recall": 1 / 3, "f1": 0.4,
        "most_confused_with": 1, "confusions": 1,
    }  # fmt: skip


def test_confused_classes_come_to_lie_beside_each_other():
    rng = np.random.default_rng(2)
    family = rng.permutation(60) // 4  # 15 families of four that are taken for one another
    labels = np.repeat(np.arange(60), 40)
    kin = np.array([rng.choice(np.flatnonzero(family == family[label])) for label in labels])
    predicted = np.where(rng.random(len(labels)) < 0.5, kin, labels)
    predicted = np.where(rng.random(len(labels)) < 0.02, rng.integers(0, 60, len(labels)), predicted)
    confusions = confusion_counts(predicted, labels, 63)  # three classes that nobody has anything to do with
    order = cluster_order(confusions, 63)
    assert np.array_equal(np.sort(order), np.arange(63)) and order.dtype == np.int64
    kinship = np.append(family, [-1, -2, -3])[order]
    assert (kinship[1:] == kinship[:-1]).sum() == 15 * 3
    assert np.array_equal(order, cluster_order(confusions, 63))


@pytest.mark.parametrize("classes", [0, 1, 2])
def test_few_classes_have_an_order_too(classes):
    nobody = confusion_counts(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), classes)
    assert sorted(cluster_order(nobody, classes)) == list(range(classes))
