"""Crops, flips, colours and blur against torchvision's, erased boxes, and maps that go through the same crop.

Run: python -m pytest tests/test_augment.py
"""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms import functional as classic
from torchvision.transforms.v2 import functional as modern

from util.data.augment import (
    EvalCrop,
    TrainCrop,
    TrainView,
    View,
    normalize,
    random_erase_box,
    random_resized_box,
    standardize,
    to_unit,
)
from util.data.images import crop_region
from util.run.seed import rng_for


def picture(width: int = 120, height: int = 90, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(48, 48), (64, 32), (200, 200)])
@pytest.mark.parametrize("box", [(0, 0, 120, 90), (13, 7, 77, 60), (100, 80, 103, 82)])
def test_crop_equals_torchvision(size, box, flip):
    got = View(box, flip).apply(picture(), size)
    assert got.shape == (3, *size) and got.dtype == torch.uint8 and got.is_contiguous()
    x1, y1, x2, y2 = box
    place = (y1, x1, y2 - y1, x2 - x1)
    expected = modern.resized_crop(
        modern.pil_to_tensor(picture()), *place, list(size), modern.InterpolationMode.BICUBIC, antialias=True
    )
    pillow = classic.pil_to_tensor(
        classic.resized_crop(picture(), *place, list(size), classic.InterpolationMode.BICUBIC)
    )
    if flip:
        expected, pillow = expected.flip(-1), pillow.flip(-1)
    assert (got.int() - expected.int()).abs().max() <= 1
    assert (got.int() - pillow.int()).abs().max() <= 2
    assert (got.int() - pillow.int()).abs().float().mean() < 0.1


def test_crop_of_the_target_size_is_not_resampled():
    got = View((10, 20, 42, 52)).apply(picture(), (32, 32))
    assert torch.equal(got, classic.pil_to_tensor(picture())[:, 20:52, 10:42])


def quantiles(boxes: np.ndarray) -> np.ndarray:
    """Of x1, y1, width, height, area and proportions, at five levels: (6, 5)."""
    x, y, w, h = boxes.T
    return np.quantile(np.stack([x, y, w, h, w * h / 1000, 50 * w / h]), [0.1, 0.25, 0.5, 0.75, 0.9], axis=1).T


@pytest.mark.parametrize("shape", [(100, 100), (160, 90)])
def test_boxes_are_distributed_as_torchvisions(shape):
    width, height = shape
    scale, ratio, count = (0.2, 1.0), (3 / 4, 4 / 3), 6000
    torch.manual_seed(0)
    blank = torch.zeros(3, height, width)
    reference = np.array([RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(count)])[:, [1, 0, 3, 2]]
    boxes = np.array([random_resized_box(width, height, scale, ratio, rng_for(0, i)) for i in range(count)])
    ours = np.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])
    assert np.abs(quantiles(ours) - quantiles(reference)).max() < 4
    assert np.abs(ours.mean(0) - reference.mean(0)).max() < 1.2


@pytest.mark.parametrize("shape", [(400, 20), (20, 400), (50, 50), (1, 1), (1, 300)])
def test_fallback_is_torchvisions(shape):
    width, height = shape
    scale, ratio = (30.0, 40.0), (3 / 4, 4 / 3)  # never fits
    top, left, h, w = RandomResizedCrop.get_params(torch.zeros(3, height, width), scale, ratio)
    got = random_resized_box(width, height, scale, ratio, rng_for(0))
    assert got == (left, top, left + max(1, w), top + max(1, h))


def test_train_crop_is_a_function_of_its_generator():
    crop, image = TrainCrop((32, 32)), picture()
    first = crop(image, {}, rng_for(0, 1, 2))
    assert first.shape == (3, 32, 32) and first.dtype == torch.uint8
    assert torch.equal(first, crop(image, {}, rng_for(0, 1, 2)))
    assert not torch.equal(first, crop(image, {}, rng_for(0, 1, 3)))


