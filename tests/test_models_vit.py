"""Backbones against timm and against the encoder of the autoencoder, and weights on their way into them.

Run: python -m pytest tests/test_models_vit.py
"""

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn
from torchvision.transforms.functional import normalize

from models_baseline import TimmBackbone
from models_mae import build_mae
from models_vit import VIT_MODELS, VIT_SIZES, Block, DropPath, VisionTransformer, build_vit, patchify
from util.run.errors import UserError
from util.training.hub import Weights, load_weights
from util.training.pretrained import fingerprint_of, load_pretrained

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
NORMS = ("norm.", "fc_norm.")  # what the weights of an autoencoder may lack


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight moved a little: fresh biases and norms are zeros and ones, and would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def small_vit(**options) -> VisionTransformer:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
    return stirred(VisionTransformer(**{**sizes, **options}))


def weights_of(state: dict, **args) -> Weights:
    return Weights(state, args, "theirs.pth", "path")


def message_of(error) -> str:
    """What the user reads, which must be one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def mae():
    torch.manual_seed(0)
    return stirred(build_mae("mae_vit_nano_patch8", 32))


@pytest.mark.parametrize("pooling", [True, False])
def test_embeddings_equal_those_of_timm(pooling):
    model = stirred(build_vit("vit_tiny_patch16", img_size=64, global_pool=pooling))
    options = {"global_pool": "avg", "fc_norm": True} if pooling else {"global_pool": "token"}
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, **options).eval()
    reference.load_state_dict(model.state_dict(), strict=True)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(normalize(images, *IMAGENET))
        assert model.embed(images).shape == (3, 192)
        assert (model.embed(images) - expected).abs().max() <= 1e-5
        assert expected.std() > 0.1  # the comparison is not of zeros


@pytest.mark.parametrize(("pooling", "norm"), [(True, "fc_norm"), (False, "norm")])
def test_names_are_those_of_the_official_release(pooling, norm):
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    for i in range(3):
        parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        names += [f"blocks.{i}.{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    names += [f"{norm}.weight", f"{norm}.bias"]
    assert sorted(small_vit(global_pool=pooling).state_dict()) == sorted(names)


@pytest.mark.parametrize("size", [(32, 32), (24, 64)])
def test_tokens_equal_those_of_the_autoencoder_that_sees_everything(mae, size):
    images = torch.rand(2, 3, *size)
    grid = size[0] // 8, size[1] // 8
    places = torch.arange(grid[0] * grid[1]).expand(2, -1)
    with torch.inference_mode():
        expected = mae.encode(patchify(normalize(images, *IMAGENET), 8), places, grid)
        for pooling in (True, False):
            model = build_vit("vit_nano_patch8", img_size=32, global_pool=pooling).eval()
            load_pretrained(model, weights_of(mae.state_dict()), NORMS)
            tokens = model.forward_features(images)
            if pooling:
                assert torch.allclose(model.embed(images), model.fc_norm(tokens[:, 1:].mean(1)), atol=1e-6)
                tokens = mae.norm(tokens)
            else:
                assert torch.equal(model.embed(images), tokens[:, 0])
            assert torch.allclose(tokens, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(24, 64), (48, 48), (8, 16)])
def test_other_sizes_resample_the_position_embeddings_as_timm_does(size):
    model, grid = small_vit(), (size[0] // 8, size[1] // 8)
    other = small_vit(img_size=size)
    resampled = resample_abs_pos_embed(model.pos_embed, list(grid), [4, 4], num_prefix_tokens=1)
    other.load_state_dict({**model.state_dict(), "pos_embed": resampled})
    images = torch.rand(2, 3, *size)
    with torch.inference_mode():
        assert model.forward_features(images).shape == (2, 1 + grid[0] * grid[1], 48)
        assert torch.allclose(model.embed(images), other.embed(images), atol=1e-5)


def test_sides_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="30 x 32 px does not divide into patches of 8 px") as error:
        small_vit().embed(torch.rand(1, 3, 30, 32))
    assert "--input_size" in message_of(error)
    with pytest.raises(UserError, match="32 x 30 px"):
        VisionTransformer(img_size=(32, 30), patch_size=8, embed_dim=48, depth=1, num_heads=4)
    with pytest.raises(UserError, match="unknown model 'vit_giant'"):
        build_vit("vit_giant")


@pytest.mark.parametrize("name", VIT_MODELS)
def test_every_model_has_the_parameters_of_its_size(name):
    with torch.device("meta"):  # no memory is touched: the largest has 2.5 GB
        model = build_vit(name)
    size, patch = name.removeprefix("vit_").split("_patch")
    dim, depth, _ = VIT_SIZES[size]
    tokens = 1 + (224 // int(patch)) ** 2
    block = 12 * dim**2 + 13 * dim  # 4 + 8 matrices of attention and perceptron, 3 + 1 + 4 + 1 biases, 2 norms
    expected = 3 * int(patch) ** 2 * dim + dim + dim + tokens * dim + depth * block + 2 * dim
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == expected
    if name == "vit_base_patch16":
        assert count == 85_798_656  # timm's vit_base_patch16_224 without its classifier


def test_a_head_is_put_on_the_embedding():
    model, images = small_vit(), torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model(images), model.embed(images))
        model.head = nn.Linear(48, 5)
        assert torch.equal(model(images), model.head(model.embed(images)))


def test_drop_path_leaves_out_whole_samples_and_keeps_the_expectation():
    drop, x = DropPath(0.3), torch.rand(20_000, 2, 3) + 0.5
    torch.manual_seed(0)
    kept = drop(x) / x
    assert ((kept == 0).all((1, 2)) | torch.isclose(kept, torch.tensor(1 / 0.7)).all(2).all(1)).all()
    assert abs(kept[:, 0, 0].mean() - 1) < 0.02  # sd of the mean: 0.0046
    assert drop.eval()(x) is x
    assert DropPath(0.0).train()(x) is x


def test_a_block_leaves_out_each_branch_on_its_own():
    torch.manual_seed(0)
    block, x = stirred(Block(16, 2, drop_path=0.5)).train(), torch.randn(64, 3, 16)

    def branches(attention: float, mlp: float) -> torch.Tensor:
        between = x + attention * block.attn(block.norm1(x))
        return between + mlp * block.mlp(block.norm2(between))

    with torch.no_grad():
        got = block(x)
        cases = torch.stack([branches(a, m) for a in (0.0, 2.0) for m in (0.0, 2.0)])
        whole = ((cases - got).abs() < 1e-5).flatten(2).all(2)
        assert (whole.sum(0) == 1).all()  # each sample is exactly one of the four
        assert (whole.sum(1) > 4).all()  # and all four occur
        assert torch.allclose(block.eval()(x), branches(1.0, 1.0), atol=1e-5)


def test_drop_path_rises_linearly_to_the_last_block():
    rates = [block.drop_path.rate for block in small_vit(depth=6, drop_path=0.2).blocks]
    assert rates == pytest.approx([0.0, 0.04, 0.08, 0.12, 0.16, 0.2])
    assert [block.drop_path.rate for block in small_vit().blocks] == [0.0] * 3
    assert len(small_vit(depth=1, drop_path=0.2).blocks) == 1


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_resnet", (40, 64)),
        ("test_efficientnet", (64, 64)),
        ("test_vit", (32, 48)),
        ("vit_tiny_patch16_224", (64, 64)),
    ],
)
def test_networks_of_timm_see_the_pixels_they_were_trained_on(name, size):
    torch.manual_seed(0)
    model = TimmBackbone(name, size).eval()
    options = {"img_size": size} if "vit" in name else {}
    reference = timm.create_model(name, num_classes=0, **options).eval()
    reference.load_state_dict(model.net.state_dict())
    config = reference.pretrained_cfg
    assert (config["mean"][0] == 0.485) == (name == "test_efficientnet")  # both kinds of statistics are here
    images = torch.rand(2, 3, *size)
    with torch.inference_mode():
        got = model.embed(images)
        expected = reference(normalize(images, config["mean"], config["std"]))
    assert got.shape == (2, model.embed_dim)
    assert torch.allclose(got, expected, atol=1e-5)


def test_the_width_is_that_of_what_the_network_returns():
    # the 1x1 convolution after its pooling makes it wider than its last feature map
    model = TimmBackbone("mobilenetv4_conv_small", (32, 32)).eval()
    with torch.inference_mode():
        assert model.embed(torch.rand(1, 3, 32, 32)).shape == (1, model.embed_dim) == (1, 1280)


@pytest.mark.parametrize("prefix", ["", "net."])
def test_weights_of_timm_come_back_under_both_names(tmp_path, prefix):
    first, second = TimmBackbone("test_resnet", (32, 32)), TimmBackbone("test_resnet", (32, 32))
    stirred(first, 1)
    full = {f"{prefix}{name}": value for name, value in first.net.state_dict().items()}
    torch.save({"model": full | {f"{prefix}fc.weight": torch.ones(5, 96)}}, tmp_path / "net.pth")
    second.load(load_weights(str(tmp_path / "net.pth"), official_names=False))
    assert fingerprint_of(first.state_dict()) == fingerprint_of(second.state_dict())


def test_weights_of_another_network_are_refused_in_one_line():
    vit, resnet = TimmBackbone("test_vit", (32, 32)), TimmBackbone("test_resnet", (32, 32))
    with pytest.raises(UserError, match=r"theirs\.pth is no checkpoint of this network: it lacks conv1") as error:
        resnet.load(weights_of(vit.state_dict()))
    assert "--model" in message_of(error)
    wide = TimmBackbone("vit_tiny_patch16_224", (32, 32)).state_dict()
    with pytest.raises(
        UserError, match=r"theirs\.pth .* cls_token is \(1, 1, 192\), this one needs \(1, 1, 64\)"
    ) as error:
        vit.load(weights_of(wide))
    assert "--input_size" in message_of(error)


def test_names_that_timm_does_not_know_are_refused():
    with pytest.raises(UserError, match="timm:no_such_net is not known") as error:
        TimmBackbone("no_such_net", (32, 32))
    message_of(error)
    with pytest.raises(UserError, match="takes no --drop_path") as error:
        TimmBackbone("vgg11", (32, 32), drop_path=0.1)
    message_of(error)


def test_an_unknown_tag_of_a_known_network_is_refused():
    with pytest.raises(UserError, match="no_such_tag"):
        TimmBackbone("test_vit.no_such_tag", (32, 32))


def test_a_deeper_network_of_timm_is_refused():
    deeper = TimmBackbone("test_vit", (32, 32)).state_dict()
    last = max(name.split(".")[2] for name in deeper if name.startswith("net.blocks."))
    more = {name.replace(f".{last}.", f".{int(last) + 1}.", 1): value for name, value in deeper.items()}
    with pytest.raises(UserError, match="deeper"):
        TimmBackbone("test_vit", (32, 32)).load(weights_of(more | deeper))


def test_sides_that_a_network_of_timm_cannot_divide_are_refused():
    with pytest.raises(UserError, match="--input_size"):
        TimmBackbone("test_vit", (30, 30)).eval().embed(torch.rand(1, 3, 30, 30))


def test_an_encoder_without_its_pooling_norm_keeps_the_fresh_one(mae):
    model = build_vit("vit_nano_patch8", img_size=32)
    nn.init.constant_(model.fc_norm.weight, 1.25)
    assert load_pretrained(model, weights_of(mae.state_dict()), NORMS) == ["fc_norm.weight", "fc_norm.bias"]
    assert (model.fc_norm.weight == 1.25).all() and (model.fc_norm.bias == 0).all()
    assert all(torch.equal(v, mae.state_dict()[n]) for n, v in model.state_dict().items() if "fc_norm" not in n)
    assert load_pretrained(model, weights_of(model.state_dict()), NORMS) == []


def misfits(mae) -> dict[str, tuple[dict, str]]:
    state = mae.state_dict()
    tiny = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=6, num_heads=4).state_dict()
    coarse = build_vit("vit_nano_patch16", img_size=64).state_dict()
    return {
        "a head alone": ({"head.weight": torch.ones(5, 128)}, "holds no encoder"),
        "a narrower one": (tiny, "another model"),
        "larger patches": (coarse, "another model"),
        "a shallower one": ({n: v for n, v in state.items() if not n.startswith("blocks.5.")}, r"lacks blocks\.5"),
        "a deeper one": (state | {"blocks.6.norm1.weight": torch.ones(128)}, "deeper"),
        "no class token": ({n: v for n, v in state.items() if n != "cls_token"}, "lacks cls_token"),
        "no square": (state | {"pos_embed": torch.zeros(1, 1 + 12, 128)}, "square grid"),
    }


@pytest.mark.parametrize("case", misfits(build_mae("mae_vit_nano_patch8", 32)))
def test_weights_that_do_not_fit_are_refused_by_name_and_change_nothing(mae, case):
    state, reason = misfits(mae)[case]
    model = build_vit("vit_nano_patch8", img_size=32)
    before = fingerprint_of(model.state_dict())
    with pytest.raises(UserError, match=rf"theirs\.pth.*{reason}") as error:
        load_pretrained(model, weights_of(state), NORMS)
    message_of(error)
    assert fingerprint_of(model.state_dict()) == before


def test_position_embeddings_are_resampled_to_the_grid_of_the_model(mae):
    model = build_vit("vit_nano_patch8", img_size=(24, 64))
    load_pretrained(model, weights_of(mae.state_dict(), input_size=32), NORMS)
    expected = resample_abs_pos_embed(mae.pos_embed, [3, 8], [4, 4], num_prefix_tokens=1)
    assert torch.allclose(model.pos_embed, expected, atol=1e-5)
    wide = stirred(build_mae("mae_vit_nano_patch8", (16, 64)))  # as many patches as a square of 4 x 4
    load_pretrained(model, weights_of(wide.state_dict(), input_size=[16, 64]), NORMS)
    expected = resample_abs_pos_embed(wide.pos_embed, [3, 8], [2, 8], num_prefix_tokens=1)
    assert torch.allclose(model.pos_embed, expected, atol=1e-5)


def test_a_fingerprint_changes_with_one_bit_name_type_or_shape():
    base = {"a": torch.arange(6.0).reshape(2, 3) + 1, "b": torch.tensor(3)}
    flipped = base["a"].clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    others = [
        base | {"a": flipped},
        {"c": base["a"], "b": base["b"]},
        {"b": base["a"], "a": base["b"]},
        base | {"a": base["a"].view(torch.int32)},  # the same bits
        base | {"a": base["a"].reshape(3, 2)},
        base | {"c": torch.zeros(0)},
        {"a": base["a"]},
    ]
    prints = {fingerprint_of(state) for state in [base, *others]}
    assert len(prints) == 1 + len(others)
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in prints)


def test_a_fingerprint_is_of_the_values_alone():
    a = torch.arange(6.0).reshape(2, 3)
    base = fingerprint_of({"a": a, "b": torch.ones(2, dtype=torch.bfloat16)})
    assert fingerprint_of({"b": torch.ones(2, dtype=torch.bfloat16), "a": a.t().contiguous().t()}) == base
    assert fingerprint_of({"a": a.clone().requires_grad_(), "b": torch.ones(2, dtype=torch.bfloat16)}) == base
