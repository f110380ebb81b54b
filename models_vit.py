"""Vision transformer layers (Dosovitskiy et al., arXiv 2010.11929) with the state-dict names of the official MAE.

An image of H x W px is cut into (H/p) x (W/p) patches, numbered row by row. A patch is a vector of
p*p*3 values in the order (row in patch, column in patch, channel).
"""

import torch
import torch.nn.functional as F
from torch import nn


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(N, C, H, W) images -> (N, L, p*p*C) patches, channel fastest. H and W must divide by p."""
    n, c, height, width = images.shape
    p = patch_size
    grid = images.reshape(n, c, height // p, p, width // p, p)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(n, (height // p) * (width // p), p * p * c)


def unpatchify(patches: torch.Tensor, patch_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """The inverse of `patchify`: (N, L, p*p*C) patches on a grid of (rows, columns) -> (N, C, H, W)."""
    n, _, values = patches.shape
    rows, columns, p = *grid, patch_size
    blocks = patches.reshape(n, rows, columns, p, p, values // (p * p))
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, rows * p, columns * p)


class PatchEmbed(nn.Module):
    """Linear embedding of patches. The weight is kept as a convolution's, as in every ViT checkpoint."""

    def __init__(self, patch_size: int, embed_dim: int, channels: int = 3):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(N, any number of patches, p*p*C) -> (N, the same number, D)."""
        # a convolution of stride p is this matrix product; it takes any subset of the patches
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches, weight, self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention, (N, T, D) -> (N, T, D)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(n, tokens, dim))


class Mlp(nn.Module):
    """The two-layer perceptron of a block, with GELU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block, (N, T, D) -> (N, T, D)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def init_vit_weights(module: nn.Module) -> None:
    """Xavier-uniform matrices, zero biases, unit norms: the initialisation of MAE (arXiv 2111.06377, appendix A.1)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, PatchEmbed):
        nn.init.xavier_uniform_(module.proj.weight.view(module.proj.weight.shape[0], -1))
        nn.init.zeros_(module.proj.bias)
