"""Multiply-accumulates against closed forms and published numbers, timing against a clock that is set by hand.

Run: python -m pytest tests/test_speed.py
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from models_baseline import TimmBackbone
from models_vit import VIT_SIZES, Backbone, build_vit
from util.benchmark import speed
from util.benchmark.speed import count_macs, crop_size_summary, measure_speed

CPU = torch.device("cpu")


def vit_macs(dim: int, depth: int, patch: int, height: int, width: int) -> int:
    """A ViT: embedding of L patches, then blocks of T = L + 1 tokens.

    A block multiplies T x D by D x 3D (qkv), D x D (projection), D x 4D and 4D x D (perceptron), and T x D by D x T,
    then T x T by T x D, over all heads (attention).
    """
    patches = (height // patch) * (width // patch)
    tokens = patches + 1
    block = 12 * tokens * dim * dim + 2 * tokens * tokens * dim
    return patches * (3 * patch * patch) * dim + depth * block


@pytest.mark.parametrize(
    ("size", "patch", "resolution"),
    [("base", 16, (224, 224)), ("base", 16, (336, 336)), ("small", 16, (448, 448)), ("nano", 8, (64, 96))],
)
def test_macs_of_a_vit_are_the_closed_form(size, patch, resolution):
    # on the meta device nothing is computed, and attention is not one kernel but two products
    with torch.device("meta"):
        model = build_vit(f"vit_{size}_patch{patch}", img_size=resolution).eval()
    dim, depth, _ = VIT_SIZES[size]
    assert count_macs(model, resolution, torch.device("meta")) == vit_macs(dim, depth, patch, *resolution)


@pytest.mark.parametrize("resolution", [(64, 64), (96, 160)])
@pytest.mark.parametrize("pooled", [True, False])
def test_macs_are_the_same_where_attention_is_one_kernel(resolution, pooled):
    model = build_vit("vit_nano_patch8", img_size=64, global_pool=pooled).eval()
    assert count_macs(model, resolution, CPU) == vit_macs(128, 6, 8, *resolution)
    with torch.inference_mode():
        assert count_macs(model, resolution, CPU) == vit_macs(128, 6, 8, *resolution)
    for parameter in model.parameters():
        parameter.requires_grad = False
    assert count_macs(model, resolution, CPU) == vit_macs(128, 6, 8, *resolution)


def test_the_base_model_costs_what_is_published():
    assert vit_macs(768, 12, 16, 224, 224) / 1e9 == pytest.approx(17.5, rel=0.01)  # arXiv 2010.11929, table 6 and timm


@pytest.mark.parametrize(
    ("name", "published"),
    [("resnet18", 1.82), ("vit_small_patch16_224", 4.61), ("convnext_tiny", 4.47)],  # as timm and torchvision give them
)
def test_macs_of_timms_networks_are_the_published_ones(name, published):
    with torch.device("meta"):
        model = TimmBackbone(name, (224, 224)).eval()
    assert count_macs(model, (224, 224), torch.device("meta")) / 1e9 == pytest.approx(published, rel=0.01)


class Clock:
    """A clock that stands still until a model advances it."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Timed(Backbone):
    """An embedding that takes `cost(call, batch)` seconds. Counts its calls by batch size."""

    def __init__(self, clock: Clock, cost):
        super().__init__(2)
        self.clock, self.cost, self.calls = clock, cost, []
        self.layer = nn.Linear(3, 2, bias=False)
        self.drop = nn.Dropout(0.5)

    def embed(self, images):
        assert images.min() >= 0 and images.max() <= 1 and not self.training and not self.drop.training
        self.calls.append(len(images))
        self.clock.now += self.cost(len(self.calls), len(images))
        return self.layer(images.mean((2, 3)))


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=made.perf_counter))
    return made


def test_quantiles_and_rates_are_those_of_the_calls_after_the_warm_up(clock):
    # the 5 calls to warm up are slow; then 1, 2, ..., 20 ms one by one, and 100 ms for a batch
    cost = lambda call, batch: 0.1 if batch > 1 else 0.5 if call <= 5 else (call - 5) / 1000  # noqa: E731
    model = Timed(clock, cost)
    got = measure_speed(model, (8, 8), CPU, "fp32", batch=16, warmup=5, repeats=20, seconds=1000)
    assert got["latency_ms_p50"] == pytest.approx(10.5)
    assert got["latency_ms_p95"] == pytest.approx(np.quantile(np.arange(1, 21), 0.95))
    assert got["images_per_s"] == pytest.approx(160)
    assert (got["latency_repeats"], got["latency_warmup"], got["batch_repeats"], got["batch"]) == (20, 5, 20, 16)
    assert got["precision"] == "fp32" and got["device"].startswith("cpu")
    assert got["params"] == 6 and got["gmacs"] == pytest.approx(6e-9)
    assert model.calls == [1] * 25 + [16] * 25 + [1]  # the last one is counted, not timed


