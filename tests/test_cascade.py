"""A cascade of resolutions against brute force, and against the plain evaluation at its two ends.

Run: python -m pytest tests/test_cascade.py
"""

import json
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import eval_recognition
import main_finetune
from models_vit import build_vit
from util.benchmark.cascade import SURE, cascade_report, choose_threshold, decided_at, margins_of
from util.benchmark.protocols import known_val
from util.data.augment import EvalCrop
from util.data.images import BadImage
from util.data.sources import open_source
from util.transfer.cascade import Cascade, Pyramid, centre_scorer, head_scorer
from util.transfer.encoder import Encoder

CPU, INF = torch.device("cpu"), float("inf")
SIZES = ((16, 16), (24, 24), (32, 32))


def brute_force(margins: np.ndarray, threshold: float) -> list[int]:
    """The deciding stage of each picture, a picture and a stage at a time."""
    stages = []
    for column in margins.T:
        stage = 0
        while stage < len(column) - 1 and not min(column[stage], SURE) >= threshold:
            stage += 1
        stages.append(stage)
    return stages


def scored(seed: int, stages: int = 3, images: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """(correct, margins) (S, N) of made-up stages: later ones are more often right; some margins tie, some are none."""
    rng = np.random.default_rng(seed)
    correct = rng.random((stages, images)) < np.linspace(0.5, 0.9, stages)[:, None]
    margins = np.round(rng.exponential(1 + correct), 1)
    margins[0, :2], margins[1, 1], margins[0, 2], margins[0, 3] = np.nan, np.nan, np.inf, 0.0
    return correct, margins


def test_margins_are_those_of_a_sorted_row():
    scores = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    ordered = np.sort(scores.astype(np.float64), axis=1)
    np.testing.assert_array_equal(margins_of(scores), ordered[:, -1] - ordered[:, -2])
    special = margins_of(np.array([[1.0, -INF, -INF], [2.0, 2.0, 0.0], [np.nan, 1.0, 0.0], [-INF, -INF, -INF]]))
    np.testing.assert_array_equal(special, [INF, 0.0, np.nan, np.nan])
    with pytest.raises(ValueError, match="C > 1"):
        margins_of(np.zeros((3, 1)))


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0, 2.3, 100.0, INF])
def test_the_first_sure_stage_decides(threshold):
    _, margins = scored(1)
    stages = decided_at(margins, threshold)
    assert stages.tolist() == brute_force(margins, threshold)
    if threshold == INF:
        assert (stages == 2).all()
    if threshold == 0:
        assert (stages[2:] == 0).all() and stages[:2].tolist() == [1, 2]


@pytest.mark.parametrize("most_lost", [0.0, 0.03, 0.1, 1.0])
@pytest.mark.parametrize("seed", range(8))
def test_the_threshold_is_the_smallest_that_keeps_to_its_promise(seed, most_lost):
    correct, margins = scored(seed)

    def lost(threshold: float) -> float:
        stages = brute_force(margins, threshold)
        return correct[-1].mean() - np.mean([correct[stage, image] for image, stage in enumerate(stages)])

    values = np.unique(margins[np.isfinite(margins)])
    # every threshold does what one of these does: 0, between two margins, beyond the largest
    grid = [0.0, *((values[:-1] + values[1:]) / 2), values[-1] + 1, INF]
    kept = [lost(t) <= most_lost + 1e-9 for t in grid]
    first = next(place for place in range(len(grid)) if all(kept[place:]))
    chosen = choose_threshold(correct, margins, most_lost)
    assert brute_force(margins, chosen) == brute_force(margins, grid[first])
    assert lost(chosen) <= most_lost + 1e-9
    assert most_lost < 1 or chosen == 0


