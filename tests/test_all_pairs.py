"""Every pair, streamed: equal to brute force on the same numbers, whatever the bins, ties and sizes of identities.

Run: python -m pytest tests/test_all_pairs.py
"""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from util.benchmark import all_pairs
from util.benchmark.all_pairs import all_pairs_report
from util.benchmark.verification import Ranks

FPRS = (0.0001, 0.001, 0.01, 0.1)


def people(sizes: list[int], dim: int = 24, noise: float = 0.35, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of identities with these numbers of pictures, rows shuffled, and their codes."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)) * 3, sizes))
    centres = rng.normal(0, 1, (3 * len(sizes), dim)) / np.sqrt(dim)
    embeddings = (centres[labels] + noise * rng.normal(0, 1, (len(labels), dim))).astype(np.float32)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), labels


def every_pair(embeddings, labels, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of all pairs and whether they are positive, from one matrix made of products of the same shapes."""
    order = np.argsort(labels, kind="stable")
    rows, labels, n = torch.from_numpy(embeddings[order]), labels[order], len(labels)
    matrix = np.empty((n, n), dtype=np.float32)
    for top in range(0, n, block):
        for left in range(top, n, block):
            matrix[top : top + block, left : left + block] = rows[top : top + block] @ rows[left : left + block].T
    upper = np.triu_indices(n, 1)
    return matrix[upper], (labels[:, None] == labels)[upper]


def assert_exact(found: dict, scores: np.ndarray, same: np.ndarray, fprs=FPRS) -> None:
    roc = Ranks(scores[same], scores[~same]).roc()
    assert (found["positives"], found["negatives"]) == (same.sum(), (~same).sum())
    for fpr in fprs:
        key, threshold = f"{fpr:g}", roc.threshold(fpr)
        assert found["operating_points"][key]["threshold"] == threshold
        assert found["operating_points"][key]["realised_fpr"] == np.mean(scores[~same] > np.float32(threshold))
        assert found["tpr_at_fpr"][key] == np.mean(scores[same] > np.float32(threshold))
    assert found["eer"] == pytest.approx(roc.eer(), abs=1e-12)
    assert abs(found["auc"] - roc.auc()) <= found["auc_error_bound"] + 1e-12


@pytest.mark.parametrize("images", [1000, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("block", [64, 333])
def test_equals_brute_force(images, block):
    embeddings, labels = people(np.random.default_rng(1).integers(1, 40, images // 20).tolist())
    found = all_pairs_report(embeddings, labels, fprs=FPRS, block=block, replicates=3)
    scores, same = every_pair(embeddings, labels, block)
    assert_exact(found, scores, same)
    assert found["auc"] == pytest.approx(roc_auc_score(same, scores), abs=1e-5)
    assert found["auc_error_bound"] < 2e-5


@pytest.mark.parametrize("edges", [2, 9, 200])
def test_coarse_bins_cost_nothing_but_the_auc(edges, monkeypatch):
    monkeypatch.setattr(all_pairs, "EDGES", edges)
    embeddings, labels = people([7] * 60)
    found = all_pairs_report(embeddings, labels, fprs=FPRS, block=100, replicates=3)
    scores, same = every_pair(embeddings, labels, 100)
    assert_exact(found, scores, same)
    assert found["auc_error_bound"] > 1 / edges**2 / 100


def test_few_pairs_are_collected(monkeypatch):
    """The second pass holds the scores of a few bins: their share of the pairs is that of the bins."""
    collected = []
    fill = all_pairs._Bins.fill

    def spy(self, scores):
        collected.extend(len(kind) for kinds in scores.values() for kind in kinds)
        fill(self, scores)

    monkeypatch.setattr(all_pairs._Bins, "fill", spy)
    embeddings, labels = people([10] * 100)
    all_pairs_report(embeddings, labels, block=128, replicates=1)
    assert 0 < sum(collected) < 1000  # of 499,500


def test_one_identity_may_fill_whole_tiles():
    embeddings, labels = people([300, 3, 200, 1, 1, 150], noise=1.0)
    found = all_pairs_report(embeddings, labels, fprs=FPRS, block=64, replicates=3)
    assert_exact(found, *every_pair(embeddings, labels, 64))


def test_equal_pictures_and_a_collapsed_model():
    embeddings, labels = people([10] * 30)
    embeddings[100:] = embeddings[0]  # 200 equal pictures: tens of thousands of equal scores of both kinds
    found = all_pairs_report(embeddings, labels, fprs=FPRS, block=64, replicates=3)
    assert_exact(found, *every_pair(embeddings, labels, 64))
    embeddings[:] = 0
    embeddings[:, 0] = 1
    found = all_pairs_report(embeddings, labels, block=64, replicates=3)
    assert found["auc"] == found["eer"] == 0.5 and found["auc_error_bound"] == 0
    assert found["tpr_at_fpr"]["0.1"] == found["operating_points"]["0.1"]["realised_fpr"] == 0
    assert found["operating_points"]["0.1"]["threshold"] == 1


def test_the_order_of_rows_and_the_tile_change_nothing_but_rounding():
    embeddings, labels = people([12] * 40)
    order = np.random.default_rng(0).permutation(len(labels))
    one = all_pairs_report(embeddings, labels, block=100, replicates=3)
    for other in (
        all_pairs_report(embeddings[order], labels[order], block=100, replicates=3),
        all_pairs_report(embeddings, labels, block=480, replicates=3),
        all_pairs_report(embeddings, labels, block=61, replicates=3),
    ):
        assert (one["positives"], one["negatives"]) == (other["positives"], other["negatives"])
        assert one["auc"] == pytest.approx(other["auc"], abs=1e-5) and one["eer"] == pytest.approx(
            other["eer"], abs=1e-3
        )
        for key, point in one["operating_points"].items():
            assert point["threshold"] == pytest.approx(other["operating_points"][key]["threshold"], abs=1e-6)
    again = all_pairs_report(embeddings, labels, block=100, replicates=3)
    assert one == again


def test_threads_change_nothing():
    embeddings, labels = people([12] * 20)
    before = torch.get_num_threads()
    try:
        reports = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            reports.append(all_pairs_report(embeddings, labels, block=64, replicates=3))
    finally:
        torch.set_num_threads(before)
    assert_exact(reports[1], *every_pair(embeddings, labels, 64), fprs=(0.001, 0.01, 0.1))
    assert reports[0]["auc"] == pytest.approx(reports[1]["auc"], abs=1e-5)


def test_intervals_hold_the_figures(monkeypatch):
    """Also where one identity has most of the positive pairs, and where the intervals are from a part of the pairs."""
    monkeypatch.setattr(all_pairs, "CI_POSITIVES", 2000)
    monkeypatch.setattr(all_pairs, "CI_NEGATIVES", 20_000)
    embeddings, labels = people([80] + [9] * 40)
    first = embeddings[labels == 0]
    embeddings[labels == 0] = 0.6 * first + 0.4 * np.roll(first, 1, axis=1)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    found = all_pairs_report(embeddings, labels, fprs=(0.01, 0.1), block=100, replicates=100)
    for name in ("auc", "eer"):
        low, high = found[f"{name}_ci95"]
        assert low < found[name] < high
    for key in ("0.01", "0.1"):
        low, high = found["tpr_at_fpr_ci95"][key]
        assert low < found["tpr_at_fpr"][key] < high
    assert found["ci_pairs"] == {"positives": 2000, "negatives": 20_000}


def test_progress_counts_every_pair_twice():
    embeddings, labels = people([12] * 20)
    done = []
    all_pairs_report(embeddings, labels, block=50, replicates=1, progress=done.append)
    assert sum(done) == 240 * 239 and len(done) == 2 * 15


def test_a_machine_whose_products_do_not_repeat_is_noticed(monkeypatch):
    embeddings, labels = people([12] * 20)
    collect = all_pairs._Tiles.collect

    def elsewhere(self, spans):
        return {name: (positive, negative[1:]) for name, (positive, negative) in collect(self, spans).items()}

    monkeypatch.setattr(all_pairs._Tiles, "collect", elsewhere)
    with pytest.raises(RuntimeError, match="do not repeat"):
        all_pairs_report(embeddings, labels, block=50, replicates=1)


def test_what_cannot_be_reported_says_so():
    embeddings, labels = people([3] * 10)
    few = all_pairs_report(embeddings, labels, fprs=(0.001,), replicates=1)
    assert "1000 negatives or more" in few["tpr_at_fpr"]["0.001"]["skipped"] and few["tpr_at_fpr_ci95"]["0.001"] is None
    assert "skipped" in few["operating_points"]["0.001"] and 0.5 < few["auc"] <= 1
    assert all_pairs_report(embeddings, np.zeros(30, int)) == {"skipped": "no pairs of two identities"}
    assert all_pairs_report(embeddings, np.arange(30)) == {"skipped": "no pairs of one identity"}
    assert "skipped" in all_pairs_report(embeddings[:1], labels[:1])
    with pytest.raises(ValueError, match="normalised"):
        all_pairs_report(2 * embeddings, labels)
    embeddings[4, 4] = np.nan
    with pytest.raises(ValueError, match="finite"):
        all_pairs_report(embeddings, labels)
    with pytest.raises(ValueError, match="30 embeddings, but 29 labels"):
        all_pairs_report(embeddings, labels[1:])


def test_a_read_only_memory_map_will_do(tmp_path):
    embeddings, labels = people([12] * 20)
    np.save(tmp_path / "embeddings.npy", embeddings)
    mapped = np.load(tmp_path / "embeddings.npy", mmap_mode="r")
    assert all_pairs_report(mapped, labels, replicates=1) == all_pairs_report(embeddings, labels, replicates=1)
