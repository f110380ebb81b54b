"""The paired comparison of two ways of pre-training.

Run: python -m pytest tests/test_compare_pretraining.py
"""

import json

import numpy as np
import pytest
import torch

from models_mae import build_mae
from tests.helpers import fails, make_identities
from util.benchmark.scores import Measured
from util.training.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def compare(import_script):
    return import_script("scripts/compare_pretraining.py")


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


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return str(make_identities(tmp_path_factory.mktemp("data") / "faces", train=10, val=2, test=2))


def test_the_whole_comparison(compare, checkpoints, faces, tmp_path, capsys):
    fresh, white = str(checkpoints / "fresh.pth"), str(checkpoints / "white.pth")
    data = ["--pictures", faces, "--labelled", faces, "--device", "cpu"]
    compare.main(["--a", fresh, "--b", white, *data, "--out", str(tmp_path / "new" / "compare.json")])
    result = json.loads((tmp_path / "new" / "compare.json").read_text())
    assert result["psnr_db"]["difference_ci95"][1] < 0  # white patches are a worse guess than grey ones
    assert result["psnr_db"]["interval_over"] == "samples"
    probe = result["probe_top1"]
    assert probe["difference"] == 0 and probe["difference_ci95"] == [0, 0]  # the encoders are the same
    assert probe["samples"] > result["psnr_db"]["samples"] > 0 and 0 < probe["a"] <= 100
    assert "few_shot_5way_1shot" in result["skipped"]  # there are four characters
    said = capsys.readouterr().out
    assert "psnr_db: a " in said and "not measured: few_shot_5way_1shot: " in said


def test_a_measure_that_no_picture_has_is_skipped_and_the_others_are_kept(compare, faces, tmp_path, monkeypatch):
    ids = np.array(["a", "b"])
    found = {
        "psnr_db": Measured(np.array([1.0, 2.0]), ids, ids),
        "psnr_eyes_db": Measured(np.full(2, np.nan), ids, ids),
    }
    monkeypatch.setattr(compare, "score", lambda *_: (found, {}))
    compare.main(["--a", "x", "--b", "y", "--pictures", faces, "--device", "cpu", "--out", str(tmp_path / "c.json")])
    result = json.loads((tmp_path / "c.json").read_text())
    assert result["psnr_db"]["difference"] == 0 and "no sample has a value" in result["skipped"]["psnr_eyes_db"]


def test_several_pairs_are_judged_over_runs_too(compare, checkpoints, faces, tmp_path):
    fresh, white = str(checkpoints / "fresh.pth"), str(checkpoints / "white.pth")
    argv = ["--pictures", faces, "--device", "cpu", "--out", str(tmp_path / "compare.json")]
    compare.main(["--a", fresh, white, "--b", white, fresh, *argv])
    figure = json.loads((tmp_path / "compare.json").read_text())["psnr_db"]
    one, other = figure["difference_of_each_pair"]
    assert one == pytest.approx(-other) and one < 0 and figure["difference"] == pytest.approx(0, abs=1e-9)
    assert figure["difference_ci95_samples"] == pytest.approx([0, 0], abs=1e-9)  # blind to what the runs say
    assert figure["difference_ci95"][1] > 10 * other and figure["interval_over"] == "seeds and samples"


def test_what_cannot_be_compared_is_one_line(compare, tmp_path, capsys):
    common = ["--a", "p", "--out", str(tmp_path / "x.json")]
    assert "as many" in fails(compare.main, capsys, [*common, "--labelled", "x", "--b", "p", "q"])
    assert "nothing to score on" in fails(compare.main, capsys, [*common, "--b", "p"])
