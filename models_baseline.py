"""The networks that masked autoencoders are compared with, behind the interface of `models_vit.Backbone`.

build_baseline("ir_50", (224, 224))          # face recognition: models_iresnet.py
build_baseline("dinov2_vitb14", (224, 224))  # by a short name, a network of timm
build_baseline("timm:convnext_tiny", (224, 224))
"""

from dataclasses import replace

import torch
from torch import nn

from models_iresnet import IR_MODELS, build_iresnet
from models_vit import Backbone, patch_grid
from util.run.errors import UserError
from util.training.hub import Weights
from util.training.pretrained import grid_of_weights, load_exactly

# short names of networks of timm, with the weights that are meant
TIMM_MODELS = {
    "resnet50": "resnet50.a1_in1k",
    "efficientnet_b0": "efficientnet_b0.ra_in1k",
    "efficientnet_b3": "efficientnet_b3.ra2_in1k",
    "dino_vitb16": "vit_base_patch16_224.dino",
    "dinov2_vitb14": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_vitl14": "vit_large_patch14_dinov2.lvd142m",
}
WITH_MEAN = "+mean"
BASELINE_NAMES = (*IR_MODELS, *TIMM_MODELS)


def timm_name(name: str) -> str | None:
    """What timm calls a network named by its short name or as timm:NAME; None for any other."""
    name = name.removesuffix(WITH_MEAN)
    return name.removeprefix("timm:") if name.startswith("timm:") else TIMM_MODELS.get(name)


def is_baseline(name: str) -> bool:
    """Whether `build_baseline` is meant by a name."""
    return name in IR_MODELS or timm_name(name) is not None


def build_baseline(name: str, img_size: tuple[int, int], drop_path: float = 0.0) -> Backbone:
    """A freshly initialised network by its name: of IR_MODELS, of TIMM_MODELS, or timm:NAME.

    img_size: (height, width) px. drop_path: rate of the last block, 0..<1. A vision transformer whose name ends in
    "+mean" embeds by its class token and the mean of its patch tokens, one after the other (as DINOv2's linear
    evaluation does, arXiv 2304.07193); without that, by the class token alone, or as timm pools.
    """
    if name not in IR_MODELS:
        return TimmBackbone(timm_name(name), img_size, drop_path, with_mean=name.endswith(WITH_MEAN))
    if drop_path:
        raise UserError(f"{name} takes no --drop_path: leave it out")
    return build_iresnet(name, img_size)


class TimmBackbone(Backbone):
    """Any network of timm as a backbone, with the pixel statistics that timm gives for it.

    name: as in timm.list_models(). img_size: (height, width) px. A plain vision transformer stores position embeddings
    for it and re-samples them for inputs of another size; other transformers are built for this one size.
    with_mean: see `build_baseline`. UserError for what timm does not know, and for a size that does not divide.
    """

    def __init__(self, name: str, img_size: tuple[int, int], drop_path: float = 0.0, with_mean: bool = False):
        import timm  # slow to import
        from timm.models import is_model_in_modules
        from timm.models.vision_transformer import VisionTransformer

        try:
            config = timm.get_pretrained_cfg(name, allow_unregistered=False)
        except RuntimeError as error:
            raise UserError(f"timm:{name} is not known ({error}): see timm.list_models(pretrained=True)") from error
        resamples = is_model_in_modules(name.split(".")[0], ["vision_transformer"])
        options = {"img_size": img_size} if config.fixed_input_size else {}
        if resamples:
            options["dynamic_img_size"] = True
        if drop_path:
            options["drop_path_rate"] = drop_path
        try:
            net = timm.create_model(name, pretrained=False, num_classes=0, **options)
        except TypeError as error:
            raise UserError(f"timm:{name} takes no --drop_path: leave it out ({error})") from error
        is_transformer = isinstance(net, VisionTransformer)
        if with_mean and not (is_transformer and net.global_pool == "token"):
            raise UserError(f"timm:{name} does not embed by a class token: leave {WITH_MEAN} out of --model")
        width = getattr(net, "head_hidden_size", net.num_features)
        super().__init__(width * (2 if with_mean else 1), config.mean, config.std)
        self.net, self.fixed_size = net, config.fixed_input_size and not resamples
        self._transformer, self._with_mean = is_transformer, with_mean
        patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
        self.patch_size = patch[0] if isinstance(patch, tuple) else patch
        self.check_size(img_size)
        classifiers = config.classifier or ()
        self._classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)

    @property
    def blocks(self) -> nn.Sequential:
        """The blocks of a plain vision transformer; AttributeError for a network without."""
        if not self._transformer:
            raise AttributeError("no transformer blocks")
        return self.net.blocks

    def check_size(self, size: tuple[int, int]) -> None:
        if self.patch_size:
            patch_grid(*size, self.patch_size)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] -> embeddings (N, D)."""
        self.check_size(images.shape[-2:])
        images = self.standardize(images)
        if not self._with_mean:
            return self.net(images)
        tokens = self.net.forward_features(images)
        return torch.cat([tokens[:, 0], tokens[:, self.net.num_prefix_tokens :].mean(dim=1)], dim=1)

    def load(self, weights: Weights) -> None:
        """Load weights under timm's own names, or under ours; UserError where they are another network's.

        Position embeddings of a plain vision transformer are re-sampled to the size that it was built for.
        """
        state = {name.removeprefix("net."): value for name, value in weights.state.items()}
        # what DINOv2's own files have for its objective, and nobody needs afterwards
        extra = ("head.", "mask_token", *(f"{name}." for name in self._classifiers))
        weights = replace(weights, state=state)
        if self._transformer and "pos_embed" in state:
            state["pos_embed"] = self._resampled(state["pos_embed"], weights)
        load_exactly(self.net, weights, extra)

    def _resampled(self, pos_embed: torch.Tensor, weights: Weights) -> torch.Tensor:
        """Position embeddings of weights for this network's grid; as they are where they cannot be its own."""
        from timm.layers import resample_abs_pos_embed

        own = self.net.pos_embed
        if pos_embed.ndim != 3 or pos_embed.shape == own.shape or pos_embed.shape[-1] != own.shape[-1]:
            return pos_embed
        prefix = 0 if self.net.no_embed_class else self.net.num_prefix_tokens
        old = grid_of_weights(weights, self.patch_size, prefix)
        grid = list(self.net.patch_embed.grid_size)
        return resample_abs_pos_embed(pos_embed, new_size=grid, old_size=list(old), num_prefix_tokens=prefix)


def has_statistics(name: str, model: Backbone) -> bool:
    """Whether timm gives the network `name` the pixel statistics that a model takes out."""
    import timm

    config = timm.get_pretrained_cfg(name)
    own = (*model.pixel_mean.flatten().tolist(), *model.pixel_std.flatten().tolist())
    return all(abs(a - b) < 1e-3 for a, b in zip((*config.mean, *config.std), own, strict=True))
