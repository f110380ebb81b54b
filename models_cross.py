"""Cross-attention parts of cheaper decoders: masked patches ask the visible ones, not each other.

CrossMAE (arXiv 2401.14391) decodes with these blocks alone; PR-MIM (arXiv 2411.15746) fills in what a partial
reconstruction leaves out by something as light as one `Fill`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models_vit import Mlp


class CrossAttention(nn.Module):
    """Multi-head attention of queries (N, Q, D) to a memory (N, T, M) -> (N, Q, D)."""

    def __init__(self, dim: int, memory_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(memory_dim, dim * 2)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        n, count, dim = queries.shape
        q = self.q(queries).reshape(n, count, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv(memory).reshape(n, -1, 2, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(n, count, dim))


class CrossBlock(nn.Module):
    """A pre-norm block of CrossMAE: queries (N, Q, D) read a memory (N, T, M) and never see each other."""

    def __init__(self, dim: int, memory_dim: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CrossAttention(dim, memory_dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, queries: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        queries = queries + self.attn(self.norm1(queries), memory)
        return queries + self.mlp(self.norm2(queries))


class FeatureMaps(nn.Module):
    """What each decoder block reads: a learned mixture of the outputs of all encoder blocks (arXiv 2401.14391, 3.3).

    It begins as the last block's output alone, which is what the plain decoder reads.
    """

    def __init__(self, dim: int, encoder_blocks: int, decoder_blocks: int):
        super().__init__()
        weight = torch.zeros(decoder_blocks, encoder_blocks)
        weight[:, -1] = 1.0
        self.weight = nn.Parameter(weight)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in range(decoder_blocks))

    def forward(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Encoder blocks' outputs, each (N, T, D) -> as many memories (N, T, D) as there are decoder blocks."""
        mixed = torch.tensordot(self.weight, torch.stack(outputs), dims=1)
        return [norm(memory) for norm, memory in zip(self.norms, mixed, strict=True)]


class Fill(nn.Module):
    """Patches that the decoder left out, from those it has worked on: one attention layer without a perceptron."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CrossAttention(dim, dim, num_heads)

    def forward(self, queries: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        """Mask tokens with their places (N, Q, D), decoded tokens (N, T, D) -> (N, Q, D)."""
        return queries + self.attn(queries, self.norm(decoded))
