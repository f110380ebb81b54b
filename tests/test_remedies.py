"""Losses on pictures: against numpy, closed forms and finite differences; and as options of main_pretrain.py.

Run: python -m pytest tests/test_remedies.py
"""

import json
from functools import partial

import numpy as np
import pytest
import torch

import main_pretrain
from models_mae import build_mae, paste
from models_perceptual import FeatureNet, open_feature_net
from models_vit import build_vit, unpatchify
from tests import helpers
from tests.helpers import assert_same, outcome
from util.data.augment import IMAGENET_MEAN, IMAGENET_STD
from util.mae import remedies
from util.mae.masking import random_mask
from util.mae.remedies import PictureLosses, colour_loss, feature_loss, frequency_loss, multiscale_loss
from util.run.errors import UserError
from util.training.checkpoint import read_checkpoint, save_checkpoint
from util.training.hub import load_weights

PATCH = 8
fails = partial(helpers.fails, main_pretrain.main)


def conv_maps(images: torch.Tensor) -> list[torch.Tensor]:
    """A network of two layers, of 16 and 4 px."""
    weights = torch.randn(5, 3, 2, 2, dtype=images.dtype, generator=torch.Generator().manual_seed(3))
    one = torch.nn.functional.conv2d(images, weights, stride=2)
    return [one, torch.nn.functional.avg_pool2d(torch.tanh(one), 4)]


LOSSES = {
    "multiscale": multiscale_loss,
    "frequency": partial(frequency_loss, patch=PATCH),
    "colour": colour_loss,
    "feature": partial(feature_loss, features=conv_maps),
}


@pytest.fixture
def batch():
    """Target, pasted and area of two pictures of 24 x 32 px in double precision."""
    generator = torch.Generator().manual_seed(0)
    target, pred = torch.randn(2, 2, 3, 24, 32, dtype=torch.float64, generator=generator)
    mask = random_mask(torch.rand(2, 12, generator=generator), 0.6)
    return target, *paste(target, pred, mask.double(), PATCH)


def pixel_loss(target, pasted, area):
    return (pasted - target).square().sum() / (3 * area.sum())


# --- against numpy ----------------------------------------------------------------------------------------------


def test_multiscale_is_the_error_of_cell_means(batch):
    target, pasted, area = (part.double().numpy() for part in batch)
    scales = []
    for size in (2, 4, 8):
        pictures = []
        for i in range(2):
            cells = []
            for y in range(0, 24, size):
                for x in range(0, 32, size):
                    cell = np.s_[i, :, y : y + size, x : x + size]
                    if area[cell].all():
                        cells.append(((pasted[cell].mean((1, 2)) - target[cell].mean((1, 2))) ** 2).mean())
            pictures.append(np.mean(cells))
        scales.append(np.mean(pictures))
    assert multiscale_loss(*batch).item() == pytest.approx(np.mean(scales), rel=1e-6)


def test_frequency_is_the_error_of_numpys_amplitudes(batch):
    target, pasted, area = (part.numpy() for part in batch)
    values = []
    for i in range(2):
        for y in range(0, 24, PATCH):
            for x in range(0, 32, PATCH):
                cell = np.s_[i, :, y : y + PATCH, x : x + PATCH]
                if area[cell].all():
                    one, other = (np.abs(np.fft.fft2(p[cell].mean(0))) / PATCH for p in (target, pasted))
                    error = (one - other) ** 2
                    error[0, 0] = 0  # of 8 px, every wave but the mean is as short as that
                    values.append(error.mean())
    assert frequency_loss(*batch, PATCH).item() == pytest.approx(np.mean(values), rel=1e-6)


