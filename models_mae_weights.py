"""Trained masked autoencoders: which model some weights belong to, and loading them into it.

model = load_mae("official:mae_visualize_vit_base")
"""

from dataclasses import replace

import torch

from models_mae import MAE_MODELS, MaskedAutoencoder, build_mae
from util.run.errors import UserError
from util.training.hub import Weights, load_weights
from util.training.pretrained import count_blocks, grid_of_weights, load_pretrained


def load_mae(
    spec: str, img_size: int | tuple[int, int] | None = None, device: torch.device | str = "cpu"
) -> MaskedAutoencoder:
    """A trained autoencoder, ready to reconstruct, from any weights that `util.training.hub` can name.

    img_size: None keeps the size the checkpoint was trained at. UserError for weights without a decoder.
    """
    weights = load_weights(spec)
    if not has_decoder(weights.state):
        raise UserError(f"{weights.source} holds an encoder only: reconstruction needs a checkpoint with a decoder")
    name = model_name(weights)
    size = img_size or _grid_px(weights, MAE_MODELS[name].keywords["patch_size"])
    model = build_mae(name, size, **decoder_options(weights.state))
    model.norm_pix_loss = bool(weights.args.get("norm_pix_loss", False))
    load_mae_weights(model, weights)
    return model.to(device).eval()


_DECODER = ("decoder_", "mask_token")  # how the names of its weights begin


def has_decoder(state: dict[str, torch.Tensor]) -> bool:
    """Whether a state dict holds the decoder's weights beside the encoder's."""
    return "decoder_pred.weight" in state and "mask_token" in state


def decoder_options(state: dict[str, torch.Tensor]) -> dict:
    """The options of `MaskedAutoencoder` that weights with a decoder were trained with."""
    return {
        "decoder": "cross" if "decoder_maps.weight" in state else "self",
        "fill": "decoder_fill.norm.weight" in state,
        "hard": "decoder_hardness.norm.weight" in state,
        "refine": "decoder_refine.out.weight" in state,
    }


def model_name(weights: Weights) -> str:
    """The name of the model that weights belong to: what the checkpoint says, else found by its shapes."""
    named = weights.args.get("model")
    if named in MAE_MODELS:
        return named
    state = weights.state
    if "patch_embed.proj.weight" not in state:
        raise UserError(f"{weights.source} holds no masked autoencoder: it has no patch_embed.proj.weight")
    shape = {
        "embed_dim": state["patch_embed.proj.weight"].shape[0],
        "patch_size": state["patch_embed.proj.weight"].shape[-1],
        "depth": count_blocks(state, "blocks"),
    }
    if has_decoder(state):
        shape["decoder_embed_dim"] = state["mask_token"].shape[-1]
        shape["decoder_depth"] = count_blocks(state, "decoder_blocks")
    # shapes do not tell the number of heads; a config.json may
    shape |= {key: weights.args[key] for key in ("num_heads", "decoder_num_heads") if key in weights.args}
    for name, build in MAE_MODELS.items():
        if all(build.keywords[key] == value for key, value in shape.items()):
            return name
    raise UserError(f"{weights.source} fits no known model: its shapes are {shape}")


def load_mae_weights(model: MaskedAutoencoder, weights: Weights) -> list[str]:
    """Load weights into an autoencoder; returns the names that the checkpoint lacks and that keep their fresh values.

    An encoder without its decoder is accepted, and so is one with a decoder of the other kind, which is left out;
    anything else that is not the model's own is a UserError.
    """
    if has_decoder(weights.state) and decoder_options(weights.state)["decoder"] != model.decoder:
        weights = replace(weights, state={k: v for k, v in weights.state.items() if not k.startswith(_DECODER)})
    if model.decoder_hardness is None:  # nothing of the prediction depends on it
        state = {name: value for name, value in weights.state.items() if not name.startswith("decoder_hardness")}
        weights = replace(weights, state=state)
    if model.decoder_refine is None and has_decoder(weights.state) and decoder_options(weights.state)["refine"]:
        raise UserError(f"{weights.source} was trained to mend the borders of its prediction: give --refine")
    missing = load_pretrained(model, weights, optional=_DECODER)
    lost = [name for name in missing if not name.startswith(("decoder_fill", "decoder_hardness", "decoder_refine"))]
    if lost and has_decoder(weights.state):
        raise UserError(
            f"{weights.source} lacks {lost[0]}: its decoder is another model's; choose the matching --model"
        )
    return missing


def _grid_px(weights: Weights, patch_size: int) -> tuple[int, int]:
    rows, columns = grid_of_weights(weights, patch_size)
    return rows * patch_size, columns * patch_size