def test_half_of_the_crops_are_mirrored():
    crop = TrainCrop((16, 16))
    flips = [crop.draw(picture(), {}, rng_for(i)).flip for i in range(2000)]
    assert 0.46 < np.mean(flips) < 0.54
    assert not any(TrainCrop((16, 16), flip=False).draw(picture(), {}, rng_for(i)).flip for i in range(50))


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.5, 0.6)])
def test_crops_lie_in_the_picture_and_have_the_asked_area(scale):
    crop = TrainCrop((32, 32), scale=scale)
    for i in range(300):
        x1, y1, x2, y2 = crop.draw(picture(), {}, rng_for(i)).box
        assert 0 <= x1 < x2 <= 120 and 0 <= y1 < y2 <= 90
        assert scale[0] - 0.02 < (x2 - x1) * (y2 - y1) / (120 * 90) < scale[1] + 0.02


def test_wide_art_is_cut_around_the_face_before_the_random_crop():
    image, face = picture(800, 200), [700, 60, 760, 120]
    region = crop_region(image, 1.0, face)
    for i in range(100):
        x1, y1, x2, y2 = TrainCrop((32, 32)).draw(image, {"box": face}, rng_for(i)).box
        assert region[0] <= x1 and x2 <= region[2] and region[1] <= y1 and y2 <= region[3]


def test_moderate_art_is_not_cut_first():
    image = picture(280, 200)
    lefts = [TrainCrop((32, 32)).draw(image, {"box": [0, 0, 20, 20]}, rng_for(i)).box[2] for i in range(200)]
    assert max(lefts) > 270  # reaches parts that a crop around the face would have cut off


def test_proportions_are_relative_to_the_target():
    crop = TrainCrop((64, 32))
    shapes = []
    for i in range(200):
        x1, y1, x2, y2 = crop.draw(picture(90, 120), {}, rng_for(i)).box
        shapes.append((x2 - x1) / (y2 - y1) / 0.5)
    assert 0.72 < min(shapes) < 0.8 and 1.25 < max(shapes) < 1.39


@pytest.mark.parametrize("size", [(48, 48), (32, 64)])
def test_eval_crop_is_the_smart_crop(size):
    image, record = picture(300, 100), {"box": [10, 20, 40, 50]}
    crop = EvalCrop(size)
    got = crop(image, record)
    assert torch.equal(got, crop(image, record, rng_for(5)))
    expected = View(crop_region(image, size[1] / size[0], record["box"])).apply(image, size)
    assert torch.equal(got, expected)


def pixels_of(image: Image.Image) -> torch.Tensor:
    return classic.pil_to_tensor(image)


def jittered(pixels: torch.Tensor, factors) -> np.ndarray:
    """Brightness, contrast and saturation by their formulas, in float: (3, H, W) in 0..255."""
    x, grey_of = pixels.numpy().astype(float), np.array([0.2989, 0.587, 0.114])
    brightness, contrast, saturation = factors
    x = np.clip(brightness * x, 0, 255)
    x = np.clip(contrast * x + (1 - contrast) * np.tensordot(grey_of, x, 1).mean(), 0, 255)
    return np.clip(saturation * x + (1 - saturation) * np.tensordot(grey_of, x, 1), 0, 255)


def jitter(pixels: torch.Tensor, strength: float, rng: np.random.Generator) -> tuple[View, torch.Tensor]:
    """A drawn view of the whole picture (3, H, W), and what it makes of it."""
    crop = TrainCrop(pixels.shape[1:], scale=(1, 1), ratio=(1, 1), flip=False)
    picture = pixels.permute(1, 2, 0).numpy()
    view = TrainView(crop, jitter=strength).draw(picture, {}, rng)
    assert view.box == (0, 0, pixels.shape[2], pixels.shape[1])
    return view, view.apply(picture, crop.size)


