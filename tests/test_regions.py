"""util/benchmark/regions.py against loops over single pixels, scikit-image, and cases worked out by hand.

Run: python -m pytest tests/test_regions.py
"""

import math

import numpy as np
import pytest
import torch
from skimage.color import deltaE_ciede2000, rgb2lab

from util.benchmark.reconstruction import delta_e, psnr_masked
from util.benchmark.regions import FIGURES, MAPS, REGIONS, measure_regions, region_masks
from util.run.seed import rng_for

N, H, W = 3, 12, 10


@pytest.fixture(scope="module")
def batch():
    rng = rng_for(0, "regions")
    target = torch.from_numpy(rng.random((N, 3, H, W), dtype=np.float32))
    pasted = (target + torch.from_numpy(rng.normal(0, 0.3, (N, 3, H, W)).astype(np.float32))).clamp(-0.2, 1.2)
    mask = torch.from_numpy((rng.random((N, 1, H, W)) < 0.6).astype(np.float32))
    maps = torch.from_numpy(rng.integers(0, 256, (N, len(MAPS), H, W), dtype=np.uint8))
    maps[0, 1] = 0  # a picture without eyes
    return target, torch.where(mask > 0, pasted, target), mask, maps


def belongs(maps, region, n, y, x):
    """Whether a pixel lies in a region, from the definition."""
    face, eyes, foreground = (int(maps[n, i, y, x]) for i in range(3))
    return {
        "face": face >= 128,
        "eyes": eyes >= 128,
        "figure": foreground >= 128,
        "background": foreground < 128,
    }[region]


def brute_force(target, pasted, mask, maps, region, n):
    target, image = target[n].double().numpy(), pasted[n].double().clamp(0, 1).numpy()
    difference = deltaE_ciede2000(*(rgb2lab(np.moveaxis(picture, 0, -1)) for picture in (target, image)))
    squares, colours, removed = [], [], 0
    for y in range(H):
        for x in range(W):
            if mask[n, 0, y, x] == 0:
                continue
            removed += 1
            if belongs(maps, region, n, y, x):
                squares.extend((target[:, y, x] - image[:, y, x]) ** 2)
                colours.append(difference[y, x])
    if not colours:
        return {"psnr_db": math.nan, "delta_e": math.nan, "share": 0.0}
    return {
        "psnr_db": 10 * math.log10(1 / np.mean(squares)),
        "delta_e": np.mean(colours),
        "share": len(colours) / removed,
    }


def test_every_figure_of_every_region_is_that_of_its_pixels(batch):
    target, pasted, mask, maps = batch
    report = measure_regions(target, pasted, mask, region_masks(maps, MAPS))
    assert tuple(report) == REGIONS
    for region, figures in report.items():
        assert tuple(figures) == FIGURES
        for n in range(N):
            expected = brute_force(target, pasted, mask, maps, region, n)
            for figure, values in figures.items():
                assert values.shape == (N,)
                assert values[n].item() == pytest.approx(expected[figure], abs=2e-3, nan_ok=True), (region, figure, n)
    assert report["eyes"]["psnr_db"][0].isnan() and report["eyes"]["share"][0] == 0


def test_regions_are_cut_at_half_and_figure_and_background_share_all_pixels():
    maps = torch.tensor([[[[0, 127, 128, 255]], [[255, 128, 127, 0]], [[127, 128, 0, 255]]]], dtype=torch.uint8)
    masks = region_masks(maps, MAPS)
    assert masks["face"].tolist() == [[[[0, 0, 1, 1]]]]
    assert masks["eyes"].tolist() == [[[[1, 1, 0, 0]]]]
    assert masks["figure"].tolist() == [[[[0, 1, 0, 1]]]]
    assert torch.equal(masks["figure"] + masks["background"], torch.ones(1, 1, 1, 4))


def test_only_the_regions_that_the_maps_tell(batch):
    maps = batch[3]
    assert tuple(region_masks(maps[:, :1], ("face",))) == ("face",)
    assert tuple(region_masks(maps[:, [2, 1]], ("foreground", "eyes"))) == ("eyes", "figure", "background")
    assert torch.equal(region_masks(maps[:, [2, 1]], ("foreground", "eyes"))["eyes"], region_masks(maps, MAPS)["eyes"])


def test_a_region_that_is_the_whole_picture_has_the_figures_of_the_picture(batch):
    target, pasted, mask, _ = batch
    everywhere = {"all": torch.ones(N, 1, H, W)}
    figures = measure_regions(target, pasted, mask, everywhere)["all"]
    torch.testing.assert_close(figures["psnr_db"], psnr_masked(target, pasted.clamp(0, 1), mask))
    removed = mask.mean(dim=(1, 2, 3))  # visible pixels have no difference: the mean over all is that much lower
    torch.testing.assert_close(figures["delta_e"] * removed, delta_e(target, pasted.clamp(0, 1)), atol=1e-4, rtol=1e-4)
    assert figures["share"].tolist() == [1.0] * N


def test_what_nobody_removed_has_no_figures_and_an_exact_copy_no_error(batch):
    target, pasted, mask, maps = batch
    regions = region_masks(maps, MAPS)
    for figures in measure_regions(target, target, torch.zeros_like(mask), regions).values():
        assert all(values.isnan().all() for values in figures.values())
    copy = measure_regions(target, target, mask, regions)["face"]
    assert (copy["psnr_db"] == math.inf).all() and copy["delta_e"].abs().max() < 1e-3
    shares = measure_regions(target, pasted, mask, regions)
    torch.testing.assert_close(shares["figure"]["share"] + shares["background"]["share"], torch.ones(N))
