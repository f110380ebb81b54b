"""visualize/reconstruct.py: the same nested masks for all, the layout of metrics.json, the figure, bad input.

Run: python -m pytest tests/test_visualize_reconstruct.py
"""

import contextlib
import importlib.util
import io
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from models_mae import build_mae
from models_mae_weights import load_mae
from tests.helpers import waves
from util.benchmark.reconstruction import METRICS
from util.data.sources import open_source
from visualize import pictures, reconstruct

NAME, SIZE, PATCH = "mae_vit_nano_patch8", 32, 8
RATIOS = ["0", "0.5", "0.75"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for part, number in (("train", 6), ("test", 5)):
        (folder / part).mkdir()
        for i in range(number):
            waves(part, i).save(folder / part / f"{i}.png")
    return folder


def save_model(path, **args):
    torch.manual_seed(0)
    model = build_mae(NAME, img_size=SIZE)
    torch.save({"model": model.state_dict(), "args": {"model": NAME, "input_size": SIZE, **args}}, path)
    return path


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("ckpt") / "raw.pth")


def run(ckpt, data, out, *flags):
    argv = ["--ckpt", ckpt, "--data_path", data, "--out", out, "--device", "cpu", *flags]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        reconstruct.main([str(word) for word in argv])
    figure = Image.open(out / "reconstruction.png")
    return SimpleNamespace(
        metrics=json.loads((out / "metrics.json").read_text()), figure=figure, printed=printed.getvalue()
    )


