"""Score maps: a number in 0..1 for each patch of each picture, high where a masking strategy wants to remove.

Three look at the picture's content (`face`, `foreground`, `lineart`), four do not (`green`, `block`, `grid`, `box`),
and `hard` is what the model itself finds hard. `util.mae.masking` turns scores into masks.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from util.mae.ordered_dither import ranks_over
from util.run.seed import uniform_for

LINE_SIGMAS = (1.0, 1.6)  # px: their difference answers to lines of 1 to 3 px
FLAT = 1e-5  # far below an 8-bit level and above rounding errors: a picture of one colour has no lines
GREEN_SIGMAS = (0.75, 1.5)  # patches
BLOCKS = 16  # rectangles: enough that what none of them covers is seldom asked for
BLOCK_AREA = (0.08, 0.4)  # of a rectangle, fractions of the picture; BEiT's least is 16 patches of 196
BLOCK_ASPECT = 0.3  # height / width is at least this and at most its inverse, as in BEiT


@dataclass(frozen=True)
class Batch:
    """What scores are made of.

    images: (N, 3, H, W) in [0, 1]. grid: (rows, columns) of patches. maps: semantic maps on that grid by name, (N, L)
    in 0..1. hard: (N, L) as the model predicts its error on each patch, in any unit; None if it does not.
    """

    images: torch.Tensor
    grid: tuple[int, int]
    seed: int
    epoch: int
    index: torch.Tensor
    maps: dict[str, torch.Tensor]
    hard: torch.Tensor | None = None

    def uniform(self, count: int, purpose: str) -> torch.Tensor:
        """(N, count) numbers in [0, 1) that depend on (seed, epoch, sample index) and the purpose alone."""
        return uniform_for(self.seed, self.epoch, self.index, count, purpose)


def face_scores(batch: Batch) -> torch.Tensor:
    """S1: half for the face, the other half for its eyes. A picture without a face scores 0 everywhere."""
    return (batch.maps["face"] + batch.maps["eyes"]) / 2


def foreground_scores(batch: Batch) -> torch.Tensor:
    """S2: the share of each patch that the figure covers."""
    return batch.maps["foreground"]


def lineart_scores(batch: Batch) -> torch.Tensor:
    """S3: how much line and detail a patch has, e / (e + mean of e over the picture).

    e is the mean absolute difference of two Gaussian blurs of the luma. An average patch scores 1/2, an empty one 0,
    and a change of contrast changes next to nothing.
    """
    red, green, blue = batch.images.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    luma = luma - luma.mean(dim=(1, 2), keepdim=True)  # else two blurs of a bright picture nearly cancel
    fine, coarse = (_blur(luma, sigma) for sigma in LINE_SIGMAS)
    rows, columns = batch.grid
    n, height, width = luma.shape
    energy = (fine - coarse).abs().view(n, rows, height // rows, columns, width // columns).mean(dim=(2, 4)).flatten(1)
    return energy / (energy + energy.mean(dim=1, keepdim=True) + FLAT)


def green_scores(batch: Batch) -> torch.Tensor:
    """Band-pass filtered ("green") noise in place of white, the mask of ColorMAE (arXiv 2407.13036): even clusters.

    White Gaussian noise on the grid, the difference of two Gaussian blurs of it that wrap around, and its distribution
    function: every score is uniform in 0..1.
    """
    rows, columns = batch.grid
    u = batch.uniform(rows * columns, "green").clamp(min=2**-25)
    white = math.sqrt(2) * torch.erfinv(2 * u - 1).view(-1, rows, columns)
    fine, coarse = (_wrapped_blur(white, sigma) for sigma in GREEN_SIGMAS)
    scale = math.sqrt(2) * _band_deviation(rows, columns)
    return ((1 + torch.erf((fine - coarse) / scale)) / 2).flatten(1)


def block_scores(batch: Batch) -> torch.Tensor:
    """Rectangles one after the other, as in BEiT (arXiv 2106.08254) and the mask ablation of MAE (arXiv 2111.06377).

    The patches of the first rectangle score 1, those that only the k-th of K covers 1 - (k - 1) / K, others 0.
    """
    rows, columns = batch.grid
    area, aspect, y, x = batch.uniform(4 * BLOCKS, "block").view(-1, 4, BLOCKS).unbind(1)
    area = (BLOCK_AREA[0] + area * (BLOCK_AREA[1] - BLOCK_AREA[0])) * rows * columns
    aspect = torch.exp((1 - 2 * aspect) * math.log(BLOCK_ASPECT))
    height = (area * aspect).sqrt().round().clamp(1, rows)
    width = (area / aspect).sqrt().round().clamp(1, columns)
    top, left = (y * (rows - height + 1)).floor(), (x * (columns - width + 1)).floor()
    covered = _covered(top, height, rows)[..., :, None] * _covered(left, width, columns)[..., None, :]
    rank = 1 - torch.arange(BLOCKS, device=covered.device) / BLOCKS
    return (covered * rank.view(1, -1, 1, 1)).amax(dim=1).flatten(1)


def grid_scores(batch: Batch) -> torch.Tensor:
    """Regular masks: what is kept forms a grid, as in MAE's ablation: one of four at ratio 0.75, a checkerboard at 0.5.

    The order of an ordered dither (Bayer matrix), moved about from sample to sample, gives one for every ratio.
    """
    rows, columns = batch.grid
    rank = ranks_over(batch.grid, batch.index.device)
    side = len(rank)
    down, right = (batch.uniform(2, "grid") * side).long().split(1, dim=1)
    row = (torch.arange(rows, device=rank.device) + down) % side
    column = (torch.arange(columns, device=rank.device) + right) % side
    return (rank[row[:, :, None], column[:, None, :]] / (side * side)).flatten(1)


def box_scores(batch: Batch) -> torch.Tensor:
    """The control of `face`: a box of the same area and the same sum of scores, anywhere in the picture."""
    rows, columns = batch.grid
    area = batch.maps["face"].sum(dim=1)
    height = (area * rows / columns).sqrt().clamp(max=rows)
    width = (area / height.clamp(min=1e-6)).clamp(max=columns)
    y, x = batch.uniform(2, "box").unbind(1)
    down = _covered(y * (rows - height), height, rows)
    right = _covered(x * (columns - width), width, columns)
    level = face_scores(batch).sum(dim=1) / area.clamp(min=1e-6)
    return (down[:, :, None] * right[:, None, :] * level[:, None, None]).flatten(1)


def hard_scores(batch: Batch) -> torch.Tensor:
    """What the model expects to predict badly, in the spirit of hard patches mining (arXiv 2304.05919).

    The logistic function of the prediction, standardised over the patches of the picture.
    """
    mean, std = batch.hard.mean(dim=1, keepdim=True), batch.hard.std(dim=1, keepdim=True)
    return torch.sigmoid((batch.hard - mean) / std.clamp(min=1e-6))


@dataclass(frozen=True)
class Score:
    """A score map. maps: the semantic maps it needs. hard: whether it needs the model's prediction of its errors."""

    of: Callable[[Batch], torch.Tensor] | None
    maps: tuple[str, ...] = ()
    hard: bool = False


