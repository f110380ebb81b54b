"""Which parameters learn at which rate, and when, on the backbones of the transfer scripts.

Run: python -m pytest tests/test_optim.py
"""

import pytest
import torch
from torch import nn

from models_vit import VisionTransformer
from util.training.optim import WarmupCosine, make_optimizer, transfer_groups, unfreeze_in_stages

DEPTH = 4


def classifier(**options) -> VisionTransformer:
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=DEPTH, num_heads=2, **options)
    model.head = nn.Linear(16, 3)
    return model


def settings_of(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    """Parameter name -> (lr_scale, weight_decay); each must be in exactly one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], (g["lr_scale"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


def test_every_trainable_parameter_is_in_one_group():
    model = classifier()
    groups = transfer_groups(model, 0.05, head_scale=4.0, layer_decay=0.75)
    assert set(settings_of(model, groups)) == {name for name, _ in model.named_parameters()}
    assert len({(group["lr_scale"], group["weight_decay"]) for group in groups}) == len(groups)


def test_frozen_parameters_are_left_out():
    model = classifier()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(("blocks.2.attn", "head."))
    groups = transfer_groups(model, 0.05)
    kinds = ("weight", "bias")
    expected = {f"{part}.{kind}" for part in ("blocks.2.attn.qkv", "blocks.2.attn.proj", "head") for kind in kinds}
    assert set(settings_of(model, groups)) == expected


@pytest.mark.parametrize("pooling", [True, False])
def test_rates_fall_from_layer_to_layer(pooling):
    model, decay = classifier(global_pool=pooling), 0.5
    scale = {n: s for n, (s, _) in settings_of(model, transfer_groups(model, 0.05, layer_decay=decay)).items()}
    layers = {"patch_embed.proj.weight": 0, "patch_embed.proj.bias": 0, "cls_token": 0, "pos_embed": 0}
    layers |= {"blocks.0.attn.qkv.weight": 1, "blocks.1.norm1.bias": 2, f"blocks.{DEPTH - 1}.mlp.fc2.weight": DEPTH}
    layers |= {"fc_norm.weight" if pooling else "norm.weight": DEPTH + 1}
    for name, layer in layers.items():
        assert scale[name] == pytest.approx(decay ** (DEPTH + 1 - layer)), name
    assert scale["head.weight"] == scale["head.bias"] == 1.0
    assert scale["patch_embed.proj.weight"] == pytest.approx(1 / 32)


def test_the_head_has_its_own_rate_whatever_the_layers_have():
    model = classifier()
    found = settings_of(model, transfer_groups(model, 0.05, head_scale=40.0, layer_decay=0.5))
    assert found["head.weight"] == (40.0, 0.05) and found["head.bias"] == (40.0, 0.0)
    assert found["fc_norm.weight"] == (1.0, 0.0)
    even = settings_of(model, transfer_groups(model, 0.05))
    assert {scale for scale, _ in even.values()} == {1.0}


def test_biases_norms_tokens_and_positions_do_not_decay():
    model = classifier()
    found = settings_of(model, transfer_groups(model, 0.05, layer_decay=0.75))
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
        assert found[name][1] == (0.05 if decays else 0.0), name
    assert sum(weight_decay > 0 for _, weight_decay in found.values()) == 1 + 4 * DEPTH + 1


def test_a_network_without_blocks_has_one_rate_below_the_head():
    model = nn.Sequential()
    model.net, model.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Linear(4, 2)
    found = settings_of(model, transfer_groups(model, 0.1, head_scale=3.0))
    assert found == {
        "net.0.weight": (1.0, 0.1), "net.0.bias": (1.0, 0.0), "net.1.weight": (1.0, 0.0), "net.1.bias": (1.0, 0.0),
        "head.weight": (3.0, 0.1), "head.bias": (3.0, 0.0),
    }  # fmt: skip


def test_the_schedule_multiplies_the_rate_of_each_group():
    model = classifier()
    groups = transfer_groups(model, 0.05, head_scale=10.0, layer_decay=0.5)
    optimizer = make_optimizer(groups, 1e-3, torch.device("cpu"))
    schedule = WarmupCosine(lr=0.2, min_lr=0.0, warmup_steps=2, total_steps=10)
    for step in (0, 1, 5, 10):
        assert schedule.apply(optimizer, step) == schedule.at(step)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(schedule.at(step) * group["lr_scale"])
    schedule.apply(optimizer, 1)
    rates = {round(group["lr"], 9) for group in optimizer.param_groups}
    assert rates == {round(0.2 * scale, 9) for scale in (10, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)}


def test_a_step_moves_a_layer_by_its_own_rate():
    model = classifier()
    optimizer = make_optimizer(transfer_groups(model, 0.0, head_scale=8.0, layer_decay=0.5), 1e-3, torch.device("cpu"))
    WarmupCosine(1e-3, 0.0, 0, 10).apply(optimizer, 0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # Adam's first step has the length of the rate
    moved = {name: (before[name] - parameter).abs().mean().item() for name, parameter in model.named_parameters()}
    assert moved["head.weight"] == pytest.approx(8e-3, rel=1e-3)
    assert moved["fc_norm.bias"] == pytest.approx(1e-3, rel=1e-3)
    assert moved["blocks.3.mlp.fc1.weight"] == pytest.approx(5e-4, rel=1e-3)
    assert moved["patch_embed.proj.weight"] == pytest.approx(1e-3 / 32, rel=1e-3)


def parts(names: list[str]) -> set[str]:
    """blocks.0.attn.qkv.weight -> blocks.0; patch_embed.proj.bias -> patch_embed."""
    return {".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1]) for name in names}


@pytest.mark.parametrize(("pooling", "norm"), [(True, "fc_norm"), (False, "norm")])
def test_stages_open_a_backbone_from_its_head_down(pooling, norm):
    model = classifier(global_pool=pooling)
    everything = {name for name, _ in model.named_parameters()}
    stage = unfreeze_in_stages(model, every=2, top_k=3, always=("head.", "fc_norm."))
    first = {"head", "fc_norm"} if pooling else {"head"}
    top = {"blocks.1", "blocks.2", "blocks.3"}
    for epoch, expected in ((0, first), (1, first), (2, first | {norm} | top), (3, first | {norm} | top)):
        names = stage(epoch)
        assert parts(names) == expected
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(names)
        for part in expected:  # a part is open as a whole
            assert {name for name in everything if name.startswith(part + ".")} <= set(names)
    for epoch in (4, 5, 100):
        assert set(stage(epoch)) == everything
    assert parts(stage(0)) == first  # of the epoch alone


def test_what_was_frozen_before_the_stages_stays_frozen_and_closed_parts_have_no_gradient():
    model = classifier()
    model.pos_embed.requires_grad = False
    stage = unfreeze_in_stages(model, every=1, top_k=1, always=("head.", "fc_norm."))
    assert "pos_embed" not in stage(50) and "cls_token" in stage(50)
    model(torch.rand(2, 3, 16, 16)).sum().backward()
    assert model.blocks[0].mlp.fc1.weight.grad is not None
    stage(1)
    assert model.blocks[0].mlp.fc1.weight.grad is None and model.blocks[3].mlp.fc1.weight.grad is not None
