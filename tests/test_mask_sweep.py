"""visualize/mask_sweep.py: every number against another computation, the files, bad input; scripts/mask_sweep.sh.

Run: python -m pytest tests/test_mask_sweep.py
"""

import contextlib
import io
import json
import os
import shlex
import statistics
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import fails
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import peak_signal_noise_ratio
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models_mae import build_mae
from models_mae_weights import load_mae
from tests.helpers import waves
from util.benchmark.bootstrap import multiplicities
from util.benchmark.paired import difference
from util.benchmark.reconstruction import METRICS
from util.benchmark.regions import REGIONS
from util.data.augment import EvalCrop
from util.data.manifest import write_manifest
from util.data.sources import open_source
from util.run.errors import UserError
from visualize import mask_sweep
from visualize.pictures import FLOORS, Pictures, draw_masks, heat, scale_bar, tile
from visualize.sweep.numbers import COMPARED, Sweep, mean_intervals
from visualize.sweep.probes import by_training, read_probes
from visualize.sweep.report import _best_pictures, _differ
from visualize.sweep.trained import by_recipe, epochs_done, learning_curve, open_trained

NAME, SIZE, PATCH, TESTED = "mae_vit_nano_patch8", 32, 8, 7
RATIOS = ["0", "0.5", "0.75"]
IDENTITIES = ["rei", "asuka", "rei", None, "asuka", "rei", "misato"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared folder: 5 training and 7 test pictures, with maps."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"sample_id": f"train{i}", "file_name": f"t{i}.png", "split": "train"} for i in range(5)]
    rows += [
        {"sample_id": f"test{i}", "file_name": f"{i}.png", "split": "test", "identity": name}
        for i, name in enumerate(IDENTITIES)
    ]
    for row in rows:
        waves(row["sample_id"]).save(folder / row["file_name"])
    write_manifest(folder, rows)
    (folder / "maps").mkdir()
    maps = np.zeros((3, len(rows), 32, 32), dtype=np.uint8)
    maps[0, :, 6:22, 8:24], maps[1, :, 10:13, 10:22], maps[2, :, 4:, 6:26] = 255, 200, 255
    maps[1, 5] = 0  # the first test picture has no eyes
    for name, values in zip(("face", "eyes", "foreground"), maps, strict=True):
        np.save(folder / "maps" / f"{name}.npy", values)
    return folder


def save_run(folder, *, mask_ratio, seed=0, log=True, name=NAME, size=SIZE, **args):
    """A run folder with fresh weights and a log of two of its three epochs."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed + round(100 * mask_ratio))
    model = build_mae(name, img_size=size)
    with torch.no_grad():  # fresh weights say next to nothing: make the models differ
        model.decoder_pred.weight.add_(0.05 * torch.randn_like(model.decoder_pred.weight))
    flags = {"model": name, "input_size": size, "mask_ratio": mask_ratio, "seed": seed, "epochs": 3, "batch_size": 16}
    torch.save({"model": model.state_dict(), "args": {**flags, **args}}, folder / "checkpoint-last.pth")
    lines = [
        {"epoch": e, "global_step": 10 * (e + 1), "val_loss": 1 - 0.1 * e, "val_psnr_db": 17.0 + e} for e in range(2)
    ]
    if log:
        (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"epoch": 2, "glo')
    return str(folder / "checkpoint-last.pth")


@pytest.fixture(scope="module")
def ckpts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [save_run(folder / f"r{r}s{s}", mask_ratio=r, seed=s) for r, s in ((0.75, 0), (0.25, 0), (0.25, 1))]


@pytest.fixture(scope="module")
def probes(ckpts, tmp_path_factory):
    """Three probes of the checkpoints, one of another one, and one that is not finished."""
    folder = tmp_path_factory.mktemp("probes")
    results = [
        {"args": {"init": ckpts[0]}, "test": {"top1": 0.5, "top5": 0.8, "macro_f1": 0.45}, "val": {"top1": 0.9}},
        {"args": {"init": ckpts[1]}, "test": {"top1": 0.3, "macro_f1": 0.25}},
        {"args": {"init": os.path.relpath(ckpts[2])}, "test": {"top1": 0.4, "macro_f1": 0.35}},
        {"args": {"init": "elsewhere.pth"}, "test": {"top1": 0.99}},
        {"args": {"init": ckpts[0]}, "test": {"top1": 0.0}, "finished": False},
    ]
    for i, result in enumerate(results):
        (folder / f"p{i}").mkdir()
        (folder / f"p{i}" / "results.json").write_text(json.dumps({"finished": True, **result}))
    return folder


def run(ckpts, data, out, *flags):
    argv = ["--ckpt", *ckpts, "--data_path", data, "--out", out, "--device", "cpu", *flags]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        mask_sweep.main([str(word) for word in argv])
    return SimpleNamespace(
        metrics=json.loads((out / "metrics.json").read_text()), text=(out / "mask_sweep.md").read_text(), out=out,
        printed=printed.getvalue(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(ckpts, data, probes, tmp_path_factory):
    flags = ["--mask_ratios", *reversed(RATIOS), "--probes", probes, "--batch_size", "3", "--figure_images", "2"]
    return run(ckpts, data, tmp_path_factory.mktemp("out") / "deeper", *flags)


@pytest.fixture(scope="module")
def expected(ckpts, data):
    """(ckpt, ratio) -> what the model makes of all test pictures at once."""
    source, found = open_source(data, "test"), {}
    images, index, _ = next(iter(Pictures(source, range(TESTED), (SIZE, SIZE), TESTED, "")))
    for ckpt in ckpts:
        model = load_mae(ckpt)
        for ratio in (0.5, 0.75):
            mask = draw_masks(model, images, index, 0, ratio)
            out = model.reconstruct(images, mask)
            psnr = np.array([
                peak_signal_noise_ratio(a, b, data_range=1)
                for a, b in zip(images.numpy(), out["pasted"].numpy(), strict=True)
            ])  # fmt: skip
            loss = model((images - model.pixel_mean) / model.pixel_std, ratio, noise=mask)[0].item()
            found[ckpt, ratio] = SimpleNamespace(images=images, out=out, psnr=psnr, loss=loss)
    return found


# --- the numbers


def test_metrics_are_those_of_the_reconstructions_averaged_over_runs(result, expected, ckpts):
    assert list(result.metrics["ratios"]) == ["25 %", "75 %"] and result.metrics["images"] == TESTED
    for label, own in {"25 %": ckpts[1:], "75 %": ckpts[:1]}.items():
        assert list(result.metrics["ratios"][label]) == RATIOS
        for ratio in (0.5, 0.75):
            table = result.metrics["ratios"][label][f"{ratio:g}"]
            assert tuple(table) == METRICS
            runs = [expected[ckpt, ratio].psnr for ckpt in own]
            assert table["psnr_db"]["mean"] == pytest.approx(np.mean(runs), abs=1e-3)
            assert table["psnr_db"]["std"] == pytest.approx(np.std(np.mean(runs, axis=0)), abs=1e-3)
            assert table["loss"]["mean"] == pytest.approx(np.mean([expected[c, ratio].loss for c in own]), rel=1e-4)
            gap = table["psnr_db"]["mean"] - table["psnr_masked_db"]["mean"]
            assert gap == pytest.approx(-10 * np.log10(ratio), abs=1e-3)
            if len(runs) == 1:
                assert table["psnr_db"]["std_runs"] is None
            else:
                spread = statistics.stdev(values.mean() for values in runs)
                assert table["psnr_db"]["std_runs"] == pytest.approx(spread, abs=1e-3)
        assert result.metrics["ratios"][label]["0"]["psnr_db"]["mean"] is None
        assert result.metrics["ratios"][label]["0"]["delta_e"]["mean"] == 0


def test_floors_are_under_the_same_masks(result, expected, ckpts):
    assert list(result.metrics["floors"]) == list(FLOORS)
    for ratio in (0.5, 0.75):
        images, mask = expected[ckpts[0], ratio].images.numpy(), expected[ckpts[0], ratio].out["mask"].numpy()
        values = []
        for image, area in zip(images, mask[:, 0] > 0, strict=True):
            filled = image.copy()
            filled[:, area] = image[:, ~area].mean(axis=1, keepdims=True)
            values.append(peak_signal_noise_ratio(image, filled, data_range=1))
        floor = result.metrics["floors"]["visible_mean"][f"{ratio:g}"]["psnr_db"]
        assert floor["mean"] == pytest.approx(np.mean(values), abs=1e-3)
        assert result.metrics["floors"]["visible_mean"][f"{ratio:g}"]["loss"]["mean"] is None


def test_regions_are_the_maps_through_the_crop_of_the_picture(result, expected, ckpts, data):
    source, crop = open_source(data, "test"), EvalCrop((SIZE, SIZE))
    views = [crop.draw(source.load(i), source.record(i)) for i in range(TESTED)]
    areas = {}
    for region, name, inside in zip(REGIONS, ("face", "eyes", "foreground", "foreground"), (1, 1, 1, 0), strict=True):
        maps = np.load(data / "maps" / f"{name}.npy")[5:]  # after the training rows
        shown = [view.crop_map(one, (40, 48), (SIZE, SIZE)) for view, one in zip(views, maps, strict=True)]
        areas[region] = (np.stack(shown) >= 128) == inside
    now = expected[ckpts[0], 0.75]
    target, pasted, removed = now.images.numpy(), now.out["pasted"].numpy(), now.out["mask"][:, 0].numpy() > 0
    table = result.metrics["regions"]["rows"]["75 %"]["0.75"]
    for region, area in areas.items():
        psnr, colour, share = [], [], []
        for a, b, inside, gone in zip(target, pasted, area, removed, strict=True):
            judged = inside & gone
            share.append(judged.sum() / gone.sum())
            if judged.any():
                psnr.append(10 * np.log10(1 / np.mean((a - b)[:, judged] ** 2)))
                colour.append(deltaE_ciede2000(*(rgb2lab(np.moveaxis(p, 0, -1)) for p in (a, b)))[judged].mean())
        assert table[region]["psnr_db"]["mean"] == pytest.approx(np.mean(psnr), abs=2e-3)
        assert table[region]["psnr_db"].get("undefined", 0) == TESTED - len(psnr)
        assert table[region]["delta_e"]["mean"] == pytest.approx(np.mean(colour), abs=2e-3)
        assert table[region]["share"]["mean"] == pytest.approx(np.mean(share), abs=1e-6)
        low, high = table[region]["psnr_db"]["ci95"]
        assert low < np.mean(psnr) < high
    assert table["eyes"]["psnr_db"]["undefined"] >= 1


def test_differences_are_paired_and_their_intervals_a_bootstrap_over_pictures(result, expected, ckpts):
    entries = result.metrics["differences"]
    assert len(entries) == 2 * len(COMPARED)  # of one pair of trainings, where anything was removed
    for entry in entries:
        assert (entry["a"], entry["b"]) == ("25 %", "75 %")
        if entry["metric"] != "psnr_db":
            continue
        ratio = entry["test_ratio"]
        low, high = (np.mean([expected[c, ratio].psnr for c in own], axis=0) for own in (ckpts[1:], ckpts[:1]))
        assert entry["difference"] == pytest.approx((low - high).mean(), abs=1e-3)
        drawn = [(weights * (low - high)).sum() / TESTED for weights in multiplicities(TESTED, 1000, 0)]
        assert entry["ci95"] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=1e-3)


def test_groups_are_sorted_counted_and_averaged(result, expected, ckpts):
    groups = result.metrics["groups"]["identity"]
    assert list(groups) == ["asuka", "misato", "rei", "not known"]
    for name, entry in groups.items():
        inside = np.array([(identity or "not known") == name for identity in IDENTITIES])
        assert entry["images"] == inside.sum()
        own = entry["psnr_db"]["75 %"]["0.75"]
        assert own["mean"] == pytest.approx(expected[ckpts[0], 0.75].psnr[inside].mean(), abs=1e-3)
        if inside.sum() < 2:
            assert own["ci95"] is None
        else:
            values = expected[ckpts[0], 0.75].psnr[inside]
            assert values.min() - 1e-3 <= own["ci95"][0] < own["mean"] < own["ci95"][1] <= values.max() + 1e-3
    assert "| rei | 3 |" in result.text


def test_intervals_leave_out_what_is_not_finite():
    values = np.array([1.0, np.nan, 3.0, np.inf, 5.0])
    found = mean_intervals({"some": values, "none": np.full(5, np.nan), "equal": np.full(5, 2.0)}, seed=3)
    drawn = []
    for weights in multiplicities(5, 1000, 3):
        if (weights[[0, 2, 4]]).sum():
            drawn.append((weights[[0, 2, 4]] * values[[0, 2, 4]]).sum() / weights[[0, 2, 4]].sum())
    assert found["some"] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist())
    assert found["none"] is None and found["equal"] == [2.0, 2.0]
    assert mean_intervals({}) == {} and mean_intervals({"one": np.ones(1)}) == {"one": None}


def test_error_maps_are_means_over_the_pictures_in_which_a_pixel_was_removed(ckpts, data, expected):
    args = mask_sweep.get_args(["--ckpt", *ckpts, "--data_path", str(data), "--out", "x", "--mask_ratios", "0.75"])
    sweep, shown, missing, patches = mask_sweep.measure(
        args, by_recipe(open_trained(ckpts)), open_source(data, "test"), None, torch.device("cpu")
    )
    assert patches == 16 and not missing and not sweep.regions
    runs = []
    for ckpt in ckpts[1:]:
        now = expected[ckpt, 0.75]
        error = 255 * np.abs(now.out["pasted"].numpy() - now.images.numpy()).mean(axis=1)
        removed = now.out["mask"][:, 0].numpy() > 0
        with np.errstate(invalid="ignore"):
            runs.append((error * removed).sum(axis=0) / removed.sum(axis=0))
    np.testing.assert_allclose(sweep.error_map("25 %", 0.75), np.mean(runs, axis=0), rtol=1e-4)
    chosen = [0, 2, 4]
    assert shown.places == chosen and torch.equal(shown.originals, expected[ckpts[0], 0.75].images[chosen])
    torch.testing.assert_close(shown.pasted["75 %", 0.75], expected[ckpts[0], 0.75].out["pasted"][chosen])


# --- what was trained


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    settings = [
        {"mask_ratio": 0.9},
        {"mask_ratio": 0.75, "masking": "random"},
        {"mask_ratio": 0.75, "masking": "face", "output_dir": "elsewhere"},
        {"mask_ratio": 0.75, "masking": "face", "seed": 4},
        {"mask_ratio": 0.25, "epochs": 9},
    ]
    runs = open_trained(save_run(tmp_path / str(i), **flags) for i, flags in enumerate(settings))
    groups = by_recipe(runs)
    assert {label: len(own) for label, own in groups.items()} == {
        "25 %": 1, "75 %, masking random": 1, "75 %, masking face": 2, "90 %": 1,
    }  # fmt: skip
    assert epochs_done(runs[0]) == (2, 3)
    twin = open_trained([save_run(tmp_path / "twin", mask_ratio=0.9)])
    with pytest.raises(UserError, match="one training and seed"):
        by_recipe([*runs, *twin])


def test_weights_that_do_not_say_their_ratio_are_named_by_their_file(tmp_path, data):
    torch.save({"model": build_mae(NAME, SIZE).state_dict()}, tmp_path / "official.pth")
    done = run([tmp_path / "official.pth"], data, tmp_path / "out", "--mask_ratios", "0.5", "--images", "2")
    assert list(done.metrics["ratios"]) == [str(tmp_path / "official.pth")]
    assert "no checkpoint has a log.txt" in done.printed and not (tmp_path / "out" / "curves.png").exists()


def test_learning_curves_have_masked_decibels_and_counted_computation(ckpts):
    entries = learning_curve(open_trained(ckpts[:1])[0], 16)
    assert [entry["epoch"] for entry in entries] == [1, 2] and [entry["loss"] for entry in entries] == [1, 0.9]
    for entry in entries:
        assert entry["psnr_masked_db"] == pytest.approx(entry["psnr_db"] + 10 * np.log10(0.75))
    model = build_mae(NAME, SIZE).to("meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        images, noise = torch.empty(1, 3, SIZE, SIZE, device="meta"), torch.empty(1, 16, device="meta")
        model(images, 0.75, noise, 1.0).backward()
    assert entries[-1]["pflop"] * 1e15 == pytest.approx(20 * 16 * counter.get_total_flops(), rel=1e-6)


def test_learning_curves_know_the_size_of_a_step_from_the_results(tmp_path):
    ckpt = save_run(tmp_path / "a", mask_ratio=0.5)
    (before,) = [entry["pflop"] for entry in learning_curve(open_trained([ckpt])[0], 16)][-1:]
    (tmp_path / "a" / "results.json").write_text(json.dumps({"steps": 20, "images_seen": 20 * 16 * 4}))  # 4 processes
    (after,) = [entry["pflop"] for entry in learning_curve(open_trained([ckpt])[0], 16)][-1:]
    assert after == pytest.approx(4 * before)


# --- probes


def test_probes_belong_to_the_checkpoint_they_started_from(result, probes, ckpts):
    found = result.metrics["probes"]
    assert found["part"] == "test" and found["unused"] == 1
    assert found["trainings"]["75 %"]["top1"] == {"mean": 0.5, "std": None}
    low = found["trainings"]["25 %"]
    assert low["runs"] == 2 and low["top1"]["mean"] == pytest.approx(0.35)
    assert low["macro_f1"]["std"] == pytest.approx(statistics.stdev([0.25, 0.35]))
    assert "35.0 ± 7.1" in result.text and "Best features: trained at 75 %, 50.0 % test top-1" in result.text
    assert "15.0 points over 25 % (one run of some: not certain)" in result.text
    assert "1 probes are of other checkpoints" in result.text
    by_pattern = read_probes(f"{probes}/p[0-2]")
    assert len(by_pattern) == 3 and read_probes(f"{probes}/p0/*.json") == by_pattern[:1]
    with pytest.raises(UserError, match=r"none of 1 is of a checkpoint.*elsewhere\.pth"):
        by_training(read_probes(f"{probes}/p3"), by_recipe(open_trained(ckpts)))


# --- the files


def test_all_files_are_there_and_of_their_size(result):
    names = {"mask_sweep.md", "metrics.json", "grid.png", "errors.png", "curves.png", "regions.png"}
    assert {path.name for path in result.out.iterdir()} == names
    width, height = Image.open(result.out / "grid.png").size
    # three blocks, two in a line; 2 + 2 columns of 128 px and 2 rows in each
    assert 2 * 4 * 128 < width < 2 * 4 * 128 + 120 and 2 * 2 * 128 < height < 2 * 2 * 128 + 320
    width, height = Image.open(result.out / "errors.png").size
    assert 4 * 128 < width < 4 * 128 + 260 and (2 + 4) * 128 < height < (2 + 4) * 128 + 420
    for name in ("curves", "regions"):
        assert Image.open(result.out / f"{name}.png").size[0] == 1008


def test_report_has_every_row_and_says_who_wins(result):
    for ratio in ("0 %", "50 %", "75 %"):
        assert f"### Tested at {ratio}" in result.text
    for row in ("**25 %**", "**75 %**", *FLOORS.values()):
        assert result.text.count(f"\n| {row} |") >= len(RATIOS)
    assert "| 25 % | 2 | 0, 1 | 2 of 3 |" in result.text
    for ratio in ("0.5", "0.75"):
        means = {label: table[ratio]["psnr_db"]["mean"] for label, table in result.metrics["ratios"].items()}
        best, floor = max(means, key=means.get), max(
            entry[ratio]["psnr_db"]["mean"] for entry in result.metrics["floors"].values()
        )  # fmt: skip
        (line,) = [line for line in result.text.splitlines() if line.startswith(f"* With {100 * float(ratio):g} %")]
        lead = max(means.values()) - min(means.values())
        assert f"trained at {best}, +{lead:.2f}" in line and f"{abs(means[best] - floor):.2f} dB BELOW" in line


def test_one_checkpoint_is_enough_for_its_test_ratios(ckpts, data, tmp_path):
    flags = ["--mask_ratios", "0.5", "0.9", "--images", "3", "--groups", "identity", "--val_fraction", "0.2"]
    done = run(ckpts[:1], data, tmp_path, *flags)
    assert (
        done.metrics["images"] == 3 and done.metrics["differences"] == [] and list(done.metrics["ratios"]) == ["75 %"]
    )
    assert "Paired differences" not in done.text and "no probes were given" in done.text
    assert done.metrics["ratios"]["75 %"]["0.9"]["psnr_db"]["mean"] > 0


def test_parts_that_cannot_be_had_say_why(ckpts, tmp_path):
    for i in range(3):
        (tmp_path / "data" / "test").mkdir(parents=True, exist_ok=True)
        waves("test", i).save(tmp_path / "data" / "test" / f"{i}.png")
    whole = (tmp_path / "data" / "test" / "1.png").read_bytes()
    (tmp_path / "data" / "test" / "1.png").write_bytes(whole[: len(whole) // 2])
    done = run(ckpts, tmp_path / "data", tmp_path / "out", "--mask_ratios", "0.5")
    assert done.metrics["images"] == 2
    assert "no map" in done.metrics["regions"]["skipped"] and not (tmp_path / "out" / "regions.png").exists()
    assert "identity" in done.metrics["groups"]["identity"]["skipped"]
    assert "no training pictures" in done.metrics["missing_floors"]["mean_image"]
    for part in (
        "By region\n\nSkipped:",
        "PSNR per group: identity, tested at 50 %\n\nSkipped:",
        "| skipped: no train",
    ):
        assert part in done.text


def test_damaged_pictures_are_not_compared_and_some_maps_are_enough(ckpts, data, tmp_path):
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "face.npy").write_bytes((data / "maps" / "face.npy").read_bytes())
    flags = ["--mask_ratios", "0.5", "--maps", tmp_path / "maps", "--images", "3"]
    done = run(ckpts[:1], data, tmp_path / "out", *flags)
    assert list(done.metrics["regions"]["rows"]["75 %"]["0.5"]) == ["face"]
    assert "eyes" in done.metrics["regions"]["missing"] and "Not told apart" in done.text


def test_bad_input_ends_in_one_line(ckpts, data, probes, tmp_path, capsys):
    other = save_run(tmp_path / "other", mask_ratio=0.5, size=48)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    good = ["--device", "cpu", "--ckpt", *ckpts, "--data_path", data, "--out", tmp_path / "out", "--images", "2"]

    def fail(*flags):  # the last of a repeated flag counts
        return fails(mask_sweep.main, capsys, [str(word) for word in (*good, *flags)])

    assert "nowhere.pth" in fail("--ckpt", tmp_path / "nowhere.pth")
    assert "twice" in fail("--ckpt", ckpts[0], ckpts[0])
    assert "48 x 48 px" in fail("--ckpt", ckpts[0], other)
    assert "nowhere" in fail("--data_path", tmp_path / "nowhere")
    assert "1.5" in fail("--mask_ratios", "1.5")
    assert "removes nothing" in fail("--mask_ratios", "0")
    assert "none of the 16 patches" in fail("--mask_ratios", "0.99")
    assert "--groups hair" in fail("--groups", "hair")
    assert "does not say the style" in fail("--groups", "style")
    assert "empty" in fail("--maps", tmp_path / "empty")
    assert "no results.json of a finished probe" in fail("--probes", tmp_path / "empty")
    assert "none of 1 is of" in fail("--probes", probes / "p3")
    assert "--out" in fail("--out", tmp_path / "file" / "out")
    (tmp_path / "empty" / "results.json").write_text("{")
    assert "damaged" in fail("--probes", tmp_path / "empty")
    assert not (tmp_path / "out" / "metrics.json").exists()


# --- drawing


def test_heat_is_uniform_to_the_eye_and_grey_where_there_is_no_number():
    colours = heat(np.linspace(0, 2, 21)[None], 2.0)[0]
    lightness = rgb2lab(colours[None] / 255)[0, :, 0]
    steps = np.diff(lightness)
    assert (steps > 0).all() and steps.std() < 0.25 * steps.mean()
    assert (heat(np.array([[5.0]]), 2.0) == colours[-1]).all() and (heat(np.array([[-1.0]]), 2.0) == colours[0]).all()
    assert len(set(heat(np.array([[np.nan]]), 2.0)[0, 0].tolist())) == 1


def test_tiles_and_scale_bars_keep_their_pictures():
    red, blue, long = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (10, 40), "blue"), Image.new("RGB", (70, 5))
    sheet = tile([red, blue, long], gap=4, columns=2)
    assert sheet.size == (70 + 4 + 10, 40 + 4 + 5)
    assert sheet.getpixel((29, 19)) == (255, 0, 0) and sheet.getpixel((74, 39)) == (0, 0, 255)
    bar = np.asarray(scale_bar(3.0, "error", width=200))
    row = bar[28, 4:204]
    assert (row == heat(np.linspace(0, 3, 200)[None], 3.0)[0]).all()


# --- the script


def test_script_probes_the_runs_and_reports_both(tmp_path, import_script):
    """A stand-in for Python notes what the script would have it do."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    note = f"import json, sys; open('{tmp_path}/asked.txt', 'a').write(json.dumps(sys.argv[1:]) + chr(10))"
    stub.write_text(
        f'#!/bin/sh\ncase "$1" in scripts/*) exec "{sys.executable}" "$@";; esac\n'
        f'case "$2" in util.run.grid|visualize.mask_sweep) shift; exec "{sys.executable}" -c "{note}" "$@";; esac\n'
    )
    stub.chmod(0o755)
    (tmp_path / "my labels").mkdir()
    environment = {
        **os.environ,
        "PATH": f"{stub.parent}{os.pathsep}{os.environ['PATH']}",
        "ANIMASK_USE_ACTIVE_ENV": "1",
    }
    environment |= {"MODEL": "mae_vit_tiny_patch8_dec128d4b", "INPUT_SIZE": "64", "PROBE": str(tmp_path / "my labels")}
    environment |= {"PROBE_FLAGS": "--head_norm", "GRID": ""}

    def ask(**more) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
        (tmp_path / "asked.txt").write_text("")
        script = ["bash", ROOT / "scripts" / "mask_sweep.sh", tmp_path, tmp_path / "out"]
        done = subprocess.run(script, env={**environment, **more}, capture_output=True, text=True, timeout=60)
        return done, [json.loads(line) for line in (tmp_path / "asked.txt").read_text().splitlines()]

    done, asked = ask()
    assert done.returncode == 0, done.stderr
    assert [words[0] for words in asked] == ["util.run.grid", *["visualize.mask_sweep"] * 2]
    then = asked[0][asked[0].index("--then") + 1].replace("{run}", "RUN")
    flags = import_script("main_linprobe.py").get_args([*shlex.split(then)[1:], "--output_dir", "x"])
    assert flags.data_path == str(tmp_path / "my labels") and flags.model == "vit_tiny_patch8" and flags.head_norm
    assert flags.init == "RUN/checkpoint-last.pth" and flags.input_size == 64
    for kind, words in zip(("epochs", "compute"), asked[1:], strict=True):
        args = mask_sweep.get_args(words[1:])
        assert args.ckpt == [f"{tmp_path}/out/{kind}/*/checkpoint-last.pth"]
        assert args.probes == f"{tmp_path}/out/then/{kind}" and args.mask_ratios == [0.25, 0.5, 0.75, 0.9]
    _, asked = ask(PROBE="", GRID="--dry_run")
    assert len(asked) == 1 and "--then" not in asked[0]
    done, _ = ask(PROBE=str(tmp_path / "nowhere"))
    assert done.returncode == 2 and "there is no PROBE" in done.stderr


# --- intervals over seeds


def made_up(gains: dict[str, list[float]], seeds: dict[str, list[int]], pictures: int = 40) -> Sweep:
    """A sweep whose runs have the PSNR of their pictures plus a gain of their own."""
    rng = np.random.default_rng(0)
    base, trainings, measured = rng.normal(20, 2, pictures), {}, {}
    for label, own in gains.items():
        runs = [SimpleNamespace(ckpt=f"{label}{seed}", args={"seed": seed}, mask_ratio=0.5) for seed in seeds[label]]
        trainings[label] = runs
        for run, gain in zip(runs, own, strict=True):
            values = {("model", 0.5, metric): base + gain + rng.normal(0, 0.1, pictures) for metric in COMPARED}
            measured[run.ckpt] = SimpleNamespace(values=values, index=np.arange(pictures))
    return Sweep([0.5], trainings, measured, [])


def test_differences_of_repeated_trainings_cover_their_seeds():
    """Runs that differ as much as the ways do: over pictures alone the difference would be beyond doubt."""
    sweep = made_up({"a": [0.0, 0.6], "b": [0.5, 0.1]}, {"a": [0, 1], "b": [0, 1]})
    entry = next(one for one in sweep.differences() if one["metric"] == "psnr_db")
    rows = [np.stack([sweep.measured[f"{label}{s}"].values["model", 0.5, "psnr_db"] for s in (0, 1)]) for label in "ab"]
    found = difference(rows[1], rows[0], np.arange(40))
    assert (entry["difference"], entry["ci95"], entry["over"]) == (found.mean, found.ci95, "seeds and samples")
    assert entry["ci95"][0] < 0 < entry["ci95"][1]
    # other seeds: these very runs on other pictures
    apart = made_up({"a": [0.0, 0.6], "b": [0.8, 0.9]}, {"a": [0, 1], "b": [2, 3]})
    entry = next(one for one in apart.differences() if one["metric"] == "psnr_db")
    assert entry["over"] == "samples" and entry["ci95"][1] < 0


def test_the_sentences_say_what_is_certain():
    texts = []
    for gains, seeds in (
        ({"a": [0.0], "b": [0.5]}, {"a": [0], "b": [0]}),
        ({"a": [0.0, 0.01, 0.0], "b": [0.5, 0.51, 0.5]}, {"a": [0, 1, 2], "b": [0, 1, 2]}),
        ({"a": [0.0, 0.8], "b": [0.5, 0.1]}, {"a": [0, 1], "b": [0, 1]}),
    ):
        sweep = made_up(gains, seeds)
        sweep.floors = ["mean"]
        sweep.summary = lambda row, *key, own=sweep, **_: (
            {"mean": 10.0} if row == "mean" else Sweep.summary(own, row, *key)
        )
        texts.append(_best_pictures(sweep, {"differences": sweep.differences()}, 0.5))
    assert "(of these runs; other seeds may differ)" in texts[0]
    assert "certain" not in texts[1] and "of these runs" not in texts[1]
    assert "which is not certain" in texts[2]
    two = [{"mean": mean, "std": 0.01, "runs": 3} for mean in (0.5, 0.6)]
    assert _differ(*two) and not _differ(two[0], {**two[1], "std": 0.2})