SCORES = {
    "random": Score(None),  # the map of zeros
    "face": Score(face_scores, maps=("face", "eyes")),
    "foreground": Score(foreground_scores, maps=("foreground",)),
    "lineart": Score(lineart_scores),
    "green": Score(green_scores),
    "block": Score(block_scores),
    "grid": Score(grid_scores),
    "box": Score(box_scores, maps=("face", "eyes")),
    "hard": Score(hard_scores, hard=True),
}


def _covered(start: torch.Tensor, length: torch.Tensor, cells: int) -> torch.Tensor:
    """The share of each of `cells` unit cells that lies in start .. start + length: (..., cells)."""
    cell = torch.arange(cells, device=start.device, dtype=start.dtype)
    start, end = start[..., None], (start + length)[..., None]
    return (torch.minimum(end, cell + 1) - torch.maximum(start, cell)).clamp(0, 1)


def _blur(maps: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of (N, H, W); at the borders the weights inside the picture are scaled to sum to 1."""
    rows, columns = (_gaussian(size, sigma, str(maps.device)) for size in maps.shape[-2:])
    return rows @ maps @ columns.T


def _wrapped_blur(maps: torch.Tensor, sigma: float) -> torch.Tensor:
    """The same on a torus."""
    rows, columns = (_wrapped_gaussian(size, sigma, str(maps.device)) for size in maps.shape[-2:])
    return rows @ maps @ columns


# Constants made anew at every step would make the host wait for the device.


@functools.cache
def _gaussian(size: int, sigma: float, device: str) -> torch.Tensor:
    place = torch.arange(size, dtype=torch.float32)
    weights = torch.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2))
    return (weights / weights.sum(dim=1, keepdim=True)).to(device)


@functools.cache
def _wrapped_gaussian(size: int, sigma: float, device: str) -> torch.Tensor:
    """(size, size), symmetric: a Gaussian blur of a line whose ends meet."""
    return torch.from_numpy(_wrapped_weights(size, sigma)).to(device)


def _wrapped_weights(size: int, sigma: float) -> np.ndarray:
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    weights = np.exp(-(np.minimum(distance, size - distance) ** 2) / (2 * sigma**2))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


@functools.cache
def _band_deviation(rows: int, columns: int) -> float:
    """The deviation of the difference of the two blurs of unit white noise: the norm of the joint kernel."""
    fine, coarse = (np.outer(*(_wrapped_weights(size, sigma)[0] for size in (rows, columns))) for sigma in GREEN_SIGMAS)
    return float(np.linalg.norm(fine - coarse))
