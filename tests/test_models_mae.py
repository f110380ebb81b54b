"""The model against brute force: masks, patches, odd sizes, reconstruction. (HF parity: test_mae_parity.py)"""

import pytest
import torch

from models_mae import MAE_MODELS, build_mae
from models_mae_weights import load_mae, load_mae_weights, model_name
from models_vit import patchify, unpatchify
from util.data.augment import normalize
from util.mae.masking import random_mask, visible_count
from util.mae.pos_embed import resample_pos_embed, sincos_pos_embed
from util.run.errors import UserError
from util.training.checkpoint import save_checkpoint
from util.training.hub import load_weights


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_mae("mae_vit_nano_patch8", 32).eval()


def test_patches_are_numbered_by_row_with_channels_fastest():
    images = torch.arange(2 * 3 * 16 * 24, dtype=torch.float32).reshape(2, 3, 16, 24)
    patches = patchify(images, 8)
    assert patches.shape == (2, 6, 192)
    # patch 4 is row 1, column 1; value (row 2, column 5, channel 1) of it
    assert patches[1, 4, (2 * 8 + 5) * 3 + 1] == images[1, 1, 8 + 2, 8 + 5]
    assert torch.equal(unpatchify(patches, 8, (2, 3)), images)


def test_patch_embedding_is_the_convolution_of_the_checkpoints(model):
    images = torch.rand(2, 3, 32, 32)
    by_convolution = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    assert torch.allclose(model.patch_embed(patchify(images, 8)), by_convolution, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.75, 0.9])
def test_every_sample_keeps_the_same_number_of_patches(ratio):
    noise = torch.rand(50, 196)
    mask = random_mask(noise, ratio)
    assert (mask.sum(1) == 196 - int(196 * (1 - ratio))).all()
    for row, values in zip(mask, noise, strict=True):  # brute force: no kept patch has more noise than a removed one
        kept, removed = values[row == 0], values[row == 1]
        assert not len(removed) or kept.max() < removed.min()


def test_masked_pixels_do_not_reach_the_prediction(model):
    images, noise = torch.rand(2, 3, 32, 32), torch.rand(2, 16)
    _, pred, mask = model(images, 0.75, noise)
    area = unpatchify(mask[:, :, None].expand(-1, -1, 64), 8, (4, 4))
    changed = torch.where(area > 0, torch.rand_like(images), images)
    assert torch.equal(model(changed, 0.75, noise)[1], pred)
    assert not torch.equal(model(1 - images, 0.75, noise)[1], pred)


def test_loss_is_the_mean_square_over_removed_patches(model):
    images, noise = torch.rand(3, 3, 32, 32), torch.rand(3, 16)
    loss, pred, mask = model(images, 0.5, noise)
    target, errors = patchify(images, 8), []
    for i in range(3):
        for j in range(16):
            if mask[i, j]:
                errors += [(pred[i, j] - target[i, j]).square().mean()]
    assert torch.allclose(loss, torch.stack(errors).mean(), rtol=1e-5)


def test_unequal_sides_and_other_sizes(model):
    images = torch.rand(2, 3, 24, 64)
    noise = torch.rand(2, 24)
    loss, pred, mask = model(images, 0.75, noise)
    assert pred.shape == (2, 24, 192) and (mask.sum(1) == 18).all() and torch.isfinite(loss)
    # re-sampling the fixed embeddings on the fly gives what a model built for that size is loaded with
    other = build_mae("mae_vit_nano_patch8", (24, 64)).eval()
    state = model.state_dict()
    for name in ("pos_embed", "decoder_pos_embed"):
        state[name] = resample_pos_embed(state[name], (4, 4), (3, 8))
    other.load_state_dict(state)
    assert torch.allclose(other(images, 0.75, noise)[1], pred, atol=1e-5)
    with pytest.raises(UserError, match="does not divide"):
        model(torch.rand(1, 3, 30, 32))


def test_resampled_position_embeddings_follow_rows_and_columns():
    square, wide = sincos_pos_embed(64, (8, 8)), sincos_pos_embed(64, (8, 12))
    resampled = resample_pos_embed(square, (8, 8), (8, 12))
    # the row half of the vector does not depend on the number of columns
    assert torch.allclose(resampled[:, 1:, 32:], wide[:, 1:, 32:], atol=1e-2)
    assert torch.equal(resample_pos_embed(square, (8, 8), (8, 8)), square)
    assert (square[:, 0] == 0).all()
    # arXiv 1706.03762: sin(position / 10000^(2i/d)); column 3, frequency 1 of 16
    assert square[0, 1 + 2 * 8 + 3, 1] == pytest.approx(torch.tensor(3.0 / 10000 ** (1 / 16)).sin().item(), abs=1e-6)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_reconstruct_pastes_the_prediction_into_the_visible_picture(model, norm_pix_loss):
    model.norm_pix_loss = norm_pix_loss
    images = (torch.rand(2, 3, 32, 32) * 255).round() / 255
    noise = torch.rand(2, 16)
    shown = model.reconstruct(images, random_mask(noise, 0.75))
    _, pred, mask = model(normalize((images * 255).to(torch.uint8)), 0.75, noise)
    area = shown["mask"].expand(-1, 3, -1, -1)
    assert torch.equal(shown["pasted"][area == 0], images[area == 0])
    assert torch.equal(shown["pasted"][area == 1], shown["pred"][area == 1])
    assert torch.equal(patchify(shown["mask"], 8).mean(-1), mask)
    if not norm_pix_loss:
        pixels = unpatchify(pred, 8, (4, 4)) * model.pixel_std + model.pixel_mean
        assert torch.allclose(shown["pred"], pixels.clamp(0, 1), atol=1e-4)
    model.norm_pix_loss = False
    with pytest.raises(ValueError, match="same number"):
        model.reconstruct(images, torch.tensor([[1.0] * 4 + [0.0] * 12, [1.0] * 5 + [0.0] * 11]))


