"""Losses on whole pictures, against the three faults of masked autoencoders: blocks, wrong colours, lost detail.

Pictures are (N, 3, H, W), normalised as the model takes them; `pasted` is the prediction where patches were removed and
the picture itself where they were not; `area` is (N, 1, H, W), 1 = removed, whole patches, some in each picture. A
loss is one number, the mean over the batch, 0 where pasted is target, in float32 (float64 for such input).

`multiscale`, `frequency` and `colour` are never above the pixel loss of the same prediction: by Jensen's inequality the
first, by the triangle inequality of norms the others. So a weight of 1 never outweighs it; `feature`, from 0 to 4, is
of its order.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F

from util.run.device import area_average

PICTURE_LOSSES = ("multiscale", "frequency", "colour", "feature")
SCALES = (2, 4, 8)  # px
LONGEST_WAVE = 8  # px, of what counts as detail

# a network's view of pictures: (N, 3, H, W), normalised -> feature maps, each (N, C, h, w)
Features = Callable[[torch.Tensor], list[torch.Tensor]]


def multiscale_loss(target: torch.Tensor, pasted: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """Squared error of pictures averaged over cells of 2, 4 and 8 px, mean over the removed part and the three scales.

    It weighs what is wrong in the large, such as the colour of a patch, and forgives what is not where it should be.
    Pixels that fill no cell, at the right and lower edge, are left out.
    """
    error = pasted - target
    losses = []
    for scale in SCALES:
        squared = F.avg_pool2d(error, scale).square().sum(dim=(1, 2, 3))
        losses.append(squared / (3 * F.avg_pool2d(area, scale).sum(dim=(1, 2, 3))))
    return torch.stack(losses).mean()


def frequency_loss(target: torch.Tensor, pasted: torch.Tensor, area: torch.Tensor, patch: int) -> torch.Tensor:
    """Squared difference of the Fourier amplitudes of each removed patch in grey, mean over patches and frequencies.

    patch: px. Waves of up to 8 px along either axis are compared, the detail that `hf_energy_ratio` measures; longer
    ones count as equal. Phases are left to the pixel loss, and that is the point. With phases the squared error of
    spectra is the pixel loss again (Parseval), weighted as in the focal frequency loss (arXiv 2012.12821) or not, and
    detail whose place cannot be told is best left out. By amplitude alone it is not: with a weight of W, detail of
    unknown phase is best drawn at W / (1 + W) of its amplitude. That detail is made up, which costs PSNR (the trade of
    arXiv 1711.06077); in grey, the mean of the channels, so that it is no coloured specks. In patches, because beyond
    them the picture is given. The transform is the orthonormal one.
    """
    greys = (_in_patches(picture.mean(dim=1), patch) for picture in (target, pasted))
    amplitudes = [torch.fft.fft2(grey, norm="ortho").abs() for grey in greys]
    waves = torch.fft.fftfreq(patch, device=target.device).abs() >= 1 / LONGEST_WAVE
    error = (amplitudes[0] - amplitudes[1]).square() * (waves | waves[:, None])
    removed = area[:, 0, ::patch, ::patch]
    return (error.mean(dim=(-2, -1)) * removed).sum() / removed.sum()


def colour_loss(target: torch.Tensor, pasted: torch.Tensor, area: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Squared difference of mean and of deviation of each channel over the removed area, their sum, mean over channels.

    The statistics are those of AdaIN's style loss (arXiv 1703.06868, equation 13); the sum of squares is the squared
    2-Wasserstein distance of two normal distributions. Equal means forbid a tint, equal deviations the grey of a hedged
    guess. eps: added to variances, whose root has no slope at 0.
    """
    count = area.sum(dim=(2, 3))
    statistics = []
    for picture in (target, pasted):
        mean = (picture * area).sum(dim=(2, 3)) / count
        variance = ((picture - mean[:, :, None, None]).square() * area).sum(dim=(2, 3)) / count
        statistics.append((mean, (variance + eps).sqrt()))
    (mean, deviation), (own_mean, own_deviation) = statistics
    return ((mean - own_mean).square() + (deviation - own_deviation).square()).mean()


def feature_loss(
    target: torch.Tensor, pasted: torch.Tensor, area: torch.Tensor, features: Features, eps: float = 1e-8
) -> torch.Tensor:
    """Squared distance of a frozen network's features, each scaled to length 1 (as in LPIPS, arXiv 1801.03924).

    Mean over the layers, and over the places of their maps by the removed share of each place; from 0 to 4. The
    network runs in the precision of its surroundings, the distance in full.
    """
    with torch.no_grad():
        wanted = features(target)
    losses = []
    for one, other in zip(wanted, features(pasted), strict=True):
        one, other = (_precise(layer) for layer in (one, other))
        share = area_average(area, one.shape[-2:])[:, 0]
        distance = (F.normalize(one, dim=1, eps=eps) - F.normalize(other, dim=1, eps=eps)).square().sum(dim=1)
        losses.append((distance * share).sum(dim=(1, 2)) / share.sum(dim=(1, 2)))
    return torch.stack(losses).mean()


def _precise(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _in_patches(picture: torch.Tensor, patch: int) -> torch.Tensor:
    """(N, H, W) -> (N, rows, columns, p, p)."""
    n, height, width = picture.shape
    return picture.reshape(n, height // patch, patch, width // patch, patch).transpose(2, 3)


class PictureLosses:
    """The pixel loss and what is added to it.

    weights: factors by name, of PICTURE_LOSSES; a loss of weight 0 is not computed. patch: px.
    features: what `feature_loss` compares by; needed where "feature" has a weight.
    """

    def __init__(self, weights: Mapping[str, float], patch: int, features: Features | None = None):
        by_frequency, by_features = partial(frequency_loss, patch=patch), partial(feature_loss, features=features)
        losses = zip(PICTURE_LOSSES, (multiscale_loss, by_frequency, colour_loss, by_features), strict=True)
        self.features = features
        self.terms = {name: (weights[name], loss) for name, loss in losses if weights.get(name)}

    def __bool__(self) -> bool:
        """Whether anything is added."""
        return bool(self.terms)

    def __call__(
        self, pixel_loss: torch.Tensor, target: torch.Tensor, pasted: torch.Tensor, area: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """{"loss": the weighted sum, "pixel_loss": ..., "NAME_loss": ...}: every part as it is without its weight."""
        pictures = [_precise(part) for part in (target, pasted, area)]
        total, parts = pixel_loss, {}
        for name, (weight, loss) in self.terms.items():
            parts[f"{name}_loss"] = loss(*pictures)
            total = total + weight * parts[f"{name}_loss"]
        return {"loss": total, "pixel_loss": pixel_loss, **parts}