@pytest.mark.parametrize("strength", [0.1, 0.4])
def test_jitter_is_brightness_contrast_and_saturation_alone(strength):
    pixels, factors = pixels_of(picture()), []
    for i in range(40):
        view, got = jitter(pixels, strength, rng_for(i))
        factors.append([view.brightness, view.contrast, view.saturation])
        assert got.dtype == torch.uint8 and got.shape == pixels.shape and got.is_contiguous()
        assert np.abs(got.numpy() - jittered(pixels, factors[-1])).max() < 4  # three roundings to whole levels
        expected = modern.adjust_brightness(pixels, view.brightness)
        expected = modern.adjust_saturation(modern.adjust_contrast(expected, view.contrast), view.saturation)
        difference = (got.int() - expected.int()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 0.02
    assert np.min(factors) < 1 - 0.8 * strength and np.max(factors) > 1 + 0.8 * strength
    assert np.abs(np.array(factors) - 1).max() <= strength


def test_jitter_changes_the_mean_brightness_by_its_strength_at_most():
    pixels = pixels_of(picture()) // 2 + 50  # away from black and white, where values are cut off
    before = pixels.float().mean()
    ratios = [(jitter(pixels, 0.1, rng_for(i))[1].float().mean() / before).item() for i in range(300)]
    assert 0.88 < min(ratios) < 0.93 and 1.07 < max(ratios) < 1.12


def test_jitter_does_not_touch_its_input_and_follows_its_generator():
    pixels = pixels_of(picture())
    first = jitter(pixels, 0.3, rng_for(1))[1]
    assert torch.equal(first, jitter(pixels, 0.3, rng_for(1))[1])
    assert not torch.equal(first, jitter(pixels, 0.3, rng_for(2))[1])
    assert torch.equal(pixels, pixels_of(picture()))
    assert torch.equal(jitter(pixels, 0.0, rng_for(1))[1], pixels)


@pytest.mark.parametrize("size", [(90, 120), (40, 40), (20, 64)])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_torchvisions(size, sigma):
    sharp = View((0, 0, 120, 90)).apply(picture(), size)
    got = View((0, 0, 120, 90), blur=sigma).apply(picture(), size)
    side = 2 * max(1, round(0.05 * min(size))) + 1
    expected = modern.gaussian_blur(sharp, [side, side], [sigma, sigma])
    difference = (got.int() - expected.int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.02
    assert torch.equal(got, sharp) == (sigma == 0.1)  # a tenth of a pixel is no blur


def test_the_asked_share_of_views_is_blurred():
    view = TrainView(TrainCrop((16, 16)), blur=0.5)
    sigmas = np.array([view.draw(picture(), {}, rng_for(i)).blur for i in range(800)])
    assert 0.44 < (sigmas > 0).mean() < 0.56  # sd 0.018
    drawn = sigmas[sigmas > 0]
    assert 0.1 <= drawn.min() < 0.15 and 1.95 < drawn.max() <= 2.0 and abs(drawn.mean() - 1.05) < 0.1


def erased(size: tuple[int, int], level: int, rng: np.random.Generator) -> tuple[tuple, torch.Tensor]:
    """A drawn box and a picture of one level in which it is erased, (3, H, W)."""
    plain = np.full((*size, 3), level, dtype=np.uint8)
    view = View((0, 0, size[1], size[0]), erase=random_erase_box(size, rng), noise=int(rng.integers(1 << 24)))
    return view.erase, view.apply(plain, size)


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_an_erased_box_has_the_area_of_the_paper_and_the_rest_is_untouched(size):
    areas = []
    for i in range(300):
        (x1, y1, x2, y2), got = erased(size, 0, rng_for(i))
        inside = torch.zeros(size, dtype=torch.bool)
        inside[y1:y2, x1:x2] = True
        assert torch.equal(got.amax(0) > 0, inside)  # noise that is black by chance is one in 17 million
        areas.append(inside.float().mean().item())
    assert 0.017 < min(areas) < 0.04 and 0.3 < max(areas) < 0.34


def test_an_erased_box_is_noise_of_every_level_and_follows_its_generator():
    first = erased((96, 96), 128, rng_for(0))[1]
    assert torch.equal(first, erased((96, 96), 128, rng_for(0))[1])
    assert not torch.equal(first, erased((96, 96), 128, rng_for(1))[1])
    boxes = (erased((96, 96), 128, rng_for(i)) for i in range(20))
    noise = torch.cat([got[:, y1:y2, x1:x2].flatten(1) for (x1, y1, x2, y2), got in boxes], dim=1).float()
    assert noise.min() == 0 and noise.max() == 255
    assert (noise.mean(1) - 127.5).abs().max() < 3 and (noise.std(1) - 73.9).abs().max() < 2
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.03  # the channels know nothing of each other
    neighbours = torch.corrcoef(torch.stack([noise[:, 1:].flatten(), noise[:, :-1].flatten()]))
    assert neighbours[0, 1].abs() < 0.03


def test_a_view_without_jitter_and_erasing_is_its_crop():
    crop, image = TrainCrop((32, 32)), picture()
    for i in range(20):
        plain = crop(image, {}, rng_for(i))
        assert torch.equal(TrainView(crop)(image, {}, rng_for(i)), plain)
        # jitter and erasing are drawn after the crop, so they keep its place
        hardly = TrainView(crop, jitter=1e-9)(image, {}, rng_for(i))
        assert (hardly.int() - plain.int()).abs().max() <= 3  # levels, of three roundings
        left = TrainView(crop, erase=1.0)(image, {}, rng_for(i)) == plain
        assert 0.6 < left.all(0).float().mean() < 0.99


def test_the_asked_share_of_views_is_erased():
    crop, image = TrainCrop((16, 16)), picture()
    views = (TrainView(crop, erase=0.25)(image, {}, rng_for(i)) for i in range(600))
    erased = [not torch.equal(view, crop(image, {}, rng_for(i))) for i, view in enumerate(views)]
    assert 0.18 < np.mean(erased) < 0.32  # sd 0.018


def test_a_view_is_a_function_of_its_generator():
    view, image = TrainView(TrainCrop((32, 32)), jitter=0.2, erase=0.5), picture()
    assert torch.equal(view(image, {}, rng_for(0, 1)), view(image, {}, rng_for(0, 1)))
    assert not torch.equal(view(image, {}, rng_for(0, 1)), view(image, {}, rng_for(0, 2)))


def test_transforms_are_told_apart_by_their_words():
    # the cache of embeddings goes by them
    crops = [TrainCrop((32, 32)), TrainCrop((32, 48)), TrainCrop((32, 32), scale=(0.5, 1.0))]
    crops += [TrainCrop((32, 32), ratio=(1.0, 1.0)), TrainCrop((32, 32), flip=False)]
    views = [TrainView(crop) for crop in crops]
    views += [TrainView(crops[0], jitter=0.1), TrainView(crops[0], jitter=0.1000001), TrainView(crops[0], erase=0.1)]
    views += [TrainView(crops[0], blur=0.1)]
    transforms = [*crops, *views, EvalCrop((32, 32)), EvalCrop((48, 32))]
    assert len({repr(transform) for transform in transforms}) == len(transforms)
    assert repr(TrainView(TrainCrop([32, 32], scale=[0.2, 1.0]))) == repr(TrainView(TrainCrop((32, 32))))
    assert repr(EvalCrop([32, 32])) == repr(EvalCrop((32, 32)))


def test_normalize_equals_torchvision():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reference = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(images.float() / 255)
    assert torch.allclose(normalize(images), reference, atol=1e-6)
    assert torch.equal(normalize(images), standardize(to_unit(images)))
    assert torch.allclose(to_unit(images), images.float() / 255, atol=1e-7)
    assert to_unit(images).max() <= 1 and images.dtype == torch.uint8


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainCrop((32, 32))(picture(), {}, rng_for(0))
        EvalCrop((32, 32))(picture(), {})
        TrainView(TrainCrop((32, 32)), jitter=0.1, erase=1.0, blur=1.0)(picture(), {}, rng_for(0))
        stored = np.array(picture())
        stored.flags.writeable = False  # as in a file that is mapped to be read
        View((0, 0, 120, 90)).apply(stored, (32, 32))


def test_crops_and_flips_are_the_ones_of_earlier_results():
    expected = [((6, 7, 88, 81), True), ((5, 10, 89, 86), True), ((7, 3, 113, 89), True), ((43, 10, 106, 67), False)]
    crop, view = TrainCrop((32, 32)), TrainView(TrainCrop((32, 32)), jitter=0.2, blur=0.5, erase=0.5)
    for index, (box, flip) in enumerate(expected):
        for transform in (crop, view):
            drawn = transform.draw(picture(), {}, rng_for(0, 1, index, "augment"))
            assert (drawn.box, drawn.flip) == (box, flip)


def test_jitter_and_erasing_are_drawn_as_ever():
    """Brightness, contrast, saturation, whether to erase, then the box: what comes later must not move them."""
    view = TrainView(TrainCrop((32, 32)), jitter=0.2, erase=0.5)
    for i in range(40):
        got, rng = view.draw(picture(), {}, rng_for(i)), rng_for(i)
        view.crop.draw(picture(), {}, rng)
        assert [got.brightness, got.contrast, got.saturation] == [rng.uniform(0.8, 1.2) for _ in range(3)]
        assert got.erase == (random_erase_box((32, 32), rng) if rng.random() < 0.5 else (0, 0, 0, 0))


@pytest.mark.parametrize("flip", [False, True])
def test_a_map_goes_through_the_crop_as_its_picture_does(flip):
    """A map of 32 x 32 labels, drawn as a picture of 256 x 128 px: what the crop shows is what the map says."""
    labels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    drawn = np.repeat(np.repeat(labels[..., None], 4, 0), 8, 1).repeat(3, 2)
    for box in [(0, 0, 256, 128), (64, 32, 192, 96), (8, 4, 40, 20), (16, 0, 240, 112)]:
        view = View(box, flip)
        grid = ((box[3] - box[1]) // 4, (box[2] - box[0]) // 8)
        shown = view.apply(drawn, (box[3] - box[1], box[2] - box[0]))[0].numpy()
        assert np.array_equal(view.crop_map(labels, (256, 128), grid), shown[2::4, 4::8])


@pytest.mark.parametrize("flip", [False, True])
def test_a_map_of_a_crop_between_its_cells_is_averaged_over_each(flip):
    """Against the map drawn at a pixel per pixel of a picture of 96 x 64, whose cells of 3 x 2 px it never cuts."""
    rng = rng_for(0)
    values = rng.integers(0, 256, (32, 32), dtype=np.uint8)
    drawn = np.repeat(np.repeat(values, 2, 0), 3, 1).astype(float)
    for _ in range(50):
        rows, columns = (int(n) for n in rng.integers(1, 9, 2))
        height, width = rows * int(rng.integers(1, 64 // rows + 1)), columns * int(rng.integers(1, 96 // columns + 1))
        x, y = int(rng.integers(96 - width + 1)), int(rng.integers(64 - height + 1))
        cut = drawn[y : y + height, x : x + width].reshape(rows, height // rows, columns, width // columns)
        expected = cut.mean(axis=(1, 3))[:, :: -1 if flip else 1]
        got = View((x, y, x + width, y + height), flip).crop_map(values, (96, 64), (rows, columns))
        assert got.dtype == np.uint8 and np.abs(got - expected).max() <= 0.51