def test_only_waves_of_up_to_8_px_are_compared():
    """In patches of 16 px: one or two waves across, of amplitude 1 and 0."""
    place = 2 * torch.pi * torch.arange(16, dtype=torch.float64) / 16
    area, flat = torch.ones(1, 1, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    for waves, energy in ((0, 0.0), (1, 0.0), (2, 0.5), (5, 0.5)):  # the mean square of a cosine is a half
        drawn = torch.cos(waves * place).expand_as(flat)
        assert frequency_loss(drawn, flat, area, 16).item() == pytest.approx(energy, abs=1e-12)
        assert frequency_loss(drawn.transpose(2, 3), flat, area, 16).item() == pytest.approx(energy, abs=1e-12)


def test_colour_is_the_difference_of_numpys_statistics(batch):
    target, pasted, area = (part.numpy() for part in batch)
    values = []
    for i in range(2):
        for channel in range(3):
            one, other = (picture[i, channel][area[i, 0] > 0] for picture in (target, pasted))
            values.append((one.mean() - other.mean()) ** 2 + (one.std() - other.std()) ** 2)
    assert colour_loss(*batch).item() == pytest.approx(np.mean(values), rel=1e-4)


def test_features_are_compared_by_direction_where_patches_were_removed(batch):
    target, pasted, area = batch
    layers = []
    for one, other in zip(conv_maps(target), conv_maps(pasted), strict=True):
        one, other, cell = one.numpy(), other.numpy(), 24 // one.shape[-2]
        pictures = []
        for i in range(2):
            total = share = 0.0
            for y in range(one.shape[2]):
                for x in range(one.shape[3]):
                    a, b = one[i, :, y, x], other[i, :, y, x]
                    removed = area[i, 0, y * cell : (y + 1) * cell, x * cell : (x + 1) * cell].mean().item()
                    total += removed * ((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2).sum()
                    share += removed
            pictures.append(total / share)
        layers.append(np.mean(pictures))
    assert feature_loss(target, pasted, area, conv_maps).item() == pytest.approx(np.mean(layers), rel=1e-6)


# --- closed forms and bounds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_lost_at_the_target(batch, name):
    target, _, area = batch
    assert LOSSES[name](target, target.clone(), area).item() == 0
    assert LOSSES[name](*batch).item() > 1e-3


@pytest.mark.parametrize("name", ["multiscale", "frequency", "colour"])
@pytest.mark.parametrize("kind", ["noise", "tint", "grey", "mirrored", "shifted"])
def test_a_loss_is_never_above_the_pixel_loss(batch, name, kind):
    target, pasted, area = batch
    wrong = {
        "noise": pasted,
        "tint": target + torch.tensor([0.3, -0.5, 0.1]).view(3, 1, 1),
        "grey": target.mean(1, keepdim=True).expand_as(target),
        "mirrored": target.flip(3),
        "shifted": target.roll(1, 3),
    }[kind]
    wrong = torch.where(area > 0, wrong, target)
    assert LOSSES[name](target, wrong, area) <= pixel_loss(target, wrong, area) * (1 + 1e-12)


def test_a_tint_costs_its_square_in_every_loss_that_sees_it(batch):
    target, _, area = batch
    tint = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)
    tinted = target + area * tint.view(3, 1, 1)
    expected = tint.square().mean().item()
    assert multiscale_loss(target, tinted, area).item() == pytest.approx(expected, rel=1e-9)
    assert colour_loss(target, tinted, area).item() == pytest.approx(expected, rel=1e-9)


def test_each_loss_forgives_what_it_is_meant_to(batch):
    """Fine noise by the cells, phases by the amplitudes, places by the statistics."""
    target, _, area = batch
    checkers = torch.ones(24, 32, dtype=torch.float64)
    checkers[::2, ::2] = checkers[1::2, 1::2] = -1
    assert multiscale_loss(target, target + area * checkers, area).item() < 1e-20
    # a patch that is rolled around has other phases and the same amplitudes, mean and deviation
    grid = target.reshape(2, 3, 3, PATCH, 4, PATCH).roll((3, 2), dims=(3, 5)).reshape(target.shape)
    rolled = torch.where(area > 0, grid, target)
    assert pixel_loss(target, rolled, area) > 1
    assert frequency_loss(target, rolled, area, PATCH).item() < 1e-20
    assert colour_loss(target, rolled, area).item() < 1e-20


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
def test_detail_of_unknown_phase_is_best_drawn_at_a_share_of_its_amplitude(weight):
    """The claim of `frequency_loss`: over all shifts of a wave, amplitude W / (1 + W) costs least beside the pixels."""
    wave = 2 * torch.pi * 3 / PATCH * torch.arange(PATCH, dtype=torch.float64)
    shifts = torch.arange(64, dtype=torch.float64) * 2 * torch.pi / 64
    target = torch.cos(wave + shifts[:, None])[:, None, None].expand(-1, 3, PATCH, -1)
    area = torch.ones(64, 1, PATCH, PATCH, dtype=torch.float64)

    def cost(amplitude: float) -> float:
        drawn = (amplitude * torch.cos(wave)).expand_as(target)
        return (pixel_loss(target, drawn, area) + weight * frequency_loss(target, drawn, area, PATCH)).item()

    best = weight / (1 + weight)
    assert cost(best) < min(cost(best - 0.02), cost(best + 0.02))


# --- gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(batch, name):
    target, pasted, area = (part[:1, :, :16, :16].contiguous() for part in batch)
    area[:, :, :8, :8] = 1
    assert torch.autograd.gradcheck(lambda p: LOSSES[name](target, p, area), pasted.requires_grad_(), atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_at_the_target_and_on_flat_pictures(batch, name):
    _, _, area = batch
    for value in (0.0, 0.7):
        flat = torch.full_like(area, value).expand(-1, 3, -1, -1).clone().requires_grad_()
        LOSSES[name](flat.detach(), flat, area).backward()
        assert flat.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_only_removed_patches_get_gradients(name):
    model = build_mae("mae_vit_nano_patch8", 32)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    _, pred, mask = model(images, 0.75, noise)
    pred.retain_grad()
    LOSSES[name](images, *paste(images, unpatchify(pred, 8, (4, 4)), mask, 8)).backward()
    reached = pred.grad.abs().amax(dim=2) > 0
    assert torch.equal(reached, mask > 0)


# --- the sum ----------------------------------------------------------------------------------------------------


def test_the_sum_is_weighted_and_its_parts_are_not(batch):
    weights = {"multiscale": 0.5, "frequency": 0.0, "colour": 3.0, "feature": 0.25}
    added = PictureLosses(weights, PATCH, conv_maps)
    parts = added(torch.tensor(2.0, dtype=torch.float64), *batch)
    assert list(parts) == ["loss", "pixel_loss", "multiscale_loss", "colour_loss", "feature_loss"]
    expected = 2.0
    for name in ("multiscale", "colour", "feature"):
        assert torch.equal(parts[f"{name}_loss"], LOSSES[name](*batch))
        expected += weights[name] * parts[f"{name}_loss"].item()
    assert parts["loss"].item() == pytest.approx(expected, rel=1e-12) and parts["pixel_loss"] == 2
    assert added and not PictureLosses(dict.fromkeys(weights, 0.0), PATCH)


def test_under_autocast_the_losses_are_in_single_precision(batch):
    pictures = [part.float() for part in batch]
    added = PictureLosses({"multiscale": 1, "frequency": 1, "colour": 1}, PATCH)
    plain = added(torch.tensor(1.0), *pictures)
    with torch.autocast("cpu", torch.bfloat16):
        cast = added(torch.tensor(1.0), *pictures)
    assert all(value.dtype == torch.float32 for value in cast.values())
    assert_same(cast, plain)


# --- networks to compare by -------------------------------------------------------------------------------------


def test_feature_maps_of_our_encoder_are_its_blocks_outputs():
    torch.manual_seed(0)
    vit = build_vit("vit_nano_patch8", img_size=32)
    pictures = torch.rand(2, 3, 32, 24)
    outputs = []
    for block in vit.blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out.detach()))
    vit.forward_features(pictures)
    wanted = [outputs[i][:, 1:].transpose(1, 2).reshape(2, 128, 4, 3) for i in (0, 2, 3, 5)]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    for found, expected in zip(FeatureNet(vit)((pictures - mean) / std), wanted, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_networks_weights_stay_and_pictures_get_gradients():
    net = FeatureNet(build_vit("vit_nano_patch8", img_size=32).train())
    assert not net.backbone.training and not any(p.requires_grad for p in net.parameters())
    target, pasted = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32, requires_grad=True)
    feature_loss(target, pasted, torch.ones(1, 1, 32, 32), net).backward()
    assert pasted.grad.abs().max() > 0


