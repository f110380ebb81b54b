"""The networks that masked autoencoders are compared with, against published figures and other implementations.

Run: python -m pytest tests/test_models_baseline.py
"""

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

import main_lora
import models_iresnet
from models_baseline import BASELINE_NAMES, TIMM_MODELS, TimmBackbone, build_baseline
from models_transfer import load_recogniser, load_transferred, start_backbone
from tests.helpers import META, assert_same, count, fails, make_identities, on_meta, random_state, transfer_flags
from util.benchmark.speed import count_macs
from util.run.errors import UserError
from util.training.checkpoint import read_checkpoint
from util.training.hub import Weights
from util.training.optim import transfer_groups, unfreeze_in_stages
from util.transfer.lora import add_lora, load_lora, load_peft, lora_state

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("name", "millions", "side", "gmacs"),
    [
        # parameters and multiplications without a classifier, as timm and the papers give them
        ("resnet50", 23.51, 224, 4.09),
        ("efficientnet_b0", 4.01, 224, 0.38),
        ("efficientnet_b3", 10.70, 300, 1.83),
        ("dino_vitb16", 85.80, 224, 17.58),
        ("dinov2_vitb14", 86.58, 518, 151.7),
        ("dinov2_vitl14", 304.37, 518, 507.2),
    ],
)
def test_short_names_are_the_published_networks(name, millions, side, gmacs):
    model = on_meta(name, side // 32 * 32 if name == "efficientnet_b3" else side)
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.01)
    assert count_macs(model, (side, side), META) / 1e9 == pytest.approx(gmacs, rel=0.03)
    config = timm.get_pretrained_cfg(TIMM_MODELS[name])
    assert (config.mean, config.std) == IMAGENET and config.hf_hub_id == f"timm/{TIMM_MODELS[name]}"
    assert hasattr(model, "blocks") == name.startswith("dino")  # EfficientNet's "blocks" are no transformer's
    assert not model.fixed_size


