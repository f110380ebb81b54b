"""Our autoencoder against two references: Hugging Face's ViTMAEForPreTraining (same weights, same noise: same loss,
prediction and mask) and the official checkpoint's listing of names and shapes.

Run: python -m pytest tests/test_mae_parity.py
"""

import pytest
import torch

from models_mae import MaskedAutoencoder, build_mae
from util.training.convert import hf_config, official_to_timm, save_hf

TOLERANCE = 1e-5
SMALL = {
    "patch_size": 8,
    "embed_dim": 96,
    "depth": 3,
    "num_heads": 6,
    "decoder_embed_dim": 64,
    "decoder_depth": 2,
    "decoder_num_heads": 4,
}
HEADS = {"small": (6, 4), "base": (12, 16)}


def build(name: str, size: int) -> MaskedAutoencoder:
    """A model with random weights, of which none is zero or one: not the biases, not the norms."""
    torch.manual_seed(0)
    model = build_mae("mae_vit_base_patch16", size) if name == "base" else MaskedAutoencoder(size, **SMALL)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(
    scope="module", params=[("small", 224), ("small", 64), ("base", 224), ("base", 64)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def pair(request, tmp_path_factory):
    """(ours, Hugging Face's) with the same weights, both built at the same image size."""
    transformers = pytest.importorskip("transformers")
    name, size = request.param
    ours = build(name, size)
    heads, decoder_heads = HEADS[name]
    config = hf_config(ours.state_dict(), num_heads=heads, decoder_num_heads=decoder_heads)
    assert config["layer_norm_eps"] == 1e-6 and config["image_size"] == size
    folder = save_hf(tmp_path_factory.mktemp("hf"), ours.state_dict(), config)
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(folder).eval()
    (folder / "model.safetensors").unlink()  # base is 450 MB
    return ours, theirs


def batch_of(model: MaskedAutoencoder) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    height, width = (side * model.patch_size for side in model.grid)
    images = torch.randn(2, 3, height, width, generator=generator)
    return images, torch.rand(2, model.num_patches(images), generator=generator)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("mask_ratio", [0.75, 0.6])
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_prediction_and_mask_equal_hugging_face(pair, norm_pix_loss, mask_ratio):
    ours, theirs = pair
    images, noise = batch_of(ours)
    ours.norm_pix_loss = theirs.config.norm_pix_loss = norm_pix_loss
    theirs.config.mask_ratio = mask_ratio
    loss, pred, mask = ours(images, mask_ratio, noise)
    reference = theirs(images, noise=noise)
    assert torch.equal(mask, reference.mask)
    assert_close(pred, reference.logits)
    assert_close(loss, reference.loss)
    assert pred.abs().mean() > 0.1 and loss > 0.1  # the figures compared are not near zero


def test_gradients_equal_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = build("small", 64)
    config = hf_config(ours.state_dict(), num_heads=6, decoder_num_heads=4)
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(save_hf(tmp_path, ours.state_dict(), config))
    images, noise = batch_of(ours)
    ours(images, 0.75, noise)[0].backward()
    theirs(images, noise=noise).loss.backward()
    pairs = {
        "patch_embed.proj.weight": theirs.vit.embeddings.patch_embeddings.projection.weight,
        "cls_token": theirs.vit.embeddings.cls_token,
        "norm.bias": theirs.vit.layernorm.bias,
        "mask_token": theirs.decoder.mask_token,
        "decoder_embed.weight": theirs.decoder.decoder_embed.weight,
        "decoder_pred.bias": theirs.decoder.decoder_pred.bias,
    }
    for name, parameter in pairs.items():
        gradient = ours.get_parameter(name).grad
        assert gradient.abs().max() > 0, name
        assert_close(gradient, parameter.grad)


def block_shapes(prefix: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.norm1.weight": (dim,),
        f"{prefix}.norm1.bias": (dim,),
        f"{prefix}.attn.qkv.weight": (3 * dim, dim),
        f"{prefix}.attn.qkv.bias": (3 * dim,),
        f"{prefix}.attn.proj.weight": (dim, dim),
        f"{prefix}.attn.proj.bias": (dim,),
        f"{prefix}.norm2.weight": (dim,),
        f"{prefix}.norm2.bias": (dim,),
        f"{prefix}.mlp.fc1.weight": (4 * dim, dim),
        f"{prefix}.mlp.fc1.bias": (4 * dim,),
        f"{prefix}.mlp.fc2.weight": (dim, 4 * dim),
        f"{prefix}.mlp.fc2.bias": (dim,),
    }


def official_base() -> dict[str, tuple[int, ...]]:
    """mae_pretrain_vit_base_full.pth: every name with its shape."""
    shapes = {
        "cls_token": (1, 1, 768),
        "pos_embed": (1, 197, 768),
        "patch_embed.proj.weight": (768, 3, 16, 16),
        "patch_embed.proj.bias": (768,),
        "norm.weight": (768,),
        "norm.bias": (768,),
        "mask_token": (1, 1, 512),
        "decoder_pos_embed": (1, 197, 512),
        "decoder_embed.weight": (512, 768),
        "decoder_embed.bias": (512,),
        "decoder_norm.weight": (512,),
        "decoder_norm.bias": (512,),
        "decoder_pred.weight": (768, 512),
        "decoder_pred.bias": (768,),
    }
    for n in range(12):
        shapes |= block_shapes(f"blocks.{n}", 768)
    for n in range(8):
        shapes |= block_shapes(f"decoder_blocks.{n}", 512)
    return shapes


def test_names_and_shapes_are_the_official_ones():
    with torch.device("meta"):
        state = build_mae("mae_vit_base_patch16").state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == official_base()
    assert len(state) == 254
    assert sum(value.numel() for value in state.values()) == 111_907_840


def test_the_encoder_alone_is_mae_pretrain_vit_base():
    with torch.device("meta"):
        encoder = official_to_timm(build_mae("mae_vit_base_patch16").state_dict())
    assert len(encoder) == 150
    assert {name: tuple(value.shape) for name, value in encoder.items()} == {
        name: shape for name, shape in official_base().items() if not name.startswith(("decoder_", "mask_token"))
    }
