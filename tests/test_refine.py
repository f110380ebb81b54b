"""The refinement of predicted patches: nothing at first, removed pixels only, across borders, kept in checkpoints.

Run: python -m pytest tests/test_refine.py
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from models_mae import build_mae, paste
from models_mae_weights import decoder_options, load_mae, load_mae_weights
from models_refine import Refinement
from models_vit import patchify, unpatchify
from tests.helpers import assert_same
from util.mae.masking import random_mask
from util.run.errors import UserError
from util.training.checkpoint import save_checkpoint
from util.training.hub import load_weights


def built(refine: bool = True, trained: bool = False, size=32, **options):
    """A small model; trained: its refinement does something."""
    torch.manual_seed(0)
    model = build_mae("mae_vit_nano_patch8", size, refine=refine, **options)
    if trained:
        torch.nn.init.normal_(model.decoder_refine.out.weight, std=0.1)
        torch.nn.init.normal_(model.decoder_refine.out.bias, std=0.1)
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 32, 32, generator=generator), torch.rand(3, 16, generator=generator)


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_it_starts_as_the_identity_beside_the_same_weights(batch, decoder):
    plain, refined = built(False, decoder=decoder), built(decoder=decoder)
    state = refined.state_dict()
    assert_same(dict(plain.state_dict()), {k: v for k, v in state.items() if not k.startswith("decoder_refine.")})
    for one, other in zip(plain(batch[0], 0.75, batch[1]), refined(batch[0], 0.75, batch[1]), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(plain(batch[0], 0.75, batch[1], 1.0), refined(batch[0], 0.75, batch[1], 1.0))


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_the_prediction_is_corrected_where_patches_were_removed(batch, decoder):
    """By hand, in pictures: the convolutions see the pasted picture, the mask and the place inside each patch."""
    images, noise = batch
    model, plain = built(trained=True, decoder=decoder), built(False, decoder=decoder)
    loss, pred, mask = model(images, 0.75, noise)
    _, raw, _ = plain(images, 0.75, noise)
    pasted, area = paste(images, unpatchify(raw, 8, (4, 4)), mask, 8)
    line = torch.arange(32) % 8 / 3.5 - 1
    rows, columns = line[:, None].expand(32, 32), line.expand(32, 32)
    x = torch.cat([pasted, area, torch.stack([rows, columns]).expand(3, -1, -1, -1)], dim=1)
    x = F.pixel_unshuffle(x, 2)
    net = model.decoder_refine
    for layer in (net.inner[0], net.inner[2]):
        x = F.gelu(F.conv2d(x, layer.weight, layer.bias, padding=1))
    correction = F.pixel_shuffle(F.conv2d(x, net.out.weight, net.out.bias, padding=1), 2)
    expected = unpatchify(raw, 8, (4, 4)) + correction * area
    torch.testing.assert_close(unpatchify(pred, 8, (4, 4)), expected, atol=1e-5, rtol=0)
    assert torch.equal(pred[mask == 0], raw[mask == 0]) and not torch.allclose(pred[mask > 0], raw[mask > 0], atol=1e-2)
    error = (patchify(expected, 8) - patchify(images, 8)).square().mean(-1)
    assert loss.item() == pytest.approx(error[mask > 0].mean().item(), rel=1e-5)


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_the_loss_alone_is_the_loss_with_all_gradients(batch, decoder):
    model = built(trained=True, decoder=decoder).double()
    images, noise = batch[0].double(), batch[1]
    whole, alone = model(images, 0.75, noise)[0], model(images, 0.75, noise, 1.0)
    assert alone.item() == pytest.approx(whole.item(), abs=1e-12)
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted, found = (torch.autograd.grad(loss, parameters) for loss in (whole, alone))
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-12, rtol=1e-9)


def test_what_was_removed_does_not_reach_the_prediction(batch):
    images, noise = batch
    model = built(trained=True).eval()
    _, pred, mask = model(images, 0.75, noise)
    other, _ = paste(images, torch.randn_like(images), mask, 8)
    assert torch.equal(model(other, 0.75, noise)[1], pred)


def test_it_sees_across_borders_seven_pixels_far():
    torch.manual_seed(0)
    net = Refinement(8)
    torch.nn.init.normal_(net.out.weight)
    pasted, area = torch.randn(1, 3, 48, 48, requires_grad=True), torch.ones(1, 1, 48, 48)
    net(pasted, area)[0, :, 24, 24].sum().backward()  # the first pixel of a patch, even
    rows = (pasted.grad[0].abs().amax((0, 2)) > 0).nonzero()[:, 0]
    assert rows.min() < 24 - 5 and rows.max() > 24 and rows.max() - rows.min() + 1 == 14  # 7 cells of 2 px


def test_visible_pixels_stay_as_they_are(batch):
    model = built(trained=True).eval()
    images = torch.rand(3, 3, 32, 32)
    shown = model.reconstruct(images, random_mask(batch[1], 0.75))
    seen = (shown["mask"] == 0).expand_as(images)
    assert torch.equal(shown["pasted"][seen], images[seen])
    assert shown["pasted"].min() >= 0 and shown["pasted"].max() <= 1


def test_every_weight_learns_once_the_last_layer_has(batch):
    model = built()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = [name for name, _ in model.named_parameters() if name.startswith("decoder_refine.")]
    for reached in (["decoder_refine.out.weight", "decoder_refine.out.bias"], names):
        optimizer.zero_grad()
        model(batch[0], 0.75, batch[1], 1.0).backward()
        parameters = dict(model.named_parameters())
        assert [name for name in names if parameters[name].grad.abs().max() > 0] == sorted(reached, key=names.index)
        optimizer.step()


def test_it_mends_a_step_between_patches():
    """What it is for: patches whose grey levels are off, each by its own; it learns to smooth their borders."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = Refinement(8, width=16)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    everywhere = torch.arange(16).expand(8, -1)

    def batch_of_patches():
        smooth = F.interpolate(torch.randn(8, 3, 4, 4, generator=generator), size=32, mode="bicubic")
        wrong = patchify(smooth, 8) + 0.5 * torch.randn(8, 16, 1, generator=generator)
        return patchify(smooth, 8), wrong

    def error(patches, pred):
        return (net.refine(pred, patches, everywhere, (4, 4)) - patches).square().mean()

    before = (lambda patches, pred: (pred - patches).square().mean())(*batch_of_patches()).item()
    for _ in range(60):
        optimizer.zero_grad()
        error(*batch_of_patches()).backward()
        optimizer.step()
    assert error(*batch_of_patches()).item() < 0.9 * before


