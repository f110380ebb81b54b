"""Put weights from elsewhere into a model that is already built."""

import hashlib

import torch
from torch import nn

from util.mae.pos_embed import resample_pos_embed, square_grid
from util.run.errors import UserError
from util.training.hub import Weights


def load_pretrained(model: nn.Module, weights: Weights, optional: tuple[str, ...]) -> list[str]:
    """Load weights into a vision transformer; returns the names that they lack and that keep their fresh values.

    model: has `grid` (rows, columns) and `patch_size` (px). optional: how names may begin that can be lacking.
    Position embeddings are re-sampled to the model's grid. Weights without an encoder, of another architecture,
    or without a part that is not optional are a UserError.
    """
    own = model.state_dict()
    state = {name: value for name, value in weights.state.items() if name in own}
    if "patch_embed.proj.weight" not in state:
        raise UserError(f"{weights.source} holds no encoder: it has no patch_embed.proj.weight; choose other weights")
    if "pos_embed" in state:
        old = grid_of_weights(weights, model.patch_size)
        for name in ("pos_embed", "decoder_pos_embed"):
            if name in state and state[name].shape == (1, 1 + old[0] * old[1], own[name].shape[-1]):
                state[name] = resample_pos_embed(state[name], old, model.grid)
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise UserError(
                f"{weights.source} is a checkpoint of another model: {name} is {tuple(value.shape)}, "
                f"this model needs {tuple(own[name].shape)}; choose the matching --model"
            )
    missing = [name for name in own if name not in state]
    lost = [name for name in missing if not name.startswith(optional)]
    if lost:
        raise UserError(f"{weights.source} lacks {lost[0]} and {len(lost) - 1} more weights of the encoder")
    left = ("head.", "norm.", "fc_norm.") + (() if "mask_token" in own else ("decoder", "mask_token"))
    extra = [name for name in weights.state if name not in own and not name.startswith(left)]
    if extra:
        raise UserError(
            f"{weights.source} is a checkpoint of a deeper or another model (it holds {extra[0]}): choose its --model"
        )
    model.load_state_dict({**{name: own[name] for name in missing}, **state})
    return missing


def load_exactly(net: nn.Module, weights: Weights, extra: tuple[str, ...] = ()) -> None:
    """Load weights under a network's own names, all of them and no others.

    extra: how names may begin that the weights have besides, such as a classifier's. UserError where they are another
    network's; nothing is changed then.
    """
    own, state = net.state_dict(), weights.state
    for name, value in own.items():
        if name not in state:
            raise UserError(f"{weights.source} is no checkpoint of this network: it lacks {name}; choose its --model")
        if state[name].shape != value.shape:
            raise UserError(
                f"{weights.source} is a checkpoint of another model: {name} is {tuple(state[name].shape)}, "
                f"this one needs {tuple(value.shape)}; choose the matching --model or --input_size"
            )
    for name in state:
        if name not in own and not name.startswith(extra):
            raise UserError(f"{weights.source} is a checkpoint of another or a deeper network: it also holds {name}")
    net.load_state_dict({name: state[name] for name in own})


def count_blocks(state: dict[str, torch.Tensor], prefix: str) -> int:
    """The number of transformer blocks under a prefix such as "blocks"."""
    return len({name.split(".")[1] for name in state if name.startswith(prefix + ".")})


def grid_of_weights(weights: Weights, patch_size: int, prefix: int = 1) -> tuple[int, int]:
    """The (rows, columns) of patches that weights were trained on; UserError where nothing tells.

    prefix: tokens without a place in the picture that have a position embedding too, such as the class token.
    """
    if "pos_embed" not in weights.state:
        raise UserError(f"{weights.source} lacks pos_embed: it is no checkpoint of a masked autoencoder")
    if weights.state["pos_embed"].ndim != 3:
        raise UserError(f"{weights.source} has position embeddings of another form: choose other weights")
    size, patches = weights.args.get("input_size"), weights.state["pos_embed"].shape[1] - prefix
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        grid = height // patch_size, width // patch_size
        if grid[0] * grid[1] == patches:
            return grid
    try:
        return square_grid(patches)
    except ValueError as error:
        raise UserError(f"{weights.source}: {error}") from error


def fingerprint_of(state: dict[str, torch.Tensor]) -> str:
    """16 hex digits that change with any name, shape, type or bit of a state dict."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tuple(value.shape)}\0{value.dtype}\0".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
