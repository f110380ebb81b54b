"""What training costs on paper: floating-point operations of one picture, by formula from the shapes of a network.

Counted are the products, two operations for a multiply-add; what else a step does takes time, but no products. A
backward pass computes the gradient of each product by its input and by its weight: twice the forward pass, less where
one of the two is not needed. Attention is counted as its two products and their gradients, whatever the kernel repeats.
"""

from collections.abc import Mapping
from dataclasses import dataclass

MLP_RATIO = 4


@dataclass(frozen=True)
class Shape:
    """A vision transformer, and the decoder of a masked autoencoder. patch: side, px."""

    patch: int
    dim: int
    depth: int
    decoder_dim: int = 0
    decoder_depth: int = 0

    @classmethod
    def of(cls, keywords: Mapping[str, int]) -> "Shape":
        """From the keywords of an entry of VIT_MODELS or MAE_MODELS."""
        return cls(
            keywords["patch_size"],
            keywords["embed_dim"],
            keywords["depth"],
            keywords.get("decoder_embed_dim", 0),
            keywords.get("decoder_depth", 0),
        )

    @property
    def pixels(self) -> int:
        """Values of a patch."""
        return 3 * self.patch**2


def linear(rows: int, fan_in: int, fan_out: int) -> int:
    """A linear layer on some rows, forward."""
    return 2 * rows * fan_in * fan_out


def attention(queries: int, keys: int, dim: int) -> int:
    """The two products of attention over all heads, forward."""
    return 4 * queries * keys * dim


def block(tokens: int, dim: int, last: int | None = None) -> int:
    """A transformer block, forward. last: tokens that are computed, from all of them; default: all."""
    last = tokens if last is None else last
    return (
        linear(2 * tokens + last, dim, dim)
        + attention(last, tokens, dim)
        + linear(last, dim, dim)
        + 2 * linear(last, dim, MLP_RATIO * dim)
    )


def _cross_attention(queries: int, tokens: int, dim: int, memory_dim: int) -> int:
    return 2 * linear(queries, dim, dim) + linear(tokens, memory_dim, 2 * dim) + attention(queries, tokens, dim)


def embedding(shape: Shape, patches: int) -> int:
    """An encoder that sees every patch, forward: what a probe spends on a view of a picture."""
    return linear(patches, shape.pixels, shape.dim) + shape.depth * block(1 + patches, shape.dim)


def pretraining(
    shape: Shape, patches: int, visible: int, *, predict_ratio: float = 1.0, decoder: str = "self", fill: bool = False
) -> int:
    """Forward and backward of a masked autoencoder. visible: patches kept of all. The rest as of `main_pretrain.py`."""
    masked, dim = patches - visible, shape.decoder_dim
    asked = max(1, round(masked * predict_ratio))
    tokens = 1 + visible
    embed = linear(visible, shape.pixels, shape.dim)
    forward = shape.depth * block(tokens, shape.dim)
    predicted = asked
    if decoder == "cross":
        mixtures = 2 * shape.decoder_depth * shape.depth * tokens * shape.dim
        one = _cross_attention(asked, tokens, dim, shape.dim) + 2 * linear(asked, dim, MLP_RATIO * dim)
        forward += mixtures + shape.decoder_depth * one
    else:
        forward += linear(tokens, shape.dim, dim)
        forward += (shape.decoder_depth - 1) * block(tokens + asked, dim) + block(tokens + asked, dim, asked)
        if fill:
            predicted = masked
            forward += _cross_attention(masked - asked, tokens + asked, dim, dim) if masked > asked else 0
    forward += linear(predicted, dim, shape.pixels)
    return 2 * embed + 3 * forward  # nobody needs the gradient of the pixels


def finetuning(shape: Shape, patches: int, classes: int) -> int:
    """Forward and backward with every weight learning, a linear head included."""
    blocks = shape.depth * block(1 + patches, shape.dim)
    return 2 * linear(patches, shape.pixels, shape.dim) + 3 * (blocks + linear(1, shape.dim, classes))


def adapting(shape: Shape, patches: int, classes: int, rank: int) -> int:
    """Forward and backward with LoRA adapters on every layer of the blocks, and a linear head."""
    tokens, dim, hidden = 1 + patches, shape.dim, MLP_RATIO * shape.dim
    # fan in, fan out, rows of A: q, k and v have an A each
    layers = ((dim, 3 * dim, 3 * rank), (dim, dim, rank), (dim, hidden, rank), (hidden, dim, rank))
    frozen = sum(linear(tokens, fan_in, fan_out) for fan_in, fan_out, _ in layers)
    down = sum(linear(tokens, fan_in, rows) for fan_in, _, rows in layers)
    up = sum(linear(tokens, rows, fan_out) for _, fan_out, rows in layers)
    # the gradient of a frozen weight is not needed, nor in the first block the one of what comes in
    one = 2 * frozen + 3 * (down + up + attention(tokens, tokens, dim))
    saved = linear(tokens, dim, 3 * dim) + linear(tokens, dim, 3 * rank)
    embed = linear(patches, shape.pixels, dim)
    return embed + shape.depth * one - saved + 3 * linear(1, dim, classes)


def recomputing(shape: Shape, tokens: int, decoder_tokens: int = 0) -> int:
    """What activation checkpointing adds, at most: the blocks' forward pass once more."""
    again = shape.depth * block(tokens, shape.dim)
    return again + (shape.decoder_depth * block(decoder_tokens, shape.decoder_dim) if decoder_tokens else 0)