def test_under_autocast_the_sum_is_in_single_precision(batch):
    model = built(trained=True)
    with torch.autocast("cpu", torch.bfloat16):
        _, pred, _ = model(batch[0], 0.75, batch[1])
        loss = model(batch[0], 0.75, batch[1], 1.0)
    assert pred.dtype == torch.float32 and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model(batch[0], 0.75, batch[1], 1.0).item(), rel=0.05)


def test_unequal_sides_and_other_sizes():
    model = built(trained=True)
    loss, pred, _ = model(torch.randn(2, 3, 24, 64), 0.75, torch.rand(2, 24))
    assert pred.shape == (2, 24, 192) and loss.isfinite()


def test_the_cost_is_that_of_its_docstring():
    """Of ViT-B/16 at 224 px and 75 %: 5 % of the operations, by counting."""
    with torch.device("meta"):
        models = [build_mae("mae_vit_base_patch16", 224, refine=refine) for refine in (False, True)]
        images, noise = torch.randn(1, 3, 224, 224), torch.rand(1, 196)
    counts = []
    for model in models:
        with FlopCounterMode(display=False) as counter:
            model(images, 0.75, noise, 1.0)
        counts.append(counter.get_total_flops())
    assert 0.03 < counts[1] / counts[0] - 1 < 0.06
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        models[1].decoder_refine(images, images[:, :1])
    assert counter.get_total_flops() / 2e9 == pytest.approx(0.46, abs=0.01)


def test_patches_of_an_odd_side_are_refused():
    with pytest.raises(ValueError, match="do not divide"):
        Refinement(7)


# --- checkpoints ------------------------------------------------------------------------------------------------


def saved(model, path) -> str:
    save_checkpoint(path, {"model": model.state_dict()})
    return str(path)


@pytest.mark.parametrize("refine", [True, False])
def test_a_checkpoint_remembers_its_refinement(tmp_path, batch, refine):
    model = built(refine, trained=refine).eval()
    assert decoder_options(model.state_dict())["refine"] == refine
    loaded = load_mae(saved(model, tmp_path / "mae.pth"))
    assert (loaded.decoder_refine is not None) == refine
    images, mask = torch.rand(3, 3, 32, 32), random_mask(batch[1], 0.75)
    assert_same(loaded.reconstruct(images, mask), model.reconstruct(images, mask))


def test_weights_in_the_official_layout_get_a_fresh_refinement_only(tmp_path):
    official = built(False)
    weights = load_weights(saved(official, tmp_path / "mae.pth"))
    assert not any("refine" in name for name in weights.state)
    target = build_mae("mae_vit_nano_patch8", 32, refine=True)
    missing = load_mae_weights(target, weights)
    assert missing and all(name.startswith("decoder_refine.") for name in missing)
    assert torch.equal(target.decoder_pred.weight, official.decoder_pred.weight)


def test_a_refinement_is_not_lost_silently(tmp_path):
    weights = load_weights(saved(built(), tmp_path / "mae.pth"))
    with pytest.raises(UserError, match="give --refine"):
        load_mae_weights(build_mae("mae_vit_nano_patch8", 32), weights)


def test_the_encoder_goes_to_a_backbone_without_it(tmp_path):
    from models_vit import build_vit
    from util.training.pretrained import load_pretrained

    weights = load_weights(saved(built(), tmp_path / "mae.pth"))
    backbone = build_vit("vit_nano_patch8", img_size=32)
    missing = load_pretrained(backbone, weights, optional=("fc_norm.",))
    assert all(name.startswith("fc_norm.") for name in missing)


