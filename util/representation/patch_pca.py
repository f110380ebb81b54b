"""Principal components of patch tokens as colours (as in DINOv2, arXiv 2304.07193, figure 1), for any colour vision."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Components:
    """mean: (D,). axes: (K, D), orthonormal, by falling variance. share: (K,) of the variance, fractions in 0..1."""

    mean: np.ndarray
    axes: np.ndarray
    share: np.ndarray

    def of(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens (..., D) -> their components (..., K)."""
        return (tokens - self.mean) @ self.axes.T


def fit_components(tokens: np.ndarray, count: int = 3) -> Components:
    """The first principal components of tokens (M, D), in float64; at most min(M, D) of them.

    The sign of an axis is free: its largest entry is made positive, so that one set of tokens gives one figure.
    """
    tokens = np.asarray(tokens, dtype=np.float64)
    mean = tokens.mean(axis=0)
    centred = tokens - mean
    values, vectors = np.linalg.eigh(centred.T @ centred)
    values, axes = values[::-1][:count].clip(min=0), vectors.T[::-1][:count]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1, keepdims=True), axis=1)
    total = np.square(centred).sum()
    return Components(mean, axes * np.sign(largest), values / total if total else np.zeros(len(values)))


def without_position(tokens: np.ndarray) -> np.ndarray:
    """Tokens (N, L, D) less what all N pictures share at each of the L places, which a position embedding makes."""
    return tokens - tokens.mean(axis=0, keepdims=True)


def foreground_by(values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Which patches are figure by a component (N, L): bool, split at the threshold of Otsu (1979).

    The side of which fewer patches lie on the border of their picture, as a share of its own, is the figure.
    """
    figure = values > otsu(values)
    border = np.ones(grid, dtype=bool)
    border[1:-1, 1:-1] = False
    on_border = np.broadcast_to(border.reshape(-1), values.shape)
    shares = [on_border[side].mean() if side.any() else 1.0 for side in (figure, ~figure)]
    return figure if shares[0] <= shares[1] else ~figure


def otsu(values: np.ndarray, bins: int = 256) -> float:
    """The threshold that separates numbers into two classes of the largest variance between them."""
    counts, edges = np.histogram(values, bins=bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = below[-1] + counts[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(invalid="ignore", divide="ignore"):
        between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    # gaps between two clusters give many equal maxima: take their middle
    best = np.flatnonzero(np.isclose(between, np.nanmax(between), rtol=1e-9))
    return float(edges[1:-1][best].mean())


def to_unit_range(values: np.ndarray, percent: float = 1.0) -> np.ndarray:
    """(M, K) -> each column in [0, 1], from its lowest to its highest `percent` percentile."""
    low, high = np.percentile(values, [percent, 100 - percent], axis=0)
    return ((values - low) / np.where(high > low, high - low, 1.0)).clip(0, 1)


def as_colours(components: np.ndarray) -> np.ndarray:
    """Three components in [0, 1], (..., 3) -> sRGB (..., 3) in [0, 1], by way of CIE L*a*b*.

    The first is the lightness, the second runs from blue to yellow, the third from green to red: who does not tell red
    from green misses the weakest of the three only.
    """
    first, second, third = np.moveaxis(components, -1, 0)
    lab = np.stack([25 + 65 * first, 90 * (third - 0.5), 110 * (second - 0.5)], axis=-1)
    return lab_to_srgb(lab)


def lab_to_srgb(lab: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (..., 3) -> sRGB (..., 3) in [0, 1], white point D65; what sRGB does not have is clipped."""
    lightness, a, b = np.moveaxis(np.asarray(lab, dtype=np.float64), -1, 0)
    y = (lightness + 16) / 116
    f = np.stack([y + a / 500, y, y - b / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    linear = xyz @ np.linalg.inv(_SRGB_TO_XYZ / _SRGB_TO_XYZ.sum(axis=1, keepdims=True)).T
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clip(min=0) ** (1 / 2.4) - 0.055)
    return encoded.clip(0, 1)


_SRGB_TO_XYZ = np.array([
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
])  # fmt: skip