def test_a_dip_is_no_threshold():
    """At 0.5 nothing is lost, by luck; at 1.5 a picture is: what is chosen lies beyond."""
    margins = np.array([[0.2, 1.0, 2.0], [9, 9, 9]])
    correct = np.array([[False, True, False], [True, False, True]])
    # lost at 0: 2 - 1; above 0.2: 0; above 1.0: 1; above 2.0: 0
    assert 2.0 < choose_threshold(correct, margins) < 3.0
    assert choose_threshold(correct, margins, 1 / 3) == 0


def test_a_first_stage_that_is_as_good_needs_no_other():
    correct = np.ones((2, 5), dtype=bool)
    assert choose_threshold(correct, np.random.default_rng(0).random((2, 5))) == 0
    with pytest.raises(ValueError, match="one shape"):
        choose_threshold(correct, np.ones((2, 4)))
    with pytest.raises(ValueError, match="one shape"):
        choose_threshold(np.ones((2, 0)), np.ones((2, 0)))


@pytest.mark.parametrize("threshold", [0.0, 1.2, INF])
def test_the_report_adds_up(threshold):
    correct, margins = scored(3)
    labels = np.arange(40) % 5
    predicted = np.where(correct, labels, -1)
    costs, speeds = np.array([1.0, 4.0, 10.0]), np.array([100.0, 20.0, 8.0])
    report = cascade_report(predicted, margins, labels, threshold, costs, speeds, labels, replicates=20, seed=0)
    stages = brute_force(margins, threshold)
    assert report["top1"] == np.mean([correct[stage, image] for image, stage in enumerate(stages)])
    assert report["top1_highest"] == correct[-1].mean()
    assert report["lost"] == pytest.approx(report["top1_highest"] - report["top1"])
    assert report["share"] == [stages.count(stage) / 40 for stage in range(3)]
    paid = [[1, 5, 15][stage] for stage in stages]
    assert report["gmacs"] == pytest.approx(np.mean(paid)) and report["gmacs_highest"] == 10
    seconds = [[0.01, 0.06, 0.185][stage] for stage in stages]
    assert report["images_per_s"] == pytest.approx(1 / np.mean(seconds)) and report["images_per_s_highest"] == 8
    for name in ("top1", "top1_highest", "lost"):
        low, high = report[f"{name}_ci95"]
        assert low <= report[name] <= high


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = build_vit("vit_nano_patch8", img_size=16).eval()
    network.head = nn.Linear(network.embed_dim, 5)
    nn.init.normal_(network.head.weight, std=0.3)
    return network


@pytest.fixture(scope="module")
def source(tmp_path_factory, make_images):
    folder = make_images(tmp_path_factory.mktemp("pictures") / "wide", 11)
    for number, path in enumerate(sorted(folder.glob("*.png"))):  # the smart crop has something to choose
        Image.open(path).resize((40 + 7 * number, 40)).save(path)
    return open_source(folder, "train", val_fraction=0.0)


def plain(model, source, size, scorer) -> torch.Tensor:
    """Scores (N, C) as anyone would compute them, a picture at a time."""
    crop = EvalCrop(size)
    with torch.inference_mode():
        return torch.cat(
            [
                scorer(model.embed(crop(source.load(row), source.record(row))[None] / 255.0))
                for row in range(len(source))
            ]
        )


def scorers_of(model, kind: str) -> list:
    if kind == "head":
        return [head_scorer(model.head)] * 3
    rng = np.random.default_rng(5)
    centres = [rng.normal(size=(6, model.embed_dim)).astype(np.float32) for _ in SIZES]
    centres = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in centres]
    for rows in centres:
        rows[4] = np.nan  # a class without a picture
    return [centre_scorer(rows, CPU) for rows in centres]


def test_a_pyramid_holds_the_very_crops(source):
    pyramid = Pyramid(SIZES)
    packed = torch.stack([pyramid(source.load(row), source.record(row)) for row in range(4)])
    for size, level in zip(SIZES, pyramid.levels(packed), strict=True):
        crop = EvalCrop(size)
        assert torch.equal(level, torch.stack([crop(source.load(row), source.record(row)) for row in range(4)]))
    with pytest.raises(ValueError, match="proportion"):
        Pyramid(((16, 16), (16, 24)))