def test_oracle_statistics_give_each_patch_its_true_mean(model):
    model.norm_pix_loss = True
    images = torch.rand(1, 3, 32, 32) * 0.2 + 0.4
    shown = model.reconstruct(images, torch.cat([torch.zeros(1, 8), torch.ones(1, 8)], dim=1))
    model.norm_pix_loss = False
    normalised = (images - model.pixel_mean) / model.pixel_std
    _, pred, _ = model(normalised, 0.5, torch.cat([torch.zeros(1, 8), torch.ones(1, 8)], dim=1))
    patches = patchify(normalised, 8)
    expected = pred * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    expected = (unpatchify(expected, 8, (4, 4)) * model.pixel_std + model.pixel_mean).clamp(0, 1)
    assert torch.allclose(shown["pred"], expected, atol=1e-5)


def test_official_names_and_aliases():
    for name in (
        "mae_vit_base_patch16",
        "mae_vit_base_patch16_dec512d8b",
        "mae_vit_large_patch16_dec512d8b",
        "mae_vit_huge_patch14_dec512d8b",
        "mae_vit_tiny_patch8",
        "mae_vit_tiny_patch16",
        "mae_vit_small_patch16",
    ):
        assert name in MAE_MODELS
    with pytest.raises(UserError, match="unknown model"):
        build_mae("mae_vit_giant")


def test_keep_is_the_integer_part():
    assert [visible_count(196, r) for r in (0, 0.25, 0.5, 0.75, 0.9)] == [196, 147, 98, 49, 19]


def checkpoint(tmp_path, state, **args):
    path = tmp_path / "weights.pth"
    save_checkpoint(path, {"model": state, "args": args})
    return str(path)


def test_a_checkpoint_comes_back_at_its_own_size(model, tmp_path):
    spec = checkpoint(tmp_path, model.state_dict(), model="mae_vit_nano_patch8", input_size=32, norm_pix_loss=True)
    loaded = load_mae(spec)
    assert loaded.grid == (4, 4) and loaded.norm_pix_loss and not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_architecture_is_found_from_the_shapes(model, tmp_path):
    assert model_name(load_weights(checkpoint(tmp_path, model.state_dict()))) == "mae_vit_nano_patch8"


def test_another_number_of_heads_is_another_model(model, tmp_path):
    with pytest.raises(UserError, match="fits no known model"):
        model_name(load_weights(checkpoint(tmp_path, model.state_dict(), num_heads=8)))


def test_non_square_checkpoints_resample_their_true_grid(tmp_path):
    wide = build_mae("mae_vit_nano_patch8", (16, 64))
    spec = checkpoint(tmp_path, wide.state_dict(), model="mae_vit_nano_patch8", input_size=[16, 64])
    target = build_mae("mae_vit_nano_patch8", (16, 32))
    load_mae_weights(target, load_weights(spec))
    assert torch.equal(target.pos_embed, resample_pos_embed(wide.pos_embed, (2, 8), (2, 4)))


def test_an_encoder_without_decoder_keeps_the_fresh_one(model, tmp_path):
    encoder = {n: v + 1 for n, v in model.state_dict().items() if not n.startswith(("decoder", "mask_token"))}
    weights = load_weights(checkpoint(tmp_path, encoder))
    target = build_mae("mae_vit_nano_patch8", 32)
    before = target.decoder_pred.weight.clone()
    missing = load_mae_weights(target, weights)
    assert "decoder_pred.weight" in missing and all(n.startswith(("decoder", "mask_token")) for n in missing)
    assert torch.equal(target.decoder_pred.weight, before)
    assert torch.equal(target.blocks[3].mlp.fc1.weight, model.blocks[3].mlp.fc1.weight + 1)
    with pytest.raises(UserError, match="encoder only"):
        load_mae(checkpoint(tmp_path, encoder))


@pytest.mark.parametrize("name", ["mae_vit_tiny_patch8", "mae_vit_nano_patch16"])
def test_a_checkpoint_of_another_model_is_refused(model, tmp_path, name):
    weights = load_weights(checkpoint(tmp_path, model.state_dict()))
    with pytest.raises(UserError, match="another model"):
        load_mae_weights(build_mae(name, 32), weights)


def test_a_shallower_or_deeper_checkpoint_is_refused(model, tmp_path):
    lacking = {n: v for n, v in model.state_dict().items() if not n.startswith("blocks.5.")}
    with pytest.raises(UserError, match=r"lacks blocks\.5"):
        load_mae_weights(build_mae("mae_vit_nano_patch8", 32), load_weights(checkpoint(tmp_path, lacking)))
    deeper = model.state_dict() | {"blocks.6.norm1.weight": torch.ones(128)}
    with pytest.raises(UserError, match="deeper"):
        load_mae_weights(build_mae("mae_vit_nano_patch8", 32), load_weights(checkpoint(tmp_path, deeper)))
