"""Reconstruction metrics and floors: hand-made cases, scikit-image, published CIEDE2000 pairs, brute-force loops."""

import math

import numpy as np
import pytest
import torch
from skimage import color, metrics

from util.benchmark import reconstruction as rec
from util.mae.masking import random_mask
from util.run.seed import rng_for, uniform_for

PATCH = 8


def textured(n=3, height=48, width=64, key="texture"):
    """Pictures that hold ramps, waves, edges and noise, none of them tied to the patch grid."""
    rng = rng_for(0, key)
    y, x = np.mgrid[0:height, 0:width]
    pictures = []
    for _ in range(n):
        fx, fy, phase = rng.uniform(0.05, 0.9, (3, 3, 1, 1))
        waves = 0.5 + 0.2 * np.sin(fx * x + fy * y + 6 * phase)
        cut = np.where(x * rng.uniform(0.5, 2) + y > rng.uniform(30, 60), 0.15, -0.15)
        pictures.append(np.clip(waves + cut + rng.normal(0, 0.05, (3, height, width)), 0, 1))
    return torch.tensor(np.array(pictures), dtype=torch.float32)


def ramp(height=48, width=64):
    y, x = np.mgrid[0:height, 0:width]
    return torch.tensor(0.1 + 0.7 * (x + y) / (height + width), dtype=torch.float32).expand(1, 3, -1, -1)