@pytest.fixture(scope="module")
def result(ckpt, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "deeper"
    return run(ckpt, data, out, "--mask_ratios", *RATIOS, "--figure_images", "2", "--batch_size", "2")


def test_metrics_file_has_the_agreed_layout(result):
    metrics = result.metrics
    assert metrics["images"] == 5 and metrics["skipped_images"] == 0
    assert list(metrics["ratios"]) == RATIOS == list(metrics["floors"])
    for mask_ratio in RATIOS:
        tables = {"model": metrics["ratios"][mask_ratio], **metrics["floors"][mask_ratio]}
        assert list(tables) == ["model", *pictures.FLOORS]
        for method, table in tables.items():
            assert tuple(table) == METRICS
            assert all(set(entry) == {"mean", "std"} for entry in table.values())
            undefined = {metric for metric in METRICS if table[metric]["mean"] is None}
            if mask_ratio == "0":
                assert undefined == {"psnr_db", "psnr_masked_db", "loss", "hf_energy_ratio"}
                assert table["ssim"]["mean"] == pytest.approx(1) and table["delta_e"]["mean"] == 0
            else:
                assert undefined == (set() if method == "model" else {"loss"})
    assert metrics["provenance"]["seed"] == 0 and metrics["provenance"]["data_fingerprint"]


def test_metrics_are_those_of_the_reconstructions(result, ckpt, data):
    model, source = load_mae(str(ckpt)), open_source(data, "test")
    images, index, _ = next(iter(pictures.Pictures(source, range(5), (SIZE, SIZE), 5, "")))
    for mask_ratio in (0.5, 0.75):
        mask = pictures.draw_masks(model, images, index, 0, mask_ratio)
        out = model.reconstruct(images, mask)
        psnr = [
            peak_signal_noise_ratio(a, b, data_range=1)
            for a, b in zip(images.numpy(), out["pasted"].numpy(), strict=True)
        ]
        entry = result.metrics["ratios"][f"{mask_ratio:g}"]
        assert entry["psnr_db"]["mean"] == pytest.approx(np.mean(psnr), abs=1e-3)
        assert entry["psnr_db"]["std"] == pytest.approx(np.std(psnr), abs=1e-3)
        # every picture has as many masked patches, so the batch loss of training is the mean over pictures
        loss = model((images - model.pixel_mean) / model.pixel_std, mask_ratio, noise=mask)[0].item()
        assert entry["loss"]["mean"] == pytest.approx(loss, rel=1e-4)
        # psnr_db and psnr_masked_db differ by the masked share
        gap = entry["psnr_db"]["mean"] - entry["psnr_masked_db"]["mean"]
        assert gap == pytest.approx(-10 * np.log10(mask_ratio), abs=1e-3)


def test_normalised_loss_is_the_one_trained_on(data, tmp_path):
    model = load_mae(str(save_model(tmp_path / "norm.pth", norm_pix_loss=True)))
    images, index, _ = next(iter(pictures.Pictures(open_source(data, "test"), range(5), (SIZE, SIZE), 5, "")))
    mask = pictures.draw_masks(model, images, index, 0, 0.75)
    expected = model((images - model.pixel_mean) / model.pixel_std, 0.75, noise=mask)[0]
    torch.testing.assert_close(model.reconstruct(images, mask)["loss"].mean(), expected)


def test_masks_depend_on_seed_and_index_alone_and_are_nested(ckpt):
    model, images = load_mae(str(ckpt)), torch.zeros(4, 3, SIZE, SIZE)
    index = torch.tensor([7, 3, 12, 0])
    masks = {r: pictures.draw_masks(model, images, index, 0, r) for r in (0.25, 0.5, 0.75, 0.9)}
    for mask_ratio, mask in masks.items():
        assert (mask.sum(dim=1) == 16 - int(16 * (1 - mask_ratio))).all()
        alone = pictures.draw_masks(model, images[2:3], index[2:3], 0, mask_ratio)
        assert torch.equal(alone[0], mask[2])
    ordered = list(masks.values())
    assert all((low <= high).all() for low, high in itertools.pairwise(ordered))
    assert not torch.equal(masks[0.5], pictures.draw_masks(model, images, index, 1, 0.5))
    assert not torch.equal(masks[0.5][0], masks[0.5][1])


def test_batch_size_and_order_of_ratios_change_nothing(result, ckpt, data, tmp_path):
    other = run(ckpt, data, tmp_path, "--mask_ratios", *reversed(RATIOS), "--batch_size", "5")
    for mask_ratio in RATIOS[1:]:
        for metric in METRICS:
            ours, theirs = (r.metrics["ratios"][mask_ratio][metric]["mean"] for r in (result, other))
            assert ours == pytest.approx(theirs, rel=1e-4)


def test_mean_image_is_the_mean_of_the_training_pictures(data):
    source = open_source(data, "train")
    some = pictures.Pictures(source, range(6), (SIZE, SIZE), 4, "")
    each = np.stack([some.crop(source.load(i), source.record(i)).numpy() for i in range(6)]) / 255
    np.testing.assert_allclose(pictures.mean_image(some).numpy(), each.mean(axis=0), atol=1e-6)


def test_images_are_spread_evenly():
    assert pictures.spread(10, 0) == list(range(10)) == pictures.spread(10, 99)
    assert pictures.spread(10, 5) == [0, 2, 4, 6, 8]
    assert pictures.spread(3, 1) == [0]


def test_table_names_every_method_under_every_ratio(result):
    for mask_ratio in ("0 %", "50 %", "75 %"):
        assert f"{mask_ratio} masked" in result.printed
    for name in ("model", *pictures.FLOORS.values()):
        assert result.printed.count(f"\n  {name} ") == len(RATIOS)
    best = result.metrics["floors"]["0.75"]["inpaint"]["psnr_db"]["mean"]
    assert f"{best:.3f}" in result.printed


def test_figure_shows_originals_masks_and_reconstructions(result):
    # three panels, two in a line; 4 columns of 128 px and 2 rows in each
    width, height = result.figure.size
    assert 2 * 4 * 128 < width < 2 * 4 * 128 + 300
    assert 2 * 2 * 128 < height < 2 * 2 * 128 + 300
    # masked patches are mid-grey: half of two pictures, then three quarters of two
    grey = (np.asarray(result.figure.convert("RGB")) == 128).all(axis=2).sum()
    assert grey == pytest.approx(2 * 128**2 * (0.5 + 0.75), rel=0.02)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_figure_says_when_statistics_are_the_oracles(norm_pix_loss, data, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(
        reconstruct, "sheet", lambda rows, **k: titles.extend(k["column_titles"]) or Image.new("RGB", (9, 9))
    )
    ckpt = save_model(tmp_path / "model.pth", norm_pix_loss=norm_pix_loss)
    done = run(ckpt, data, tmp_path, "--mask_ratios", "0.75", "--images", "1")
    assert sum("oracle statistics" in title for title in titles) == 2 * norm_pix_loss
    assert ("oracle statistics" in done.printed) == norm_pix_loss == done.metrics["norm_pix_loss"]


def test_other_input_sizes_may_be_asked_for(ckpt, data, tmp_path):
    done = run(ckpt, data, tmp_path, "--mask_ratios", "0.5", "--input_size", "48x32", "--images", "2")
    assert done.metrics["images"] == 2 and done.metrics["ratios"]["0.5"]["psnr_db"]["mean"] > 0


def test_damaged_images_are_skipped_and_counted(ckpt, data, tmp_path, capsys):
    (tmp_path / "test").mkdir()
    for i in range(3):
        waves("test", i).save(tmp_path / "test" / f"{i}.png")
    whole = (tmp_path / "test" / "1.png").read_bytes()
    (tmp_path / "test" / "1.png").write_bytes(whole[: len(whole) // 2])
    flags = ["--mask_ratios", "0.5", "--mean_data_path", data]
    done = run(ckpt, tmp_path, tmp_path / "out", *flags)
    assert done.metrics["images"] == 2 and done.metrics["skipped_images"] == 1
    skipped = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(skipped) == 1 and "1.png" in skipped[0]
    assert done.metrics["floors"]["0.5"]["mean_image"]["psnr_db"]["mean"] > 0


def test_floors_that_cannot_be_had_say_why(ckpt, data, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "cv2" else found(name, *a))
    (tmp_path / "test").mkdir()
    waves("test", 0).save(tmp_path / "test" / "0.png")  # no training pictures
    done = run(ckpt, tmp_path, tmp_path / "out", "--mask_ratios", "0.5")
    floors = done.metrics["floors"]["0.5"]
    assert "opencv" in floors["inpaint"]["skipped"] and "--mean_data_path" in floors["mean_image"]["skipped"]
    assert floors["visible_mean"]["psnr_db"]["mean"] > 0
    assert done.printed.count("skipped:") == 2


def failure(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        reconstruct.main([str(word) for word in argv])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_bad_input_ends_in_one_line(ckpt, data, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    good = ["--device", "cpu", "--ckpt", ckpt, "--data_path", data, "--out", tmp_path / "out"]

    def fail(*flags):  # the last of a repeated flag counts
        return failure(capsys, *good, *flags)

    assert "nowhere.pth" in fail("--ckpt", tmp_path / "nowhere.pth")
    assert "nowhere" in fail("--data_path", tmp_path / "nowhere")
    assert "empty" in fail("--data_path", tmp_path / "empty")
    assert "nowhere" in fail("--mean_data_path", tmp_path / "nowhere")
    assert "1.5" in fail("--mask_ratios", "1.5")
    assert "none of the 16 patches" in fail("--mask_ratios", "0.5", "0.99")
    assert "--input_size" in fail("--input_size", "30")
    assert "--out" in fail("--out", tmp_path / "file" / "out")
    assert not (tmp_path / "out" / "metrics.json").exists()
