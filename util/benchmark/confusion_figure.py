"""The confusion matrix as a figure, for twenty classes with their names as well as for thousands."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from util.benchmark.figure_style import COLOURS, INK, families, finish, new_figure, percent, percent_axis, short

NUMBERED = 30  # classes up to which each share is written into its cell
NAMED = 60  # classes up to which all names fit beside the matrix
_CELLS = 280  # rows and columns that larger matrices are pooled to: 2 px each


def confusion_figure(
    rows: np.ndarray,
    cols: np.ndarray,
    counts: np.ndarray,
    order: np.ndarray,
    names: Sequence[str],
    path: Path,
    blocks: Sequence[tuple[str, int]] = (),
):
    """Who is taken for whom, as shares of the probes of each true class.

    rows, cols, counts: (n,) true class, predicted class and number of probes, each pair once. order: (C,) the class
    numbers in the order they are drawn in, similar ones side by side. names: of the classes by number. blocks: (name,
    classes) of consecutive groups in `order`, outlined; those with room are named.
    Beyond NAMED classes the matrix is pooled: a cell shows the largest confusion among the pairs it stands for, so that
    none vanishes; the diagonal, which would outshine all, is drawn beside it as the accuracy along the order.
    """
    total = np.bincount(rows, weights=counts, minlength=len(order))
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    share = counts / total[rows]
    draw = _draw_named if len(order) <= NAMED else _draw_pooled
    figure = draw(place[rows], place[cols], share, total[order], [names[number] for number in order], blocks)
    return finish(figure, _title(rows, cols, counts, total, names), path)


def _title(rows, cols, counts, total, names) -> str:
    right = counts[rows == cols].sum() / total.sum()
    wrong = np.flatnonzero(rows != cols)
    title = f"{percent(right)} of {round(total.sum()):,} faces are named rightly"
    if not len(wrong):
        return title
    worst = wrong[np.lexsort((total[rows[wrong]], -counts[wrong]))[0]]  # of equal numbers, of the rarer character
    who, whom = (short(str(names[classes[worst]]), 28) for classes in (rows, cols))
    return f"{title}; {who} is taken for {whom} most often, {round(counts[worst])} of {round(total[rows[worst]])} times"


def _draw_named(y, x, share, total, names, blocks):
    size = len(names)
    matrix = np.zeros((size, size))
    matrix[y, x] = share
    figure, axes = new_figure(height=min(8.6, 3.4 + 0.24 * size))
    axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    font = {"fontsize": 8.5 if size <= NUMBERED else 6.5, "fontfamily": families()}
    axes.set_xticks(range(size), [short(name, 24) for name in names], rotation=90, **font)
    labels = [f"{short(name, 24)} ({round(count):,})" for name, count in zip(names, total, strict=True)]
    axes.set_yticks(range(size), labels, **font)
    axes.set(xlabel="taken for, % of the probes of a row", ylabel="true character (probes)")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if size <= NUMBERED:
        for row, column in np.argwhere(matrix >= 0.005):
            value = matrix[row, column]
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7.5,
                      color="white" if value > 0.55 else INK)  # fmt: skip
    _outline(axes, blocks, 1, size)
    return figure


def _draw_pooled(y, x, share, total, names, blocks):
    from matplotlib.colors import PowerNorm  # slow to import

    size = len(names)
    factor = -(-size // _CELLS)
    cells = -(-size // factor)
    off = y != x
    pooled = np.zeros((cells, cells))
    np.maximum.at(pooled, (y[off] // factor, x[off] // factor), share[off])
    accuracy = np.zeros(size)
    accuracy[y[~off]] = share[~off]
    figure, (axes, side) = new_figure(columns=2, height=6.4, sharey=True, width_ratios=(5.2, 1))
    extent = (0, cells * factor, cells * factor, 0)
    pooled = np.ma.masked_equal(pooled, 0)  # left white
    style = {"cmap": "magma_r", "norm": PowerNorm(0.5, 0, 1), "interpolation": "nearest"}
    image = axes.imshow(pooled, extent=extent, aspect="auto", **style)
    axes.set(xlabel="taken for", ylabel=f"true character, {size:,} of them", xlim=(0, size), ylim=(size, 0))
    axes.grid(False)
    axes.spines[:].set_visible(True)
    bar = figure.colorbar(image, ax=axes, location="top", shrink=0.6, aspect=40, pad=0.01)
    pairs = f"of {factor} x {factor} pairs, the largest" if factor > 1 else "each pair"
    bar.set_label(f"probes of the true character taken for another one ({pairs})", fontsize=9)
    bar.set_ticks([0, 0.05, 0.2, 0.5, 1])
    bar.ax.tick_params(labelsize=8)
    percent_axis(bar.ax.xaxis)
    known = total > 0
    step = max(1, size // 60)
    groups = [slice(first, min(first + step, size)) for first in range(0, size, step)]
    groups = [group for group in groups if known[group].any()]
    means = [accuracy[group][known[group]].mean() for group in groups]
    heights = [group.stop - group.start for group in groups]
    side.barh([(group.start + group.stop) / 2 for group in groups], means, heights, color=COLOURS[0])
    side.set(xlabel=f"accuracy\n(mean of {step})" if step > 1 else "accuracy", xlim=(0, 1))
    side.set_xticks([0, 0.5, 1])
    percent_axis(side.xaxis)
    side.tick_params(left=False)
    _outline(axes, blocks, 0, size)
    _name_blocks(axes, blocks, size)
    return figure


def _outline(axes, blocks: Sequence[tuple[str, int]], inset: int, size: int) -> None:
    from matplotlib.patches import Rectangle  # slow to import

    first = 0
    for _, classes in blocks:
        if classes > max(1, 0.01 * size):  # smaller ones would be a line along the diagonal
            corner = first - 0.5 * inset
            axes.add_patch(Rectangle((corner, corner), classes, classes, fill=False, edgecolor=INK, linewidth=0.7))
        first += classes


def _name_blocks(axes, blocks: Sequence[tuple[str, int]], size: int) -> None:
    """Ticks in the middle of the blocks, the largest first, as long as names do not touch."""
    if not blocks:
        return
    ends = np.cumsum([classes for _, classes in blocks])
    middles = {i: ends[i] - classes / 2 for i, (_, classes) in enumerate(blocks) if classes > 1}
    taken: list[int] = []
    for i in sorted(middles, key=lambda i: -blocks[i][1]):
        if all(abs(middles[i] - middles[other]) > 0.028 * size for other in taken):
            taken.append(i)
    places, labels = [middles[i] for i in taken], [short(str(blocks[i][0]), 22) for i in taken]
    axes.set_yticks(places, labels, fontsize=8, fontfamily=families())
    axes.set_xticks(places, labels, fontsize=8, fontfamily=families(), rotation=90)
