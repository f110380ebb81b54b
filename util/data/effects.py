"""What a view does to its pixels after the crop: colours, blur, erasing.

Everything works on a batch of levels, float32 (N, 3, H, W) in 0..255, with parameters (N,) a picture, on any device:
a worker calls it for one picture, the training step for all of them. Nothing depends on the values of the parameters
but the numbers themselves, so the host never waits, and shapes are fixed.
"""

from collections.abc import Callable, Collection

import torch

from util.run.seed import uniform_for

NOISE_KEYS = 1 << 24  # a key is exact in float32
_LEAST_SIGMA = 1e-3  # px; a kernel this narrow is exactly the identity


def jitter(levels: torch.Tensor, views: dict[str, torch.Tensor]) -> torch.Tensor:
    """Scale brightness, contrast and saturation, in this order, as torchvision does for uint8. Works in place."""
    brightness, contrast, saturation = (
        views[name].view(-1, 1, 1, 1) for name in ("brightness", "contrast", "saturation")
    )
    levels.mul_(brightness)
    _whole(levels)
    mean = _grey(levels).mean((1, 2, 3), keepdim=True)
    levels.mul_(contrast).add_(mean.mul_(1 - contrast))
    _whole(levels)
    grey = _grey(levels).mul_(1 - saturation)
    return _whole(levels.mul_(saturation).add_(grey))


def hue(levels: torch.Tensor, views: dict[str, torch.Tensor]) -> torch.Tensor:
    """Turn the hue by `views["hue"]` (of a full circle; 0: as it is); value and chroma of HSV stay."""
    red, green, _ = levels.unbind(1)
    highest, lowest = levels.amax(1), levels.amin(1)
    chroma = highest - lowest
    from_red, from_green, from_blue = (highest - levels.movedim(1, 0)) / chroma.clamp(min=1)
    sixths = torch.where(highest == green, 2 + from_red - from_blue, 4 + from_green - from_red)
    sixths = torch.where(highest == red, from_blue - from_green, sixths) + 6 * views["hue"].view(-1, 1, 1)
    # a channel lies below the highest by the chroma, but for the sixths of the circle around its own colour
    channels = [(sixths + offset).remainder_(6) for offset in (5, 3, 1)]
    below = torch.stack([torch.minimum(place, 4 - place).clamp_(0, 1) for place in channels], dim=1)
    return (highest.unsqueeze(1) - chroma.unsqueeze(1) * below).round_()


def grey(levels: torch.Tensor, views: dict[str, torch.Tensor]) -> torch.Tensor:
    """The luma in all three channels where `views["grey"]` is 1, as torchvision rounds it."""
    return torch.where(views["grey"].view(-1, 1, 1, 1) > 0, _grey(levels), levels)


def blur(levels: torch.Tensor, views: dict[str, torch.Tensor]) -> torch.Tensor:
    """Gaussian blur of deviation `views["blur"]` (px; 0: none), by torchvision's kernel, mirrored at the borders."""
    height, width = levels.shape[2:]
    radius = blur_radius((height, width))
    rows = blur_matrix(views["blur"], height, radius)
    columns = rows if width == height else blur_matrix(views["blur"], width, radius)
    return separable(levels, rows, columns).round_()


def erase(levels: torch.Tensor, views: dict[str, torch.Tensor]) -> torch.Tensor:
    """Fill the box `views["erase"]` (x1, y1, x2, y2, px of the result) with noise of the key `views["noise"]`.

    The pixels of a box are numbered row by row; each has its own 24 bits, 8 for a channel.
    """
    height, width = levels.shape[2:]
    x1, y1, x2, y2 = views["erase"][:, :, None, None].unbind(1)
    x = torch.arange(width, device=levels.device)
    y = torch.arange(height, device=levels.device)[:, None]
    inside = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
    number = ((y - y1) * (x2 - x1) + x - x1).long().clamp(0, height * width - 1)
    noise = erase_noise(views["noise"], height * width)
    noise = noise.gather(2, number.flatten(1)[:, None].expand(-1, 3, -1)).view(levels.shape)
    return torch.where(inside[:, None], noise, levels)


EFFECTS: dict[str, Callable] = {  # in the order they are applied
    "jitter": jitter,
    "hue": hue,
    "grey": grey,
    "blur": blur,
    "erase": erase,
}


def apply_effects(levels: torch.Tensor, views: dict[str, torch.Tensor], names: Collection[str]) -> torch.Tensor:
    """Those of EFFECTS that are named, for the parameters of `augment.unpack`. May work in place."""
    for name, effect in EFFECTS.items():
        if name in names:
            levels = effect(levels, views)
    return levels


def blur_radius(size: tuple[int, int]) -> int:
    """Pixels on each side of the centre of the blur's kernel: a twentieth of the short side, as SimCLR has it."""
    return max(1, round(0.05 * min(size)))


def blur_matrix(sigma: torch.Tensor, length: int, radius: int) -> torch.Tensor:
    """Gaussian blur of a line of `length` px as a matrix (N, length, length), for deviations (N,) in px.

    The kernel ends after `radius` px; what it would see beyond a border is the line mirrored about its last pixel.
    """
    if radius >= length:
        raise ValueError(f"a kernel of radius {radius} needs lines of more than {length} px")
    sigma = sigma.clamp(min=_LEAST_SIGMA).view(-1, 1, 1)
    place = torch.arange(length, device=sigma.device)
    here, there = place[:, None], place

    def weight(distance: torch.Tensor) -> torch.Tensor:
        return torch.exp(-0.5 * (distance / sigma).square()) * (distance <= radius)

    first, last = there > 0, there < length - 1  # a border pixel is its own mirror image
    matrix = weight((here - there).abs())
    matrix = matrix + weight(here + there) * first + weight(2 * (length - 1) - here - there) * last
    return matrix / matrix.sum(-1, keepdim=True)


def separable(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, *, whole: bool = False) -> torch.Tensor:
    """A linear map of the columns, then one of the rows: (N, C, h, w) by (N, H, h) and (N, W, w) to (N, C, H, W).

    whole: round to levels in between, as uint8 pixels that are resampled in two passes are.
    """
    images = _along_lines(images, columns)
    if whole:
        images.round_().clamp_(0, 255)
    return _along_lines(images.mT, rows).mT.contiguous()


def _along_lines(images: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    n, channels, height, width = images.shape
    lines = torch.bmm(images.reshape(n, channels * height, width), matrix.mT)
    return lines.view(n, channels, height, matrix.shape[1])


def erase_noise(key: torch.Tensor, pixels: int) -> torch.Tensor:
    """Levels 0..255 of the first `pixels` of a box, functions of the key (N,) alone: (N, 3, pixels) float32."""
    bits = uniform_for(0, 0, key.long(), pixels).mul_(1 << 24).int()
    return torch.stack([bits >> 16, (bits >> 8) & 255, bits & 255], dim=1).float()


def _grey(levels: torch.Tensor) -> torch.Tensor:
    red, green, blue = levels.unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_().unsqueeze(1)


def _whole(levels: torch.Tensor) -> torch.Tensor:
    return levels.clamp_(0, 255).floor_()
