"""How well a model and the floors reconstruct each picture, under the same masks: one number for each picture."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from models_mae import MaskedAutoencoder
from util.benchmark.reconstruction import measure
from util.benchmark.regions import measure_regions, region_masks
from util.run.errors import UserError
from visualize.pictures import Pictures, draw_masks

MODEL = "model"


@dataclass
class PictureFigures:
    """Of each of N pictures. index: (N,) their numbers in the source.

    values: (method, mask ratio, metric) -> (N,); regions: (method, mask ratio, region, figure) -> (N,).
    errors: mask ratio -> (H, W), the model's absolute error of each pixel in 8-bit grey levels, the mean over channels
    and over the pictures in which it was removed; NaN where it never was.
    """

    index: np.ndarray
    values: dict[tuple[str, float, str], np.ndarray]
    regions: dict[tuple[str, float, str, str], np.ndarray]
    errors: dict[float, np.ndarray]


def measure_pictures(
    model: MaskedAutoencoder, pictures: Pictures, ratios: Sequence[float], floors: dict[str, Callable], seed: int
) -> PictureFigures:
    """Measure the model and the floors on every picture, by region where the pictures have maps.

    floors: name -> fill(images, mask). UserError if no picture can be read.
    """
    device = model.pixel_mean.device
    seen, values, regions, sums = [], defaultdict(list), defaultdict(list), defaultdict(lambda: [0.0, 0.0])
    for images, index, maps in pictures:
        images, areas = images.to(device), {}
        seen.append(index)
        if maps is not None:
            areas = region_masks(maps.to(device), pictures.maps.names)
        for ratio in ratios:
            out = model.reconstruct(images, draw_masks(model, images, index, seed, ratio))
            mask, pasted = out["mask"], {MODEL: out["pasted"]}
            for method, picture in (pasted | {name: fill(images, mask) for name, fill in floors.items()}).items():
                for metric, value in measure(images, picture, mask, model.patch_size).items():
                    values[method, ratio, metric].append(value.cpu())
                for region, figures in measure_regions(images, picture, mask, areas).items() if areas else ():
                    for figure, value in figures.items():
                        regions[method, ratio, region, figure].append(value.cpu())
            values[MODEL, ratio, "loss"].append(out["loss"].cpu())
            errors = absolute_error(images, out["pasted"]) * mask[:, 0]
            for place, added in enumerate((errors, mask[:, 0])):
                sums[ratio][place] += added.sum(dim=0, dtype=torch.float32).cpu().double()
    if not seen:
        raise UserError(f"no picture of {pictures.source.name} can be read: check the files")
    return PictureFigures(
        torch.cat(seen).numpy(),
        {key: _joined(parts) for key, parts in values.items()},
        {key: _joined(parts) for key, parts in regions.items()},
        {ratio: (error / removed).numpy() for ratio, (error, removed) in sums.items()},
    )


def absolute_error(target: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W), both in [0, 1] -> (N, H, W), mean over the channels, 8-bit grey levels."""
    return 255 * (image - target).abs().mean(dim=1)


def _joined(parts: list[torch.Tensor]) -> np.ndarray:
    return torch.cat(parts).double().numpy()