def test_a_slow_model_is_timed_for_no_longer_than_asked(clock):
    model = Timed(clock, lambda call, batch: 0.5 * batch)
    got = measure_speed(model, (8, 8), CPU, "fp32", batch=64, warmup=20, repeats=100, seconds=40)
    assert clock.now - 100 <= 40 + 0.5  # and the picture whose operations are counted
    # 20 s for single pictures: 5 s to warm up, 15 s of repeats, at half a second each
    assert got["latency_warmup"] == 10 and got["latency_repeats"] == 30
    # four batches must fit into 20 s
    assert got["batch"] == 8 and got["batch_repeats"] >= 3 and got["images_per_s"] == pytest.approx(2)


def test_a_model_too_slow_for_the_time_is_still_timed(clock):
    model = Timed(clock, lambda call, batch: 60.0 * batch)
    got = measure_speed(model, (8, 8), CPU, "fp32", seconds=1)
    assert got["latency_ms_p50"] == pytest.approx(60_000) and got["latency_repeats"] == 3 and got["latency_warmup"] == 1
    assert got["batch"] == 1 and got["images_per_s"] == pytest.approx(1 / 60)


def test_a_batch_that_memory_does_not_hold_is_halved(clock):
    def cost(call, batch):
        if batch > 10:
            raise torch.OutOfMemoryError("none left")
        return 0.001

    got = measure_speed(Timed(clock, cost), (8, 8), CPU, "fp32", batch=64, warmup=1, repeats=3)
    assert got["batch"] == 8 and got["images_per_s"] == pytest.approx(8000)


def test_memory_for_no_picture_at_all_is_an_error(clock):
    def cost(call, batch):
        if call > 10:
            raise torch.OutOfMemoryError("none left")
        return 0.001

    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        measure_speed(Timed(clock, cost), (8, 8), CPU, "fp32", batch=4, warmup=5, repeats=5)


def test_the_model_is_left_as_it_was(clock):
    model = Timed(clock, lambda call, batch: 0.001)
    model.train()
    model.drop.eval()
    grad = torch.is_grad_enabled()
    measure_speed(model, (8, 8), CPU, "fp32", warmup=1, repeats=3)
    assert model.training and model.layer.training and not model.drop.training
    assert torch.is_grad_enabled() == grad and not torch.is_inference_mode_enabled()
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in model.parameters())


def test_the_precision_is_that_of_the_products(clock):
    seen = []
    model = Timed(clock, lambda call, batch: 0.001)
    model.layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    measure_speed(model, (8, 8), CPU, "bf16", warmup=1, repeats=3)
    assert set(seen[:-1]) == {torch.bfloat16}


def test_a_real_model_is_measured():
    model = build_vit("vit_nano_patch16", img_size=32)
    model.head = nn.Linear(128, 10)
    got = measure_speed(model, (32, 32), CPU, "fp32", batch=4, warmup=1, repeats=3, seconds=5)
    assert 0 < got["latency_ms_p50"] <= got["latency_ms_p95"] and got["images_per_s"] > 0
    assert got["gmacs"] == pytest.approx(vit_macs(128, 6, 16, 32, 32) / 1e9)
    assert got["params"] == sum(p.numel() for p in build_vit("vit_nano_patch16", img_size=32).parameters())


def test_crop_sizes_are_summed_up():
    sizes = np.array([[100, 200], [300, 112], [500, 400], [336, 336], [90, 1000]])
    summary = crop_size_summary(sizes)
    assert summary["images"] == 5
    assert summary["short_side_px"] == {"p5": 92.0, "p25": 100.0, "p50": 112.0, "p75": 336.0, "p95": 387.2}
    assert summary["share_below"] == {"112": 0.4, "224": 0.6, "336": 0.6, "448": 1.0}
    assert crop_size_summary(sizes, (91,))["share_below"] == {"91": 0.2}


@pytest.mark.parametrize("sizes", [np.zeros((0, 2)), np.ones(4), np.ones((3, 4))])
def test_sizes_of_nothing_are_refused(sizes):
    with pytest.raises(ValueError, match="sizes must be"):
        crop_size_summary(sizes)
    with pytest.raises(ValueError, match="no area"):
        crop_size_summary(np.array([[3, 4], [0, 7]]))
