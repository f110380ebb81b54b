"""The paired comparison of two ways of pre-training.

Run: python -m pytest tests/test_compare_pretraining.py
"""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from models_mae import build_mae
from tests.helpers import fails, make_identities
from util.training.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def compare(import_script):
    return import_script("scripts/compare_pretraining.py")


def test_pictures_of_one_source_share_a_fold(compare):
    sources = np.repeat([f"s{i}" for i in range(40)], 3)
    fold = compare.fold_of(np.zeros(120), sources, seed=0)
    assert sorted(set(fold)) == list(range(5))
    assert all(len(set(fold[sources == source])) == 1 for source in sources)


def test_the_probe_is_scikit_learns_cross_validation(compare):
    rng = np.random.default_rng(0)
    labels = np.array([f"c{i % 4}" for i in range(80)])
    features = np.eye(4)[np.arange(80) % 4] @ rng.normal(size=(4, 6)) + 0.8 * rng.normal(size=(80, 6))
    fold = rng.permutation(80) % 5
    judge = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    expected = cross_val_predict(judge, features, labels, cv=PredefinedSplit(fold)) == labels
    hits = compare.probe_hits(features, labels, fold)
    assert 0.3 < hits.mean() < 1 and np.array_equal(hits, expected)


def test_a_paired_difference_by_hand(compare):
    a, b = [np.array([1.0, 0, 1, 0]), np.array([0.0, 0, 1, 1])], [np.array([1.0, 1, 1, 0]), np.array([1.0, 1, 1, 1])]
    found = compare.paired(a, b, np.arange(4), scale=100.0)
    assert (found["a"], found["b"], found["difference"]) == (50.0, 87.5, 37.5)
    assert found["difference_of_each_pair"] == [25.0, 50.0] and found["samples"] == 4
    low, high = found["difference_ci95"]
    assert 0 <= low < 37.5 < high <= 100


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A model with fresh weights, the same after its predictions were made constant white, and their folder."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    model = build_mae("mae_vit_nano_patch8", 32)
    args = {"model": "mae_vit_nano_patch8", "input_size": 32}
    save_checkpoint(folder / "fresh.pth", {"model": model.state_dict(), "args": args})
    model.decoder_pred.weight.data.zero_()
    model.decoder_pred.bias.data.fill_(9.0)
    save_checkpoint(folder / "white.pth", {"model": model.state_dict(), "args": args})
    return folder


def test_the_whole_comparison(compare, checkpoints, tmp_path, capsys):
    fresh, white = str(checkpoints / "fresh.pth"), str(checkpoints / "white.pth")
    faces = str(make_identities(tmp_path / "faces", train=10, val=2, test=2))
    data = ["--pictures", faces, "--labelled", faces, "--device", "cpu"]
    compare.main(["--a", fresh, "--b", white, *data, "--out", str(tmp_path / "new" / "compare.json")])
    result = json.loads((tmp_path / "new" / "compare.json").read_text())
    assert result["psnr_db"]["difference_ci95"][1] < 0  # white patches are a worse guess than grey ones
    probe = result["probe_points"]
    assert probe["difference"] == 0 and probe["difference_ci95"] == [0, 0]  # the encoders are the same
    assert probe["samples"] > result["psnr_db"]["samples"] > 0 and 0 < probe["a"] <= 100
    assert "psnr_db: a " in capsys.readouterr().out


def test_what_cannot_be_compared_is_one_line(compare, tmp_path, capsys):
    common = ["--a", "p", "--out", str(tmp_path / "x.json")]
    assert "as many" in fails(compare.main, capsys, [*common, "--labelled", "x", "--b", "p", "q"])
    assert "nothing to compare" in fails(compare.main, capsys, [*common, "--b", "p"])
