"""The views of `util.data.augment`, applied to a whole batch on any device.

Workers then send stored pictures and parameters only (`DeferredView`), and the training step makes the crops
(`pictures`). An antialiased bicubic crop is linear in the rows and in the columns, so it is two small matrices for
each picture and two batched products: dense work without branches, the same picture as the worker's to 1 or 2 levels.
"""

import numpy as np
import torch

from util.data.augment import View, to_unit, unpack
from util.data.effects import apply_effects, separable
from util.data.images import Picture
from util.data.sources import Source
from util.run.device import augments_batches
from util.run.errors import UserError


class DeferredView:
    """A transform whose pixels are made later: `(picture, record, rng) -> {"image": ..., "views": ...}`.

    image: the stored picture, uint8 (h, w, 3), as it lies in memory. views: the parameters (P,) that `transform` draws
    for it, from the same numbers as ever.
    """

    def __init__(self, transform):
        self.transform, self.draw, self.size = transform, transform.draw, transform.size

    def render(self, picture: Picture, view: View) -> dict:
        """The picture and the view that was drawn for it, for the device to make its pixels."""
        return {"image": np.asarray(picture), "views": view.packed()}

    def __call__(self, picture: Picture, record: dict, rng: np.random.Generator) -> dict:
        return self.render(picture, self.draw(picture, record, rng))

    def __repr__(self) -> str:
        return f"DeferredView({self.transform!r})"


def placed(transform, augment_on: str, source: Source, device: torch.device):
    """The transform for the workers: itself, or its DeferredView where --augment_on lets the device make the crops.

    Raises UserError where the device was asked for by name and the pictures of `source` are of many sizes.
    """
    of_one_size = hasattr(source, "picture_size")  # of a packed source
    if augment_on == "device" and not of_one_size:
        raise UserError(
            f"--augment_on device needs pictures of one size, and those of {source.name} are not: pack them first "
            "(python -m util.data.pack) and use no --face_padding, or leave it out"
        )
    deferred = augment_on == "device" or (augment_on == "auto" and of_one_size and augments_batches(device))
    return DeferredView(transform) if deferred else transform


def pictures(batch: dict, transform) -> torch.Tensor:
    """What a training step is fed with, whoever makes the crops: float32 (N, 3, H, W) in [0, 1], where the batch lies.

    batch: of a loader with `transform` (TrainCrop, TrainView or EvalCrop), or with its DeferredView.
    """
    if "views" not in batch:
        return to_unit(batch["image"])
    return apply_views(batch["image"], batch["views"], transform.size, transform.effects).mul_(1 / 255)


@torch.no_grad()
def apply_views(canvases: torch.Tensor, views: torch.Tensor, size: tuple[int, int], effects=()) -> torch.Tensor:
    """Crop, mirror and change a batch as `View.apply` does a picture: levels, float32 (N, 3, H, W) in 0..255.

    canvases: uint8 (N, h, w, 3). views: (N, P), packed. size: (H, W), px. effects: those of EFFECTS that the views may
    have; to leave the others out is what makes them free.
    """
    # a step is under autocast; bf16 has no 256 levels
    with torch.autocast(canvases.device.type, enabled=False):
        parameters = unpack(views)
        levels = crops(canvases, parameters["box"], parameters["flip"], size)
        return apply_effects(levels, parameters, effects)


def crops(canvases: torch.Tensor, box: torch.Tensor, flip: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Antialiased bicubic crops of uint8 (N, h, w, 3), mirrored where `flip` (N,) is 1: whole levels (N, 3, H, W).

    box: (N, 4), x1, y1, x2, y2 in px.
    """
    left, top, right, bottom = box.unbind(1)
    rows = resampling_matrix(top, bottom, canvases.shape[1], size[0])
    columns = resampling_matrix(left, right, canvases.shape[2], size[1], flip)
    levels = canvases.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return separable(levels, rows, columns, whole=True).round_().clamp_(0, 255)


def resampling_matrix(
    low: torch.Tensor, high: torch.Tensor, length: int, count: int, flip: torch.Tensor | None = None
) -> torch.Tensor:
    """Antialiased bicubic resampling of lines as matrices (N, count, length); the rows of each sum to 1.

    low, high: (N,), the part of a line of `length` px that is resampled to `count` px; outside it nothing is seen.
    flip: (N,), 1 where the result is mirrored. PyTorch's kernel: a = -0.5, widened by the factor of a reduction.
    """
    place = torch.arange(count, device=low.device, dtype=low.dtype) + 0.5
    if flip is not None:
        place = torch.where(flip[:, None] > 0, count - place, place)
    low, high = low[:, None], high[:, None]
    scale = (high - low) / count
    pixel = torch.arange(length, device=low.device, dtype=low.dtype) + 0.5 - low  # (N, length), from the crop's edge
    distance = (pixel[:, None] - (place * scale)[:, :, None]) / scale.clamp(min=1)[:, :, None]
    inside = (pixel > 0) & (pixel < high - low)
    weights = _cubic(distance.abs()) * inside[:, None]
    return weights / weights.sum(-1, keepdim=True)


def _cubic(x: torch.Tensor) -> torch.Tensor:
    """Keys' cubic kernel, a = -0.5, at distances x >= 0."""
    x = x.clamp(max=2)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far)
