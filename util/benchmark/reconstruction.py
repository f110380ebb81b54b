"""How good is a reconstruction: metrics for batches of pictures, and the floors a model has to beat.

Pictures are (N, 3, H, W) tensors in [0, 1]; masks are (N, 1, H, W), 1 = removed, as
`MaskedAutoencoder.reconstruct` returns them. Every metric returns one number for each picture, (N,).
The three faults that masked autoencoders are known for have a number each: block artefacts
(`blockiness`), colour distortion (`delta_e`) and loss of fine detail (`hf_energy_ratio`).
"""

import math
from collections.abc import Iterable

import torch

from util.run.device import widest_float

METRICS = ("psnr_db", "psnr_masked_db", "ssim", "loss", "blockiness", "delta_e", "hf_energy_ratio")


def measure(target: torch.Tensor, pasted: torch.Tensor, mask: torch.Tensor, patch: int) -> dict[str, torch.Tensor]:
    """All metrics of a batch but the loss, which only the model knows.

    target: the originals. pasted: the reconstruction with the visible patches kept; clipped to [0, 1] here.
    mask: (N, 1, H, W), 1 = removed. patch: px. Returns {metric: (N,)}:

    - psnr_db, ssim, blockiness, delta_e judge the whole pasted picture, as a person sees it;
    - psnr_masked_db and hf_energy_ratio judge the removed pixels alone; NaN where none is removed.

    blockiness is what the reconstruction adds: the original's own is subtracted.
    """
    image = pasted.clamp(0, 1)
    return {
        "psnr_db": psnr(target, image),
        "psnr_masked_db": psnr_masked(target, image, mask),
        "ssim": ssim(target, image),
        "blockiness": blockiness(image, patch) - blockiness(target, patch),
        "delta_e": delta_e(target, image),
        "hf_energy_ratio": hf_energy_ratio(target, image, mask, patch),
    }


def summarise(values: Iterable[float] | torch.Tensor) -> dict[str, float | int | None]:
    """{"mean", "std"} (population) over the finite values, as JSON can hold them.

    A value that is not a number (nothing was removed) or infinite (the PSNR of equal pictures) has no mean:
    such pictures are left out and counted under "undefined"; with no value left, mean and std are None.
    """
    values = torch.as_tensor(values, dtype=torch.float64).flatten()
    finite = values[values.isfinite()]
    summary = {"mean": finite.mean().item(), "std": finite.std(correction=0).item()} if len(finite) else {}
    left_out = {"undefined": len(values) - len(finite)} if 0 < len(finite) < len(values) else {}
    return {"mean": None, "std": None} | summary | left_out


# --- fidelity ---------------------------------------------------------------------------------------------------


def psnr(target: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio, dB, data range 1: 10 log10(1 / MSE). Infinite for equal pictures."""
    return _decibel((image - target).square().flatten(1).mean(dim=1))


def psnr_masked(target: torch.Tensor, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`psnr` over the pixels where mask (N, 1, H, W) is 1. NaN where the mask is empty."""
    error = (image - target).square().mean(dim=1, keepdim=True) * mask
    return _decibel(error.sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3)))


def ssim(target: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004, doi 10.1109/TIP.2003.819861), at most 1.

    Gaussian window of 11 x 11 px with sigma 1.5, K1 = 0.01, K2 = 0.03, data range 1; the mean over the
    windows that lie inside the picture, and over the three channels. ValueError below 11 px a side.
    """
    if min(target.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs pictures of at least 11 x 11 px, these are {tuple(target.shape[-2:])}")
    c1, c2 = 0.01**2, 0.03**2
    x, y = _wide(target), _wide(image)  # E[x^2] - E[x]^2 cancels in flat areas: single precision is too short
    mean_x, mean_y, xx, yy, xy = _window_means(torch.stack([x, y, x * x, y * y, x * y]))
    var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    return (luminance * structure).flatten(1).mean(dim=1).float()


def _decibel(mse: torch.Tensor) -> torch.Tensor:
    return -10 * torch.log10(mse)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Double precision, which matrix products never round to TF32; single on Apple's GPUs, which have no other."""
    return x.to(widest_float(x.device))


def _window_means(maps: torch.Tensor) -> torch.Tensor:
    """Gaussian-weighted means of (..., H, W) over the windows that lie inside: (..., H - 10, W - 10)."""
    rows, columns = (_window_matrix(size, maps) for size in maps.shape[-2:])
    return rows @ maps @ columns.T  # a banded matrix product is several times faster on a CPU than a convolution


