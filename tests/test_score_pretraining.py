"""The scores of one pre-trained checkpoint, sample by sample.

Run: python -m pytest tests/test_score_pretraining.py
"""

import argparse
import json
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from models_mae import build_mae
from models_mae_weights import load_mae
from tests.helpers import fails, make_identities
from util.benchmark.few_shot import few_shot_report
from util.benchmark.scores import Measured, heading, read_scores, strategy_of, under, write_scores
from util.data.augment import EvalCrop
from util.data.sources import open_source
from util.mae.masking import Masking, random_mask
from util.run.errors import UserError
from util.run.seed import uniform_for
from util.training.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def script(import_script):
    return import_script("scripts/score_pretraining.py")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model with fresh weights."""
    torch.manual_seed(0)
    state = build_mae("mae_vit_nano_patch8", 32).state_dict()
    path = tmp_path_factory.mktemp("checkpoint") / "fresh.pth"
    save_checkpoint(path, {"model": state, "args": {"model": "mae_vit_nano_patch8", "input_size": 32}})
    return str(path)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Pictures of five characters; the left half of each is figure, and only the first picture has a face."""
    names = ("asuka", "hikari", "mari", "misato", "rei")
    folder = make_identities(tmp_path_factory.mktemp("data") / "faces", names, train=7, val=3, test=2)
    rows = 5 * (7 + 3 + 2)
    foreground, face = np.zeros((2, rows, 32, 32), dtype=np.uint8)
    foreground[:, :, :16] = 255
    first = open_source(folder, "test").manifest.rows[0]
    face[first, 8:24, 8:24] = 255
    (folder / "maps").mkdir()
    np.save(folder / "maps" / "foreground.npy", foreground)
    np.save(folder / "maps" / "face.npy", face)
    return folder


@pytest.fixture(scope="module")
def scored(script, checkpoint, faces, tmp_path_factory):
    """(results.json, scores, protocol) of the checkpoint on the faces, with one masking more."""
    out = tmp_path_factory.mktemp("scored")
    data = ["--pictures", str(faces), "--labelled", str(faces), "--episodes", "40"]
    maskings = ["--test_maskings", "foreground", "--test_strength", "1000"]
    script.main(["--ckpt", checkpoint, "--output_dir", str(out), "--device", "cpu", *data, *maskings, "--seed", "3"])
    return json.loads((out / "results.json").read_text()), *read_scores(out / "scores.npz")


def decibel(error: np.ndarray) -> float:
    return -10 * math.log10(np.square(error).mean())


def test_the_pictures_are_scored_under_the_seeds_masks(scored, checkpoint, faces):
    """Each PSNR from its definition, by pixels, for masks drawn here."""
    _, scores, _ = scored
    model, source = load_mae(checkpoint), open_source(faces, "test")
    crop = EvalCrop((32, 32))
    left = np.arange(32) < 16
    for i in range(len(source)):
        image = crop(source.load(i), source.record(i))[None].float() / 255
        mask = random_mask(uniform_for(3, 0, torch.tensor([i]), 16), 0.75)
        pasted = model.reconstruct(image, mask)["pasted"][0].numpy()
        error = pasted - image[0].numpy()
        removed = mask[0].view(4, 4).numpy().repeat(8, axis=0).repeat(8, axis=1) > 0
        assert scores["psnr_db"].values[i] == pytest.approx(decibel(error), abs=1e-3)
        figure, background = scores["psnr_figure_db"].values[i], scores["psnr_background_db"].values[i]
        assert figure == pytest.approx(decibel(error[:, removed & left]), abs=1e-3)
        assert background == pytest.approx(decibel(error[:, removed & ~left]), abs=1e-3)
    assert np.isnan(scores["psnr_face_db"].values[1:]).all()
    assert scores["psnr_db"].ids.tolist() == source.column("sample_id")
    assert scores["psnr_db"].groups.tolist() == source.column("file_name")


def test_another_masking_removes_what_it_names(scored, checkpoint, faces):
    """At 75 % and this strength: all patches of the left half, and half of the others."""
    _, scores, _ = scored
    model, source = load_mae(checkpoint), open_source(faces, "test")
    images = torch.stack([EvalCrop((32, 32))(source.load(i), source.record(i)) for i in range(len(source))]) / 255
    maps = torch.zeros(len(images), 1, 4, 4, dtype=torch.uint8)
    maps[..., :2] = 255
    masking = Masking("foreground", strength=1000, random_share=0, seed=3)
    mask = random_mask(masking.order(images, (4, 4), 0, torch.arange(len(images)), maps), 0.75)
    assert (mask.view(-1, 4, 4)[..., :2] == 1).all()
    error = (model.reconstruct(images, mask)["pasted"] - images).numpy()
    expected = [decibel(each) for each in error]
    assert scores[under("foreground")].values == pytest.approx(expected, abs=1e-3)
    assert np.abs(scores["psnr_db"].values - expected).max() > 1e-3


