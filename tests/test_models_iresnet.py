"""Face-recognition networks against the released layout and closed forms; what batch norm asks of the scripts.

Run: python -m pytest tests/test_models_iresnet.py
"""

import json
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import eval_recognition
import main_finetune
import main_linprobe
import models_iresnet
from models_baseline import build_baseline
from models_iresnet import IR_DEPTHS, IRUnit
from models_transfer import load_recogniser, load_transferred, start_backbone
from tests.helpers import (
    META,
    assert_same,
    count,
    fails,
    make_identities,
    on_meta,
    outcome,
    random_state,
    results_of,
    transfer_flags,
)
from util.benchmark.speed import count_macs
from util.run.errors import UserError
from util.training.checkpoint import read_checkpoint
from util.training.hub import load_weights
from util.training.pretrained import fingerprint_of
from util.transfer import views

PUBLISHED_WIDTHS = (64, 128, 256, 512)


def published_shapes(depths, widths=PUBLISHED_WIDTHS, places: int = 49) -> dict[str, tuple]:
    """Names and shapes of a released face-recognition backbone of 112 px, as its file holds them."""
    shapes: dict[str, tuple] = {}

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    shapes["conv1.weight"] = (widths[0], 3, 3, 3)
    norm("bn1", widths[0])
    shapes["prelu.weight"] = (widths[0],)
    channels = widths[0]
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
        for unit in range(depth):
            name = f"layer{stage}.{unit}"
            norm(f"{name}.bn1", channels)
            shapes[f"{name}.conv1.weight"] = (width, channels, 3, 3)
            norm(f"{name}.bn2", width)
            shapes[f"{name}.prelu.weight"] = (width,)
            shapes[f"{name}.conv2.weight"] = (width, width, 3, 3)
            norm(f"{name}.bn3", width)
            if unit == 0:
                shapes[f"{name}.downsample.0.weight"] = (width, channels, 1, 1)
                norm(f"{name}.downsample.1", width)
            channels = width
    norm("bn2", channels)
    shapes["fc.weight"], shapes["fc.bias"] = (512, channels * places), (512,)
    norm("features", 512)
    return shapes


def reference(state: dict, depths, images: torch.Tensor, *, pooled: bool, stem_stride: int = 1) -> torch.Tensor:
    """Embeddings by such a file in float64, written from the paper's description with nothing but functions."""
    state = {name: value.double() for name, value in state.items()}

    def norm(x, name):
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, training=False, eps=1e-5)

    def conv(x, name, stride=1):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    x = conv((images * 255 - 127.5) / 127.5, "conv1", stem_stride)
    x = F.prelu(norm(x, "bn1"), state["prelu.weight"])
    for stage, depth in enumerate(depths, 1):
        for unit in range(depth):
            name, stride = f"layer{stage}.{unit}", 2 if unit == 0 else 1
            y = conv(norm(x, f"{name}.bn1"), f"{name}.conv1")
            y = conv(F.prelu(norm(y, f"{name}.bn2"), state[f"{name}.prelu.weight"]), f"{name}.conv2", stride)
            if unit == 0:
                x = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            x = norm(y, f"{name}.bn3") + x
    x = norm(x, "bn2")
    x = x.mean(dim=(2, 3)) if pooled else x.flatten(1)
    return norm(F.linear(x, state["fc.weight"], state["fc.bias"]), "features")


def ir_macs(depths, side: int, stem_stride: int, features: int) -> int:
    """Multiply-accumulates in closed form: a convolution has k*k*C*D for each place of its result."""
    side //= stem_stride
    macs, channels = 27 * 64 * side**2, 64
    for depth, width in zip(depths, PUBLISHED_WIDTHS, strict=True):
        for unit in range(depth):
            macs += 9 * channels * width * side**2
            side //= 2 if unit == 0 else 1
            macs += (9 * width * width + (channels * width if unit == 0 else 0)) * side**2
            channels = width
    return macs + 512 * features


@pytest.mark.parametrize(
    ("name", "side", "millions", "gmacs", "stem_stride", "features"),
    [
        ("ir_50_flatten", 112, 43.59, 6.31, 1, 512 * 7 * 7),
        ("ir_50_flatten", 224, 82.13, 25.24, 1, 512 * 14 * 14),
        ("ir_50_stem2", 224, 43.59, 6.31, 2, 512 * 7 * 7),
        ("ir_50", 224, 31.01, 25.19, 1, 512),
    ],
)
def test_ir_50_costs_what_is_known_of_it(name, side, millions, gmacs, stem_stride, features):
    model = on_meta(name, side)
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.005)
    assert count_macs(model, (side, side), META) / 1e9 == pytest.approx(gmacs, abs=0.005)
    assert count_macs(model, (side, side), META) == ir_macs(IR_DEPTHS["ir_50"], side, stem_stride, features)