@pytest.fixture
def pretrained(tmp_path):
    """An autoencoder's checkpoint, as main_pretrain.py leaves one."""
    torch.manual_seed(1)
    state = build_mae("mae_vit_nano_patch8", 16).state_dict()
    save_checkpoint(tmp_path / "mae.pth", {"model": state, "args": {"model": "mae_vit_nano_patch8", "input_size": 16}})
    return tmp_path / "mae.pth"


def test_our_own_checkpoint_is_loaded_for_another_size(pretrained):
    net = open_feature_net(f"own:{pretrained}", 32)
    state = load_weights(str(pretrained)).state
    assert torch.equal(net.backbone.blocks[5].mlp.fc2.weight, state["blocks.5.mlp.fc2.weight"])
    assert [tuple(layer.shape) for layer in net(torch.randn(1, 3, 32, 32))] == [(1, 128, 4, 4)] * 4


@pytest.fixture
def timm_file(tmp_path):
    """resnet10t's weights as a file of the hub holds them, classifier included."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(2)
    net = timm.create_model("resnet10t", pretrained=False)
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", net.eval()


@pytest.mark.parametrize("how", ["file", "cache"])
def test_a_network_of_timm_with_the_weights_of_a_file(timm_file, monkeypatch, how):
    file, reference = timm_file
    monkeypatch.setattr("util.training.hub._hub_file", lambda *_: file)  # what the hub would have downloaded
    net = open_feature_net("timm:resnet10t" + (f"={file}" if how == "file" else ""), 32)
    pictures = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = reference.forward_intermediates(net.backbone.standardize(pictures), intermediates_only=True)
    found = net((pictures - mean) / std)
    assert len(found) == 4 and len(expected) == 5
    for one, other in zip(found, [expected[i] for i in (0, 1, 2, 4)], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("resnet18", "names no network"),
        ("own:", "names no network"),
        ("own:nowhere.pth", "do not exist"),
        ("timm:no_such_net", "not known"),
        ("timm:resnet10t=nowhere.pth", "do not exist"),
    ],
)
def test_a_network_that_cannot_be_had_is_refused(spec, words):
    with pytest.raises(UserError, match=words):
        open_feature_net(spec, 32)


def test_weights_that_cannot_be_downloaded_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("util.training.hub._offline", lambda: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="cannot be downloaded"):
        open_feature_net("timm:resnet10t", 32)


# --- main_pretrain.py -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), 40)


def flags(images, run, *more):
    recipe = "--model mae_vit_nano_patch8 --input_size 16 --batch_size 8 --epochs 2 --warmup_epochs 1 --lr 1e-3"
    recipe += " --device cpu --num_workers 0 --eval_images 4 --log_every 2 --labels none --mask_ratio 0.5"
    return ["--data_path", str(images), "--output_dir", str(run), *recipe.split(), *map(str, more)]


ALL = ["--multiscale_loss", 1, "--frequency_loss", 0.5, "--colour_loss", 2, "--feature_loss", 0.1]


def test_remedies_train_log_their_parts_and_resume_exactly(images, pretrained, tmp_path):
    argv = [*ALL, "--feature_net", f"own:{pretrained}", "--refine"]
    main_pretrain.main(flags(images, tmp_path / "whole", *argv))
    main_pretrain.main(flags(images, tmp_path / "parts", *argv, "--max_steps", 1))
    main_pretrain.main(flags(images, tmp_path / "parts", *argv, "--resume", "auto"))
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
    first, last = outcome(tmp_path / "whole")[3]
    assert last["train_pixel_loss"] < first["train_pixel_loss"]
    parts = {name: last[f"train_{name}_loss"] for name in ("pixel", *remedies.PICTURE_LOSSES)}
    weights = {"pixel": 1, "multiscale": 1, "frequency": 0.5, "colour": 2, "feature": 0.1}
    total = sum(weight * parts[name] for name, weight in weights.items())
    assert last["train_loss"] == pytest.approx(total, rel=1e-4)
    assert all(0 < parts[name] < 4 for name in parts)
    assert any(name.startswith("decoder_refine.") for name in outcome(tmp_path / "whole")[0])


def test_other_weights_of_the_network_are_refused_when_resuming(images, pretrained, tmp_path, capsys):
    argv = ["--feature_loss", 1, "--feature_net", f"own:{pretrained}"]
    main_pretrain.main(flags(images, tmp_path / "run", *argv, "--max_steps", 1))
    checkpoint = load_weights(str(pretrained))
    state = {name: value + 0.01 for name, value in checkpoint.state.items()}
    save_checkpoint(pretrained, {"model": state, "args": checkpoint.args})
    error = fails(capsys, flags(images, tmp_path / "run", *argv, "--resume", "auto"))
    assert "other feature_net" in error


def test_with_all_off_a_step_is_the_plain_one_bit_for_bit(images):
    """The step of before: the shortcut's loss alone, of masks from the same random numbers."""
    from util.data.augment import standardize
    from util.run.seed import uniform_for

    torch.manual_seed(0)
    model = build_mae("mae_vit_nano_patch8", 16)
    args = main_pretrain.get_args(flags(images, "run", "--augment_on", "workers"))
    added = main_pretrain.picture_losses(args, model, torch.device("cpu"))
    pictures = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    batch = {"image": pictures, "index": torch.arange(4), "epoch": 3}
    found = main_pretrain.step_fn(args, model, added)(model, batch)
    noise = uniform_for(args.seed, 3, torch.arange(4), 4)
    expected = model(standardize(main_pretrain.to_unit(pictures)), 0.5, noise, 1.0)
    assert list(found) == ["loss"] and torch.equal(found["loss"], expected)
    gradients = [torch.autograd.grad(loss, model.blocks[0].mlp.fc1.weight)[0] for loss in (found["loss"], expected)]
    assert torch.equal(*gradients)