def test_results_are_the_means_and_say_what_is_missing(scored, checkpoint):
    results, scores, protocol = scored
    for name, measured in scores.items():
        assert results[name] == pytest.approx(np.nanmean(measured.values))
    assert list(results["skipped"]) == ["regions of the map eyes"] and "eyes" in results["skipped"].popitem()[1]
    assert "psnr_eyes_db" not in scores and results["finished"] and results["args"]["ckpt"] == checkpoint
    assert protocol["seed"] == 3 and len(protocol["data"]) == 4


def test_few_shot_is_that_of_the_recognition_report(script, scored, checkpoint, faces):
    _, scores, _ = scored
    args = script.get_args(["--ckpt", checkpoint, "--output_dir", "x", "--labelled", str(faces), "--device", "cpu"])
    labelled = script.open_labelled(args)
    features = script.embeddings(checkpoint, labelled, args, torch.device("cpu"))
    options = {"base_mean": features.mean(axis=0), "methods": ("prototype",), "count": 40, "seed": 3}
    report = few_shot_report(features, labelled.labels, ((5, 1),), sources=labelled.origins, **options)
    assert scores["few_shot_5way_1shot"].mean == pytest.approx(report["5way_1shot"]["mean"])
    assert len(scores["few_shot_5way_1shot"].values) == 40 * 5
    assert scores["probe_top1"].ids.tolist() == labelled.ids.tolist() and len(labelled.ids) == 60
    assert set(scores["probe_top1"].groups) == {"asuka", "hikari", "mari", "misato", "rei"}


def test_scores_do_not_depend_on_the_batch(script, scored, checkpoint, faces):
    _, scores, _ = scored
    flags = ["--pictures", str(faces), "--batch_size", "3", "--seed", "3", "--device", "cpu"]
    args = script.get_args(["--ckpt", checkpoint, "--output_dir", "x", *flags])
    again, _ = script.score(checkpoint, script.open_data(args), args, torch.device("cpu"))
    assert again["psnr_db"].values == pytest.approx(scores["psnr_db"].values, abs=1e-4)
    assert again["psnr_face_db"].values[0] == pytest.approx(scores["psnr_face_db"].values[0], abs=1e-4)


def test_pictures_of_one_source_share_a_fold(script):
    sources = np.repeat([f"s{i}" for i in range(40)], 3)
    fold = script.fold_of(np.zeros(120), sources, seed=0)
    assert sorted(set(fold)) == list(range(5))
    assert all(len(set(fold[sources == source])) == 1 for source in sources)


def test_the_probe_is_scikit_learns_cross_validation(script):
    rng = np.random.default_rng(0)
    labels = np.array([f"c{i % 4}" for i in range(80)])
    features = np.eye(4)[np.arange(80) % 4] @ rng.normal(size=(4, 6)) + 0.8 * rng.normal(size=(80, 6))
    fold = rng.permutation(80) % 5
    judge = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    expected = cross_val_predict(judge, features, labels, cv=PredefinedSplit(fold)) == labels
    hits = script.probe_hits(features, labels, fold)
    assert 0.3 < hits.mean() < 1 and np.array_equal(hits, expected)


def test_scores_come_back_as_they_were_written(tmp_path):
    ids = np.array(["a", "日本"])
    scores = {"psnr_db": Measured(np.array([1.5, np.nan]), ids, ids), under("face:-1"): Measured(np.ones(2), ids, ids)}
    write_scores(tmp_path / "scores.npz", scores, {"seed": 1})
    found, protocol = read_scores(tmp_path / "scores.npz")
    assert protocol == {"seed": 1} and list(found) == list(scores)
    assert np.array_equal(found["psnr_db"].values, [1.5, np.nan], equal_nan=True) and found["psnr_db"].mean == 1.5
    assert found["psnr_db"].ids.tolist() == ids.tolist()
    assert strategy_of(under("face:-1")) == "face:-1" and strategy_of("psnr_db") is None
    assert heading(under("face:-1")).name == "PSNR under face:-1"
    for content in (b"", b"PK", None):
        path = tmp_path / f"broken{content}.npz"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match="holds no scores"):
            read_scores(path)


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "nothing to score on"),
        (["--pictures", "{faces}", "--test_maskings", "hard"], "follows the model"),
        (["--pictures", "{faces}", "--test_maskings", "random"], "in any case"),
        (["--pictures", "{faces}", "--test_maskings", "nose"], "no strategy"),
        (["--pictures", "{faces}", "--maps", "{faces}/test"], "map"),
        (["--labelled", "{faces}", "--labels", "none"], "no two characters"),
    ],
)
def test_what_cannot_be_scored_is_one_line(script, checkpoint, faces, tmp_path, capsys, flags, message):
    common = ["--ckpt", checkpoint, "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    flags = [flag.format(faces=faces) for flag in flags]
    assert message in fails(script.main, capsys, [*common, *flags])


def test_a_map_that_a_masking_needs_is_asked_for(script, faces, tmp_path):
    plain = make_identities(tmp_path / "plain", train=4, val=2, test=2)
    args = argparse.Namespace(
        pictures=str(plain), labels="auto", val_fraction=0.1, maps=None, test_maskings=["lineart", "face:2+green"]
    )
    with pytest.raises(UserError, match=r"--test_maskings face:2\+green: .*face"):
        script.open_pictures(args)
    args.test_maskings = ["lineart"]
    assert script.open_pictures(args).maps is None
