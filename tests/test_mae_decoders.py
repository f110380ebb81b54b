"""Decoders that do less: the same objective on fewer tokens, a part of it, and cross-attention.

Run: python -m pytest tests/test_mae_decoders.py
"""

import pytest
import torch
from torch import nn

from models_mae import build_mae
from models_mae_weights import decoder_options, load_mae, load_mae_weights
from models_vit import Block, patchify
from util.mae.losses import masked_pixel_loss
from util.mae.masking import random_mask, rank_patches
from util.mae.ordered_dither import bayer_ranks, spread_first
from util.run.errors import UserError
from util.training.checkpoint import save_checkpoint
from util.training.hub import load_weights

KINDS = {"self": {}, "cross": {"decoder": "cross"}, "fill": {"fill": True}}
LENGTH, KEPT = 16, 4


def built(norm_pix_loss: bool = False, **options):
    """A small model in double precision whose every weight matters."""
    torch.manual_seed(0)
    model = build_mae("mae_vit_nano_patch8", 32, norm_pix_loss, **options).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=generator), torch.rand(3, 16, generator=generator)


def gradients(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor | None]:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
    return dict(zip(trainable, found, strict=True))


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_the_loss_alone_is_the_loss_with_all_gradients(batch, kind, norm_pix_loss):
    model = built(norm_pix_loss, **KINDS[kind])
    images, noise = batch
    whole, _, _ = model(images, 0.75, noise)
    alone = model(images, 0.75, noise, predict_ratio=1.0)
    assert alone.item() == pytest.approx(whole.item(), abs=1e-12)
    expected, found = gradients(whole, model), gradients(alone, model)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-12, rtol=1e-9, msg=name)


