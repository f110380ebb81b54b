"""Which patches are removed. Every sample of a batch keeps exactly the same number of patches."""

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
