"""Which patches are removed. Every sample of a batch keeps exactly the same number of patches."""

import functools

import torch


def visible_count(patches: int, mask_ratio: float) -> int:
    """keep = int(L * (1 - mask_ratio)), the number of patches left visible."""
    return int(patches * (1 - mask_ratio))


def rank_patches(noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Order patches by noise, the patches to keep first (MAE's shuffle, arXiv 2111.06377, section 3).

    noise: (N, L). Returns (ids_shuffle, ids_restore), both (N, L) int64: the patches in order of
    rising noise (ties in raster order), and the place of each patch in that order.
    """
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    return ids_shuffle, torch.argsort(ids_shuffle, dim=1)


def random_mask(noise: torch.Tensor, mask_ratio: float) -> torch.Tensor:
    """(N, L) noise -> (N, L) float mask, 0 = kept and 1 = removed; the patches of least noise are kept.

    Masks of the same noise are nested: what a lower ratio removes, a higher one removes too.
    """
    _, ids_restore = rank_patches(noise)
    return (ids_restore >= visible_count(noise.shape[1], mask_ratio)).float()


def spread_first(masked_ids: torch.Tensor, grid: tuple[int, int], noise: torch.Tensor) -> torch.Tensor:
    """Order masked patches so that any number of the first ones lies spread over the picture.

    masked_ids: (N, M) places in a grid of (rows, columns). noise: (N, L), in [0, 1); it moves the pattern of each
    sample about. Returns masked_ids (N, M) in another order. In the spirit of the furthest sampling of PR-MIM (arXiv
    2411.15746), but by the order of an ordered dither (Bayer matrix), so it costs one sort and no loop.
    """
    columns = grid[1]
    rank = bayer_ranks(1 << (max(grid) - 1).bit_length()).to(noise.device)
    low_bits = noise[:, :2] * 4096 % 1  # they do not say which patches are masked
    down, right = (low_bits * len(rank)).long().split(1, dim=1)
    row, column = masked_ids // columns, masked_ids % columns
    order = rank[(row + down) % len(rank), (column + right) % len(rank)].argsort(dim=1, stable=True)
    return masked_ids.gather(1, order)


@functools.cache
def bayer_ranks(side: int) -> torch.Tensor:
    """The Bayer matrix of a side that is a power of 2: (side, side) int64, each of 0 ... side * side - 1 once."""
    if side == 1:
        return torch.zeros(1, 1, dtype=torch.int64)
    quarter = 4 * bayer_ranks(side // 2)
    return torch.cat([torch.cat([quarter, quarter + 2], 1), torch.cat([quarter + 3, quarter + 1], 1)])
