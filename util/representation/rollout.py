"""Attention rollout (arXiv 2005.00928): how much of each input token reaches each token of the last block."""

from collections.abc import Sequence

import torch


def rollout(attentions: Sequence[torch.Tensor]) -> torch.Tensor:
    """Attention weights of all blocks, first to last, each (N, heads, T, T) -> (N, T, T), rows sum to 1.

    In each block the heads are averaged and the residual connection counts as much as the attention: A = 0.5 W + 0.5 I
    (section 3). The result is the product A_last ... A_2 A_1; row t says where token t comes from.
    """
    product = None
    for weights in attentions:
        mean = weights.mean(dim=1)
        step = 0.5 * mean + 0.5 * torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        product = step if product is None else step @ product
    return product


def over_patches(weights: torch.Tensor, prefix: int, query: str) -> torch.Tensor:
    """Attention (..., T, T) -> what each of the L patches gets, (..., L), in multiples of an equal share.

    query: who attends, "class" (the class token) or "mean" (the mean over all patches, which is what a mean-pooled
    embedding reads). prefix: tokens before the patches; what they get is left out, so that the mean over L is 1.
    """
    rows = weights[..., 0, prefix:] if query == "class" else weights[..., prefix:, prefix:].mean(dim=-2)
    return rows / rows.mean(dim=-1, keepdim=True)


def entropy(shares: torch.Tensor) -> torch.Tensor:
    """(..., L) of `over_patches` -> (...): entropy of the attention over log L, 0 (one patch) to 1 (all alike)."""
    length = shares.shape[-1]
    p = shares / length
    return -(p * p.clamp(min=1e-30).log()).sum(dim=-1) / torch.log(torch.tensor(float(length)))


def mean_distance(weights: torch.Tensor, prefix: int, grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """Attention (..., T, T) -> (...): mean distance between a patch and what it attends to, px.

    (arXiv 2010.11929, figure 7.) Attention to and from the prefix tokens is left out.
    """
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = patch_size * torch.stack([y, x], dim=-1).reshape(-1, 2).to(weights)
    distances = (places[:, None] - places[None]).square().sum(dim=-1).sqrt()
    within = weights[..., prefix:, prefix:]
    return (within / within.sum(dim=-1, keepdim=True) * distances).sum(dim=-1).mean(dim=-1)