@pytest.mark.parametrize(("name", "millions"), [("ir_18", 24.03), ("ir_34", 34.14), ("ir_100", 65.16)])
def test_the_other_depths_are_the_published_ones(name, millions):
    assert count(on_meta(f"{name}_flatten", 112)) / 1e6 == pytest.approx(millions, abs=0.005)


def test_one_set_of_weights_takes_every_size():
    model = on_meta("ir_50", 224)
    for side in (64, 112, 224, 336, 448):
        model.check_size((side, side))
        assert model.embed(torch.zeros(2, 3, side, side, device=META)).shape == (2, 512)
    assert not model.fixed_size and model.embed_dim == 512
    tied = on_meta("ir_50_flatten", 112)
    assert tied.fixed_size
    for refuse in (tied.check_size, lambda size: tied.embed(torch.zeros(1, 3, *size, device=META))):
        with pytest.raises(UserError, match="112 x 112 px only, not 224 x 224") as error:
            refuse((224, 224))
        assert "--model ir_50" in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def narrow(monkeypatch) -> tuple[int, ...]:
    """IR networks of an eighth of their width, which cost next to nothing."""
    monkeypatch.setattr(models_iresnet, "WIDTHS", (8, 16, 32, 64))
    return (8, 16, 32, 64)


@pytest.mark.parametrize("name", ["ir_18_flatten", "ir_50_flatten"])
def test_a_released_backbone_loads_under_its_own_names(narrow, tmp_path, name):
    depths = IR_DEPTHS[name.removesuffix("_flatten")]
    state = random_state(published_shapes(depths, narrow))
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "backbone.pth")
    args = {"model": name, "init": str(tmp_path / "backbone.pth"), "input_size": 112, "global_pool": True, "seed": 0}
    images = torch.rand(2, 3, 112, 112, dtype=torch.float64)
    with torch.inference_mode():
        got = start_backbone(args).double().eval().embed(images)
        torch.testing.assert_close(got, reference(state, depths, images, pooled=False))


def test_the_names_and_shapes_at_full_width_are_the_released_ones():
    expected = published_shapes(IR_DEPTHS["ir_50"])
    assert {name: tuple(value.shape) for name, value in on_meta("ir_50_flatten", 112).state_dict().items()} == expected
    stem2 = on_meta("ir_50_stem2", 224).state_dict()  # a released file loads into it, too
    assert {name: tuple(value.shape) for name, value in stem2.items()} == expected


@pytest.mark.parametrize(("name", "stem_stride", "sides"), [("ir_18", 1, (48, 50)), ("ir_18_stem2", 2, (224, 224))])
def test_the_other_necks_against_the_reference(narrow, tmp_path, name, stem_stride, sides):
    depths, pooled = IR_DEPTHS["ir_18"], name == "ir_18"
    state = random_state(published_shapes(depths, narrow, places=1 if pooled else 49))
    model = build_baseline(name, sides).eval()
    torch.save(state, tmp_path / "backbone.pth")
    model.load(load_weights(str(tmp_path / "backbone.pth"), official_names=False))
    images = torch.rand(2, 3, *sides, dtype=torch.float64)
    with torch.inference_mode():
        expected = reference(state, depths, images, pooled=pooled, stem_stride=stem_stride)
        torch.testing.assert_close(model.double().embed(images), expected)


def test_weights_for_another_neck_or_network_are_refused(narrow, tmp_path):
    def refusal(name: str, state: dict) -> str:
        torch.save(state, tmp_path / "theirs.pth")
        model = build_baseline(name, (112, 112))
        before = fingerprint_of(model.state_dict())
        with pytest.raises(UserError) as error:
            model.load(load_weights(str(tmp_path / "theirs.pth"), official_names=False))
        assert fingerprint_of(model.state_dict()) == before
        assert "theirs.pth" in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    released = random_state(published_shapes(IR_DEPTHS["ir_18"], narrow))
    assert "--model ir_50_flatten" in refusal("ir_18", released)
    assert "lacks layer1.2.bn1.weight" in refusal("ir_34_flatten", released)
    assert "deeper" in refusal("ir_18_flatten", random_state(published_shapes(IR_DEPTHS["ir_34"], narrow)))
    assert "lacks conv1.weight" in refusal("ir_18", timm.create_model("test_vit").state_dict())


