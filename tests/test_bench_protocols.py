"""The benchmark of the protocols runs each of them on the embeddings it describes, and writes what it measured.

Run: python -m pytest tests/test_bench_protocols.py
"""

import json

import numpy as np
import pytest

from tests.helpers import fails

TINY = "--images 600 --identities 40 --dim 64 --negatives 2000 --positives 5 --replicates 20"


@pytest.fixture(scope="module")
def bench(import_script):
    return import_script("scripts/bench_protocols.py")


def run(bench, out, what: str, *more: str) -> dict:
    bench.main(["--what", what, "--out", str(out / "new" / "bench.json"), *TINY.split(), *more])
    return json.loads((out / "new" / "bench.json").read_text())


def test_embeddings_are_what_the_script_says(bench):
    labels = bench.make_labels(9000, 300, seed=1)
    counts = np.sort(np.bincount(labels))[::-1]
    assert len(labels) == 9000 and len(counts) == 300 and counts[-1] >= 1 and counts[0] > 5 * np.median(counts)
    embeddings = bench.make_embeddings(labels, 300, 256, seed=1)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    cosine = embeddings @ embeddings[5000:5100].T  # across blocks, which are drawn apart
    same = (labels[:, None] == labels[None, 5000:5100]) & (cosine < 0.999)
    assert cosine[same].mean() == pytest.approx(1 / (1 + bench.NOISE**2), abs=0.02)
    assert abs(cosine[labels[:, None] != labels[None, 5000:5100]].mean()) < 0.01
    assert np.array_equal(embeddings, bench.make_embeddings(labels, 300, 256, seed=1))
    assert not np.array_equal(embeddings, bench.make_embeddings(labels, 300, 256, seed=2))


def test_all_pairs(bench, tmp_path):
    result = run(bench, tmp_path, "all_pairs")
    figures = result["figures"]
    assert figures["positives"] + figures["negatives"] == 600 * 599 // 2
    assert 0.8 < figures["auc"] < 1 and figures["auc_ci95"][0] < figures["auc"] < figures["auc_ci95"][1]
    assert set(result["seconds"]) == {"embeddings", "all pairs"} and result["protocol_seconds"] > 0
    assert result["embeddings_bytes"] == 600 * 64 * 4
    assert result["peak_memory_bytes"] >= result["peak_memory_bytes_before"] > result["embeddings_bytes"]
    assert result["provenance"]["seed"] == 0 and result["wall_seconds"] > result["protocol_seconds"]


def test_verification_is_near_all_pairs(bench, tmp_path):
    result = run(bench, tmp_path, "verification", "--negatives", "20000")
    assert set(result["seconds"]) == {"embeddings", "pair list", "pair scores", "figures"}
    assert result["figures"]["negatives"] == 20_000 and 40 < result["figures"]["positives"] <= 40 * 5
    everything = run(bench, tmp_path, "all_pairs")["figures"]
    assert result["figures"]["auc"] == pytest.approx(everything["auc"], abs=0.05)


def test_identification(bench, tmp_path):
    result = run(bench, tmp_path, "identification")
    assert set(result["seconds"]) == {"embeddings", "class centres", "nearest centres"}
    assert 0.5 < result["figures"]["top1"] < result["figures"]["top5"] <= 1


def test_more_identities_than_images_is_one_line(bench, tmp_path, capsys):
    argv = ["--what", "identification", "--out", str(tmp_path / "x.json"), "--images", "5", "--identities", "6"]
    assert "6 identities need as many images, not 5" in fails(bench.main, capsys, argv)
