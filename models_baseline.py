"""Other people's networks behind the interface of `models_vit.Backbone`."""

import torch

from models_vit import Backbone, patch_grid
from util.run.errors import UserError
from util.training.hub import Weights


class TimmBackbone(Backbone):
    """Any network of timm as a backbone, with the pixel statistics that timm gives for it.

    name: as in timm.list_models(). img_size: (height, width) px, for networks that are built for one size.
    """

    def __init__(self, name: str, img_size: tuple[int, int], drop_path: float = 0.0):
        import timm  # slow to import

        try:
            config = timm.get_pretrained_cfg(name, allow_unregistered=False)
        except RuntimeError as error:
            raise UserError(f"timm:{name} is not known ({error}): see timm.list_models(pretrained=True)") from error
        options = {"img_size": img_size} if config.fixed_input_size else {}
        if drop_path:
            options["drop_path_rate"] = drop_path
        try:
            net = timm.create_model(name, pretrained=False, num_classes=0, **options)
        except TypeError as error:
            raise UserError(f"timm:{name} takes no --drop_path: leave it out ({error})") from error
        patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
        if patch:
            patch_grid(*img_size, patch if isinstance(patch, int) else patch[0])  # refuses what does not divide
        super().__init__(getattr(net, "head_hidden_size", net.num_features), config.mean, config.std)
        self.net, self.fixed_size = net, config.fixed_input_size
        classifiers = config.classifier or ()
        self._classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] -> embeddings (N, D)."""
        return self.net(self.standardize(images))

    def load(self, weights: Weights) -> None:
        """Load weights under timm's own names, or under ours; UserError where they are another network's."""
        own = self.net.state_dict()
        state = {name.removeprefix("net."): value for name, value in weights.state.items()}
        for name, value in own.items():
            if name not in state:
                raise UserError(
                    f"{weights.source} is no checkpoint of this network: it lacks {name}; choose its --model"
                )
            if state[name].shape != value.shape:
                raise UserError(
                    f"{weights.source} is a checkpoint of another model: {name} is {tuple(state[name].shape)}, "
                    f"this one needs {tuple(value.shape)}; choose the matching --model or --input_size"
                )
        ours = ("head.", *(f"{name}." for name in self._classifiers))
        for name in state:
            if name not in own and not name.startswith(ours):
                raise UserError(
                    f"{weights.source} is a checkpoint of another or a deeper network: it also holds {name}"
                )
        self.net.load_state_dict({name: state[name] for name in own})


def has_statistics(name: str, model: Backbone) -> bool:
    """Whether timm gives the network `name` the pixel statistics that a model takes out."""
    import timm

    config = timm.get_pretrained_cfg(name)
    own = (*model.pixel_mean.flatten().tolist(), *model.pixel_std.flatten().tolist())
    return all(abs(a - b) < 1e-3 for a, b in zip((*config.mean, *config.std), own, strict=True))