def test_the_last_tokens_of_a_block_are_the_same(batch):
    torch.manual_seed(0)
    block, x = Block(16, 4).double(), torch.randn(2, 9, 16, dtype=torch.float64)
    for last in (1, 5, 9):
        torch.testing.assert_close(block(x, last=last), block(x)[:, -last:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_a_part_is_predicted_at_random_of_the_removed_patches(batch, kind, monkeypatch):
    model = built(**KINDS[kind])
    images, noise = batch
    asked, decode = [], model.decode
    monkeypatch.setattr(model, "decode", lambda *args: asked.append(args[2]) or decode(*args))
    loss = model(images, 0.75, noise, predict_ratio=0.5)
    (places,) = asked
    assert places.shape == (3, 6)
    for row, mask in zip(places, random_mask(noise, 0.75), strict=True):
        assert len(set(row.tolist())) == 6 and mask[row].all()
    if kind == "cross":  # queries do not see each other, so the part is a part of the whole prediction
        _, pred, _ = model(images, 0.75, noise)
        chosen = torch.zeros(3, LENGTH, dtype=torch.float64).scatter(1, places, 1.0)
        expected = masked_pixel_loss(pred, patchify(images, 8), chosen).mean()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)


def test_the_smallest_part_is_one_patch(batch):
    assert built()(*batch[:1], 0.75, batch[1], predict_ratio=0.001).isfinite()


def test_fill_predicts_every_removed_patch_and_learns(batch, monkeypatch):
    model = built(**KINDS["fill"])
    images, noise = batch
    asked, decode = [], model.decode
    monkeypatch.setattr(model, "decode", lambda *args: asked.append(args[2:4]) or decode(*args))
    loss = model(images, 0.75, noise, predict_ratio=0.5)
    (places, left) = asked[0]
    removed = torch.cat([places, left], dim=1).sort(dim=1).values
    masked = random_mask(noise, 0.75).nonzero()[:, 1].reshape(3, 12)
    assert places.shape == left.shape == (3, 6) and torch.equal(removed, masked)
    assert all(value is not None and value.abs().max() > 0 for value in gradients(loss, model).values())


def test_left_out_patches_are_filled_from_what_was_decoded(batch):
    """By hand: one attention layer on the tokens before the last block, then the norm and the projection of all."""
    model = built(**KINDS["fill"])
    images, noise = batch
    ids = rank_patches(noise)[0]
    keep, asked, left = ids[:, :4], ids[:, 4:9], ids[:, 9:]
    patches = patchify(images, 8)
    latent = model.encode(patches.gather(1, keep[:, :, None].expand(-1, -1, 192)), keep, (4, 4))
    pred = model.decode(latent, keep, asked, left, (4, 4))
    before_last = []
    hook = model.decoder_blocks[-1].register_forward_pre_hook(lambda _, given: before_last.append(given[0]))
    model.decode(latent, keep, asked, left, (4, 4))
    hook.remove()
    fill, position = model.decoder_fill, model.decoder_pos_embed[0, 1:]
    queries = model.mask_token + position[left]
    memory = fill.norm(before_last[0])
    q, (k, v) = fill.attn.q(queries), fill.attn.kv(memory).chunk(2, dim=-1)
    heads = [part.unflatten(-1, (fill.attn.num_heads, -1)).transpose(1, 2) for part in (q, k, v)]
    weights = (heads[0] @ heads[1].transpose(-1, -2) * heads[0].shape[-1] ** -0.5).softmax(-1)
    filled = queries + fill.attn.proj((weights @ heads[2]).transpose(1, 2).flatten(2))
    expected = model.decoder_pred(model.decoder_norm(filled))
    torch.testing.assert_close(pred[:, 5:], expected, atol=1e-12, rtol=0)


def test_cross_attention_against_torch(batch):
    """A block of CrossMAE equals torch's own decoder layer without its self-attention."""
    torch.manual_seed(0)
    model = built(**KINDS["cross"])
    block, dim = model.decoder_blocks[0], 128
    reference = nn.MultiheadAttention(dim, block.attn.num_heads, batch_first=True).double()
    weights = torch.cat([block.attn.q.weight, block.attn.kv.weight]), torch.cat([block.attn.q.bias, block.attn.kv.bias])
    reference.in_proj_weight.data, reference.in_proj_bias.data = weights[0].detach(), weights[1].detach()
    reference.out_proj.load_state_dict(block.attn.proj.state_dict())
    queries, memory = torch.randn(2, 7, dim, dtype=torch.float64), torch.randn(2, 5, dim, dtype=torch.float64)
    attended = queries + reference(block.norm1(queries), memory, memory, need_weights=False)[0]
    expected = attended + block.mlp(block.norm2(attended))
    torch.testing.assert_close(block(queries, memory), expected, atol=1e-10, rtol=0)


def test_each_decoder_block_starts_from_the_last_encoder_block(batch):
    torch.manual_seed(0)
    model = build_mae("mae_vit_nano_patch8", 32, decoder="cross").double()
    outputs = [torch.randn(2, 5, 128, dtype=torch.float64) for _ in range(6)]
    for norm, memory in zip(model.decoder_maps.norms, model.decoder_maps(outputs), strict=True):
        torch.testing.assert_close(memory, norm(outputs[-1]), atol=1e-12, rtol=0)


def test_bayer_ranks_are_the_known_matrix():
    assert bayer_ranks(2).tolist() == [[0, 2], [3, 1]]
    assert bayer_ranks(4).tolist() == [[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]
    assert sorted(bayer_ranks(16).flatten().tolist()) == list(range(256))


def test_the_first_of_spread_patches_lie_further_apart_than_random_ones():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(64, 196, generator=generator)
    masked = rank_patches(noise)[0][:, 49:]
    spread = spread_first(masked, (14, 14), noise)
    assert torch.equal(spread.sort(1).values, masked.sort(1).values)
    assert not torch.equal(spread[0], spread[1])

    def reach(ids: torch.Tensor) -> float:
        """Mean distance from a patch that was left out to the nearest chosen one, in patches."""
        places = torch.stack([ids // 14, ids % 14], dim=-1).float()
        return torch.cdist(places[:, 49:], places[:, :49]).min(dim=2).values.mean().item()

    assert reach(spread) < reach(masked) - 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_remembers_its_decoder(tmp_path, kind):
    model = built(**KINDS[kind])
    expected = {"decoder": "self", "fill": False, "hard": False, "refine": False} | KINDS[kind]
    assert decoder_options(model.state_dict()) == expected
    save_checkpoint(tmp_path / "mae.pth", {"model": model.float().state_dict()})
    loaded = load_mae(str(tmp_path / "mae.pth"))
    images = torch.rand(2, 3, 32, 32)
    mask = random_mask(torch.rand(2, 16), 0.75)
    expected = model.eval().reconstruct(images, mask)
    for name, values in loaded.reconstruct(images, mask).items():
        torch.testing.assert_close(values, expected[name], atol=1e-5, rtol=0)


def test_a_decoder_of_the_other_kind_starts_fresh_and_the_encoder_is_taken(tmp_path):
    save_checkpoint(tmp_path / "mae.pth", {"model": built().float().state_dict()})
    target = build_mae("mae_vit_nano_patch8", 32, decoder="cross")
    fresh = {name: value.clone() for name, value in target.state_dict().items()}
    weights = load_weights(str(tmp_path / "mae.pth"))
    missing = load_mae_weights(target, weights)
    for name, value in target.state_dict().items():
        assert torch.equal(value, fresh[name] if name in missing else weights.state[name]), name
    assert all(name.startswith(("decoder_", "mask_token")) for name in missing) and "decoder_maps.weight" in missing


def test_official_weights_get_a_fresh_fill_layer_only(tmp_path):
    save_checkpoint(tmp_path / "mae.pth", {"model": built().float().state_dict()})
    weights = load_weights(str(tmp_path / "mae.pth"))
    missing = load_mae_weights(build_mae("mae_vit_nano_patch8", 32, fill=True), weights)
    assert missing and all(name.startswith("decoder_fill.") for name in missing)


def test_fill_needs_something_to_fill(tmp_path):
    import main_pretrain

    common = ["--data_path", "x", "--output_dir", str(tmp_path), "--fill"]
    for more in ([], ["--decoder", "cross", "--predict_ratio", "0.5"]):
        with pytest.raises(UserError, match="--predict_ratio below 1"):
            main_pretrain.get_args(common + more)
    assert main_pretrain.get_args([*common, "--predict_ratio", "0.5"]).fill
