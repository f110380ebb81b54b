"""How a cost grows with a size: a power law through measured sizes, and what it says of one that was not measured."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# 97.5 % points of Student's distribution by degrees of freedom
_STUDENT = (np.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


class PowerLaw(NamedTuple):
    """value = factor x size^exponent, by least squares of the logarithms.

    exponent: 0 does not grow, 1 is linear. low, high: its 95 % interval, infinite for two sizes. residual: root mean
    square of what is left, as a factor: 1.1 means that sizes lie some 10 % off the line. end: the exponent between the
    two largest sizes, for small ones hold constants. each: what a row more costs there. largest, value: of the largest.
    """

    factor: float
    exponent: float
    low: float
    high: float
    residual: float
    end: float
    each: float
    largest: float
    value: float

    def at(self, size: float) -> tuple[float, float]:
        """What a `size` beyond the largest would cost, the least and the most of three ways to go on.

        By the line through all sizes; from the largest size on with the exponent at the end; and, where that is below
        1, with what each row costs at the end: a constant hides that a cost is linear. Where they agree, the growth has
        settled.
        """
        if size <= self.largest * (1 + 1e-9):
            return self.value, self.value
        ways = [self.factor * size**self.exponent, self.value * (size / self.largest) ** self.end]
        if self.end < 1:
            ways.append(self.value + self.each * (size - self.largest))
        return min(ways), max(ways)


def power_law(sizes: Sequence[float], values: Sequence[float]) -> PowerLaw:
    """The power law through `values` (N,) at `sizes` (N,), all above 0.

    ValueError for fewer than two sizes, and where one stands twice.
    """
    order = np.argsort(sizes)
    sizes, values = np.asarray(sizes, float)[order], np.asarray(values, float)[order]
    if len(sizes) < 2 or len(np.unique(sizes)) < len(sizes) or not (values > 0).all():
        found = f"{values.tolist()} at {sizes.tolist()}"
        raise ValueError(f"a power law needs two sizes, all different, and values above 0, not {found}")
    x, y = np.log(sizes), np.log(values)
    slope, constant = np.polyfit(x, y, 1)
    rest, freedom = y - (slope * x + constant), len(x) - 2
    half = np.inf
    if freedom:
        half = _STUDENT[min(freedom, len(_STUDENT) - 1)] * math.sqrt(
            rest @ rest / freedom / np.sum((x - x.mean()) ** 2)
        )
    return PowerLaw(
        factor=math.exp(constant),
        exponent=float(slope),
        low=float(slope - half),
        high=float(slope + half),
        residual=math.exp(math.sqrt(np.mean(rest**2))),
        end=float((y[-1] - y[-2]) / (x[-1] - x[-2])),
        each=float((values[-1] - values[-2]) / (sizes[-1] - sizes[-2])),
        largest=float(sizes[-1]),
        value=float(values[-1]),
    )
