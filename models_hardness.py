"""Which patches of a picture will be predicted badly: a small network that learns it beside the autoencoder."""

import torch
from torch import nn


class Hardness(nn.Module):
    """Patches (N, L, p*p*3), all of them -> how hard each is to predict, (N, L), without unit.

    Hard patches mining (arXiv 2304.05919) lets a second decoder behind a moving average of the whole model judge the
    picture; this sees pixels alone, two 3 x 3 convolutions over the grid of patches wide, at less than 1 % of the
    operations of a ViT-B step. It learns by `util.mae.losses.ranking_loss`.
    """

    def __init__(self, patch_size: int, dim: int = 64):
        super().__init__()
        self.embed = nn.Linear(patch_size**2 * 3, dim)
        self.mix = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(2))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.score = nn.Linear(dim, 1)

    def forward(self, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """grid: (rows, columns) of the patches."""
        x = self.embed(patches).transpose(1, 2).unflatten(2, grid)
        for conv in self.mix:
            x = x + conv(nn.functional.gelu(x))
        return self.score(self.norm(x.flatten(2).transpose(1, 2)))[..., 0].float()
