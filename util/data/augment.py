"""Crops and flips, from a decoded picture to the uint8 tensor a model is fed with.

The parameters of a sample are drawn once (`CropFlip`), so that its boxes and semantic maps can be sent
through the same geometry. Normalisation is left to the device: a uint8 batch is a quarter of the bytes.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from util.data.images import Picture, crop_region, cut, size_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Art wider (or taller) against the target than this is first cut to the target's proportions around the character;
# beyond it a random crop would often hold none.
STRONG_ASPECT = 1.5
_ATTEMPTS = 10


@dataclass(frozen=True)
class CropFlip:
    """The geometry of one sample: cut out `box` (x1, y1, x2, y2, px of the stored image), then mirror if `flip`."""

    box: tuple[int, int, int, int]
    flip: bool = False

    def apply(self, image: Picture, size: tuple[int, int]) -> torch.Tensor:
        """The region resampled (bicubic, antialiased) to `size` (H, W): uint8 (3, H, W), contiguous."""
        # PyTorch's resize of a channels-last uint8 view is vectorised: four times as fast as PIL's, equal to 1 level.
        pixels = torch.from_numpy(cut(image, self.box)).permute(2, 0, 1)[None]
        if pixels.shape[2:] != size:
            pixels = functional.interpolate(pixels, size, mode="bicubic", antialias=True)
        pixels = pixels[0].flip(-1) if self.flip else pixels[0]
        return pixels.contiguous()


class TrainCrop:
    """Random resized crop and mirror: `(image, record, rng) -> uint8 (3, H, W)`.

    size: (H, W), px. scale: area of the crop, fractions of the picture. ratio: width / height of the crop against
    that of the target. Picture much wider or taller than the target are first cut around the character.
    """

    def __init__(self, size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=True):
        self.size, self.scale, self.ratio, self.flip = tuple(size), tuple(scale), tuple(ratio), flip

    def draw(self, image: Picture, record: dict, rng: np.random.Generator) -> CropFlip:
        """The geometry of this sample for the numbers of `rng`."""
        aspect = self.size[1] / self.size[0]
        x, y, (width, height) = 0, 0, size_of(image)
        if max(width / height / aspect, aspect * height / width) > STRONG_ASPECT:
            x, y, right, bottom = crop_region(image, aspect, record.get("box"))
            width, height = right - x, bottom - y
        ratio = (self.ratio[0] * aspect, self.ratio[1] * aspect)
        left, top, right, bottom = random_resized_box(width, height, self.scale, ratio, rng)
        flip = self.flip and rng.random() < 0.5
        return CropFlip((x + left, y + top, x + right, y + bottom), flip)

    def __call__(self, image: Picture, record: dict, rng: np.random.Generator) -> torch.Tensor:
        return self.draw(image, record, rng).apply(image, self.size)

    def __repr__(self) -> str:
        return f"TrainCrop(size={self.size}, scale={self.scale}, ratio={self.ratio}, flip={self.flip})"


class TrainView:
    """A random crop, then mild colour jitter and erasing: `(image, record, rng) -> uint8 (3, H, W)`.

    crop: TrainCrop. jitter: strength 0..1; brightness, contrast and saturation are scaled by 1 - jitter to 1 + jitter
    (never the hue: hair and eye colours are who a character is). erase: share of pictures, 0..1, with a box of noise.
    """

    def __init__(self, crop: TrainCrop, jitter: float = 0.0, erase: float = 0.0):
        self.crop, self.jitter, self.erase = crop, jitter, erase

    def __call__(self, image: Picture, record: dict, rng: np.random.Generator) -> torch.Tensor:
        pixels = self.crop(image, record, rng)
        if self.jitter:
            pixels = color_jitter(pixels, self.jitter, rng)
        if self.erase and rng.random() < self.erase:
            pixels = random_erase(pixels, rng)
        return pixels

    def __repr__(self) -> str:
        return f"TrainView({self.crop!r}, jitter={self.jitter}, erase={self.erase})"


class EvalCrop:
    """The smart crop, the same at every call: `(image, record) -> uint8 (3, H, W)`.

    size: (H, W), px. flip: mirror it, for the second half of a flip test.
    """

    def __init__(self, size, flip: bool = False):
        self.size, self.flip = tuple(size), flip

    def draw(self, image: Picture, record: dict, rng: np.random.Generator | None = None) -> CropFlip:
        """The geometry of this sample; `rng` is not used."""
        return CropFlip(crop_region(image, self.size[1] / self.size[0], record.get("box")), self.flip)

    def __call__(self, image: Picture, record: dict, rng: np.random.Generator | None = None) -> torch.Tensor:
        return self.draw(image, record).apply(image, self.size)

    def __repr__(self) -> str:
        return f"EvalCrop(size={self.size}{', flip=True' if self.flip else ''})"


def color_jitter(pixels: torch.Tensor, strength: float, rng: np.random.Generator) -> torch.Tensor:
    """Scale brightness, contrast and saturation of uint8 (3, H, W), each by a factor in 1 +- strength."""
    from torchvision.transforms.v2 import functional as transforms  # slow to import

    for adjust in (transforms.adjust_brightness, transforms.adjust_contrast, transforms.adjust_saturation):
        pixels = adjust(pixels, rng.uniform(1 - strength, 1 + strength))
    return pixels


def random_erase(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Fill a random box of uint8 (3, H, W), 2 to 33 % of the area, with noise (arXiv 1708.04896)."""
    height, width = pixels.shape[1:]
    x1, y1, x2, y2 = random_resized_box(width, height, (0.02, 1 / 3), (0.3, 1 / 0.3), rng)
    if (x2 - x1) * (y2 - y1) > width * height / 2:  # no box of that kind was found: rare, in very wide pictures
        return pixels
    noise = rng.integers(0, 256, (3, y2 - y1, x2 - x1), dtype=np.uint8)
    pixels = pixels.clone()
    pixels[:, y1:y2, x1:x2] = torch.from_numpy(noise)
    return pixels


def random_resized_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random box x1, y1, x2, y2 (px) in an image, distributed as by torchvision's RandomResizedCrop.

    Area uniform in `scale` (fractions of the image), width / height log-uniform in `ratio`; after ten boxes that do
    not fit, the largest central one whose ratio is allowed.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return x, y, x + w, y + h
    shape = min(max(width / height, ratio[0]), ratio[1])
    w = min(width, max(1, round(height * shape)))
    h = min(height, max(1, round(width / shape)))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 images (N, 3, H, W) to float32 in [0, 1], where they live."""
    return images.to(torch.float32).mul_(1 / 255)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 images (N, 3, H, W) to float32 with ImageNet's mean and deviation taken out, where they live."""
    mean, std = _statistics(images.device)
    return to_unit(images).sub_(mean).div_(std)


@functools.cache  # a constant made anew would make the host wait for the device at every step
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
