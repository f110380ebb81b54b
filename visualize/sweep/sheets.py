"""The sheets of a mask-ratio study: grid.png and errors.png."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from util.data.sheet import sheet
from visualize.measure import MODEL, absolute_error
from visualize.pictures import GREY, heat, percent_masked, scale_bar, tile
from visualize.sweep.numbers import Sweep

_FAULTS = ("blockiness", "delta_e", "hf_energy_ratio")
_BRIGHTEST = 0.99  # the share of the errors that the colours tell apart; above it all are bright


@dataclass
class Shown:
    """The pictures in the figures. originals: (K, 3, H, W) in [0, 1]. places: (K,) where they are among those measured.

    masks: ratio -> (K, 1, H, W); pasted: (label, ratio) -> (K, 3, H, W), of the first run of each training.
    """

    originals: torch.Tensor
    places: list[int]
    masks: dict[float, torch.Tensor]
    pasted: dict[tuple[str, float], torch.Tensor]
    oracle: set[str]  # labels of the models that are shown with the true patch statistics


def _masked(shown: Shown, ratio: float) -> torch.Tensor:
    return torch.where(shown.masks[ratio] > 0, GREY, shown.originals)


def grid_figure(sweep: Sweep, shown: Shown) -> Image.Image:
    """A block for each test ratio; rows are pictures, columns are trainings with their PSNR over all pictures."""
    panels, images = [], len(sweep.index)
    for ratio in sweep.ratios:
        best, titles = sweep.best(ratio), ["original", "masked"]
        for label in sweep.trainings:
            mean = sweep.summary(label, ratio, "psnr_db")["mean"]
            text = "exact" if mean is None else f"{mean:.2f} dB"
            mark = "best: " if label == best and len(sweep.trainings) > 1 else ""
            oracle = "\n(oracle statistics)" if label in shown.oracle else ""
            titles.append(f"trained at\n{_broken(label)}{oracle}\n{mark}{text}")
        columns = [shown.originals, _masked(shown, ratio), *(shown.pasted[label, ratio] for label in sweep.trainings)]
        title = f"tested with {percent_masked(ratio)}   (PSNR: mean over {images} pictures)"
        panels.append(sheet(list(zip(*columns, strict=True)), column_titles=titles, title=title, cell=_cell(shown)))
    return tile(panels, gap=36)


def error_figure(sweep: Sweep, shown: Shown, ratio: float, pictures: int = 2) -> Image.Image:
    """Where the errors are: their mean over all pictures, then single pictures with the three faults as numbers."""
    labels, ratios = list(sweep.trainings), [r for r in sweep.ratios if r]
    means = {(label, r): sweep.error_map(label, r) for label in labels for r in ratios}
    top = _top(means.values())
    panels = [
        sheet(
            [[heat(means[label, r], top) for r in ratios] for label in labels],
            column_titles=[f"tested with\n{percent_masked(r)}" for r in ratios],
            row_titles=[f"trained at\n{_broken(label)}" for label in labels],
            title=f"Mean absolute error of the removed pixels, over {len(sweep.index)} pictures",
            cell=_cell(shown),
        ),
        scale_bar(top, "error, of 255 grey levels (plain grey: never removed)"),
    ]
    visible = shown.masks[ratio][:, 0] == 0
    maps = {
        label: absolute_error(shown.originals, shown.pasted[label, ratio]).masked_fill(visible, torch.nan).numpy()
        for label in labels
    }
    top = _top(maps.values())
    rows, titles, masked = [], [], _masked(shown, ratio)
    for i in range(min(pictures, len(shown.originals))):
        for label in labels:
            rows.append([shown.originals[i], masked[i], shown.pasted[label, ratio][i], heat(maps[label][i], top)])
            titles.append(f"trained at {_broken(label)}\n{_faults(sweep, label, ratio, shown.places[i])}")
    panels += [
        sheet(
            rows,
            column_titles=["original", "masked", "reconstruction\n+ visible", "absolute error"],
            row_titles=titles,
            title=f"Single pictures, {percent_masked(ratio)}: blocks (0 is best), colour (0), detail kept (100 %)",
            cell=_cell(shown),
        ),
        scale_bar(top, "error, of 255 grey levels (plain grey: visible)"),
    ]
    return tile(panels, columns=1, gap=14)


def _faults(sweep: Sweep, label: str, ratio: float, place: int) -> str:
    """Block artefacts, colour and detail of one picture, of the training's first run."""
    values = sweep.measured[sweep.trainings[label][0].ckpt].values
    block, colour, detail = (values[MODEL, ratio, fault][place] for fault in _FAULTS)
    return f"blocks {block:+.1f} grey levels\ncolour off by {colour:.1f} dE\ndetail kept {100 * detail:.0f} %"


def _top(maps: Iterable[np.ndarray]) -> float:
    """The error that is drawn brightest."""
    values = np.concatenate([values[np.isfinite(values) & (values > 0)] for values in maps])
    return float(max(1.0, np.quantile(values, _BRIGHTEST))) if len(values) else 1.0


def _cell(shown: Shown) -> int:
    return min(max(128, *shown.originals.shape[-2:]), 192)


def _broken(label: str) -> str:
    return label.replace(", ", ",\n")
