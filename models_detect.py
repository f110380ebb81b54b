"""Detection of faces and eyes on any backbone: a feature pyramid, and FCOS (arXiv 1904.01355) from torchvision.

    model = build_detector(args)                         # as the flags of main_detect.py describe it
    losses = model(images, targets)                      # training: images (N, 3, H, W) in [0, 1]
    finder = load_detector("RUN/checkpoint-best.pth")    # pictures of any size in, boxes in px of the picture out
    found = finder.detect([picture])[0]

A plain vision transformer has maps of one stride only; the others are made from its last one, as in ViTDet (arXiv
2203.16527), the simple feature pyramid. A convolutional network has its own, which a feature pyramid network (arXiv
1612.03144) joins.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from models_baseline import TimmBackbone
from models_transfer import start_backbone
from models_vit import Backbone, VisionTransformer
from util.data.augment import to_unit
from util.data.scenes import CLASSES, letterbox
from util.run.args import height_width
from util.run.device import autocast, pick_precision, upsampled
from util.run.errors import UserError
from util.training.checkpoint import read_checkpoint
from util.training.hub import load_weights
from util.transfer.lora import LoRAConfig, add_lora

KIND = "detector"  # of a checkpoint, in its notes
WAYS = ("full", "lora", "frozen")
# a score so low that a class costs nothing where its boxes are not known: no loss, no gradient
_NO_CLAIM = -30.0
_EVAL_SCORE, _MOST_FOUND = 0.01, 300  # average precision counts finds of low scores too


class SimplePyramid(nn.Module):
    """Maps of strides p/2, p, 2p and 4p from one of stride p (arXiv 2203.16527, section 3.1).

    dim: channels of that map. width: channels of the results.
    """

    def __init__(self, dim: int, width: int):
        super().__init__()
        up = nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2)
        self.resample = nn.ModuleList([up, nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(4)])
        self.project = nn.ModuleList(_projection(channels, width) for channels in (dim // 2, dim, dim, dim))

    def forward(self, features: torch.Tensor) -> list[torch.Tensor]:
        """(N, D, H, W) -> four maps (N, width, ...), finest first."""
        finest, *others = self.resample
        maps = [upsampled(finest, features), *(resample(features) for resample in others)]
        return [project(own) for project, own in zip(self.project, maps, strict=True)]


def _projection(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel_size=1, bias=False),
        LayerNorm2d(width, eps=1e-6),
        nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(width, eps=1e-6),
    )


class ViTFeatures(nn.Module):
    """The pyramid of a plain vision transformer. `strides`: px, finest first; sides must divide by the last."""

    def __init__(self, net: VisionTransformer, width: int):
        super().__init__()
        self.net, self.out_channels = net, width
        self.pyramid = SimplePyramid(net.embed_dim, width)
        self.strides = tuple(net.patch_size * factor // 2 for factor in (1, 2, 4, 8))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """(N, 3, H, W) in [0, 1] -> maps (N, width, H / stride, W / stride), finest first."""
        rows, columns = (side // self.net.patch_size for side in images.shape[-2:])
        tokens = self.net.forward_features(images)[:, 1:]
        return self.pyramid(tokens.transpose(1, 2).unflatten(2, (rows, columns)))


class ConvFeatures(nn.Module):
    """The pyramid of a convolutional network of timm, strides 8, 16, 32 and 64."""

    strides = (8, 16, 32, 64)

    def __init__(self, net: TimmBackbone, width: int):
        super().__init__()
        self.net, self.out_channels = net, width
        stages = getattr(net.net, "feature_info", None)
        reductions = [stage["reduction"] for stage in stages] if isinstance(stages, list) else []
        if not set(self.strides[:3]) <= set(reductions):
            raise UserError(
                "this network has no maps of strides 8, 16 and 32: choose another --model, such as resnet50"
            )
        self.taken = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in self.strides[:3]]
        channels = [stages[i]["num_chs"] for i in self.taken]
        self.pyramid = FeaturePyramidNetwork(channels, width, LastLevelMaxPool())

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """(N, 3, H, W) in [0, 1] -> maps (N, width, H / stride, W / stride), finest first."""
        maps = self.net.net.forward_intermediates(
            self.net.standardize(images), indices=self.taken, intermediates_only=True
        )
        return list(self.pyramid(OrderedDict(enumerate(maps))).values())


class Head(FCOSHead):
    """FCOS's head, that does not claim what is not known: a data set may have boxes of faces, and none of eyes."""

    def compute_loss(self, targets, head_outputs, anchors, matched_idxs) -> dict[str, torch.Tensor]:
        known = torch.stack([target["known"] for target in targets])[:, None]
        outputs = {name: value.float() for name, value in head_outputs.items()}
        outputs["cls_logits"] = outputs["cls_logits"].masked_fill(~known, _NO_CLAIM)
        return super().compute_loss(targets, outputs, anchors, matched_idxs)


