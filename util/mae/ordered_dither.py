"""The order of an ordered dither: any number of its first places lies evenly spread over a grid."""

import functools

import torch

from util.run.seed import hash32


@functools.cache
def bayer_ranks(side: int, device: str = "cpu") -> torch.Tensor:
    """The Bayer matrix of a side that is a power of 2: (side, side) int64, each of 0 ... side * side - 1 once."""
    if device != "cpu":
        return bayer_ranks(side).to(device)
    if side == 1:
        return torch.zeros(1, 1, dtype=torch.int64)
    quarter = 4 * bayer_ranks(side // 2)
    return torch.cat([torch.cat([quarter, quarter + 2], 1), torch.cat([quarter + 3, quarter + 1], 1)])


def ranks_over(grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """The least Bayer matrix that covers a grid of (rows, columns); beyond its side it repeats."""
    return bayer_ranks(1 << (max(grid) - 1).bit_length(), str(device))


def spread_first(masked_ids: torch.Tensor, grid: tuple[int, int], noise: torch.Tensor) -> torch.Tensor:
    """Order masked patches so that any number of the first ones lies spread over the picture.

    masked_ids: (N, M) places in a grid of (rows, columns). noise: (N, L), finite; it moves the pattern of each
    sample about. Returns masked_ids (N, M) in another order. In the spirit of the furthest sampling of PR-MIM (arXiv
    2411.15746), but by the order of an ordered dither (Bayer matrix), so it costs one sort and no loop.
    """
    columns = grid[1]
    rank = ranks_over(grid, noise.device)
    # a hash of the bits does not say which patches are masked, as the numbers themselves do
    bits = noise[:, :2].float().contiguous().view(torch.int32).long() & 0xFFFFFFFF
    down, right = (hash32(bits) % len(rank)).split(1, dim=1)
    row, column = masked_ids // columns, masked_ids % columns
    order = rank[(row + down) % len(rank), (column + right) % len(rank)].argsort(dim=1, stable=True)
    return masked_ids.gather(1, order)
