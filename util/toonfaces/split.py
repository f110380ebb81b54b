"""Which character gets how many pictures in which split."""

from dataclasses import dataclass

import numpy as np

VAL_FRACTION = TEST_FRACTION = 0.1


@dataclass(frozen=True)
class Sizes:
    """What a data set holds. images: train + val + test pictures of the main identities, in total.

    imbalance: pictures of the most frequent identity over those of the rarest, in train only. The open
    identities (half of them open_val, half open_test) and the novel ones come on top.
    """

    identities: int
    images: int
    imbalance: float = 1.0
    open_identities: int = 20
    open_images: int = 20  # of each open identity
    novel_identities: int = 10
    novel_images: int = 25  # of each novel identity


@dataclass(frozen=True)
class Planned:
    """One picture to draw: number `number` of a character in a split."""

    kind: str  # "id", "open" or "novel": which list of characters
    character: int
    split: str
    number: int


def plan(sizes: Sizes) -> list[Planned]:
    """Every picture of the data set, in the order of its rows."""
    per_split = {
        "train": long_tail(_share(sizes.images, 1 - VAL_FRACTION - TEST_FRACTION), sizes.identities, sizes.imbalance),
        "val": long_tail(_share(sizes.images, VAL_FRACTION), sizes.identities, 1.0),
        "test": long_tail(_share(sizes.images, TEST_FRACTION), sizes.identities, 1.0),
    }
    rows = [
        Planned("id", character, split, number)
        for split, counts in per_split.items()
        for character, count in enumerate(counts)
        for number in range(count)
    ]
    for character in range(sizes.open_identities):
        split = "open_val" if character < sizes.open_identities // 2 else "open_test"
        rows += [Planned("open", character, split, number) for number in range(sizes.open_images)]
    for character in range(sizes.novel_identities):
        rows += [Planned("novel", character, "novel", number) for number in range(sizes.novel_images)]
    return rows


def _share(images: int, fraction: float) -> int:
    return int(images * fraction + 0.5)


def long_tail(total: int, classes: int, imbalance: float) -> list[int]:
    """Exponentially falling counts that sum to total (the long-tailed CIFAR of Cui et al., arXiv 1901.05555).

    The first class is `imbalance` times as frequent as the last one, as nearly as whole numbers and at least
    one picture for each class allow. total must be at least classes.
    """
    weight = imbalance ** -(np.arange(classes) / max(classes - 1, 1))
    exact = total * weight / weight.sum()
    counts = np.maximum(np.floor(exact).astype(int), 1)
    # What rounding left over goes to the largest remainders, what it took too much comes off the largest classes.
    while counts.sum() < total:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > total:
        counts[np.argmax(counts - exact + 1e3 * (counts > 1))] -= 1
    return counts.tolist()