def test_resnet50_is_that_of_torchvision():
    theirs = torchvision.models.resnet50()
    theirs.load_state_dict(random_state({name: value.shape for name, value in theirs.state_dict().items()}))
    ours = build_baseline("resnet50", (224, 224)).eval()
    ours.load(Weights(theirs.state_dict(), {}, "theirs", "path"))
    theirs.fc = nn.Identity()
    images, (mean, std) = torch.rand(2, 3, 64, 96), IMAGENET
    normal = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.inference_mode():
        expected = theirs.eval()(normal)
        torch.testing.assert_close(ours.embed(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """The smallest DINOv2 in a file as timm publishes it, of random weights: made at 518 px, 37 x 37 patches."""
    torch.manual_seed(0)
    net = timm.create_model("vit_small_patch14_dinov2", num_classes=0, depth=2)
    state = random_state({name: value.shape for name, value in net.state_dict().items()})
    path = tmp_path_factory.mktemp("dinov2") / "model.safetensors"
    save_file(state, path)
    return path


@pytest.fixture
def shallow(monkeypatch):
    """timm's DINOv2 with two of its blocks."""
    whole = timm.create_model

    def create(name, *args, **options):
        return whole(name, *args, **options, **({"depth": 2} if "dinov2" in name else {}))

    monkeypatch.setattr(timm, "create_model", create)
    return whole


DINOV2 = "timm:vit_small_patch14_dinov2.lvd142m"


@pytest.mark.parametrize("built_for", [(70, 70), (56, 84)])
def test_dinov2_takes_any_multiple_of_14_with_one_set_of_weights(dinov2, shallow, built_for):
    size = list(built_for)
    args = {"model": DINOV2, "init": str(dinov2), "input_size": size, "global_pool": True, "seed": 0}
    model, state = start_backbone(args).eval(), load_file(dinov2)
    assert model.net.pos_embed.shape == (1, 1 + built_for[0] * built_for[1] // 196, 384)
    # timm's own way: a network of fixed size, into which it loads and re-samples the file
    theirs = shallow(
        "vit_small_patch14_dinov2", num_classes=0, depth=2, img_size=built_for, pretrained=True,
        pretrained_cfg_overlay={"file": str(dinov2)},
    ).eval()  # fmt: skip
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    images = torch.rand(2, 3, *built_for)
    with torch.inference_mode():
        tokens = theirs.forward_features((images - mean) / std)
        torch.testing.assert_close(model.embed(images), tokens[:, 0], rtol=1e-4, atol=1e-4)
        both = start_backbone(args | {"model": DINOV2 + "+mean"}).eval()
        expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
        assert both.embed_dim == 768
        torch.testing.assert_close(both.embed(images), expected, rtol=1e-4, atol=1e-4)
        for side in (42, 98):
            model.check_size((side, side))
            assert model.embed(torch.rand(1, 3, side, side)).isfinite().all()
    with pytest.raises(UserError, match="multiple of 14"):
        model.check_size((224, 112 + 1))
    with pytest.raises(UserError, match="multiple of 14"):
        model.embed(torch.rand(1, 3, 64, 64))
    assert "ls1.gamma" in " ".join(state)  # layer scale came along


def test_files_of_the_first_release_of_dinov2_load_too(dinov2, shallow, tmp_path):
    """They hold the mask token of its objective."""
    state = load_file(dinov2)
    torch.save(state | {"mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2.pth")
    args = {"model": DINOV2, "init": str(tmp_path / "dinov2.pth"), "input_size": 518, "global_pool": True, "seed": 0}
    assert_same(dict(start_backbone(args).net.state_dict()), state)


def test_registers_have_no_place_in_the_picture(shallow):
    torch.manual_seed(0)
    name = "vit_small_patch14_reg4_dinov2"
    theirs = shallow(name, num_classes=0, depth=2, img_size=70)
    model = TimmBackbone(name, (42, 42), with_mean=True).eval()
    model.load(Weights(theirs.state_dict(), {}, "theirs", "path"))
    images = torch.rand(1, 3, 42, 42)
    with torch.inference_mode():
        tokens = model.net.forward_features(model.standardize(images))
        assert tokens.shape[1] == 1 + 4 + 9
        expected = torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], dim=1)
        torch.testing.assert_close(model.embed(images), expected)


def test_names_that_do_not_fit_are_one_line():
    args = {"input_size": 32, "global_pool": True, "seed": 0, "init": None}
    for name, more, reason in (
        ("resnet50+mean", {}, "leave +mean out of --model"),
        ("timm:test_vit3+mean", {}, "leave +mean out of --model"),
        ("ir_18", {"drop_path": 0.1}, "takes no --drop_path"),
        ("ir_18", {"global_pool": False}, "leave out --cls_token"),
        ("dino_vitb16", {"input_size": 40}, "multiple of 16"),
        ("ir_19", {}, "unknown model 'ir_19'"),
    ):
        with pytest.raises(UserError) as error:
            start_backbone({**args, **more, "model": name})
        assert reason in str(error.value) and "\n" not in str(error.value)
    assert {"ir_50", "ir_18", *TIMM_MODELS} <= set(BASELINE_NAMES)


# --- LoRA, layers and stages on a transformer of timm

TINY_VIT = ("--model", "timm:test_vit", "--input_size", "32")


def test_the_layers_of_a_wrapped_transformer_have_rates_of_their_own():
    model = TimmBackbone("test_vit", (32, 32))
    model.head = nn.Linear(model.embed_dim, 3)
    depth = len(model.blocks)
    rates = {
        parameter: group["lr_scale"]
        for group in transfer_groups(model, 0.05, head_scale=4.0, layer_decay=0.5)
        for parameter in group["params"]
    }
    named = dict(model.named_parameters())
    assert set(rates) == set(named.values())
    for name, parameter in named.items():
        if name.startswith("head."):
            expected = 4.0
        elif name.startswith("net.blocks."):
            expected = 0.5 ** (depth - int(name.split(".")[2]))
        else:
            expected = 1.0 if name.startswith("net.norm.") else 0.5 ** (depth + 1)
        assert rates[parameter] == expected, name


def test_a_wrapped_transformer_is_unfrozen_from_the_top():
    model = TimmBackbone("test_vit", (32, 32))
    model.head, depth = nn.Linear(model.embed_dim, 3), len(model.blocks)
    stage = unfreeze_in_stages(model, 1, 2, ("head.", "fc_norm."))
    assert stage(0) == ["head.weight", "head.bias"]
    opened = {name for name in stage(1) if not name.startswith("head.")}
    top = (f"net.blocks.{depth - 2}.", f"net.blocks.{depth - 1}.", "net.norm.")
    assert opened == {name for name, _ in model.named_parameters() if name.startswith(top)}
    assert len(stage(depth)) == len(list(model.parameters()))


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return make_identities(tmp_path_factory.mktemp("people"), train=6, val=3, test=3)


@pytest.fixture(scope="module")
def adapted(people, tmp_path_factory):
    """A run of LoRA on a transformer of timm."""
    run = tmp_path_factory.mktemp("lora") / "run"
    main_lora.main(transfer_flags(people, run, *TINY_VIT, "--rank", 2))
    return run


def test_lora_on_a_transformer_of_timm(adapted, import_script, tmp_path):
    state = read_checkpoint(adapted / "checkpoint-best.pth")["model"]
    adapters = {name for name in state if "lora_" in name}
    depth = len(TimmBackbone("test_vit", (32, 32)).blocks)
    assert {name for name in state if name not in adapters} == {"head.weight", "head.bias"}
    assert len(adapters) == depth * 4 * 2 and all(name.startswith("net.blocks.") for name in adapters)
    trained = load_transferred(adapted / "checkpoint-best.pth")
    assert any(layer.lora_B.abs().sum() > 0 for layer in trained.model.modules() if hasattr(layer, "lora_B"))
    merged = load_recogniser(str(adapted / "checkpoint-best.pth"))
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        expected = trained.model(images)
        torch.testing.assert_close(merged.model(images), expected, rtol=1e-4, atol=1e-5)
        import_script("scripts/export.py").main(
            ["--ckpt", str(adapted / "checkpoint-best.pth"), "--peft", str(tmp_path / "peft")]
        )
        peft = pytest.importorskip("peft")
        base = start_backbone(trained.args)  # the random start weights of that run
        timms_own = peft.PeftModel.from_pretrained(base.net, tmp_path / "peft").eval()
        got = timms_own(base.standardize(images))
        torch.testing.assert_close(got, trained.model.embed(images), rtol=1e-4, atol=1e-5)


def test_peft_adapters_go_into_a_wrapped_transformer(adapted, import_script, tmp_path):
    best = str(adapted / "checkpoint-best.pth")
    import_script("scripts/export.py").main(["--ckpt", best, "--peft", str(tmp_path)])
    config, state = load_peft(tmp_path)
    trained = load_transferred(best)
    model = start_backbone(trained.args)
    add_lora(model, config)
    load_lora(model, state, "there")
    expected = lora_state(trained.model)
    assert lora_state(model).keys() == expected.keys()
    images = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval().embed(images), trained.model.embed(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", ["ir_18", "resnet50", "efficientnet_b0"])
def test_lora_wants_a_transformer(people, tmp_path, capsys, monkeypatch, model):
    monkeypatch.setattr(models_iresnet, "WIDTHS", (8, 8, 8, 8))
    error = fails(main_lora.main, capsys, transfer_flags(people, tmp_path / "run", "--model", model))
    assert "LoRA needs a plain vision transformer" in error
