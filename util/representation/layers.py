"""What the blocks of a vision transformer compute, read by hooks: nothing of the network is run twice or replaced.

model, here: a Backbone with transformer `blocks`, ours (models_vit) or a plain one of timm, in eval mode. Its tokens
are P prefix tokens (the class token, and registers where there are some), then the L patches row by row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from util.run.errors import UserError

QUERIES = ("class", "mean")


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    """The transformer blocks, first to last; UserError for a network without."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or not len(blocks):
        raise UserError("the network has no transformer blocks: give weights of a plain vision transformer")
    return blocks


def prefix_tokens(model: nn.Module) -> int:
    """The number P of tokens that come before the patches."""
    return getattr(getattr(model, "net", None), "num_prefix_tokens", 1)


def pooling_of(model: nn.Module) -> str:
    """What the embedding is read from: "mean" (of the patch tokens) or "class" (the class token)."""
    if (net := getattr(model, "net", None)) is not None:
        return "class" if net.global_pool == "token" else "mean"
    return "mean" if model.global_pool else "class"


def grid_of(model: nn.Module, images: torch.Tensor) -> tuple[int, int]:
    """The (rows, columns) of patches of pictures (N, 3, H, W)."""
    return images.shape[-2] // model.patch_size, images.shape[-1] // model.patch_size


@contextmanager
def _hooks(handles: Iterator) -> Iterator[None]:
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def tokens_by_layer(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Pictures (N, 3, H, W) in [0, 1] -> tokens (N, P + L, D) before the first block and after each: depth + 1 of them.

    They are the residual stream as it is: no final norm.
    """
    blocks, found = blocks_of(model), []

    def enter(_, inputs):
        found.append(inputs[0].float())

    def leave(_, inputs, output):
        found.append(output.float())

    handles = [blocks[0].register_forward_pre_hook(enter), *(block.register_forward_hook(leave) for block in blocks)]
    with _hooks(handles):
        model.embed(images)
    return found


def pooled(tokens: torch.Tensor, prefix: int, query: str) -> torch.Tensor:
    """Tokens (N, P + L, D) -> (N, D): the class token ("class"), or the mean of the patches ("mean")."""
    return tokens[:, 0] if query == "class" else tokens[:, prefix:].mean(dim=1)


@torch.inference_mode()
def attention_by_layer(model: nn.Module, images: torch.Tensor, layers: Sequence[int] | None = None) -> list:
    """Pictures (N, 3, H, W) in [0, 1] -> softmax(q k^T / sqrt(d)) of blocks, each (N, heads, T, T), rows sum to 1.

    layers: numbers of the blocks, -1 the last; default: all. The network attends through a fused kernel that never
    holds these weights, so they are computed again from the queries and keys that went into it, and compared: times
    the values they must give what the kernel gave. UserError for blocks that attend in some other way.
    """
    blocks = blocks_of(model)
    chosen = [blocks[i] for i in (range(len(blocks)) if layers is None else layers)]
    modules = [_attention_of(block) for block in chosen]
    projected: dict[nn.Module, torch.Tensor] = {}
    mixed: dict[nn.Module, torch.Tensor] = {}

    def keep_qkv(attention: nn.Module) -> Callable:
        return lambda _, inputs, output: projected.__setitem__(attention, output)

    def keep_mixed(attention: nn.Module) -> Callable:
        return lambda _, inputs: mixed.__setitem__(attention, inputs[0])

    handles = [attention.qkv.register_forward_hook(keep_qkv(attention)) for attention in modules]
    handles += [attention.proj.register_forward_pre_hook(keep_mixed(attention)) for attention in modules]
    with _hooks(handles):
        model.embed(images)
    return [_weights(attention, projected[attention], mixed[attention]) for attention in modules]


def _attention_of(block: nn.Module) -> nn.Module:
    attention = getattr(block, "attn", None)
    if not all(hasattr(attention, name) for name in ("qkv", "proj", "num_heads")):
        raise UserError(f"blocks of kind {type(block).__name__} have no attention with a joint qkv: it cannot be shown")
    return attention


def _weights(attention: nn.Module, qkv: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    """The attention weights (N, heads, T, T) behind the output of the qkv layer (N, T, 3 D)."""
    n, tokens, width = qkv.shape
    heads = attention.num_heads
    q, k, v = qkv.float().reshape(n, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4).unbind(0)
    # timm's, where a network normalises them
    q = getattr(attention, "q_norm", nn.Identity())(q)
    k = getattr(attention, "k_norm", nn.Identity())(k)
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
    again = (weights @ v).transpose(1, 2).flatten(2)
    # on a GPU either product may have gone through TF32, which is good to a hundredth here
    if (again - mixed.float()).abs().max() > 0.02 * mixed.abs().max():
        kind = type(attention).__name__
        raise UserError(f"attention of kind {kind} does more than softmax(q k) v: its weights cannot be shown")
    return weights
