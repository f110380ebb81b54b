"""Frozen networks as judges of pictures: their feature maps, for the perceptual loss of util/mae/remedies.py.

net = open_feature_net("own:runs/mae/checkpoint-last.pth", input_size=224)
maps = net(images)      # (N, 3, H, W), normalised -> [(N, C, h, w), ...]
"""

import torch
from torch import nn

from models_baseline import TimmBackbone
from models_transfer import load_recogniser
from models_vit import Backbone, VisionTransformer
from util.data.augment import IMAGENET_MEAN, IMAGENET_STD
from util.run.errors import UserError
from util.training.pretrained import fingerprint_of

LAYERS = 4  # of a network's depth, evenly spread and the last among them


def open_feature_net(spec: str, input_size: int | list[int]) -> "FeatureNet":
    """The network that `spec` names, for pictures of input_size px.

    spec: "own:W", W weights of this project or any that --init takes; "timm:NAME", with the weights that timm has for
    it; "timm:NAME=FILE", with those of a file in timm's layout. UserError for weights that cannot be had: random ones
    would teach nothing that can be named.
    """
    scheme, _, name = spec.partition(":")
    if scheme not in ("own", "timm") or not name:
        raise UserError(f"--feature_net {spec} names no network: give own:CHECKPOINT, timm:NAME or timm:NAME=FILE")
    if scheme == "own":
        return FeatureNet(load_recogniser(name, input_size=input_size).model)
    network, _, file = spec.partition("=")
    return FeatureNet(load_recogniser(file or network, model=network, input_size=input_size).model)


class FeatureNet(nn.Module):
    """Feature maps of a frozen backbone; gradients reach the pictures, never its weights.

    fingerprint: of its weights, so that a resumed run can tell whether they are the same.
    """

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.fingerprint = fingerprint_of(backbone.state_dict())
        self.register_buffer("pixel_mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        if isinstance(backbone, TimmBackbone) and not hasattr(backbone.net, "forward_intermediates"):
            raise UserError(
                "--feature_net: timm gives no feature maps of this network: choose another, such as a resnet"
            )

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Pictures (N, 3, H, W), normalised as a masked autoencoder takes them -> maps, each (N, C, h, w)."""
        images = images * self.pixel_std + self.pixel_mean  # a backbone takes out its own statistics
        if isinstance(self.backbone, TimmBackbone):
            standard = self.backbone.standardize(images)
            return _spread(self.backbone.net.forward_intermediates(standard, intermediates_only=True))
        return [_as_map(tokens, images, self.backbone) for tokens in _spread(self._block_outputs(images))]

    def _block_outputs(self, images: torch.Tensor) -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = []
        hooks = [b.register_forward_hook(lambda _, __, out: outputs.append(out)) for b in self.backbone.blocks]
        self.backbone.forward_features(images)
        for hook in hooks:
            hook.remove()
        return outputs


def _spread(layers: list[torch.Tensor]) -> list[torch.Tensor]:
    count = min(LAYERS, len(layers))
    return [layers[(i + 1) * len(layers) // count - 1] for i in range(count)]


def _as_map(tokens: torch.Tensor, images: torch.Tensor, model: VisionTransformer) -> torch.Tensor:
    """(N, 1 + L, D) tokens, the class token first -> (N, D, rows, columns)."""
    rows, columns = (side // model.patch_size for side in images.shape[-2:])
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (rows, columns))