def _window_matrix(size: int, like: torch.Tensor, sigma: float = 1.5, radius: int = 5) -> torch.Tensor:
    """(size - 2 radius, size): row i holds the weights of the window that starts at i."""
    position = torch.arange(size, device=like.device, dtype=like.dtype)
    offset = position - (position[: size - 2 * radius, None] + radius)
    weights = torch.exp(-(offset**2) / (2 * sigma**2)) * (offset.abs() <= radius)
    return weights / weights.sum(dim=1, keepdim=True)


# --- block artefacts --------------------------------------------------------------------------------------------


def blockiness(image: torch.Tensor, patch: int) -> torch.Tensor:
    """Excess step across patch borders, in 8-bit grey levels: 0 in a picture whose content ignores the grid.

    For every pixel pair astride a border, the absolute difference across it less the mean of the two next to
    it on the same line; the mean over borders, lines, both directions and channels, times 255. It is the idea
    of the mean squared difference of slope (Minami and Zakhor 1995, doi 10.1109/76.388057) in first power, so
    that it reads in grey levels. Comparing with the neighbours makes ramps and texture cancel, and
    blur inside a patch does not pass for an edge. NaN where the picture is one patch; patch >= 2.
    """
    excess = []
    for axis in (2, 3):
        step = image.diff(dim=axis).abs()
        border = torch.arange(patch - 1, step.shape[axis], patch, device=image.device)
        across, before, after = (step.index_select(axis, border + shift) for shift in (0, -1, 1))
        excess.append((across - (before + after) / 2).flatten(1))
    return 255 * torch.cat(excess, dim=1).mean(dim=1)


# --- fine detail ------------------------------------------------------------------------------------------------


def hf_energy_ratio(target: torch.Tensor, image: torch.Tensor, mask: torch.Tensor, patch: int) -> torch.Tensor:
    """High-frequency energy of the removed patches over that of the original: 1 = all detail kept, 0 = none.

    Energy is the sum of squared coefficients of each patch's 2-D DCT at or above a quarter of the Nyquist
    frequency (wavelengths up to 8 px) along either axis. Taken inside each patch, so that edges between
    patches, which `blockiness` counts, do not pass for detail. Above 1: noise. NaN where nothing is removed
    or the original is flat.
    """
    removed = mask[:, :, ::patch, ::patch].flatten(1)
    energy = [(_hf_energy(picture, patch) * removed).sum(dim=1) for picture in (image, target)]
    return torch.where(energy[1] > 1e-9, energy[0] / energy[1], torch.nan).float()


