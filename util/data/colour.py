"""The colour scheme of a picture as a vector, made without any model: what characters share who are confused for it.

It knows no shapes, yet it is far from nothing: by it alone, 36 % of the validation faces of 95 characters (a part of
nagadomi's animeface-character-dataset) lie nearest to their own character's mean, where 1 % would by chance.
"""

import functools
import itertools

import numpy as np
import torch
from torch.nn import functional

from util.data.smart_crop import rgb_to_lab

BINS = (4, 8, 8)  # of L*, a*, b*
SIGNATURE_DIM = BINS[0] * BINS[1] * BINS[2]

_LOW, _HIGH = np.float32([0, -50, -60]), np.float32([100, 70, 70])  # colours beyond are counted in the outer bins
_SIDE = 48  # px that are looked at along a side: finer texture is no part of a colour scheme
_SPREAD = 0.25  # deviation of the window around the centre, fraction of the sides: hair and face, not the background


def colour_signature(pixels: torch.Tensor | np.ndarray) -> np.ndarray:
    """A histogram of the colours in uint8 RGB (3, H, W) as a vector (256,) float32 of length 1, none below 0.

    CIE L*a*b*, each pixel shared out among the 8 bins around it and weighted by a Gaussian window; the root of each
    share, so that the cosine of two signatures is the Bhattacharyya coefficient of the histograms, in 0..1.
    """
    if not torch.is_tensor(pixels):
        pixels = torch.from_numpy(np.array(pixels))  # a copy: PyTorch warns of arrays that cannot be written
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or len(pixels) != 3:
        raise ValueError(f"a picture must be uint8 (3, H, W), not {pixels.dtype} {tuple(pixels.shape)}")
    small = functional.adaptive_avg_pool2d(pixels.float(), _SIDE).round_().to(torch.uint8)
    lab = rgb_to_lab(small.permute(1, 2, 0).numpy()).reshape(-1, 3)
    bins = np.array(BINS)
    place = ((lab - _LOW) / (_HIGH - _LOW) * bins - 0.5).clip(0, bins - 1)  # of bin centres: 0, 1, ...
    below = np.minimum(np.floor(place).astype(np.int64), bins - 2)
    above = place - below
    histogram = np.zeros(SIGNATURE_DIM)
    for corner in itertools.product((0, 1), repeat=3):
        weight = np.where(corner, above, 1 - above).prod(axis=1) * _window()
        number = np.ravel_multi_index(tuple((below + corner).T), BINS)
        histogram += np.bincount(number, weights=weight, minlength=SIGNATURE_DIM)
    return np.sqrt(histogram / histogram.sum()).astype(np.float32)


def reduce_signatures(signatures: np.ndarray, dims: int = 16) -> np.ndarray:
    """Signatures (N, S) to their first principal components (N, dims), for searches that need few dimensions."""
    centred = signatures.astype(np.float64) - signatures.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)  # in ascending order
    return (centred @ vectors[:, : -dims - 1 : -1]).astype(np.float32)


@functools.cache
def _window() -> np.ndarray:
    place = ((np.arange(_SIDE) + 0.5) / _SIDE - 0.5) / _SPREAD
    bell = np.exp(-0.5 * place**2)
    return np.outer(bell, bell).ravel()
