"""Stresses against Pillow, scikit-image and SciPy, covered parts against a search over all pixels; drops by resampling.

Run: python -m pytest tests/test_stress.py
"""

import io
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2yuv, yuv2rgb
from torch.nn import functional

from util.benchmark.stress import strata_report, stress_report
from util.data.augment import EvalCrop, TrainCrop, View
from util.data.stress import (
    EYES_IN_CROP,
    EYES_IN_FACE,
    FACE_IN_CROP,
    FILL,
    STRESSES,
    StressView,
    blur,
    cover,
    downscale,
    hidden_boxes,
    jpeg,
    known_part,
    known_parts,
    patch_boxes,
    rotate_hue,
    stress_view,
    to_crop,
    to_grey,
    to_lines,
)
from util.run.errors import UserError
from util.run.seed import rng_for

RECORD = {"box": [30.0, 40.0, 90.0, 110.0], "eyes": [[35.0, 60.0, 50.0, 75.0], [70.0, 62.0, 86.0, 74.0]]}


def picture(width: int = 120, height: int = 150, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def array(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(1, 2, 0).numpy()


def luma(pixels: torch.Tensor) -> np.ndarray:
    return array(pixels).astype(np.float64) @ [0.299, 0.587, 0.114]


# -- colours


@pytest.mark.parametrize("degrees", [0, 360, -360])
def test_a_full_turn_changes_nothing(degrees):
    pixels = tensor(picture())
    assert torch.equal(rotate_hue(pixels, degrees), pixels)


@pytest.mark.parametrize("degrees", [1e-6, 15, 30, 90, 180, 270, -45])
def test_turned_colours_keep_their_luma(degrees):
    pixels = torch.cat([tensor(picture()), torch.randint(0, 256, (3, 40, 120), dtype=torch.uint8)], dim=1)
    turned = rotate_hue(pixels, degrees)
    assert turned.dtype == torch.uint8 and turned.shape == pixels.shape
    assert np.abs(luma(turned) - luma(pixels)).max() <= 0.51  # of rounding three channels
    if degrees >= 15:
        assert (turned.int() - pixels.int()).abs().float().mean() > 5


@pytest.mark.parametrize("degrees", [30, 90, 180, 270])
def test_hues_turn_as_in_the_yuv_plane_of_scikit_image(degrees):
    pixels = (tensor(picture()) // 4 + 96).to(torch.uint8)  # pale: every turned colour can be shown
    yuv = rgb2yuv(array(pixels))
    turn = math.radians(degrees)
    u, v = yuv[..., 1].copy(), yuv[..., 2].copy()
    yuv[..., 1], yuv[..., 2] = u * math.cos(turn) - v * math.sin(turn), u * math.sin(turn) + v * math.cos(turn)
    assert np.abs(array(rotate_hue(pixels, degrees)) - yuv2rgb(yuv) * 255).max() < 1.2


def test_colours_that_cannot_be_shown_keep_their_hue():
    pixels = torch.tensor([[255, 250, 0, 10], [255, 20, 0, 0], [0, 20, 255, 90]], dtype=torch.uint8).view(3, 1, 4)
    for degrees in (60, 90, 180, 250):
        before, after = (rgb2yuv(array(p)) for p in (pixels, rotate_hue(pixels, degrees)))
        angle = np.degrees(np.arctan2(after[..., 2], after[..., 1]) - np.arctan2(before[..., 2], before[..., 1]))
        saturation = np.hypot(after[..., 1], after[..., 2])
        # rounding to 8 bits turns a colour of little saturation by degrees(0.4 / 255 / saturation)
        assert (np.abs((angle - degrees + 180) % 360 - 180) < 0.5 + np.degrees(0.004 / saturation)).all()


def test_grey_is_pillows():
    pixels = tensor(picture())
    grey = array(to_grey(pixels))
    assert (grey == grey[..., :1]).all()
    assert np.abs(grey[..., 0].astype(int) - np.asarray(picture().convert("L")).astype(int)).max() <= 1
    assert (grey[..., 0] != np.asarray(picture().convert("L"))).mean() < 0.01  # of a luma that ends in .5
    half = to_grey(pixels, 0.5).float()
    assert (half - (pixels.float() + to_grey(pixels).float()) / 2).abs().max() <= 1
    assert torch.equal(to_grey(pixels, 0.0), pixels)


def test_lines_stay_and_flat_parts_turn_white():
    flat = np.full((100, 100), 180, dtype=np.uint8)
    flat[:, 60:] = 90
    drawn = flat.copy()
    drawn[:, 29:31] = 20
    lines = to_lines(torch.from_numpy(drawn).expand(3, -1, -1), 0.03)
    assert lines.shape == (3, 100, 100) and (lines == lines[:1]).all()
    assert lines[:, :, 29:31].max() < 60
    for column in (5, 15, 45, 80, 95):  # on both sides of the edge at 60: how light a part was is gone
        assert lines[:, :, column].min() >= 250
    grey = ndimage.gaussian_filter(drawn.astype(float), 3, truncate=3, mode="nearest")
    expected = np.clip(255 * (drawn + 1.0) / (grey + 1), 0, 255)
    assert np.abs(lines[0].numpy() - expected).max() <= 1


# -- quality


@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
@pytest.mark.parametrize("deviation", [0.005, 0.02, 0.06])
def test_blur_is_scipys(size, deviation):
    image = picture(size[1], size[0])
    sigma = deviation * min(size)
    expected = ndimage.gaussian_filter(
        np.array(image).astype(float), (sigma, sigma, 0), truncate=3, mode="nearest", output=np.float64
    )
    assert np.abs(array(blur(tensor(image), deviation)) - expected).max() < 0.52
    assert torch.equal(blur(tensor(image), 0), tensor(image))


@pytest.mark.parametrize("quality", [5, 15, 50, 90])
def test_jpeg_is_pillows(quality):
    file = io.BytesIO()
    picture().save(file, "JPEG", quality=quality)
    assert torch.equal(jpeg(tensor(picture()), quality), tensor(Image.open(io.BytesIO(file.getvalue()))))


def test_a_lower_quality_costs_more():
    pixels = tensor(picture()).int()
    errors = [(jpeg(pixels.to(torch.uint8), q).int() - pixels).abs().float().mean() for q in (90, 50, 30, 15, 5)]
    assert all(a < b for a, b in pairwise(errors))


@pytest.mark.parametrize("scale", [0.5, 0.25, 0.125])
def test_downscaling_is_pillows_and_pytorchs(scale):
    image = picture(128, 96)
    small = image.resize((round(128 * scale), round(96 * scale)), Image.Resampling.BICUBIC)
    got = downscale(tensor(image), scale)
    assert torch.equal(got, tensor(small.resize((128, 96), Image.Resampling.BICUBIC)))
    expected = tensor(image)[None].float()
    for size in ((round(96 * scale), round(128 * scale)), (96, 128)):
        expected = functional.interpolate(expected, size, mode="bicubic", antialias=True).clamp(0, 255)
    assert (got - expected[0]).abs().max() < 6 and (got - expected[0]).abs().mean() < 0.5
    assert downscale(tensor(image), 0.001).float().flatten(1).std(1).max() == 0  # one pixel is left of it


# -- covered parts


def covered_by_search(box, geometry: View, size) -> np.ndarray:
    """Which pixels of the crop (H, W) a box of the stored image touches: every pixel's footprint is asked."""
    left, top, right, bottom = geometry.box
    hit = np.zeros(size, dtype=bool)
    for row in range(size[0]):
        for column in range(size[1]):
            place = size[1] - 1 - column if geometry.flip else column
            x1, x2 = (left + (place + k) * (right - left) / size[1] for k in (0, 1))
            y1, y2 = (top + (row + k) * (bottom - top) / size[0] for k in (0, 1))
            hit[row, column] = x1 < box[2] and x2 > box[0] and y1 < box[3] and y2 > box[1]
    return hit


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(48, 48), (32, 56)])
@pytest.mark.parametrize("crop", [(0, 0, 120, 150), (17, 33, 77, 93), (33, 10, 120, 70)])
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_exactly_the_pixels_that_an_eye_touches_are_covered(crop, size, flip, margin):
    geometry = View(crop, flip)
    pixels = torch.full((3, *size), 7, dtype=torch.uint8)
    got = cover(pixels, hidden_boxes("eyes", geometry, size, RECORD, margin))
    expected = np.zeros(size, dtype=bool)
    for x1, y1, x2, y2 in RECORD["eyes"]:
        x, y = margin * (x2 - x1), margin * (y2 - y1)
        expected |= covered_by_search((x1 - x, y1 - y, x2 + x, y2 + y), geometry, size)
    assert expected.any() and not expected.all()
    # a box that ends where a pixel ends touches the next by the last bit of a fraction
    assert ((got == FILL).all(0).numpy() ^ expected).sum() <= 2 * max(size)
    inner = np.zeros(size, dtype=bool)
    for x1, y1, x2, y2 in RECORD["eyes"]:
        inner |= covered_by_search((x1 + 0.01, y1 + 0.01, x2 - 0.01, y2 - 0.01), geometry, size)
    assert (got == FILL).all(0).numpy()[inner].all()
    assert (got == 7).all(0).numpy()[~expected & ~ndimage.binary_dilation(expected)].all()
    assert (pixels == 7).all()  # the crop itself is left as it was


@pytest.mark.parametrize("flip", [False, True])
def test_painted_eyes_are_gone(flip):
    """The other way round: red eyes are painted into the picture, and no red is left in the crop."""
    pixels = np.full((150, 120, 3), 255, dtype=np.uint8)
    for x1, y1, x2, y2 in np.array(RECORD["eyes"], dtype=int):
        pixels[y1:y2, x1:x2] = (255, 0, 0)
    image = Image.fromarray(pixels)
    geometry = View((20, 30, 110, 140), flip)
    size = (66, 54)
    clean = geometry.apply(image, size)
    assert (clean[1] < 128).float().mean() > 0.03
    hidden = cover(clean, hidden_boxes("eyes", geometry, size, RECORD, 0.1))
    assert hidden[1].min() >= FILL
    assert ((hidden[1] == FILL) & (hidden[0] == FILL)).float().mean() < 1.7 * (clean[1] < 128).float().mean()


def fractions_of(box, part) -> list[float]:
    width, height = box[2] - box[0], box[3] - box[1]
    return [box[0] + part[0] * width, box[1] + part[1] * height, box[0] + part[2] * width, box[1] + part[3] * height]


def test_eyes_that_are_not_known_are_covered_by_a_band():
    geometry, size = View((0, 0, 120, 150)), (150, 120)  # px of the crop are px of the image
    for record in ({"box": RECORD["box"]}, {"box": RECORD["box"], "eyes": None}, {"box": RECORD["box"], "eyes": []}):
        [band] = hidden_boxes("eyes", geometry, size, record, 0.25)
        assert band == pytest.approx(fractions_of(RECORD["box"], EYES_IN_FACE))
        assert known_part("eyes", record) == "face box"
    [band] = hidden_boxes("eyes", geometry, size, {"box": None}, 0.25)
    assert band == pytest.approx(fractions_of((0, 0, 120, 150), EYES_IN_CROP))
    [turned] = hidden_boxes("eyes", View((0, 0, 120, 150), True), size, {"box": RECORD["box"]}, 0.25)
    assert turned[0] == pytest.approx(120 - 90) and turned[2] == pytest.approx(120 - 30)


@pytest.mark.parametrize("strength", [0.0, 0.15, 0.5])
def test_hair_is_all_above_the_top_of_the_face_and_a_share_of_it(strength):
    geometry, size = View((10, 20, 110, 140)), (60, 50)
    pixels = torch.zeros(3, *size, dtype=torch.uint8)
    got = (cover(pixels, hidden_boxes("hair", geometry, size, RECORD, strength)) == FILL).all(0)
    rows = math.ceil((40 + strength * 70 - 20) / 2)  # the face lies at 40 to 110 px, a row of the crop is 2 px
    assert got[:rows].all() and not got[rows:].any()
    [box] = hidden_boxes("hair", geometry, size, {}, strength)
    top, bottom = 60 * FACE_IN_CROP[1], 60 * FACE_IN_CROP[3]
    assert box == pytest.approx((0, 0, 50, top + strength * (bottom - top)))


def test_the_ways_in_which_parts_are_found_are_counted():
    records = [RECORD, RECORD, {"box": RECORD["box"], "eyes": []}, {"eyes": None, "box": None}, {}, {}]
    assert known_parts("eyes", records) == {"eyes": 2, "face box": 1, "crop": 3}
    assert known_parts("hair", records) == {"face box": 3, "crop": 3}
    assert known_parts("hair", [RECORD]) == {"face box": 1, "crop": 0}


def test_boxes_outside_the_crop_cover_nothing():
    pixels = torch.full((3, 20, 30), 7, dtype=torch.uint8)
    assert torch.equal(cover(pixels, [(-9, -9, -1, 5), (31, 3, 40, 9), (3, 20, 9, 28)]), pixels)
    got = cover(pixels, [(-5, -5, 2.5, 1)])
    assert (got[:, :1, :3] == FILL).all() and (got == FILL).sum() == 9


@pytest.mark.parametrize("grid", [4, 7, 14])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 1.0])
def test_patches_cover_the_asked_share_of_a_grid(grid, fraction):
    size = (56, 84)
    boxes = patch_boxes(size, grid, fraction, rng_for(1))
    assert len(boxes) == len(set(boxes)) == round(fraction * grid * grid)
    covered = (cover(torch.zeros(3, *size, dtype=torch.uint8), boxes) == FILL).all(0)
    cells = covered.view(grid, 56 // grid, grid, 84 // grid).float().mean((1, 3))
    assert set(cells.flatten().tolist()) <= {0.0, 1.0} and cells.sum() == len(boxes)
    assert cover(torch.zeros(3, 50, 33, dtype=torch.uint8), patch_boxes((50, 33), grid, 1.0, rng_for(0))).min() == FILL


def test_every_cell_is_as_likely_to_be_covered():
    often = np.zeros((4, 4))
    for i in range(1500):
        for x1, y1, _, _ in patch_boxes((40, 40), 4, 0.25, rng_for(i)):
            often[y1 // 10, x1 // 10] += 1 / 1500
    assert np.abs(often - 0.25).max() < 0.05  # sd 0.011


# -- views


@pytest.mark.parametrize("name", STRESSES)
def test_a_view_is_a_function_of_picture_record_and_generator(name):
    crop = EvalCrop((48, 64))
    view, image = stress_view(crop, name), picture(200, 150)
    got = view(image, RECORD, rng_for(0, 1))
    assert got.shape == (3, 48, 64) and got.dtype == torch.uint8 and got.is_contiguous()
    assert torch.equal(got, view(image, RECORD, rng_for(0, 1)))
    assert (got.int() - crop(image, RECORD).int()).abs().float().mean() > 1
    other = view(image, RECORD, rng_for(0, 2))
    assert torch.equal(got, other) == (STRESSES[name].kind != "patches")


def test_stronger_is_farther_from_the_clean_picture():
    crop, image = EvalCrop((112, 112)), picture(150, 150)
    clean = crop(image, RECORD).int()
    for name, stress in STRESSES.items():
        if name == "lines":  # wider lines keep more of the picture
            continue
        views = [stress_view(crop, name, strength) for strength in stress.severities]
        far = [(view(image, RECORD, rng_for(0)).int() - clean).abs().float().mean().item() for view in views]
        assert all(a < b for a, b in pairwise(far)), name
        assert stress.strength in stress.severities or stress.kind == "hue"


def test_a_view_sends_boxes_through_the_crop_that_it_draws():
    """A random crop that mirrors: the eyes are covered wherever they come to lie."""
    pixels = np.full((150, 120, 3), 255, dtype=np.uint8)
    for x1, y1, x2, y2 in np.array(RECORD["eyes"], dtype=int):
        pixels[y1:y2, x1:x2] = (255, 0, 0)
    crop = TrainCrop((40, 40), scale=(0.3, 1.0))
    view = StressView(crop, "eyes", 0.2)
    seen = 0
    for i in range(30):
        seen += int((crop(Image.fromarray(pixels), RECORD, rng_for(i))[1] < 100).any())
        assert view(Image.fromarray(pixels), RECORD, rng_for(i))[1].min() >= FILL
    assert seen > 20


def test_a_name_of_a_view_tells_all_that_decides_its_pixels():
    crop = EvalCrop((32, 32))
    views = [
        StressView(crop, "blur", 0.02),
        StressView(crop, "blur", 0.04),
        StressView(EvalCrop((48, 48)), "blur", 0.02),
    ]
    views += [StressView(crop, "patches", 0.3, grid) for grid in (4, 7, 14)] + [StressView(crop, "eyes", 0.02)]
    assert len({repr(view) for view in views}) == len(views)
    assert repr(StressView(EvalCrop((32, 32)), "jpeg", 15)) == repr(StressView(crop, "jpeg", 15.0))
    assert " at 0x" not in repr(views[0])


def test_what_is_no_stress_is_refused():
    with pytest.raises(ValueError, match="'sepia' is not one of hue, "):
        StressView(EvalCrop((32, 32)), "sepia", 1)
    for kind, strength in (("jpeg", 0), ("patches", 1.2), ("downscale", 0.0), ("eyes", -0.1), ("blur", math.nan)):
        with pytest.raises(ValueError, match=f"strength .* of '{kind}' is not in "):
            StressView(EvalCrop((32, 32)), kind, strength)


def test_boxes_go_through_a_crop_and_back():
    geometry, size = View((10, 20, 60, 120), True), (40, 100)
    assert to_crop((10, 20, 60, 120), geometry, size) == pytest.approx((0, 0, 100, 40))
    assert to_crop((10, 20, 20, 70), geometry, size) == pytest.approx((80, 0, 100, 20))


# -- the report


def brute_force(clean, stressed, groups, replicates: int, seed: int) -> tuple[list[float], list[float]]:
    """Intervals of the accuracy under stress and of the drop, by picking the samples of the drawn identities."""
    names = np.unique(groups)
    top1, drops = [], []
    for replicate in range(replicates):
        drawn = rng_for(seed, replicate, "bootstrap").choice(np.arange(len(names)), len(names))
        rows = np.concatenate([np.flatnonzero(groups == names[i]) for i in drawn])
        top1.append(stressed[rows].mean())
        drops.append(clean[rows].mean() - stressed[rows].mean())
    return np.quantile(top1, [0.025, 0.975]).tolist(), np.quantile(drops, [0.025, 0.975]).tolist()


@pytest.fixture
def outcome():
    """200 probes of 12 identities of unequal size, right or not: clean and under two stresses."""
    rng = np.random.default_rng(4)
    groups = rng.choice([3, 5, 8, 9, 20, 21, 33, 40, 41, 52, 77, 80], 200, p=np.r_[[0.3], [0.7 / 11] * 11])
    clean = rng.random(200) < 0.85
    return groups, clean, {"mild": clean & (rng.random(200) < 0.95), "hard": rng.random(200) < 0.4}


def test_drops_and_their_intervals_are_those_of_a_paired_bootstrap(outcome):
    groups, clean, stressed = outcome
    report = stress_report(clean, stressed, groups, replicates=300, seed=5)
    assert list(report) == ["mild", "hard"]
    for name, correct in stressed.items():
        top1, drop = brute_force(clean, correct, groups, 300, 5)
        assert report[name]["top1"] == pytest.approx(correct.mean())
        assert report[name]["drop"] == pytest.approx(clean.mean() - correct.mean())
        assert report[name]["top1_ci95"] == pytest.approx(top1)
        assert report[name]["drop_ci95"] == pytest.approx(drop)
        assert report[name]["probes"] == 200
        assert report[name]["relative_drop"] == pytest.approx(1 - correct.mean() / clean.mean())
    mild = report["mild"]
    assert mild["drop_ci95"][1] - mild["drop_ci95"][0] < 0.7 * (mild["top1_ci95"][1] - mild["top1_ci95"][0])


def test_harm_to_one_identity_alone_is_no_sure_harm():
    """All of the drop comes from one of twenty identities: samples of identities without it show none."""
    groups = np.repeat(np.arange(20), 10)
    clean = np.ones(200, dtype=bool)
    one = report_of(clean, groups != 7, groups)
    spread = report_of(clean, np.arange(200) % 20 != 7, groups)
    assert one["drop"] == spread["drop"] == pytest.approx(0.05)
    assert one["drop_ci95"][0] == 0 and one["drop_ci95"][1] >= 0.15
    assert spread["drop_ci95"][0] > 0.02 and spread["drop_ci95"][1] < 0.09


def report_of(clean, stressed, groups) -> dict:
    return stress_report(clean, {"x": stressed}, groups, replicates=400)["x"]


def test_a_report_of_little_says_so():
    report = report_of(np.array([True, True]), np.array([True, False]), np.array([4, 4]))
    assert report["drop"] == 0.5 and report["drop_ci95"] is None and report["top1_ci95"] is None
    nothing = report_of(np.zeros(4, dtype=bool), np.zeros(4, dtype=bool), np.arange(4))
    assert nothing["drop"] == 0 and nothing["relative_drop"] is None
    with pytest.raises(ValueError, match="'x' has 3 probes, the clean run 2"):
        stress_report(np.ones(2, bool), {"x": np.ones(3, bool)}, np.zeros(2, int))
    with pytest.raises(ValueError, match="no probes"):
        stress_report(np.ones(0, bool), {}, np.zeros(0, int))


STRATA = np.array(["moe", "moe", "sketch", None, "sketch", "moe", "rare", "moe", None, "sketch"], dtype=object)
RIGHT = np.array([1, 1, 0, 1, 1, 1, 0, 0, 0, 0], dtype=bool)
WHO = np.array([0, 1, 0, 1, 2, 2, 2, 3, 3, 1])


def test_strata_are_compared_with_all_that_have_one():
    report = strata_report(RIGHT, STRATA, WHO, replicates=50)
    assert list(report) == ["moe", "rare", "sketch", "unlabelled"]
    assert report["unlabelled"] == 2
    assert report["moe"]["top1"] == 0.75 and report["moe"]["probes"] == 4 and report["moe"]["identities"] == 4
    assert report["sketch"]["top1"] == pytest.approx(1 / 3)
    assert report["sketch"]["drop"] == pytest.approx(4 / 8 - 1 / 3)
    assert report["moe"]["drop"] == pytest.approx(4 / 8 - 0.75)
    assert report["rare"]["top1_ci95"] is None and report["rare"]["drop_ci95"] is None
    low, high = report["moe"]["top1_ci95"]
    assert low < 0.75 < high


def test_strata_are_compared_with_a_reference():
    report = strata_report(RIGHT, STRATA, WHO, reference="moe", replicates=50)
    assert report["sketch"]["drop"] == pytest.approx(0.75 - 1 / 3)
    assert report["moe"]["drop"] == 0 and report["moe"]["drop_ci95"] == [0, 0]
    with pytest.raises(UserError, match="'3d' is not one of the strata moe, rare, sketch"):
        strata_report(RIGHT, STRATA, WHO, reference="3d")


def test_intervals_of_strata_are_those_of_a_bootstrap():
    rng = np.random.default_rng(0)
    groups, strata = rng.integers(0, 15, 300), rng.choice(["a", "b"], 300).astype(object)
    correct = rng.random(300) < np.where(strata == "a", 0.9, 0.6)
    report = strata_report(correct, strata, groups, reference="a", replicates=200, seed=2)
    tops, drops = [], []
    for replicate in range(200):
        drawn = rng_for(2, replicate, "bootstrap").choice(np.arange(15), 15)
        rows = np.concatenate([np.flatnonzero(groups == i) for i in drawn])
        a, b = (correct[rows][strata[rows] == name].mean() for name in "ab")
        tops.append(b)
        drops.append(a - b)
    assert report["b"]["top1_ci95"] == pytest.approx(np.quantile(tops, [0.025, 0.975]).tolist())
    assert report["b"]["drop_ci95"] == pytest.approx(np.quantile(drops, [0.025, 0.975]).tolist())
    assert report["b"]["drop_ci95"][0] > 0.1


def test_strata_that_nobody_noted_are_none():
    report = strata_report(RIGHT, np.array([None] * 10, dtype=object), WHO)
    assert report == {"unlabelled": 10}
    with pytest.raises(UserError, match="a stratum is called 'unlabelled'"):
        strata_report(RIGHT[:1], np.array(["unlabelled"], dtype=object), WHO[:1])
