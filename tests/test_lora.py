"""LoRA: what it adds, what it leaves alone, and that PEFT (where it is installed) agrees on both."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models_vit import Block, PatchEmbed
from util.run.errors import UserError
from util.training.optim import decay_groups, make_optimizer
from util.transfer.lora import (
    TARGETS,
    LoRAConfig,
    LoRALinear,
    add_lora,
    count_parameters,
    load_lora,
    load_peft,
    lora_state,
    merge_lora,
    save_peft,
)

DIM, DEPTH = 24, 2
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
ROWS = {"q": slice(0, DIM), "k": slice(DIM, 2 * DIM), "v": slice(2 * DIM, 3 * DIM)}  # of the fused qkv


class Encoder(nn.Module):
    """A small vision transformer, with a decoder's blocks beside its own as in a masked autoencoder."""

    def __init__(self, dim: int = DIM, depth: int = DEPTH, heads: int = 3, patch: int = 4):
        super().__init__()
        self.patch_embed = PatchEmbed(patch, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.decoder_blocks = nn.ModuleList([Block(dim, heads)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(N, L, p*p*3) -> (N, L, D)."""
        x = self.patch_embed(patches)
        for block in [*self.blocks, *self.decoder_blocks]:
            x = block(x)
        return self.norm(x)


@pytest.fixture
def model() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval()


@pytest.fixture
def patches() -> torch.Tensor:
    return torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module) -> nn.Module:
    """Adapters as training might leave them: none of them zero."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(model: nn.Module, **config) -> nn.Module:
    """A copy of the model with trained adapters."""
    model = copy.deepcopy(model)
    add_lora(model, LoRAConfig(**config))
    return train(model)


def explicit(model: nn.Module, state: dict, config: LoRAConfig) -> nn.Module:
    """The reference: a float64 copy of a plain model with W + alpha / rank * B A written into its weights."""
    model = copy.deepcopy(model).double()
    names = {"proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    alpha = 2 * config.rank if config.alpha is None else config.alpha
    for i, block in enumerate(model.blocks):
        order = [target for target in "qkv" if target in config.targets]
        for target in config.targets:
            layer, part = names.get(target, "attn.qkv"), order.index(target) if target in ROWS else 0
            a, b = (state[f"blocks.{i}.{layer}.lora_{factor}"][part].double() for factor in "AB")
            weight = block.get_submodule(layer).weight.data
            weight[ROWS.get(target, slice(None))] += alpha / config.rank * (b @ a)
    return model


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    return {name: value.detach().numpy().tobytes() for name, value in model.state_dict().items()}


def refused(call, *arguments) -> str:
    """The message of the UserError that the call must end in; one line."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value) and ": " in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("targets", [TARGETS, ("q", "v"), ("k",), ("proj", "fc2")])
def test_the_adapted_model_starts_as_the_base(model, patches, targets):
    before, names = model(patches), set(model.state_dict())
    add_lora(model, LoRAConfig(rank=4, targets=targets, dropout=0.5))
    assert torch.equal(model.train()(patches), before)
    assert {name for name in model.state_dict() if "lora_" not in name} == names
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(lora_state(model)) != set()


def test_weights_and_biases_are_the_same_objects(model):
    before = dict(model.named_parameters())
    add_lora(model, LoRAConfig(rank=4))
    assert all(parameter is before[name] for name, parameter in model.named_parameters() if name in before)


def test_a_is_drawn_for_its_own_number_of_inputs(model):
    """Kaiming-uniform with a = sqrt 5 is uniform within 1 / sqrt(in): for each part, not for the stack of three."""
    add_lora(model, LoRAConfig(rank=8))
    for name, a in lora_state(model).items():
        if name.endswith("_A"):
            for part in a:
                assert 0.9 < part.abs().max() * math.sqrt(a.shape[2]) <= 1, name
                assert abs(part.mean()) * math.sqrt(a.shape[2]) < 0.2, name
        else:
            assert not a.any()


@pytest.mark.parametrize("targets", [TARGETS, ("q",), ("k",), ("v",), ("q", "v"), ("k", "fc1"), ("proj",), ("fc2",)])
def test_outputs_are_those_of_explicit_weights(model, patches, targets):
    config = LoRAConfig(rank=4, alpha=3, targets=targets)
    ours = adapted(model, rank=4, alpha=3, targets=targets)
    reference = explicit(model, lora_state(ours), config)
    assert (reference(patches.double()) - model.double()(patches.double())).abs().max() > 0.05
    torch.testing.assert_close(ours.double()(patches.double()), reference(patches.double()), atol=1e-12, rtol=0)


@pytest.mark.parametrize("target", ["q", "k", "v"])
def test_one_of_q_k_v_leaves_the_other_two_alone(model, target):
    ours = adapted(model, rank=2, targets=(target,))
    x = torch.randn(2, 7, DIM)
    base, changed = model.blocks[1].attn.qkv(x), ours.blocks[1].attn.qkv(x)
    for name, rows in ROWS.items():
        assert torch.equal(base[..., rows], changed[..., rows]) is (name != target)


def test_the_order_of_targets_does_not_matter(model, patches):
    one, other = adapted(model, targets=("v", "q")), adapted(model, targets=("q", "v"))
    assert torch.equal(one(patches), other(patches))


def test_training_changes_the_adapters_and_nothing_else(model, patches):
    add_lora(model, LoRAConfig(rank=4))
    before = bytes_of(model)
    optimizer = make_optimizer(decay_groups(model.named_parameters(), 0.5), 1e-2, torch.device("cpu"))
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(patches).square().sum().backward()
        optimizer.step()
    changed = {name for name, value in bytes_of(model).items() if value != before[name]}
    assert changed == set(lora_state(model))


def test_gradients_are_those_of_the_explicit_form(model):
    layer = adapted(model, rank=3, alpha=5, targets=("q", "v")).blocks[0].attn.qkv
    x = torch.randn(4, 6, DIM)
    layer(x).sin().sum().backward()

    a = layer.lora_A.detach().double().requires_grad_()
    b = layer.lora_B.detach().double().requires_grad_()
    delta = torch.cat([b[0] @ a[0], torch.zeros(DIM, DIM), b[1] @ a[1]])
    base = model.blocks[0].attn.qkv.double()
    (x.double() @ (base.weight + 5 / 3 * delta).T + base.bias).sin().sum().backward()
    torch.testing.assert_close(layer.lora_A.grad.double(), a.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.lora_B.grad.double(), b.grad, atol=1e-4, rtol=1e-4)
    assert layer.weight.grad is None and a.grad.abs().min() > 0


@pytest.mark.parametrize("targets", [TARGETS, ("k", "fc1")])
def test_merging_gives_a_plain_model_of_the_same_outputs(model, patches, targets):
    ours = adapted(model, rank=4, targets=targets)
    expected = ours(patches)
    reference = explicit(model, lora_state(ours), LoRAConfig(rank=4, targets=targets)).float().state_dict()
    merge_lora(ours)
    assert list(ours.state_dict()) == list(model.state_dict())
    assert not any(isinstance(module, LoRALinear) or module.training for module in ours.modules())
    torch.testing.assert_close(ours(patches), expected, atol=1e-5, rtol=0)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, reference[name], atol=1e-7, rtol=0)


def test_merging_leaves_the_weights_it_was_given_alone(model):
    before = bytes_of(model)
    ours = Encoder()
    for name, module in model.named_modules():  # ours shares every tensor with the model
        for parameter, value in module.named_parameters(recurse=False):
            setattr(ours.get_submodule(name), parameter, value)
    add_lora(ours, LoRAConfig(rank=4))
    merge_lora(train(ours))
    assert bytes_of(model) == before != bytes_of(ours)


def test_eval_and_train_merge_nothing(model):
    ours = adapted(model, rank=4)
    before = bytes_of(ours)
    for mode in (True, False, True):
        assert bytes_of(ours.train(mode)) == before


def test_dropout_acts_in_training_only_and_on_the_adapters_only(model, patches):
    without = adapted(model, rank=4)
    ours = adapted(model, rank=4, dropout=0.5)
    assert torch.equal(ours(patches), without(patches))
    ours.train()
    assert not torch.equal(ours(patches), ours(patches))
    for name, parameter in ours.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.zero_()
    assert torch.equal(ours(patches), model(patches))


def test_dropout_keeps_the_mean(model):
    layer = adapted(model, rank=4, dropout=0.25, targets=("fc1",)).blocks[0].mlp.fc1
    x = torch.randn(1, DIM).expand(40000, DIM)
    expected = layer(x[:1])
    assert (layer.train()(x).mean(dim=0) - expected).abs().max() < 0.05


def test_under_autocast_the_adapters_compute_in_its_precision(model, patches):
    ours = adapted(model, rank=4)
    expected = ours(patches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours.blocks[0].attn.qkv(torch.randn(2, 3, DIM)).dtype == torch.bfloat16
        torch.testing.assert_close(ours(patches).float(), expected, atol=0.1, rtol=0)


def test_adapters_round_trip(model, patches):
    ours = adapted(model, rank=4, targets=("q", "fc1"))
    state = {name: value.clone() for name, value in lora_state(ours).items()}
    assert len(state) == DEPTH * 2 * 2
    add_lora(model, LoRAConfig(rank=4, targets=("q", "fc1")))
    load_lora(model, state, "here")
    assert torch.equal(model(patches), ours(patches))


@pytest.mark.parametrize(
    "trained, expected",
    [
        ({"rank": 8}, "their rank is 8, the model's 4"),
        ({"rank": 4, "targets": ("q", "v")}, "use the targets"),
        ({"rank": 4, "targets": ("q", "k", "v", "proj", "fc1")}, "use the targets"),
        ({"rank": 4, "depth": 3}, "blocks.2.attn.qkv.lora_A has no place"),
        ({"rank": 4, "depth": 1}, "blocks.1.attn.qkv.lora_A is missing"),
        ({"rank": 4, "dim": 36}, r"blocks.0.attn.qkv.lora_A is (3, 4, 36), the model needs (3, 4, 24)"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_and_change_nothing(model, trained, expected):
    other = Encoder(dim=trained.pop("dim", DIM), depth=trained.pop("depth", DEPTH))
    state = lora_state(adapted(other, **trained))
    ours = adapted(model, rank=4)
    before = bytes_of(ours)
    message = refused(load_lora, ours, state, "runs/lora.pth")
    assert "runs/lora.pth" in message and expected in message
    assert bytes_of(ours) == before


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"rank": 0}, "rank of 0"),
        ({"rank": 25}, "choose at most 24"),
        ({"alpha": 0.0}, "alpha of 0.0"),
        ({"alpha": math.nan}, "alpha of nan"),
        ({"targets": ()}, "no LoRA target"),
        ({"targets": ("q", "qkv")}, "'qkv': choose some of q, k, v, proj, fc1, fc2"),
        ({"dropout": 1.0}, "0..<1"),
        ({"dropout": -0.1}, "0..<1"),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_is_frozen(model, config, expected):
    assert expected in refused(add_lora, model, LoRAConfig(**config))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not lora_state(model)


def test_the_largest_rank_is_accepted(model):
    add_lora(model, LoRAConfig(rank=DIM))
    assert lora_state(model)["blocks.0.attn.qkv.lora_B"].shape == (3, DIM, DIM)


def test_models_that_cannot_be_adapted_are_refused(model):
    assert "no transformer blocks" in refused(add_lora, nn.Sequential(nn.Linear(4, 4)), LoRAConfig())
    stages = nn.Module()
    stages.blocks = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert "no linear attn.qkv" in refused(add_lora, stages, LoRAConfig())
    add_lora(model, LoRAConfig())
    assert "already" in refused(add_lora, model, LoRAConfig())


def test_parameters_of_a_base_sized_model_are_those_of_the_formula():
    """A layer of m outputs and n inputs costs rank * (m + n), the fused qkv three times that of a square."""
    with torch.device("meta"):
        model = Encoder(dim=768, depth=12, heads=12, patch=16)
        del model.decoder_blocks
    _, base = count_parameters(model)
    add_lora(model, LoRAConfig(rank=8))
    trainable, total = count_parameters(model)
    assert trainable == 12 * 8 * (4 * (768 + 768) + 2 * (768 + 3072)) == 1_327_104
    assert total == base + trainable
    assert 0.984 < 1 - trainable / base < 0.985
    head = nn.Linear(768, 10)
    model.head = head
    assert count_parameters(model) == (trainable + 7690, total + 7690)


# --- what is written for PEFT ---


@pytest.mark.parametrize("targets", [TARGETS, ("q", "v"), ("k",), ("k", "proj"), ("fc1", "fc2")])
def test_our_own_folder_comes_back_exactly(model, tmp_path, targets):
    config = LoRAConfig(rank=4, alpha=10.0, targets=targets, dropout=0.1)
    ours = copy.deepcopy(model)
    add_lora(ours, config)
    for trained in (False, True):  # untrained, all of B is zero and tells nothing of the targets
        save_peft(tmp_path, train(ours) if trained else ours, config)
        loaded, state = load_peft(tmp_path)
        assert loaded == config
        assert state.keys() == lora_state(ours).keys()
        assert all(torch.equal(state[name], value) for name, value in lora_state(ours).items())


def test_the_folder_is_written_as_peft_expects_it(model, tmp_path):
    """By hand from the format, so that it holds where PEFT is not installed."""
    config = LoRAConfig(rank=4, alpha=6, targets=("q", "v", "proj"))
    ours = adapted(model, rank=4, alpha=6, targets=config.targets)
    save_peft(tmp_path / "new" / "folder", ours, config, base_model_name="mae")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    settings = json.loads((folder / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", "base_model_name_or_path": "mae"}
    assert settings.items() >= expected.items()
    assert settings["rank_pattern"] == {"attn.qkv": 8} and settings["alpha_pattern"] == {"attn.qkv": 12}
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == DEPTH * 2 * 2
    a, b = (tensors[f"base_model.model.blocks.1.attn.qkv.lora_{factor}.weight"] for factor in "AB")
    assert a.shape == (8, DIM) and b.shape == (3 * DIM, 8)
    merged = model.blocks[1].attn.qkv.weight + 12 / 8 * (b @ a)
    merge_lora(ours)
    torch.testing.assert_close(ours.blocks[1].attn.qkv.weight, merged, atol=1e-6, rtol=0)


def test_a_config_that_is_not_the_models_is_not_written(model, tmp_path):
    with pytest.raises(ValueError, match="not adapted with"):
        save_peft(tmp_path, adapted(model, rank=4), LoRAConfig(rank=8))
    with pytest.raises(ValueError, match="not adapted with"):
        save_peft(tmp_path, adapted(model, rank=4), LoRAConfig(rank=4, targets=("q", "v")))
    with pytest.raises(ValueError, match="not adapted with"):
        save_peft(tmp_path, adapted(model, rank=4, targets=("q",)), LoRAConfig(rank=4, targets=("q", "proj")))
    with pytest.raises(ValueError, match="no adapters"):
        save_peft(tmp_path, model, LoRAConfig())
    assert not list(tmp_path.iterdir())


def write_foreign(folder, tensors: dict | None = None, **settings) -> None:
    """A folder as PEFT would write it: one A for the fused qkv."""
    if tensors is None:
        generator = torch.Generator().manual_seed(3)
        shapes = {"attn.qkv": (DIM, 3 * DIM), "mlp.fc2": (4 * DIM, DIM)}
        tensors = {}
        for i in range(DEPTH):
            for (layer, (n, m)), rank in zip(shapes.items(), (5, 2), strict=True):
                name = f"base_model.model.blocks.{i}.{layer}"
                tensors[f"{name}.lora_A.weight"] = torch.randn(rank, n, generator=generator)
                tensors[f"{name}.lora_B.weight"] = torch.randn(m, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 5, "lora_alpha": 7, "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "settings, scalings",
    [
        ({}, {"attn.qkv": 7 / 5, "mlp.fc2": 7 / 2}),
        ({"use_rslora": True}, {"attn.qkv": 7 / 5**0.5, "mlp.fc2": 7 / 2**0.5}),
        ({"alpha_pattern": {"fc2": 3}}, {"attn.qkv": 7 / 5, "mlp.fc2": 3 / 2}),
        ({"alpha_pattern": {"c2": 3}}, {"attn.qkv": 7 / 5, "mlp.fc2": 7 / 2}),  # no whole name: not this layer
    ],
)
def test_shared_factors_of_several_ranks_and_scalings_are_read(model, patches, tmp_path, settings, scalings):
    write_foreign(tmp_path, **settings)
    config, state = load_peft(tmp_path)
    assert config.targets == ("q", "k", "v", "fc2") and config.rank == 5
    reference = copy.deepcopy(model)
    for name, value in load_file(tmp_path / "adapter_model.safetensors").items():
        if ".lora_A." in name:
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = load_file(tmp_path / "adapter_model.safetensors")[name.replace("_A", "_B")]
            scaling = scalings[".".join(layer.split(".")[2:])]
            reference.get_submodule(layer).weight.data += scaling * (b @ value)
    add_lora(model, config)
    load_lora(model, state, "there")
    merge_lora(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], atol=1e-4, rtol=1e-5)
    assert torch.isfinite(model(patches)).all()


def test_a_changed_lora_alpha_counts_in_our_own_folder(model, tmp_path):
    config = LoRAConfig(rank=4, targets=("q", "fc1"))
    save_peft(tmp_path, adapted(model, rank=4, targets=config.targets), config)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 1.0}))
    assert load_peft(tmp_path)[0] == LoRAConfig(rank=4, alpha=1.0, targets=("q", "fc1"))


def test_our_folder_trained_further_is_read_as_anothers(model, tmp_path):
    """Once B is not block-diagonal any more, our note on its parts must not be believed."""
    config = LoRAConfig(rank=4, targets=("q", "v"))
    save_peft(tmp_path, adapted(model, rank=4, targets=("q", "v")), config)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: value + 0.1 for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt", "animask_qkv_parts": "q,v"})
    config, state = load_peft(tmp_path)
    assert config.targets == ("q", "k", "v") and config.rank == 8
    b = state["blocks.0.attn.qkv.lora_B"].flatten(0, 1)
    torch.testing.assert_close(b, tensors["base_model.model.blocks.0.attn.qkv.lora_B.weight"])


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"invented_in_the_future": {"x": 1}}, "invented_in_the_future"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"lora_alpha": "8"}, "damaged"),
        ({"lora_alpha": 0}, "by 0"),
        ({"lora_alpha": 10**400}, "by 1000"),
        ({"alpha_pattern": [1]}, "damaged"),
        ({"alpha_pattern": {"(": 1}}, "damaged"),
        ({"lora_dropout": 1.5}, "dropout of 1.5"),
    ],
)
def test_settings_that_are_not_plain_lora_are_refused(tmp_path, settings, expected):
    write_foreign(tmp_path, **settings)
    message = refused(load_peft, tmp_path)
    assert expected in message


def a_layer(name: str, rank_a: int = 2, rank_b: int = 2, out: int = 72) -> dict:
    key = f"base_model.model.{name}"
    return {f"{key}.lora_A.weight": torch.ones(rank_a, DIM), f"{key}.lora_B.weight": torch.ones(out, rank_b)}


@pytest.mark.parametrize(
    "tensors, expected",
    [
        (a_layer("patch_embed.proj"), "patch_embed.proj"),
        (a_layer("decoder_blocks.0.attn.qkv"), "decoder_blocks"),
        (a_layer("blocks.0.attn.qkv") | {"base_model.model.head.weight": torch.ones(1)}, "head.weight"),
        (a_layer("blocks.0.attn.qkv") | {"base_model.model.blocks.0.attn.qkv.lora_B.bias": torch.ones(72)}, "B.bias"),
        (a_layer("blocks.1.attn.qkv"), "same layers in every block"),
        (a_layer("blocks.0.attn.qkv") | a_layer("blocks.1.mlp.fc1"), "same layers in every block"),
        (a_layer("blocks.0.attn.qkv", rank_b=3), "damaged (blocks.0.attn.qkv)"),
        (a_layer("blocks.0.attn.qkv", out=70), "damaged (blocks.0.attn.qkv)"),
        ({"base_model.model.blocks.0.mlp.fc1.lora_A.weight": torch.ones(2, 2)}, "damaged (blocks.0.mlp.fc1)"),
        ({}, "no adapters"),
    ],
)
def test_weights_beyond_the_blocks_layers_are_refused(tmp_path, tensors, expected):
    write_foreign(tmp_path, tensors)
    assert expected in refused(load_peft, tmp_path)


def test_missing_and_damaged_files_are_refused(tmp_path):
    assert "adapter_config.json does not exist" in refused(load_peft, tmp_path)
    write_foreign(tmp_path)
    weights, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole = weights.read_bytes()
    for damaged in (whole[:-5], whole[:40], b"", b"\0" * 100):
        weights.write_bytes(damaged)
        assert "adapter_model.safetensors is damaged" in refused(load_peft, tmp_path)
    weights.unlink()
    assert "adapter_model.safetensors does not exist" in refused(load_peft, tmp_path)
    for damaged in (b"{", b"[]", b"{}", b"\xff\xfe"):
        settings.write_bytes(damaged)
        assert "adapter_config.json is damaged" in refused(load_peft, tmp_path)


# --- PEFT itself ---


def peft_adapted(model: nn.Module, seed: int = 4, **settings) -> nn.Module:
    """A copy of the model with PEFT's adapters in all layers of its blocks, at random values."""
    peft = pytest.importorskip("peft")
    pattern = rf"(?!decoder).*blocks.*\.({'|'.join(layer.replace('.', chr(92) + '.') for layer in LAYERS)})"
    config = peft.LoraConfig(**{"target_modules": pattern, "r": 4, "lora_alpha": 6, **settings})
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return theirs.eval()


@pytest.mark.parametrize("targets", [TARGETS, ("q", "v"), ("k",), ("v", "proj", "fc1")])
def test_peft_computes_from_our_folder_what_we_compute(model, patches, tmp_path, targets):
    peft = pytest.importorskip("peft")
    config = LoRAConfig(rank=3, alpha=4, targets=targets)
    ours = adapted(model, rank=3, alpha=4, targets=targets)
    save_peft(tmp_path, ours, config)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path))
    touched = {name.rsplit(".lora_A", 1)[0] for name, _ in theirs.named_modules() if name.endswith("lora_A")}
    used = [layer for layer in LAYERS if any(f".{layer}." in name for name in lora_state(ours))]
    assert touched == {f"base_model.model.blocks.{i}.{layer}" for i in range(DEPTH) for layer in used}
    torch.testing.assert_close(theirs(patches), ours(patches), atol=1e-5, rtol=0)
    assert (ours(patches) - model(patches)).abs().max() > 0.01
    torch.testing.assert_close(theirs.merge_and_unload()(patches), ours(patches), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"attn.qkv": 7, "fc1": 2}, "alpha_pattern": {"mlp.fc1": 9}},
        {"rank_pattern": {r"blocks\.1\.attn\.proj": 1}, "alpha_pattern": {r"blocks.1.*": 2}, "use_rslora": True},
        {"target_modules": ["attn.proj"], "exclude_modules": r"decoder.*"},
    ],
)
def test_what_peft_trained_gives_its_outputs_here(model, patches, tmp_path, settings):
    theirs = peft_adapted(model, **settings)
    theirs.save_pretrained(tmp_path)
    config, state = load_peft(tmp_path)
    ours = copy.deepcopy(model)
    add_lora(ours, config)
    load_lora(ours, state, str(tmp_path))
    torch.testing.assert_close(ours(patches), theirs(patches), atol=1e-5, rtol=0)
    assert (ours(patches) - model(patches)).abs().max() > 0.01


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_modules": ["proj"]}, "proj"),
        ({"target_modules": r"blocks\.1\.attn\.qkv"}, "same layers in every block"),
    ],
)
def test_what_peft_does_beyond_plain_lora_is_refused(model, tmp_path, settings, expected):
    peft_adapted(model, **settings).save_pretrained(tmp_path)
    assert expected in refused(load_peft, tmp_path)


def test_our_folder_saved_again_by_peft_is_the_same_adapter(model, patches, tmp_path):
    peft = pytest.importorskip("peft")
    ours = adapted(model, rank=3, targets=("q", "v", "fc2"))
    save_peft(tmp_path / "ours", ours, LoRAConfig(rank=3, targets=("q", "v", "fc2")))
    peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours")).save_pretrained(tmp_path / "theirs")
    config, state = load_peft(tmp_path / "theirs")
    add_lora(model, config)
    load_lora(model, state, "theirs")
    torch.testing.assert_close(model(patches), ours(patches), atol=1e-5, rtol=0)
