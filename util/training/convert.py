"""Key names of a masked autoencoder's state dict: official MAE, Hugging Face and timm.

Everything in this project is kept under the official names. Hugging Face has used three spellings of the
same weights, all of which are read here:

    classic   transformers 4.x, in memory and on disk; what `official_to_hf` and `save_hf` write
    5.x       in memory: `vit.layers.N.attention.q_proj`, `mlp.fc1`
    5.x       on disk: classic, but for the decoder's blocks, `decoder.decoder_encoder.layer.N`

The functions are pure: they map state dicts (name -> tensor) and leave their arguments as they are.
"""

import json
import re
from pathlib import Path

import torch

from util.run.files import write_atomically

State = dict[str, torch.Tensor]

# official name -> classic Hugging Face name, outside the transformer blocks
_HF_NAMES = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
_HF_BLOCKS = {"blocks": "vit.encoder.layer", "decoder_blocks": "decoder.decoder_layers"}
# within a block; attn.qkv is apart, because Hugging Face keeps three matrices for it
_HF_LAYERS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_HF_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))

# the other spellings, brought to the classic one before the tables above are read backwards
_HF_RENAMED = (
    (re.compile(r"^(embeddings|encoder|layers|layernorm)\."), r"vit.\1."),  # an encoder saved on its own
    (re.compile(r"^vit\.layers\."), "vit.encoder.layer."),
    (re.compile(r"^decoder\.decoder_encoder\.layer\."), "decoder.decoder_layers."),
    (re.compile(r"\.attention\.q_proj\."), ".attention.attention.query."),
    (re.compile(r"\.attention\.k_proj\."), ".attention.attention.key."),
    (re.compile(r"\.attention\.v_proj\."), ".attention.attention.value."),
    (re.compile(r"\.attention\.o_proj\."), ".attention.output.dense."),
    (re.compile(r"\.mlp\.fc1\."), ".intermediate.dense."),
    (re.compile(r"\.mlp\.fc2\."), ".output.dense."),
)
_BLOCK_KEY = re.compile(r"^(?P<stack>.+?)\.(?P<index>\d+)\.(?P<layer>.+)\.(?P<kind>weight|bias)$")


def detect_layout(state: State) -> str | None:
    """ "official" (timm's encoders too), "hf" (any of its spellings), or None for anything else."""
    if "patch_embed.proj.weight" in state:
        return "official"
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in state):
        return "hf"
    return None


def official_to_hf(state: State) -> State:
    """Official names -> classic Hugging Face names; `attn.qkv` is cut into query, key and value."""
    converted = {}
    for name, value in state.items():
        block = _BLOCK_KEY.match(name)
        if block is None:
            converted[_rename(name, _HF_NAMES)] = value
            continue
        stack, layer = _HF_BLOCKS.get(block["stack"]), block["layer"]
        if stack is None or layer not in (*_HF_LAYERS, "attn.qkv"):
            raise ValueError(f"{name} has no counterpart in a masked autoencoder")
        if layer == "attn.qkv":
            for part, rows in zip(_HF_QKV, value.chunk(3), strict=True):
                converted[f"{stack}.{block['index']}.{part}.{block['kind']}"] = rows
        else:
            converted[f"{stack}.{block['index']}.{_HF_LAYERS[layer]}.{block['kind']}"] = value
    return converted


def hf_to_official(state: State) -> State:
    """Any of Hugging Face's spellings -> official names; ValueError names a key that has no counterpart."""
    names = {theirs: ours for ours, theirs in _HF_NAMES.items()}
    stacks = {theirs: ours for ours, theirs in _HF_BLOCKS.items()}
    layers = {theirs: ours for ours, theirs in _HF_LAYERS.items()}
    classic = {_classic_name(name): value for name, value in state.items()}
    converted = {}
    for name, value in classic.items():
        block = _BLOCK_KEY.match(name)
        if block is None:
            converted[_rename(name, names)] = value
            continue
        stack, layer = stacks.get(block["stack"]), block["layer"]
        if stack is None or layer not in (*layers, *_HF_QKV):
            raise ValueError(f"{name} has no counterpart in a masked autoencoder")
        if layer == _HF_QKV[0]:
            parts = [classic[name.replace(_HF_QKV[0], part)] for part in _HF_QKV]
            converted[f"{stack}.{block['index']}.attn.qkv.{block['kind']}"] = torch.cat(parts)
        elif layer in layers:
            converted[f"{stack}.{block['index']}.{layers[layer]}.{block['kind']}"] = value
    return converted