class Detector(FCOS):
    """FCOS on the pyramid of a backbone, for pictures that are batched already.

    width: channels of the pyramid and the head. convs: layers of each of the head's two towers.
    frozen: the backbone learns nothing, nor do its running statistics change.
    """

    def __init__(self, features: ViTFeatures | ConvFeatures, convs: int = 4, frozen: bool = False):
        anchors = AnchorGenerator(tuple((stride,) for stride in features.strides), ((1.0,),) * len(features.strides))
        head = Head(features.out_channels, 1, len(CLASSES), convs)
        super().__init__(
            features, len(CLASSES), anchor_generator=anchors, head=head,
            score_thresh=_EVAL_SCORE, detections_per_img=_MOST_FOUND,
        )  # fmt: skip
        self.transform, self.frozen = None, frozen
        if frozen:
            features.net.requires_grad_(False)

    @property
    def multiple(self) -> int:
        """What the sides of a picture must divide by, px."""
        return max(self.backbone.strides)

    def train(self, mode: bool = True) -> "Detector":
        """A frozen backbone stays as in evaluation."""
        super().train(mode)
        if self.frozen:
            self.backbone.net.eval()
        return self

    def forward(self, images: torch.Tensor, targets: list[dict] | None = None) -> dict | list[dict]:
        """Images (N, 3, H, W) in [0, 1] -> the losses if there are targets, else what is found in each.

        targets: for each picture "boxes" (n, 4), x1 y1 x2 y2 in px, "labels" (n,), places in CLASSES, and "known"
        (classes,) bool, whether the boxes of a class are all there. Found: "boxes", "scores" in 0..1, "labels".
        """
        size = tuple(images.shape[-2:])
        features = self.backbone(images)
        outputs = self.head(features)
        anchors = self.anchor_generator(ImageList(images, [size] * len(images)), features)
        counts = [one.shape[-2] * one.shape[-1] for one in features]
        if targets is not None:
            return self.compute_loss(targets, outputs, anchors, counts)
        split = {name: list(value.float().split(counts, dim=1)) for name, value in outputs.items()}
        return self.postprocess_detections(split, [list(one.split(counts)) for one in anchors], [size] * len(images))


def build_detector(args: dict, say=None, *, weights: bool = True) -> Detector:
    """The detector that the flags of main_detect.py describe; its backbone with the weights of --init.

    say, weights: as of `models_transfer.start_backbone`. UserError for a network that has no maps.
    """
    if args["width"] % 32 or args["width"] < 64:
        # 32 groups, and more than one value in each: of a map of a single place too
        raise UserError(f"--width {args['width']} does not suit the head's group norms: give a multiple of 32, from 64")
    net = start_backbone({**args, "global_pool": True}, say, weights=weights)
    torch.manual_seed(args["seed"])
    if args["train"] == "lora":
        add_lora(net, LoRAConfig(args["rank"], args["alpha"], tuple(args["lora_targets"]), args["lora_dropout"]))
    return Detector(_features(net, args["width"]), args["convs"], frozen=args["train"] == "frozen")


def _features(net: Backbone, width: int) -> ViTFeatures | ConvFeatures:
    if isinstance(net, VisionTransformer):
        # the pooling is no part of it: a parameter without a gradient would stall other processes
        net.fc_norm = nn.Identity()
        return ViTFeatures(net, width)
    if isinstance(net, TimmBackbone):
        return ConvFeatures(net, width)
    raise UserError("this network has no feature maps to detect on: choose a vit_* or a timm:NAME as --model")


@dataclass(frozen=True)
class Found:
    """What is in a picture, best first. boxes: (m, 4) float32, x1 y1 x2 y2, px of the picture. scores: (m,), 0..1.

    labels: (m,) int64, 1 for a face, 2 for an eye.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def of(self, label: int) -> "Found":
        """Those of one label."""
        chosen = self.labels == label
        return Found(self.boxes[chosen], self.scores[chosen], self.labels[chosen])


class PictureDetector:
    """A trained detector for pictures of any size. size: longer side that they are shown at, px."""

    def __init__(self, model: Detector, device: torch.device, size: int, precision: str = "auto"):
        self.model, self.device, self.size = model.to(device).eval(), device, size
        self.precision = pick_precision(precision, device)

    @torch.inference_mode()
    def detect(self, pictures: list[Image.Image], size: int | None = None) -> list[Found]:
        """What is found in each picture; a size of its own takes the place of the detector's."""
        return [self._detect(picture, size or self.size) for picture in pictures]

    def _detect(self, picture: Image.Image, size: int) -> Found:
        canvas, scale = letterbox(picture, size, self.model.multiple)
        with autocast(self.device, self.precision):
            found = self.model(to_unit(canvas[None].to(self.device)))[0]
        boxes = (found["boxes"].cpu() / torch.tensor([scale[0], scale[1]] * 2)).numpy()
        boxes = np.clip(boxes, 0, [picture.width, picture.height] * 2).astype(np.float32)
        return Found(boxes, found["scores"].cpu().numpy(), found["labels"].cpu().numpy() + 1)


def load_detector(ckpt: str | Path, device: torch.device | str = "cpu", size: int | None = None) -> PictureDetector:
    """Read a checkpoint of main_detect.py, or a safetensors file made of one (scripts/make_demo_weights.py).

    size: longer side that pictures are shown at, px; default: as in training. UserError for another kind of checkpoint,
    and where its weights do not fit its flags.
    """
    checkpoint = _read(Path(ckpt))
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != KIND:
        raise UserError(f"{ckpt} is no checkpoint of main_detect.py: give checkpoint-best.pth of such a run")
    args = checkpoint["args"]
    model = build_detector(args, weights=False)
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserError(f"{ckpt} does not fit its own flags: {str(error).splitlines()[-1].strip()}") from error
    return PictureDetector(model, torch.device(device), size or max(height_width(args["input_size"])))


def _read(path: Path) -> dict:
    if path.suffix != ".safetensors":
        return read_checkpoint(path)
    weights = load_weights(str(path), official_names=False)
    return {"kind": weights.args.get("kind"), "args": weights.args, "model": weights.state}