def test_a_step_in_half_precision_has_its_losses_in_single(images, pretrained):
    torch.manual_seed(0)
    model = build_mae("mae_vit_nano_patch8", 16, refine=True)
    args = main_pretrain.get_args(flags(images, "run", *ALL, "--feature_net", f"own:{pretrained}", "--refine"))
    added = main_pretrain.picture_losses(args, model, torch.device("cpu"))
    pictures = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    batch = {"image": pictures, "index": torch.arange(4), "epoch": 0}
    step = main_pretrain.step_fn(args, model, added)
    plain = step(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        cast = step(model, batch)
    assert len(plain) == 6 and plain.keys() == cast.keys()
    for name, value in cast.items():
        assert value.dtype == torch.float32 and value.item() == pytest.approx(plain[name].item(), rel=0.1), name
    cast["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_two_processes_share_the_gradients_of_the_losses(images, run_script, tmp_path):
    """Two processes of 4 images do what one of 8 does, but for the order of sums."""
    argv = ["--multiscale_loss", 1, "--frequency_loss", 1, "--refine", "--max_steps", 2, "--eval_images", 0]
    run_script("main_pretrain.py", *flags(images, tmp_path / "one", *argv))
    run_script("main_pretrain.py", *flags(images, tmp_path / "two", *argv, "--batch_size", 4), processes=2)
    one, two = (read_checkpoint(tmp_path / name / "checkpoint-last.pth")["model"] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-4, rtol=0, msg=name)


@pytest.mark.parametrize("remedy", ["--multiscale_loss", "--frequency_loss", "--colour_loss", "--refine"])
@pytest.mark.parametrize("against", [["--norm_pix_loss"], ["--predict_ratio", 0.5], ["--predict_ratio", 0.5, "--fill"]])
def test_what_leaves_no_picture_is_refused(images, tmp_path, capsys, remedy, against):
    value = [] if remedy == "--refine" else [1]
    error = fails(capsys, flags(images, tmp_path, remedy, *value, *against))
    assert remedy in error and against[0] in error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--feature_loss", 1], "need each other"),
        (["--feature_net", "own:x.pth"], "need each other"),
        (["--colour_loss", -1], "at least 0"),
        (["--feature_loss", 1, "--feature_net", "vgg16"], "names no network"),
    ],
)
def test_bad_flags_are_refused(images, tmp_path, capsys, argv, words):
    assert words in fails(capsys, flags(images, tmp_path, *argv))


def test_remedies_are_off_by_default(images, tmp_path):
    main_pretrain.main(flags(images, tmp_path, "--max_steps", 1))
    args = json.loads((tmp_path / "args.json").read_text())
    args = args.get("args", args)
    assert not any(args[f"{name}_loss"] for name in remedies.PICTURE_LOSSES) and not args["refine"]
