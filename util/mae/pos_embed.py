"""Fixed 2-D sine-cosine position embeddings, and their re-sampling to another grid."""

import torch
import torch.nn.functional as F


def sincos_pos_embed(
    dim: int,
    grid: tuple[int, int],
    cls_token: bool = True,
    *,
    first: tuple[float, float] = (0.0, 0.0),
    step: tuple[float, float] = (1.0, 1.0),
) -> torch.Tensor:
    """Position embeddings of a patch grid (arXiv 2111.06377; the 1-D form is arXiv 1706.03762, section 3.5).

    dim: multiple of 4. grid: (rows, columns). first, step: of the positions, down and right.
    Returns (1, [1 +] rows * columns, dim): the first half of the vector encodes the column and the second the row,
    each as [sin | cos]; the class token's is zero.
    """
    if dim % 4:
        raise ValueError(f"the embedding dimension {dim} is not a multiple of 4")
    rows, columns = grid
    row, column = torch.meshgrid(
        first[0] + step[0] * torch.arange(rows, dtype=torch.float64),
        first[1] + step[1] * torch.arange(columns, dtype=torch.float64),
        indexing="ij",
    )
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))

    def encode(position: torch.Tensor) -> torch.Tensor:
        angle = position.reshape(-1, 1) * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    embed = torch.cat([encode(column), encode(row)], dim=1)
    if cls_token:
        embed = torch.cat([torch.zeros(1, dim, dtype=torch.float64), embed])
    return embed[None].float()


def resample_pos_embed(embed: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Bicubic re-sampling of (1, 1 + L, D) embeddings from an `old` (rows, columns) grid to a `new` one.

    The class token's embedding is kept as it is.
    """
    if old == new:
        return embed
    if embed.shape[1] != 1 + old[0] * old[1]:
        raise ValueError(f"{embed.shape[1]} position embeddings do not fit a class token and a grid of {old}")
    cls, patches = embed[:, :1], embed[:, 1:]
    dim = embed.shape[-1]
    picture = patches.reshape(1, *old, dim).permute(0, 3, 1, 2).float()
    picture = F.interpolate(picture, size=new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([cls, picture.permute(0, 2, 3, 1).reshape(1, -1, dim).to(embed.dtype)], dim=1)


def square_grid(tokens: int) -> tuple[int, int]:
    """The (rows, columns) of a square grid of `tokens` patches; ValueError if there is none."""
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"{tokens} patches do not form a square grid; the image size of the checkpoint is needed")
    return side, side