# --- blending ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(2)
    images = F.interpolate(torch.rand(3, 3, 5, 5, generator=generator), size=(32, 40), mode="bicubic").clamp(0, 1)
    return images, random_mask(torch.rand(3, 20, generator=generator), 0.75)


def shifted_copy(model, down: int, right: int):
    """A model of the larger pictures of a shift, whose patches lie half a patch before those of `model`."""
    moved = built(False, size=(32 + 2 * down, 40 + 2 * right)).eval()
    state = model.state_dict()
    for name in ("pos_embed", "decoder_pos_embed"):
        dim = state[name].shape[-1]
        omega = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
        y, x = (np.arange(side // 8 + (shift > 0)) - 0.5 * (shift > 0) for side, shift in ((32, down), (40, right)))
        parts = [np.concatenate([f(place[:, None] * omega) for f in (np.sin, np.cos)], 1) for place in (x, y)]
        rows = np.concatenate([np.tile(parts[0], (len(y), 1)), np.repeat(parts[1], len(x), 0)], 1)
        state[name] = torch.from_numpy(np.concatenate([np.zeros((1, dim)), rows])[None]).float()
    moved.load_state_dict(state)
    return moved


def test_blending_is_the_weighted_mean_of_four_shifted_predictions(pictures):
    """One picture at a time through `reconstruct`, pixel by pixel where each shift has a say."""
    images, mask = pictures
    model = built(False, size=(32, 40)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = model.reconstruct(images, mask)
    model.blend = True
    found = model.reconstruct(images, mask)
    model.blend = False
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for i in range(len(images)):
        total, weights = torch.zeros(3, 32, 40), torch.zeros(32, 40)
        for down, right in ((0, 0), (0, 4), (4, 0), (4, 4)):
            if (down, right) == (0, 0):
                pred, asked = plain["pred"][i], torch.ones(32, 40)
            else:
                rows, columns = (
                    (torch.arange(-s, side + s)).clamp(0, side - 1) for s, side in ((down, 32), (right, 40))
                )
                canvas, unknown = (plain[name][i][:, rows][:, :, columns] for name in ("pasted", "mask"))
                cells = unknown[0].unflatten(0, (-1, 8)).unflatten(2, (-1, 8)).amin((1, 3))
                moved = shifted_copy(model, down, right)
                pred = moved.reconstruct(canvas[None], cells.reshape(1, -1))["pred"][0]
                inside = slice(down, down + 32), slice(right, right + 40)
                asked = cells.repeat_interleave(8, 0).repeat_interleave(8, 1)[inside]
                pred = pred[(slice(None), *inside)]
            y, x = ((torch.arange(side) + shift) % 8 + 0.5 for side, shift in ((32, down), (40, right)))
            weight = (1 - (y / 4 - 1).abs())[:, None] * (1 - (x / 4 - 1).abs()) * asked
            total, weights = total + pred * weight, weights + weight
        torch.testing.assert_close(found["pred"][i], total / weights, atol=1e-4, rtol=0)


def test_blending_touches_removed_pixels_only_and_no_picture_depends_on_another(pictures):
    images, mask = pictures
    model = built(trained=True).eval()
    plain = model.reconstruct(images, mask)
    model.blend = True
    found = model.reconstruct(images, mask)
    seen = (found["mask"] == 0).expand_as(images)
    assert torch.equal(found["pasted"][seen], images[seen]) and torch.equal(found["loss"], plain["loss"])
    assert not torch.allclose(found["pred"], plain["pred"], atol=1e-3)
    for i in range(len(images)):
        alone = model.reconstruct(images[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(alone["pred"][0], found["pred"][i], atol=1e-5, rtol=0)


def test_blending_smooths_the_borders_of_flat_patches(pictures):
    """A model that knows a grey level for each patch and nothing else."""
    images, mask = pictures
    model = built(False).eval()

    def predict(patches, noise, keep, grid):
        levels = torch.randn(len(patches), patches.shape[1], 1, generator=torch.Generator().manual_seed(0))
        return 0.5 * levels.expand_as(patches), (noise > 0).float()

    model.predict = predict
    steps = []
    for model.blend in (False, True):
        shown = model.reconstruct(images, mask)["pred"]
        steps.append(shown.diff(dim=3).abs()[..., 7::8].mean().item())
    assert steps[1] < 0.7 * steps[0]


def test_blending_is_refused_for_normalised_patches(pictures):
    model = built(False)
    model.norm_pix_loss = model.blend = True
    with pytest.raises(ValueError, match="normalised patches"):
        model.reconstruct(*pictures)


def test_the_figures_say_why_they_do_not_blend(tmp_path, capsys):
    from tests.helpers import fails
    from visualize import reconstruct

    args = {"norm_pix_loss": True, "model": "mae_vit_nano_patch8", "input_size": 32}
    save_checkpoint(tmp_path / "mae.pth", {"model": built(False).state_dict(), "args": args})
    argv = ["--blend", "--ckpt", str(tmp_path / "mae.pth"), "--data_path", "x", "--out", str(tmp_path)]
    assert "--blend averages pixels" in fails(reconstruct.main, capsys, [*argv, "--device", "cpu"])
