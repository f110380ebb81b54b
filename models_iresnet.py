"""Improved residual networks for faces (arXiv 2004.04989), as ArcFace (arXiv 1801.07698) trains them.

    model = build_iresnet("ir_50")
    embeddings = model.embed(images)       # (N, 3, H, W) in [0, 1] -> (N, 512)

State-dict names are those of the published face-recognition backbones, so that a released file loads as it is. Its
neck flattens a map of 7 x 7, which ties it to 112 px; here the map is averaged first, so one set of weights takes any
size. `ir_50_flatten` has the published neck, `ir_50_stem2` the same one for 224 px behind a stem of stride 2.
"""

import torch
from torch import nn

from models_vit import Backbone
from util.run.errors import UserError
from util.training.hub import Weights
from util.training.pretrained import load_exactly

EMBED_DIM = 512
WIDTHS = (64, 128, 256, 512)
HALF = (0.5, 0.5, 0.5)  # (x - 127.5) / 127.5 of pixels 0..255


class IRUnit(nn.Module):
    """BN - conv - BN - PReLU - conv (stride) - BN beside a shortcut, (N, C, H, W) -> (N, D, H / s, W / s)."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride > 1 or channels != width:
            projection = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv1(self.bn1(x))
        out = self.conv2(self.prelu(self.bn2(out)))
        return self.bn3(out) + (x if self.downsample is None else self.downsample(x))


class IResNet(Backbone):
    """A face-recognition network: a stem, four stages that each halve the map, and a neck.

    depths: units of each stage. flatten_at: None averages the last map, so that any input size will do; (height, width)
    px flattens it, and the network takes that size only. stem_stride: 1, or 2 for pictures twice as large. dropout:
    of the neck, 0..<1. The embedding has no scale of its own: the last norm's is 1 and is not trained.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        flatten_at: tuple[int, int] | None = None,
        stem_stride: int = 1,
        dropout: float = 0.0,
    ):
        super().__init__(EMBED_DIM, HALF, HALF)
        self.flatten_at, self.fixed_size = flatten_at, flatten_at is not None
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.prelu = nn.PReLU(WIDTHS[0])
        channels = WIDTHS[0]
        for number, (depth, width) in enumerate(zip(depths, WIDTHS, strict=True), 1):
            units = [IRUnit(channels if i == 0 else width, width, 2 if i == 0 else 1) for i in range(depth)]
            self.add_module(f"layer{number}", nn.Sequential(*units))
            channels = width
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        halvings = len(depths) + (stem_stride == 2)
        places = 1
        for side in flatten_at or ():
            places *= -(-side // 2**halvings)
        self.pool = nn.Identity() if flatten_at else nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels * places, EMBED_DIM)
        self.features = nn.BatchNorm1d(EMBED_DIM)
        self.features.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def check_size(self, size: tuple[int, int]) -> None:
        if self.flatten_at and tuple(size) != self.flatten_at:
            raise UserError(
                f"a network that flattens its last map takes {self.flatten_at[0]} x {self.flatten_at[1]} px only, not "
                f"{size[0]} x {size[1]}: take one that averages it, such as --model ir_50"
            )

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] -> embeddings (N, 512). In training N must be at least 2: batch norm."""
        self.check_size(images.shape[-2:])
        x = self.prelu(self.bn1(self.conv1(self.standardize(images))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        x = self.pool(self.dropout(self.bn2(x)))
        return self.features(self.fc(x.flatten(1)))

    def load(self, weights: Weights) -> None:
        """Load weights under the published names; UserError where they are another network's, or for another neck."""
        theirs = weights.state.get("fc.weight")
        if theirs is not None and "layer1.0.conv1.weight" in weights.state and theirs.shape != self.fc.weight.shape:
            raise UserError(
                f"{weights.source} has a neck for {theirs.shape[1]} features, this one has {self.fc.in_features}: "
                "published files are of a flattening neck, such as --model ir_50_flatten --input_size 112"
            )
        load_exactly(self, weights, extra=("head.",))


# units of each stage
IR_DEPTHS = {"ir_18": (2, 2, 2, 2), "ir_34": (3, 4, 6, 3), "ir_50": (3, 4, 14, 3), "ir_100": (3, 13, 30, 3)}
# whether the last map is flattened, and the stem's stride
IR_NECKS = {"": (False, 1), "_flatten": (True, 1), "_stem2": (True, 2)}

# name: units of each stage, whether the neck flattens, stride of the stem
IR_MODELS = {
    f"{name}{neck}": (depths, *choice) for name, depths in IR_DEPTHS.items() for neck, choice in IR_NECKS.items()
}


def build_iresnet(name: str, img_size: tuple[int, int] = (112, 112)) -> IResNet:
    """A freshly initialised network of IR_MODELS. img_size: (height, width) px; it counts where the neck flattens."""
    depths, flattens, stem_stride = IR_MODELS[name]
    return IResNet(depths, img_size if flattens else None, stem_stride)