def pixel_mask(n=3, height=48, width=64, mask_ratio=0.75, patch=PATCH):
    rows, columns = height // patch, width // patch
    mask = random_mask(uniform_for(0, 0, torch.arange(n), rows * columns), mask_ratio)
    return mask.view(n, 1, rows, columns).repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def block_noise(n=3, height=48, width=64, amplitude=0.1, patch=PATCH):
    steps = rng_for(0, "blocks").uniform(-amplitude, amplitude, (n, 3, height // patch, width // patch))
    return torch.tensor(steps, dtype=torch.float32).repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def blurred(images, sigma=2.0):
    from skimage.filters import gaussian

    return torch.stack([torch.tensor(gaussian(i.numpy(), sigma, channel_axis=0)) for i in images])


# --- hand-made cases --------------------------------------------------------------------------------------------


def test_identity_is_the_best_value_of_every_metric():
    images, mask = textured(), pixel_mask()
    values = rec.measure(images, images, mask, PATCH)
    assert set(values) | {"loss"} == set(rec.METRICS)
    assert all(value.shape == (3,) for value in values.values())
    assert torch.isinf(values["psnr_db"]).all() and torch.isinf(values["psnr_masked_db"]).all()
    torch.testing.assert_close(values["ssim"], torch.ones(3))
    torch.testing.assert_close(values["hf_energy_ratio"], torch.ones(3))
    assert (values["blockiness"] == 0).all() and (values["delta_e"] == 0).all()


def test_constant_shift_has_the_psnr_of_its_square():
    images = textured().clamp(0, 0.8)
    for shift in (0.1, 0.01):
        expected = torch.full((3,), -20 * math.log10(shift))
        torch.testing.assert_close(rec.psnr(images, images + shift), expected, atol=1e-3, rtol=0)
    values = rec.measure(images, images + 0.1, pixel_mask(), PATCH)
    torch.testing.assert_close(values["psnr_masked_db"], torch.full((3,), 20.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(values["hf_energy_ratio"], torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(values["blockiness"], torch.zeros(3), atol=1e-3, rtol=0)
    assert (values["delta_e"] > 3).all()


@pytest.mark.parametrize("mask_ratio", [0.25, 0.5, 0.75])
def test_masked_psnr_looks_at_masked_pixels_only(mask_ratio):
    images, mask = textured().clamp(0, 0.8), pixel_mask(mask_ratio=mask_ratio)
    wrong = images + 0.1 * mask
    torch.testing.assert_close(rec.psnr_masked(images, wrong, mask), torch.full((3,), 20.0), atol=1e-3, rtol=0)
    # the same squared error spread over all pixels: 1 / ratio less
    expected = torch.full((3,), 20 - 10 * math.log10(mask_ratio))
    torch.testing.assert_close(rec.psnr(images, wrong), expected, atol=1e-3, rtol=0)
    assert torch.isinf(rec.psnr_masked(images, torch.where(mask > 0, images, 0.5), mask)).all()


def test_values_beyond_the_range_are_clipped_before_measuring():
    white = torch.ones(1, 3, 16, 16)
    assert torch.isinf(rec.measure(white, white + 0.5, torch.ones(1, 1, 16, 16), PATCH)["psnr_db"]).all()


def test_blur_loses_fine_detail_and_little_else():
    images, mask = textured(), pixel_mask()
    soft = blurred(images)
    values = rec.measure(images, soft, mask, PATCH)
    assert (values["hf_energy_ratio"] < 0.3).all()
    assert (values["ssim"] < 0.9).all()
    assert (values["blockiness"].abs() < 1).all()
    softer = rec.hf_energy_ratio(images, blurred(images, 4.0), mask, PATCH)
    assert (softer < values["hf_energy_ratio"]).all()
    flat = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    torch.testing.assert_close(rec.hf_energy_ratio(images, flat, mask, PATCH), torch.zeros(3), atol=1e-5, rtol=0)


def test_noise_is_surplus_detail():
    images = textured()
    noisy = images + torch.tensor(rng_for(1).normal(0, 0.2, images.shape), dtype=torch.float32)
    assert (rec.hf_energy_ratio(images, noisy, pixel_mask(), PATCH) > 1.5).all()


def test_hf_energy_looks_at_masked_patches_only():
    images, mask = textured(), pixel_mask(mask_ratio=0.5)
    soft = blurred(images)
    torch.testing.assert_close(
        rec.hf_energy_ratio(images, torch.where(mask > 0, images, soft), mask, PATCH), torch.ones(3)
    )
    pasted = rec.hf_energy_ratio(images, torch.where(mask > 0, soft, images), mask, PATCH)
    torch.testing.assert_close(pasted, rec.hf_energy_ratio(images, soft, mask, PATCH))


@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize(("wavelength", "counts"), [(4, True), (6, True), (16, False), (32, False)])
def test_the_high_band_begins_at_a_quarter_of_nyquist(patch, wavelength, counts):
    # one wave added to a picture whose energy is all in the band: the energy rises only if the wave is in it
    x = torch.arange(64)
    checks = 0.5 + 0.2 * (-1.0) ** (x[:, None] + x)
    wave = 0.2 * torch.cos(2 * math.pi * (x + 0.5) / wavelength)
    checks, mask = checks.expand(1, 3, 64, 64), torch.ones(1, 1, 64, 64)
    gain = rec.hf_energy_ratio(checks, checks + wave, mask, patch).item() - 1
    assert gain > 0.3 if counts else gain < 0.1


def test_block_noise_raises_blockiness_by_its_mean_step():
    noise = block_noise()
    grey = torch.full((3, 3, 48, 64), 0.5)
    blocks = noise[:, :, ::PATCH, ::PATCH]
    steps = [blocks.diff(dim=axis).abs() * PATCH for axis in (2, 3)]  # every border is PATCH pixels long
    pairs = sum(step[0].numel() * PATCH for step in steps)
    expected = 255 * sum(step.sum(dim=(1, 2, 3)) for step in steps) / pairs
    torch.testing.assert_close(rec.blockiness(grey + noise, PATCH), expected, atol=1e-2, rtol=1e-4)
    images = textured().clamp(0.1, 0.9)
    values = rec.measure(images, images + noise, pixel_mask(), PATCH)
    assert (values["blockiness"] > 3).all()
    # no detail is lost, and edges between patches do not pass for detail
    torch.testing.assert_close(values["hf_energy_ratio"], torch.ones(3), atol=1e-4, rtol=0)


def test_smooth_and_textured_pictures_are_not_blocky():
    assert rec.blockiness(ramp(), PATCH).abs().item() < 1e-2
    white_noise = torch.tensor(rng_for(2).random((4, 3, 64, 64)), dtype=torch.float32)
    assert (rec.blockiness(white_noise, PATCH).abs() < 3).all()  # its steps are 85 grey levels
    assert (rec.blockiness(textured(), PATCH).abs() < 1).all()
    # blocks that do not lie on the patch grid are content
    shifted = (0.5 + block_noise()).roll((PATCH // 2, PATCH // 2), dims=(2, 3))
    assert (rec.blockiness(shifted, PATCH) < 0.5).all()


def test_blockiness_against_loops():
    image = textured(n=1)
    pixels, excess = image[0].numpy(), []
    for c in range(3):
        for y in range(48):
            for x in range(PATCH, 64, PATCH):
                line = pixels[c, y]
                near = (abs(line[x - 1] - line[x - 2]) + abs(line[x + 1] - line[x])) / 2
                excess.append(abs(line[x] - line[x - 1]) - near)
        for x in range(64):
            for y in range(PATCH, 48, PATCH):
                line = pixels[c, :, x]
                near = (abs(line[y - 1] - line[y - 2]) + abs(line[y + 1] - line[y])) / 2
                excess.append(abs(line[y] - line[y - 1]) - near)
    assert rec.blockiness(image, PATCH).item() == pytest.approx(255 * np.mean(excess), abs=1e-4)


# --- independent references -------------------------------------------------------------------------------------


def distorted_pairs():
    images = textured()
    yield images, blurred(images)
    yield images, (images + block_noise()).clamp(0, 1)
    yield images, textured(key="another")
    yield torch.zeros_like(images), torch.full_like(images, 1 / 255)  # flat: variances cancel


def test_psnr_and_ssim_equal_scikit_image():
    for target, image in distorted_pairs():
        psnr, ssim = rec.psnr(target, image), rec.ssim(target, image)
        for i in range(len(target)):
            x, y = target[i].double().numpy(), image[i].double().numpy()
            assert psnr[i].item() == pytest.approx(metrics.peak_signal_noise_ratio(x, y, data_range=1), abs=1e-3)
            expected = metrics.structural_similarity(
                x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=0
            )
            assert ssim[i].item() == pytest.approx(expected, abs=1e-5)


def test_colour_error_equals_scikit_image():
    for target, image in distorted_pairs():
        ours = rec.delta_e(target, image)
        for i in range(len(target)):
            labs = [color.rgb2lab(x[i].double().numpy(), channel_axis=0) for x in (target, image)]
            assert ours[i].item() == pytest.approx(color.deltaE_ciede2000(*labs, channel_axis=0).mean(), abs=1e-3)


def test_lab_of_known_colours():
    # white, black, mid-grey and the sRGB primaries, D65 (published values, two decimals)
    colours = [[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86]]
    lab = rec.srgb_to_lab(torch.tensor(colours, dtype=torch.float32)[:, :, None, None])[:, :, 0, 0]
    torch.testing.assert_close(lab, torch.tensor(expected, dtype=torch.float32), atol=0.02, rtol=0)


# Sharma, Wu and Dalal 2005, table 1: pairs chosen to catch wrong hue differences, hue means and rotations
SHARMA = """
50 2.6772 -79.7751  50 0 -82.7485  2.0425
50 -1.3802 -84.2814  50 0 -82.7485  1.0000
50 0 0  50 -1 2  2.3669
50 2.4900 -0.0010  50 -2.4900 0.0009  7.1792
50 2.4900 -0.0010  50 -2.4900 0.0011  7.2195
50 -0.0010 2.4900  50 0.0009 -2.4900  4.8045
50 -0.0010 2.4900  50 0.0011 -2.4900  4.7461
50 2.5000 0  50 0 -2.5000  4.3065
50 2.5000 0  73 25 -18  27.1492
50 2.5000 0  61 -5 29  22.8977
50 2.5000 0  56 -27 -3  31.9030
50 2.5000 0  58 24 15  19.4535
60.2574 -34.0099 36.2677  60.4626 -34.1751 39.4387  1.2644
63.0109 -31.0961 -5.8663  62.8187 -29.7946 -4.0864  1.2630
61.2901 3.7196 -5.3901  61.4292 2.2480 -4.9620  1.8731
35.0831 -44.1164 3.7933  35.0232 -40.0716 1.5901  1.8645
22.7233 20.0904 -46.6940  23.0331 14.9730 -42.5619  2.0373
36.4612 47.8580 18.3852  36.2715 50.5065 21.2231  1.4146
90.8027 -2.0831 1.4410  91.1528 -1.6435 0.0447  1.4441
90.9257 -0.5406 -0.9208  88.6381 -0.8985 -0.7239  1.5381
6.7747 -0.2908 -2.4247  5.8714 -0.0985 -2.2286  0.6377
2.0776 0.0795 -1.1350  0.9033 -0.0636 -0.5514  0.9082
"""


def test_ciede2000_equals_the_published_pairs():
    table = torch.tensor([[float(x) for x in line.split()] for line in SHARMA.strip().splitlines()]).double()
    lab1, lab2, expected = table[:, :3], table[:, 3:6], table[:, 6]
    torch.testing.assert_close(rec.ciede2000(lab1, lab2), expected, atol=5e-5, rtol=0)
    torch.testing.assert_close(rec.ciede2000(lab2, lab1), expected, atol=5e-5, rtol=0)


# --- floors -----------------------------------------------------------------------------------------------------


def test_visible_mean_against_loops():
    images, mask = textured(), pixel_mask()
    filled = rec.fill_visible_mean(images, mask)
    for i in range(3):
        hidden = mask[i, 0].numpy() > 0
        for c in range(3):
            expected = images[i, c].numpy().copy()
            expected[hidden] = expected[~hidden].mean()
            np.testing.assert_allclose(filled[i, c].numpy(), expected, atol=1e-6)


def test_mean_image_against_loops():
    images, mask, mean_image = textured(), pixel_mask(), textured(n=1, key="mean")[0]
    filled = rec.fill_mean_image(images, mask, mean_image)
    for i in range(3):
        hidden = mask[i, 0].numpy() > 0
        for c in range(3):
            expected, mean = images[i, c].numpy().copy(), mean_image[c].numpy()
            expected[hidden] = np.clip(mean + (expected - mean)[~hidden].mean(), 0, 1)[hidden]
            np.testing.assert_allclose(filled[i, c].numpy(), expected, atol=1e-6)


def test_mean_image_shifted_is_exact_where_the_picture_is_that():
    mean_image = textured(n=1).clamp(0.3, 0.7)
    shifted = mean_image + torch.tensor([0.1, -0.2, 0.3]).view(3, 1, 1)
    filled = rec.fill_mean_image(shifted, pixel_mask(n=1), mean_image[0])
    torch.testing.assert_close(filled, shifted)


def test_inpainting_continues_a_ramp_and_keeps_visible_pixels():
    pytest.importorskip("cv2")
    images, mask = textured(), pixel_mask(mask_ratio=0.5)
    filled = rec.fill_inpaint(images, mask)
    assert torch.equal(filled[(mask == 0).expand_as(images)], images[(mask == 0).expand_as(images)])
    assert not torch.equal(filled, images)
    smooth, mask = ramp(), pixel_mask(n=1, mask_ratio=0.5)
    assert rec.psnr(smooth, rec.fill_inpaint(smooth, mask)).item() > 30
    assert rec.psnr(smooth, rec.fill_visible_mean(smooth, mask)).item() < 25


def test_floors_leave_an_unmasked_picture_alone_and_refuse_a_fully_masked_one():
    pytest.importorskip("cv2")
    images, none = textured(), torch.zeros(3, 1, 48, 64)
    for filled in (
        rec.fill_visible_mean(images, none),
        rec.fill_mean_image(images, none, images[0]),
        rec.fill_inpaint(images, none),
    ):
        assert torch.equal(filled, images)
    with pytest.raises(ValueError, match="no visible"):
        rec.fill_visible_mean(images, torch.ones(3, 1, 48, 64))


# --- summaries --------------------------------------------------------------------------------------------------


def test_summary_is_the_population_mean_and_deviation():
    assert rec.summarise([1.0, 3.0]) == {"mean": 2.0, "std": 1.0}
    assert rec.summarise(torch.tensor([4.0])) == {"mean": 4.0, "std": 0.0}


def test_summary_leaves_out_what_has_no_mean_and_says_so():
    assert rec.summarise([1.0, 3.0, math.inf, math.nan]) == {"mean": 2.0, "std": 1.0, "undefined": 2}
    assert rec.summarise([math.inf, math.nan]) == {"mean": None, "std": None}
    assert rec.summarise([]) == {"mean": None, "std": None}


def test_nothing_masked_is_undefined_where_only_masked_pixels_count():
    images = textured()
    values = rec.measure(images, images, torch.zeros(3, 1, 48, 64), PATCH)
    assert values["psnr_masked_db"].isnan().all() and values["hf_energy_ratio"].isnan().all()
