"""The reconstruction objective of masked autoencoders."""

import torch
from torch.nn import functional as F


def patch_statistics(patches: torch.Tensor, eps: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each patch, (N, L, 1) both; the variance is the unbiased one, plus eps."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + eps).sqrt()


def patch_errors(pred: torch.Tensor, patches: torch.Tensor, norm_pix_loss: bool = False) -> torch.Tensor:
    """Mean squared error of each patch (arXiv 2111.06377, section 3).

    pred, patches: (N, L, V). norm_pix_loss: compare with patches normalised by their own mean and standard deviation.
    Returns (N, L), float32 (float64 for such input).
    """
    precise = torch.promote_types(pred.dtype, torch.float32)  # half precision is too coarse for means of squares
    pred, target = pred.to(precise), patches.to(precise)
    if norm_pix_loss:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    return (pred - target).square().mean(dim=-1)


def masked_pixel_loss(
    pred: torch.Tensor, patches: torch.Tensor, mask: torch.Tensor, norm_pix_loss: bool = False
) -> torch.Tensor:
    """`patch_errors` averaged over the removed patches of each image.

    mask: (N, L), 1 = removed. Returns (N,); NaN where nothing is removed. The objective is the mean over the batch:
    every image has the same number of removed patches.
    """
    errors = patch_errors(pred, patches, norm_pix_loss)
    return (errors * mask).sum(dim=1) / mask.sum(dim=1)


def ranking_loss(predicted: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """How badly `predicted` orders patches by their errors (arXiv 2304.05919, section 3.2): a scalar.

    predicted, errors: (N, M). For each pair with errors i > j the logistic loss of predicted i - j; the mean over all
    such pairs of the batch.
    """
    higher = (errors[:, :, None] > errors[:, None, :]).to(predicted.dtype)
    loss = F.softplus(predicted[:, None, :] - predicted[:, :, None])
    return (loss * higher).sum() / higher.sum().clamp(min=1)
