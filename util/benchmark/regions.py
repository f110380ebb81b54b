"""How good is a reconstruction where it matters: metrics of the face, the eyes, the figure and the background.

Regions are areas of a picture, (N, 1, H, W) in {0, 1}; pictures and masks are those of `util.benchmark.reconstruction`.
Only removed pixels are judged: a visible one is the picture's own.
"""

from collections.abc import Mapping, Sequence

import torch

from util.benchmark.reconstruction import ciede2000, psnr_masked, srgb_to_lab

MAPS = ("face", "eyes", "foreground")  # the semantic maps that regions are cut from
REGIONS = ("face", "eyes", "figure", "background")
FIGURES = ("psnr_db", "delta_e", "share")
COVERED = 128  # of 255: a pixel belongs to what covers half of it


def region_masks(maps: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The regions that the maps can tell, {region: (N, 1, H, W) float in {0, 1}}.

    maps: uint8 (N, C, H, W), the covered share of each pixel times 255, sent through the same view as the pictures.
    names: which map each channel is, of MAPS. The figure is the foreground, the background all the rest.
    """
    covered = {name: (maps[:, i, None] >= COVERED).float() for i, name in enumerate(names)}
    regions = {name: covered[name] for name in ("face", "eyes") if name in covered}
    if "foreground" in covered:
        regions |= {"figure": covered["foreground"], "background": 1 - covered["foreground"]}
    return regions


def measure_regions(
    target: torch.Tensor, pasted: torch.Tensor, mask: torch.Tensor, regions: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """{region: {figure: (N,)}} of a batch, over the removed pixels of each region.

    target: the originals (N, 3, H, W) in [0, 1]. pasted: the reconstruction with the visible patches kept; clipped to
    [0, 1] here. mask: (N, 1, H, W), 1 = removed. NaN where a picture has no such pixels:

    - psnr_db: peak signal-to-noise ratio, dB; infinite where they are equal;
    - delta_e: mean CIEDE2000 colour difference;
    - share: of all removed pixels, those that lie in the region, fraction in 0..1; NaN only where none is removed.
    """
    image, removed = pasted.clamp(0, 1), mask > 0
    difference = ciede2000(srgb_to_lab(target), srgb_to_lab(image))[:, None]
    report = {}
    for name, region in regions.items():
        judged = (removed & (region > 0)).to(image.dtype)
        pixels = judged.sum(dim=(1, 2, 3))
        report[name] = {
            "psnr_db": psnr_masked(target, image, judged),
            "delta_e": (difference * judged).sum(dim=(1, 2, 3)) / pixels,
            "share": pixels / removed.sum(dim=(1, 2, 3)),
        }
    return report