@pytest.mark.parametrize("kind", ["head", "centroid"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_pictures_are_named_as_the_stages_name_them_alone(model, source, kind, batch_size):
    scorers = scorers_of(model, kind)
    scores = [plain(model, source, size, scorer) for size, scorer in zip(SIZES, scorers, strict=True)]
    margins = np.stack([margins_of(found.numpy()) for found in scores])
    classes = np.stack([found.argmax(dim=1).numpy() for found in scores])
    middle = float(np.median(margins[:2]))
    for threshold in (0.0, middle, INF):
        cascade = Cascade(Encoder(model, CPU, "fp32", most=4), Pyramid(SIZES), scorers, threshold)
        predicted, stages = cascade.name(source, batch_size=batch_size, num_workers=0)
        assert stages.tolist() == brute_force(margins, threshold)
        assert predicted.tolist() == classes[stages, np.arange(len(stages))].tolist()
    assert len(set(brute_force(margins, middle))) == 3  # every stage has had its say


class Watched:
    """A source that remembers what was decoded; picture 3 is damaged if asked for."""

    def __init__(self, source, damaged: bool = False):
        self.source, self.damaged, self.loads, self.record = source, damaged, [], source.record

    def __len__(self):
        return len(self.source)

    def load(self, row: int):
        self.loads.append(row)
        if self.damaged and row == 3:
            raise BadImage("3.png", "damaged")
        return self.source.load(row)


def test_each_picture_is_decoded_once_and_shown_large_only_if_unsure(model, source, monkeypatch):
    watched, shown = Watched(source), []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda images: shown.append(tuple(images.shape)) or embed(images))
    scorers = scorers_of(model, "head")
    threshold = float(np.median(margins_of(plain(model, source, SIZES[0], scorers[0]).numpy())))
    shown.clear()
    cascade = Cascade(Encoder(model, CPU, "fp32", most=64), Pyramid(SIZES), scorers, threshold)
    _, stages = cascade.name(watched, batch_size=64, num_workers=0)
    assert watched.loads == list(range(len(source)))
    reached = [(stages >= stage).sum() for stage in range(3)]
    assert [(count, 3, *size) for count, size in zip(reached, SIZES, strict=True) if count] == shown
    assert reached[0] == len(source) > reached[1] > 0


def test_a_damaged_picture_is_nobody(model, source):
    scorers = scorers_of(model, "head")
    cascade = Cascade(Encoder(model, CPU, "fp32", most=4), Pyramid(SIZES), scorers, 0.0)
    whole, broken = (
        cascade.name(which, batch_size=4, num_workers=0)[0] for which in (source, Watched(source, damaged=True))
    )
    assert broken[3] == -1 and np.delete(broken, 3).tolist() == np.delete(whole, 3).tolist()


# --- as a protocol ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return helpers.make_identities(tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="module")
def run(people, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    main_finetune.main(helpers.transfer_flags(people, folder))
    return folder


def evaluate(out, *flags) -> dict:
    fast = "--replicates 20 --device cpu --num_workers 0 --protocols closed_set resolution"
    eval_recognition.main([*map(str, flags), "--output_dir", str(out), *fast.split()])
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def fast_clock():
    """Speed is not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("util.transfer.views", "util.transfer.cascade"):
            patch.setattr(f"{module}.speed_at", lambda subject, size, seconds: speed(size[0]))
        yield


def speed(side: int) -> dict:
    return {
        "latency_ms_p50": 1.0, "latency_ms_p95": 2.0, "images_per_s": 10000.0 / side, "gmacs": side / 8, "params": 1
    }  # fmt: skip


@pytest.mark.parametrize("method", ["head", "centroid"])
@pytest.mark.parametrize("extra", [(), ("--flip_test",)], ids=["plain", "flip"])
def test_the_ends_of_a_cascade_are_the_plain_evaluations(people, run, tmp_path, fast_clock, method, extra):
    weights = run / "checkpoint-best.pth"
    if method == "centroid":  # an encoder without a head
        state = torch.load(weights, weights_only=True)["model"]
        weights = tmp_path / "encoder.pth"
        torch.save({"model": {k: v for k, v in state.items() if not k.startswith("head.")}}, weights)
        extra = (*extra, "--model", "vit_nano_patch8", "--input_size", 16)
    sides = ("--resolutions", 8, 16, "--cascade", 8, 16)
    flags = ("--ckpt", weights, "--data_path", people, *sides, *extra)
    low = evaluate(tmp_path / "low", *flags, "--cascade_loss", 1.0)
    assert low["closed_set"]["method"] == method
    block, passes = low["resolution"]["cascade"], 2 if "--flip_test" in extra else 1
    assert block["threshold"] == 0 and block["share"] == {"8": 1.0, "16": 0.0}
    assert block["top1"] == low["resolution"]["8"]["top1"] and block["gmacs"] == passes
    assert block["top1_highest"] == low["resolution"]["16"]["top1"] == low["closed_set"]["top1"]
    assert block["images_per_s_highest"] == pytest.approx(10000 / 16 / passes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("util.transfer.cascade.choose_threshold", lambda *_: INF)
        high = evaluate(tmp_path / "high", *flags)["resolution"]
    assert high["cascade"]["share"] == {"8": 0.0, "16": 1.0}
    assert high["cascade"]["top1"] == high["16"]["top1"] and high["cascade"]["gmacs"] == 3 * passes
    text = (tmp_path / "low" / "report.md").read_text()
    assert "A cascade, 8 then 16 px: Top-1" in text and "Decided at 8 px 100.0 %, at 16 px 0.0 %." in text


def test_the_default_is_half_and_whole_and_keeps_to_its_promise_on_val(people, run, tmp_path, fast_clock, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "util.transfer.cascade.choose_threshold",
        lambda right, margins, most: seen.append((right, margins, most)) or choose_threshold(right, margins, most),
    )
    flags = ("--ckpt", run / "checkpoint-best.pth", "--data_path", people, "--resolutions", 16)
    block = evaluate(tmp_path / "out", *flags)["resolution"]["cascade"]
    assert block["resolutions"] == [8, 16] and block["chosen_on"] == "val" and block["most_lost"] == 0.005
    ((right, margins, most),) = seen
    assert right.shape == margins.shape == (2, 20) and most == 0.005  # 4 identities, 5 pictures each
    stages = brute_force(margins, block["threshold"])
    assert right[stages, np.arange(20)].mean() >= right[-1].mean() - 0.005
    assert block["gmacs"] == pytest.approx(1 + 2 * block["share"]["16"])


def test_no_cascade_where_none_is_asked_for_or_nothing_to_choose_on(people, run, tmp_path, fast_clock):
    flags = ("--ckpt", run / "checkpoint-best.pth", "--data_path", people, "--resolutions", 16)
    assert "cascade" not in evaluate(tmp_path / "none", *flags, "--cascade")["resolution"]
    odd = evaluate(tmp_path / "odd", *flags, "--cascade", 12, 16)
    assert "multiple of 8" in odd["resolution"]["cascade"]["skipped"]
    assert "cascade: an input of 12 x 12 px" in (tmp_path / "odd" / "report.md").read_text()


def test_val_that_stands_in_for_test_is_not_tuned_on(people):
    bench = SimpleNamespace(once=lambda key, make: (SimpleNamespace(name="val"), None, {}))
    assert known_val(bench) is None


@pytest.mark.parametrize("sides", [("16",), ("16", "8"), ("8", "8")])
def test_sides_in_another_order_are_refused(sides, tmp_path, capsys):
    flags = ["--ckpt", "w.pth", "--data_path", "d", "--output_dir", str(tmp_path / "out"), "--cascade", *sides]
    assert "from small to large" in helpers.fails(eval_recognition.main, capsys, flags)