def official_to_timm(state: State) -> State:
    """The encoder alone, as timm's `vit_*_patch*_224.mae` names it.

    timm keeps the official names. The decoder has to go: timm takes a state dict that holds `mask_token` for
    another method's and rewrites it.
    """
    return {name: value for name, value in state.items() if not name.startswith(("decoder_", "mask_token"))}


def to_official(state: State) -> State:
    """Any layout that `detect_layout` knows -> official names; ValueError for anything else."""
    layout = detect_layout(state)
    if layout is None:
        raise ValueError("no vision transformer in the official MAE, timm or Hugging Face layout")
    return hf_to_official(state) if layout == "hf" else dict(state)


def hf_config(
    state: State,
    *,
    num_heads: int,
    decoder_num_heads: int,
    image_size: int | tuple[int, int] | None = None,
    norm_pix_loss: bool = False,
    mask_ratio: float = 0.75,
) -> dict:
    """The `config.json` of a ViTMAEForPreTraining for a state dict in official names.

    What shapes do not tell is asked for: the numbers of heads, and image_size (side or (height, width) in px)
    where the grid of position embeddings is not square. layer_norm_eps is 1e-6, the official value;
    Hugging Face's own default, 1e-12, changes the predictions in the fourth decimal.
    """
    patch = state["patch_embed.proj.weight"]
    return {
        "model_type": "vit_mae",
        "architectures": ["ViTMAEForPreTraining"],
        "image_size": _image_size(state, patch.shape[-1], image_size),
        "patch_size": patch.shape[-1],
        "num_channels": patch.shape[1],
        "hidden_size": patch.shape[0],
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count_blocks(state, "blocks"),
        "num_attention_heads": num_heads,
        "decoder_hidden_size": state["decoder_embed.weight"].shape[0],
        "decoder_intermediate_size": state["decoder_blocks.0.mlp.fc1.weight"].shape[0],
        "decoder_num_hidden_layers": _count_blocks(state, "decoder_blocks"),
        "decoder_num_attention_heads": decoder_num_heads,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "mask_ratio": mask_ratio,
        "norm_pix_loss": norm_pix_loss,
    }


def args_from_hf(config: dict) -> dict:
    """What a Hugging Face `config.json` says, under the names of our flags (px; fractions in 0..1)."""
    names = {
        "image_size": "input_size",
        "patch_size": "patch_size",
        "norm_pix_loss": "norm_pix_loss",
        "mask_ratio": "mask_ratio",
        "num_attention_heads": "num_heads",
        "decoder_num_attention_heads": "decoder_num_heads",
    }
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


def save_hf(folder: str | Path, state: State, config: dict) -> Path:
    """Write `model.safetensors` (classic names) and `config.json` (from `hf_config`) into a folder.

    The result loads with `ViTMAEForPreTraining.from_pretrained(folder)` in transformers 4.x and 5.x, which
    `save_pretrained` of 5.x does not achieve: 4.x cannot read the decoder it writes. Returns the folder.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors refuses views that share memory, which the cut qkv matrices are
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in official_to_hf(state).items()}
    write_atomically(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomically(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
    return folder


def _classic_name(name: str) -> str:
    for pattern, replacement in _HF_RENAMED:
        name = pattern.sub(replacement, name)
    return name


def _rename(name: str, table: dict[str, str]) -> str:
    """Translate `name`, or `name` less its .weight or .bias, by the table; ValueError if it is not there."""
    stem, dot, kind = name.rpartition(".")
    if name in table:
        return table[name]
    if stem in table and kind in ("weight", "bias"):
        return table[stem] + dot + kind
    raise ValueError(f"{name} has no counterpart in a masked autoencoder")


def _count_blocks(state: State, stack: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"{stack}.")})


def _image_size(state: State, patch_size: int, image_size: int | tuple[int, int] | None) -> int | list[int]:
    patches = state["pos_embed"].shape[1] - 1
    if image_size is None:
        side = round(patches**0.5)
        if side * side != patches:
            raise ValueError(f"{patches} patches do not form a square grid: image_size is needed")
        return side * patch_size
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if (height // patch_size) * (width // patch_size) != patches:
        raise ValueError(f"an image of {height} x {width} px does not have {patches} patches of {patch_size} px")
    return height if height == width else [height, width]
