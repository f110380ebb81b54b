"""Random views of a picture, from the decoded picture to the uint8 tensor a model is fed with.

The parameters of a sample are drawn once (`View`), so that its boxes and semantic maps can be sent through the same
geometry, and so that the pixels can be made where that is cheapest: here, picture by picture in a worker, or in
batches on the device (`util.data.augment_batch`). Normalisation is left to the device: a uint8 batch is a quarter of
the bytes.
"""

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from util.data.effects import NOISE_KEYS, apply_effects, erase_noise
from util.data.images import Picture, crop_region, cut, size_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Art wider (or taller) against the target than this is first cut to the target's proportions around the character;
# beyond it a random crop would often hold none.
STRONG_ASPECT = 1.5
BLUR_SIGMA = (0.1, 2.0)  # px, as in SimCLR
_ATTEMPTS = 10

Box = tuple[int, int, int, int]
NO_BOX: Box = (0, 0, 0, 0)


@dataclass(frozen=True)
class View:
    """What becomes of one picture: cut out `box`, mirror if `flip`, then colours, blur and noise, in this order.

    box: x1, y1, x2, y2, px of the stored picture. brightness, contrast, saturation: factors, 1 changes nothing.
    blur: deviation, px of the result; 0: none. erase: x1, y1, x2, y2, px of the result, filled with noise of the key
    `noise` (0..2^24 - 1); an empty box: none. hue: turn of the hue, -0.5..0.5 of a full circle. grey: without colour.
    """

    box: Box
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    blur: float = 0.0
    erase: Box = NO_BOX
    noise: int = 0
    hue: float = 0.0
    grey: bool = False

    def apply(self, picture: Picture, size: tuple[int, int]) -> torch.Tensor:
        """The region resampled (bicubic, antialiased) to `size` (H, W), and so on: uint8 (3, H, W), contiguous."""
        # PyTorch's resize of a channels-last uint8 view is vectorised: four times as fast as PIL's, equal to 1 level.
        pixels = torch.from_numpy(_writable(cut(picture, self.box))).permute(2, 0, 1)[None]
        if pixels.shape[2:] != size:
            pixels = functional.interpolate(pixels, size, mode="bicubic", antialias=True)
        if self.flip:
            pixels = pixels.flip(-1)
        jittered = (self.brightness, self.contrast, self.saturation) != (1, 1, 1)
        changed = {"jitter": jittered, "hue": self.hue != 0, "grey": self.grey, "blur": self.blur > 0}
        if effects := [name for name, is_changed in changed.items() if is_changed]:
            pixels = apply_effects(pixels.float(), unpack(self.packed()[None]), effects).to(torch.uint8)
        pixels = pixels[0].contiguous()
        if self.erase != NO_BOX:  # not as an effect of EFFECTS, which would make noise for the whole picture
            x1, y1, x2, y2 = self.erase
            noise = erase_noise(torch.tensor([self.noise]), (y2 - y1) * (x2 - x1))
            pixels[:, y1:y2, x1:x2] = noise.view(3, y2 - y1, x2 - x1)
        return pixels

    def crop_map(self, values: np.ndarray, picture_size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
        """Semantic maps over the whole picture, as the view shows them: uint8 (..., H, W) of values uint8 (..., h, w).

        picture_size: (W, H), px. grid: (H, W). Each cell is the mean of the map over its area.
        """
        rows = _overlaps(self.box[1], self.box[3], picture_size[1], values.shape[-2], grid[0])
        columns = _overlaps(self.box[0], self.box[2], picture_size[0], values.shape[-1], grid[1])
        if self.flip:
            columns = columns[::-1]
        return np.rint(rows @ values.astype(np.float32) @ columns.T).astype(np.uint8)

    def packed(self) -> torch.Tensor:
        """All parameters, for a batch: float32 (P,), which holds each exactly or to 7 digits. See `unpack`."""
        values = []
        for value in vars(self).values():
            values.extend(value if isinstance(value, tuple) else (value,))
        return torch.from_numpy(np.array(values, dtype=np.float32))  # torch.tensor takes five times as long


_WIDTHS = {name: np.size(value) for name, value in vars(View(NO_BOX)).items()}


def unpack(packed: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parameters of packed views (N, P) by name: boxes (N, 4), all others (N,)."""
    parts = packed.split(list(_WIDTHS.values()), dim=1)
    return {name: part if part.shape[1] > 1 else part[:, 0] for name, part in zip(_WIDTHS, parts, strict=True)}


class _Transform:
    """`(picture, record, rng) -> uint8 (3, H, W)`: a View is drawn, then applied.

    size: (H, W), px. effects: those of EFFECTS that its views may have.
    """

    size: tuple[int, int]
    effects: tuple[str, ...] = ()

    def draw(self, picture: Picture, record: dict, rng: np.random.Generator | None = None) -> View:
        """The parameters of this sample for the numbers of `rng`."""
        raise NotImplementedError

    def render(self, picture: Picture, view: View) -> torch.Tensor:
        """The pixels of a view that was drawn, uint8 (3, H, W)."""
        return view.apply(picture, self.size)

    def __call__(self, picture: Picture, record: dict, rng: np.random.Generator | None = None) -> torch.Tensor:
        return self.render(picture, self.draw(picture, record, rng))


class TrainCrop(_Transform):
    """Random resized crop and mirror: `(picture, record, rng) -> uint8 (3, H, W)`.

    size: (H, W), px. scale: area of the crop, fractions of the picture. ratio: width / height of the crop against
    that of the target. Pictures much wider or taller than the target are first cut around the character.
    """

    def __init__(self, size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=True):
        self.size, self.scale, self.ratio, self.flip = tuple(size), tuple(scale), tuple(ratio), flip

    def draw(self, picture: Picture, record: dict, rng: np.random.Generator) -> View:
        """The geometry of this sample for the numbers of `rng`."""
        aspect = self.size[1] / self.size[0]
        x, y, (width, height) = 0, 0, size_of(picture)
        if max(width / height / aspect, aspect * height / width) > STRONG_ASPECT:
            x, y, right, bottom = crop_region(picture, aspect, record.get("box"))
            width, height = right - x, bottom - y
        ratio = (self.ratio[0] * aspect, self.ratio[1] * aspect)
        left, top, right, bottom = random_resized_box(width, height, self.scale, ratio, rng)
        flip = self.flip and rng.random() < 0.5
        return View((x + left, y + top, x + right, y + bottom), flip)

    def __repr__(self) -> str:
        return f"TrainCrop(size={self.size}, scale={self.scale}, ratio={self.ratio}, flip={self.flip})"


class TrainView(_Transform):
    """A random crop, then mild colour jitter, blur and erasing: `(picture, record, rng) -> uint8 (3, H, W)`.

    crop: TrainCrop. jitter: strength 0..1; brightness, contrast and saturation are scaled by 1 - jitter to 1 + jitter
    (never the hue: hair and eye colours are who a character is). blur: share of pictures, 0..1, that are blurred, by
    a deviation uniform in BLUR_SIGMA. erase: share of pictures, 0..1, with a box of noise.
    """

    def __init__(self, crop: TrainCrop, jitter: float = 0.0, erase: float = 0.0, blur: float = 0.0):
        self.crop, self.jitter, self.erase, self.blur, self.size = crop, jitter, erase, blur, crop.size
        strengths = {"jitter": jitter, "blur": blur, "erase": erase}
        self.effects = tuple(name for name, strength in strengths.items() if strength)

    def draw(self, picture: Picture, record: dict, rng: np.random.Generator) -> View:
        """The parameters of this sample for the numbers of `rng`; the crop is drawn first."""
        drawn = {}
        view = self.crop.draw(picture, record, rng)
        if self.jitter:
            for name in ("brightness", "contrast", "saturation"):
                drawn[name] = rng.uniform(1 - self.jitter, 1 + self.jitter)
        if self.blur and rng.random() < self.blur:
            drawn["blur"] = rng.uniform(*BLUR_SIGMA)
        if self.erase and rng.random() < self.erase:
            drawn["erase"] = random_erase_box(self.size, rng)
            drawn["noise"] = int(rng.integers(NOISE_KEYS))
        return replace(view, **drawn) if drawn else view

    def __repr__(self) -> str:
        return f"TrainView({self.crop!r}, jitter={self.jitter}, erase={self.erase}, blur={self.blur})"


class EvalCrop(_Transform):
    """The smart crop, the same at every call: `(picture, record) -> uint8 (3, H, W)`.

    size: (H, W), px. flip: mirror it, for the second half of a flip test.
    """

    def __init__(self, size, flip: bool = False):
        self.size, self.flip = tuple(size), flip

    def draw(self, picture: Picture, record: dict, rng: np.random.Generator | None = None) -> View:
        """The geometry of this sample; `rng` is not used."""
        return View(crop_region(picture, self.size[1] / self.size[0], record.get("box")), self.flip)

    def __repr__(self) -> str:
        return f"EvalCrop(size={self.size}{', flip=True' if self.flip else ''})"


class WithMaps:
    """A transform that sends the semantic maps of a record through the same crop and mirror as its picture.

    `(picture, record, rng) -> {"image": ..., "maps": uint8 (C, rows, columns)}`, and what else `transform` gives.
    record: of `util.data.maps.MappedSource`. grid: (rows, columns) of the model's patches.
    """

    def __init__(self, transform, grid: tuple[int, int]):
        self.transform, self.grid, self.size = transform, tuple(grid), transform.size

    def __call__(self, picture: Picture, record: dict, rng: np.random.Generator | None = None) -> dict:
        view = self.transform.draw(picture, record, rng)
        seen = self.transform.render(picture, view)
        maps = view.crop_map(record["maps"], size_of(picture), self.grid)
        return {**(seen if isinstance(seen, dict) else {"image": seen}), "maps": torch.from_numpy(maps)}

    def __repr__(self) -> str:
        return f"WithMaps({self.transform!r}, grid={self.grid})"


def random_erase_box(size: tuple[int, int], rng: np.random.Generator) -> Box:
    """A random box x1, y1, x2, y2 in a picture of `size` (H, W), 2 to 33 % of its area (arXiv 1708.04896)."""
    height, width = size
    x1, y1, x2, y2 = random_resized_box(width, height, (0.02, 1 / 3), (0.3, 1 / 0.3), rng)
    if (x2 - x1) * (y2 - y1) > width * height / 2:  # no box of that kind was found: rare, in very wide pictures
        return NO_BOX
    return x1, y1, x2, y2


def random_resized_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
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


def standardize(images: torch.Tensor) -> torch.Tensor:
    """float32 images (N, 3, H, W) in [0, 1] with ImageNet's mean and deviation taken out, in place."""
    mean, std = _statistics(images.device)
    return images.sub_(mean).div_(std)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 images (N, 3, H, W) to float32 with ImageNet's mean and deviation taken out, where they live."""
    return standardize(to_unit(images))


@functools.cache  # a constant made anew would make the host wait for the device at every step
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))


def _writable(pixels: np.ndarray) -> np.ndarray:
    """The pixels themselves, or a copy of those that lie in a file that is only read: PyTorch warns of such."""
    return pixels if pixels.flags.writeable else pixels.copy()


def _overlaps(low: int, high: int, length: int, cells: int, count: int) -> np.ndarray:
    """How much each of `cells` equal parts of `length` px has of each of `count` parts of low..high.

    (count, cells), float32; the rows sum to 1.
    """
    edges = np.linspace(low, high, count + 1) * (cells / length)
    cell = np.arange(cells)
    shared = np.minimum(edges[1:, None], cell + 1) - np.maximum(edges[:-1, None], cell)
    return (shared.clip(0) / (edges[1:] - edges[:-1])[:, None]).astype(np.float32)