def _hf_energy(image: torch.Tensor, patch: int) -> torch.Tensor:
    """(N, 3, H, W) -> (N, L) energy of each patch's high band, channels summed."""
    n, channels, height, width = image.shape
    grid = _wide(image).reshape(n, channels, height // patch, patch, width // patch, patch)
    frequency = torch.arange(patch, device=image.device, dtype=grid.dtype)[:, None]
    dct = torch.cos(math.pi / patch * frequency * (frequency.T + 0.5)) * math.sqrt(2 / patch)
    dct[0] /= math.sqrt(2)
    spectrum = torch.einsum("up,ncrpsq,vq->nrsuvc", dct, grid, dct)
    high = torch.maximum(frequency, frequency.T) >= patch / 4
    return (spectrum.square().sum(dim=-1) * high).sum(dim=(3, 4)).flatten(1)


# --- colour -----------------------------------------------------------------------------------------------------


def delta_e(target: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Mean CIEDE2000 colour difference of two sRGB pictures over all pixels; about 1 is just noticeable."""
    return ciede2000(srgb_to_lab(target), srgb_to_lab(image)).flatten(1).mean(dim=1)


def srgb_to_lab(image: torch.Tensor) -> torch.Tensor:
    """sRGB in [0, 1] (N, 3, H, W) -> CIE L*a*b* (N, 3, H, W), white point D65, 2 degree observer."""
    to_xyz = [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
    matrix = torch.tensor(to_xyz, device=image.device, dtype=image.dtype)
    matrix = matrix / matrix.sum(dim=1, keepdim=True)  # divides by the white point: white becomes (1, 1, 1)
    linear = torch.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4)
    xyz = (matrix[:, :, None, None] * linear[:, None]).sum(dim=2)  # no matrix product: it might run in TF32
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-9) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f.unbind(dim=1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def ciede2000(lab1: torch.Tensor, lab2: torch.Tensor) -> torch.Tensor:
    """CIEDE2000 of two L*a*b* tensors (N, 3, ...) -> (N, ...), with kL = kC = kH = 1.

    The names are those of Sharma, Wu and Dalal 2005 (doi 10.1002/col.20070), equations 2 to 22.
    """
    l1, a1, b1 = lab1.unbind(dim=1)
    l2, a2, b2 = lab2.unbind(dim=1)
    g = 0.5 * (1 - _chroma_weight((torch.hypot(a1, b1) + torch.hypot(a2, b2)) / 2))
    a1, a2 = (1 + g) * a1, (1 + g) * a2
    c1, c2 = torch.hypot(a1, b1), torch.hypot(a2, b2)
    h1, h2 = torch.atan2(b1, a1), torch.atan2(b2, a2)

    turn = h2 - h1
    turn = turn - 2 * math.pi * torch.round(turn / (2 * math.pi))  # the shorter way round, -pi..pi
    d_l, d_c, d_h = l2 - l1, c2 - c1, 2 * torch.sqrt(c1 * c2) * torch.sin(turn / 2)
    l_mean, c_mean = (l1 + l2) / 2, (c1 + c2) / 2
    h_mean = (h1 + turn / 2) % (2 * math.pi)

    t = 1 - 0.17 * torch.cos(h_mean - math.radians(30)) + 0.24 * torch.cos(2 * h_mean)
    t = t + 0.32 * torch.cos(3 * h_mean + math.radians(6)) - 0.20 * torch.cos(4 * h_mean - math.radians(63))
    s_l = 1 + 0.015 * (l_mean - 50) ** 2 / torch.sqrt(20 + (l_mean - 50) ** 2)
    s_c = 1 + 0.045 * c_mean
    s_h = 1 + 0.015 * c_mean * t
    theta = math.radians(30) * torch.exp(-(((torch.rad2deg(h_mean) - 275) / 25) ** 2))
    r_t = -2 * _chroma_weight(c_mean) * torch.sin(2 * theta)
    squared = (d_l / s_l) ** 2 + (d_c / s_c) ** 2 + (d_h / s_h) ** 2 + r_t * (d_c / s_c) * (d_h / s_h)
    return squared.clamp(min=0).sqrt()


def _chroma_weight(chroma: torch.Tensor) -> torch.Tensor:
    power = chroma**7
    return torch.sqrt(power / (power + 25**7))


# --- floors: what needs no model --------------------------------------------------------------------------------


def fill_visible_mean(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Removed pixels take the mean colour of the visible pixels of their own picture. Returns (N, 3, H, W)."""
    return _paste(images, _visible_mean(images, mask).expand_as(images), mask)


def fill_mean_image(images: torch.Tensor, mask: torch.Tensor, mean_image: torch.Tensor) -> torch.Tensor:
    """Removed pixels come from the mean training image (3, H, W), shifted to fit the visible pixels.

    The shift, one number for each picture and channel, is the mean over visible pixels of (image - mean image).
    """
    return _paste(images, mean_image + _visible_mean(images - mean_image, mask), mask)


def fill_inpaint(images: torch.Tensor, mask: torch.Tensor, radius: float = 3.0) -> torch.Tensor:
    """Removed pixels by classical inpainting (Telea 2004, doi 10.1080/10867651.2004.10487596), OpenCV's.

    radius: px. Works on 8-bit pictures on the CPU; visible pixels stay as they are. ImportError without cv2.
    """
    import cv2  # optional and slow to import

    filled = []
    for image, area in zip(images.cpu(), mask.cpu(), strict=True):
        picture = (image.permute(1, 2, 0) * 255).round().byte().contiguous().numpy()
        holes = (area[0] > 0).byte().contiguous().numpy()
        filled.append(torch.from_numpy(cv2.inpaint(picture, holes, radius, cv2.INPAINT_TELEA)).permute(2, 0, 1))
    return _paste(images, torch.stack(filled).to(images) / 255, mask)


def _visible_mean(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(N, 3, 1, 1) mean over the visible pixels; ValueError if a picture has none."""
    visible = (mask == 0).to(images.dtype)
    count = visible.sum(dim=(2, 3), keepdim=True)
    if (count == 0).any():
        raise ValueError("a picture with no visible patch has no visible colour")
    return (images * visible).sum(dim=(2, 3), keepdim=True) / count


def _paste(images: torch.Tensor, fill: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask > 0, fill.clamp(0, 1), images)