def test_a_unit_keeps_its_input_where_nothing_changes():
    assert IRUnit(8, 8, 1).downsample is None
    for unit in (IRUnit(8, 8, 2), IRUnit(8, 16, 1)):
        assert unit.downsample is not None
    silent = IRUnit(8, 8, 1).eval()
    nn.init.zeros_(silent.bn3.weight)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(silent(x), x)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return make_identities(tmp_path_factory.mktemp("people"), train=6, val=3, test=3)


# --- batch norm in the transfer scripts


def test_a_network_with_batch_norm_resumes_exactly(people, narrow, tmp_path):
    """Its running statistics are in the checkpoint, and move in training alone."""
    argv = partial(transfer_flags, people, tmp_path / "parts", "--model", "ir_18", "--head", "arcface")
    main_finetune.main(transfer_flags(people, tmp_path / "whole", "--model", "ir_18", "--head", "arcface"))
    for steps in (2, 2):
        main_finetune.main(argv("--resume", "auto", "--max_steps", steps))
    assert not results_of(tmp_path / "parts")["finished"]
    main_finetune.main(argv("--resume", "auto"))
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
    best = [read_checkpoint(tmp_path / run / "checkpoint-best.pth")["model"] for run in ("parts", "whole")]
    assert_same(*best)
    state, steps = outcome(tmp_path / "whole")[0], results_of(tmp_path / "whole")["steps"]
    assert state["layer3.1.bn2.num_batches_tracked"] == state["features.num_batches_tracked"] == steps > 0
    assert state["bn2.running_mean"].abs().sum() > 0 and not torch.equal(state["bn1.running_var"], torch.ones(8))
    assert (state["features.weight"] == 1).all()  # not trained
    # what evaluates is what was saved
    trained = load_transferred(tmp_path / "whole" / "checkpoint-best.pth")
    assert not trained.model.training
    assert_same(dict(trained.model.state_dict()), dict(best[1]))


def test_a_probe_leaves_batch_norm_alone(people, narrow, tmp_path, monkeypatch):
    modes, forward = set(), nn.BatchNorm2d.forward

    def noted(self, x):
        modes.add(self.training)
        return forward(self, x)

    monkeypatch.setattr(nn.BatchNorm2d, "forward", noted)
    main_linprobe.main(transfer_flags(people, tmp_path / "run", "--model", "ir_18"))
    assert modes == {False}
    assert set(read_checkpoint(tmp_path / "run" / "checkpoint-best.pth")["model"]) == {"head.weight", "head.bias"}


def test_batches_of_one_are_refused_where_there_is_batch_norm(people, narrow, tmp_path, capsys):
    for model in ("ir_18", "timm:test_resnet"):
        argv = transfer_flags(people, tmp_path / "run", "--model", model, "--batch_size", 1)
        assert "two images or more: raise --batch_size" in fails(main_finetune.main, capsys, argv)


def test_a_trained_network_is_exported_and_evaluated_at_other_sizes(
    people, narrow, import_script, tmp_path, monkeypatch
):
    monkeypatch.setattr(views, "SPEED_SECONDS", 0.2)
    run = tmp_path / "runs" / "ir"
    argv = transfer_flags(people, run, "--model", "ir_18", "--input_size", 32, "--head_lr", 1e-2)
    main_finetune.main(argv)
    best = str(run / "checkpoint-best.pth")
    import_script("scripts/export.py").main(["--ckpt", best, "--out", str(tmp_path / "ir.safetensors")])
    trained = load_recogniser(best)
    exported = load_recogniser(str(tmp_path / "ir.safetensors"))
    images = torch.rand(2, 3, 40, 40)
    with torch.inference_mode():
        assert torch.equal(trained.model.embed(images), exported.model.embed(images))
    for name, flags in (("ir", ("--ckpt", best)), ("vit", ("--ckpt", "timm:test_vit"))):
        if name == "vit":
            torch.manual_seed(0)
            save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
            flags = ("--ckpt", str(tmp_path / "vit.safetensors"), "--model", "timm:test_vit", "--input_size", "32")
        flags += ("--protocols", "resolution", "--resolutions", "32", "48", "64", "--cascade", "--replicates", "20")
        flags += ("--data_path", people, "--output_dir", tmp_path / "out" / name, "--device", "cpu", "--num_workers", 0)
        eval_recognition.main([*map(str, flags)])
        results = json.loads((tmp_path / "out" / name / "results.json").read_text())["resolution"]
        for side in ("32", "48", "64"):
            assert 0 <= results[side]["top1"] <= 1 and results[side]["gmacs"] > 0
        assert results["32"]["gmacs"] < results["48"]["gmacs"] < results["64"]["gmacs"]
