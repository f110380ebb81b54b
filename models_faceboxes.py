"""FaceBoxes (arXiv 1708.05234), a small convolutional face detector.

Written from the paper; names of the layers are those of the state dicts in use, so that published weights load.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from util.run.errors import UserError
from util.training.hub import load_weights

MEAN_BGR = (104.0, 117.0, 123.0)  # subtracted from pixels in 0..255
VARIANCES = (0.1, 0.2)  # scale of the offsets of centre and size
# of each of the three maps: stride in px, then (side of the square prior in px, priors along each side of a cell)
SCALES = ((32, ((32, 4), (64, 2), (128, 1))), (64, ((256, 1),)), (128, ((512, 1),)))


class ConvNorm(nn.Module):
    """Convolution without a bias, batch normalisation, ReLU; with `concatenated` CReLU: [x, -x] before the ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, concatenated: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.concatenated = concatenated

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(torch.cat((x, -x), 1) if self.concatenated else x)


class Inception(nn.Module):
    """Four branches with receptive fields of 1, 3, 3 and 5 px, 32 channels each: (N, 128, H, W) to the same."""

    def __init__(self):
        super().__init__()
        self.branch1x1 = ConvNorm(128, 32, 1)
        self.branch1x1_2 = ConvNorm(128, 32, 1)
        self.branch3x3_reduce = ConvNorm(128, 24, 1)
        self.branch3x3 = ConvNorm(24, 32, 3)
        self.branch3x3_reduce_2 = ConvNorm(128, 24, 1)
        self.branch3x3_2 = ConvNorm(24, 32, 3)
        self.branch3x3_3 = ConvNorm(32, 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        branches = (
            self.branch1x1(x),
            self.branch1x1_2(F.avg_pool2d(x, 3, stride=1, padding=1)),
            self.branch3x3(self.branch3x3_reduce(x)),
            self.branch3x3_3(self.branch3x3_2(self.branch3x3_reduce_2(x))),
        )
        return torch.cat(branches, 1)


class FaceBoxes(nn.Module):
    """The network: maps at strides of 32, 64 and 128 px with 21, 1 and 1 priors a cell."""

    def __init__(self):
        super().__init__()
        self.conv1 = ConvNorm(3, 24, 7, 4, concatenated=True)
        self.conv2 = ConvNorm(48, 64, 5, 2, concatenated=True)
        self.inception1, self.inception2, self.inception3 = Inception(), Inception(), Inception()
        self.conv3_1, self.conv3_2 = ConvNorm(128, 128, 1), ConvNorm(128, 256, 3, 2)
        self.conv4_1, self.conv4_2 = ConvNorm(256, 128, 1), ConvNorm(128, 256, 3, 2)
        priors = [sum(density**2 for _, density in sizes) for _, sizes in SCALES]
        channels = (128, 256, 256)
        self.loc = nn.ModuleList(nn.Conv2d(c, 4 * n, 3, padding=1) for c, n in zip(channels, priors, strict=True))
        self.conf = nn.ModuleList(nn.Conv2d(c, 2 * n, 3, padding=1) for c, n in zip(channels, priors, strict=True))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """BGR (N, 3, H, W), float, MEAN_BGR subtracted, to offsets (N, P, 4) and logits (N, P, 2) of the P priors."""
        x = F.max_pool2d(self.conv1(images), 3, stride=2, padding=1)
        x = F.max_pool2d(self.conv2(x), 3, stride=2, padding=1)
        near = self.inception3(self.inception2(self.inception1(x)))
        middle = self.conv3_2(self.conv3_1(near))
        maps = (near, middle, self.conv4_2(self.conv4_1(middle)))
        return _per_prior(self.loc, maps, 4), _per_prior(self.conf, maps, 2)

    @torch.inference_mode()
    def detect(self, images: Tensor, min_score: float = 0.02, max_overlap: float = 0.4) -> list[tuple[Tensor, Tensor]]:
        """RGB uint8 (N, 3, H, W) to a pair for each: boxes (n, 4) x1 y1 x2 y2 in px, scores (n,) in 0..1, best first.

        They are on the CPU. Boxes may reach beyond the picture. max_overlap: IoU above which the weaker is dropped.
        """
        mean = torch.tensor(MEAN_BGR, device=images.device).view(3, 1, 1)
        offsets, logits = self(images.flip(1).float() - mean)
        boxes = decode(offsets.cpu(), make_priors(*images.shape[-2:]))
        return [
            _strongest(*pair, min_score, max_overlap)
            for pair in zip(boxes, logits.softmax(-1)[..., 1].cpu(), strict=True)
        ]


def _per_prior(heads: nn.ModuleList, maps: tuple[Tensor, ...], values: int) -> Tensor:
    """(N, P, values) in the order of `make_priors`."""
    outputs = [head(x).permute(0, 2, 3, 1).flatten(1) for head, x in zip(heads, maps, strict=True)]
    return torch.cat(outputs, 1).unflatten(1, (-1, values))


def make_priors(height: int, width: int) -> Tensor:
    """Priors (P, 4) float32 of a picture: centre x, y, width, height in px, in the order of the network's outputs.

    Small priors are tiled denser (section 3.2 of the paper); a cell's n x n of them begin at its upper left corner.
    """
    scales = []
    for stride, sizes in SCALES:
        cell = []
        for side, density in sizes:
            places = [k * stride / density for k in range(density)] if density > 1 else [stride / 2]
            cell += [(x, y, side, side) for y, x in product(places, places)]
        corners = torch.cartesian_prod(torch.arange(0, height, stride), torch.arange(0, width, stride)).flip(1)
        scales.append((F.pad(corners, (0, 2))[:, None] + torch.tensor(cell)).flatten(0, 1))
    return torch.cat(scales).float()


def decode(offsets: Tensor, priors: Tensor) -> Tensor:
    """Boxes (..., P, 4) x1 y1 x2 y2 in px from offsets (..., P, 4) and priors (P, 4)."""
    centres = priors[:, :2] + offsets[..., :2] * VARIANCES[0] * priors[:, 2:]
    halves = priors[:, 2:] * (offsets[..., 2:] * VARIANCES[1]).exp() / 2
    return torch.cat((centres - halves, centres + halves), -1)


def _strongest(boxes: Tensor, scores: Tensor, min_score: float, max_overlap: float) -> tuple[Tensor, Tensor]:
    chosen = scores >= min_score
    boxes, scores = boxes[chosen], scores[chosen]
    kept = nms(boxes, scores, max_overlap)
    return boxes[kept], scores[kept]


def load_faceboxes(spec: str, device: torch.device | str = "cpu") -> FaceBoxes:
    """The network with the weights that `spec` names (grammar of util.training.hub), ready to detect.

    Raises UserError where they are missing or of another network.
    """
    model, weights = FaceBoxes(), load_weights(spec, official_names=False)
    try:
        model.load_state_dict(weights.state)
    except RuntimeError as error:
        raise UserError(
            f"{weights.source} holds no FaceBoxes weights: give a state dict such as FaceBoxesProd.pth"
        ) from error
    return model.eval().to(device)
