"""Figures of a leaderboard: accuracy against what it costs, a point for each method."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from util.benchmark.figure_style import COLOURS, INK, MARKERS, finish, new_figure, percent_axis, short
from util.benchmark.leaderboard import HEADLINE, Board, Entry

# what it costs -> name of the file, title of the axis, word in the figure's title, factor
AXES = {
    "trainable_params": ("trainable", "trainable parameters", "trainable parameters", 1.0),
    "train_seconds": (
        "time", "training, minutes; own pre-training is in it, fetched weights are not", "training time", 1 / 60,
    ),
    "latency_ms": ("latency", "latency of one picture, ms (median)", "latency", 1.0),
}  # fmt: skip
LOG_FROM = 10.0  # ratio of the ends of an axis above which it is logarithmic
DECADES_FROM = 100.0  # and above which powers of ten are enough to read it by
MARKER, LEADER_FROM = 7.0, 16.0  # pt: side of a marker; distance above which a line leads to a number
# where a number may stand, pt from its point: rings of growing size, the right side first
_OFFSETS = [
    np.array([radius * np.cos(angle), radius * np.sin(angle)])
    for radius in (10, 14, 19, 25, 32)
    for angle in np.radians([25, -25, 155, -155, 60, -60, 120, -120, 90, -90])
]


def draw_figures(board: Board, folder: Path) -> list[Path]:
    """Write accuracy_against_NAME.png for every cost that two methods or more have; the files."""
    files = []
    for key, (name, *_) in AXES.items():
        shown = [entry for entry in board.entries if entry.values(key) and entry.values(HEADLINE.key)]
        if len(shown) > 1:
            files.append(folder / f"accuracy_against_{name}.png")
            accuracy_figure(board, shown, key, files[-1])
    return files


def accuracy_figure(board: Board, entries: Sequence[Entry], key: str, path: Path):
    """Top-1 over a cost. Numbers name the methods, colours and markers their families; bars are one deviation."""
    from matplotlib.ticker import LogLocator, NullFormatter  # slow to import

    _, axis_title, words, factor = AXES[key]
    longest = max(len(short(entry.method.label)) for entry in entries)
    rows = -(-len(entries) // max(1, 96 // (longest + 11)))
    figure, axes = new_figure(height=4.0 + 0.19 * rows)
    families = list(dict.fromkeys(entry.method.family for entry in board.entries))
    places = [entry.mean_std(key)[0] * factor for entry in entries]
    wide = max(places) / min(places) if min(places) > 0 else 0.0
    if wide > LOG_FROM:
        axes.set_xscale("log")
    for number, (entry, x) in enumerate(zip(entries, places, strict=True), 1):
        family = families.index(entry.method.family)
        mean, std = entry.mean_std(HEADLINE.key)
        axes.errorbar(
            [x], [mean], yerr=[std or 0.0], label=f"{number} {short(entry.method.label)}",
            color=COLOURS[family % len(COLOURS)], marker=MARKERS[family % len(MARKERS)], markersize=6,
            linestyle="none", capsize=2, elinewidth=1,
        )  # fmt: skip
    axes.margins(x=0.08, y=0.1)
    percent_axis(axes.yaxis)
    if wide > LOG_FROM:
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide > DECADES_FROM else (1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(_engineering)
    axes.set_xlabel(axis_title)
    axes.set_ylabel("Top-1, mean over seeds")
    return finish(figure, f"Accuracy against {words}", path, axes, lambda: _name_points(axes, entries, places))


def _name_points(axes, entries: Sequence[Entry], places: Sequence[float]) -> None:
    """A number beside each point, as near as it finds room beside the other numbers and points."""
    heights = [entry.mean_std(HEADLINE.key)[0] for entry in entries]
    points = axes.transData.transform(list(zip(places, heights, strict=True))) * 72 / axes.figure.dpi
    taken = [(*point, MARKER, MARKER) for point in points]
    for number, point in enumerate(points, 1):
        size = (5.0 * len(str(number)) + 1, 8.0)
        spots = [(*(point + offset), *size) for offset in _OFFSETS]
        spot = min(spots, key=lambda spot: sum(_overlap(spot, other) for other in taken))  # the first of equals
        taken.append(spot)
        offset = np.array(spot[:2]) - point
        far = {"arrowprops": {"arrowstyle": "-", "color": INK, "lw": 0.4}} if np.hypot(*offset) > LEADER_FROM else {}
        axes.annotate(
            str(number), (places[number - 1], heights[number - 1]), xytext=tuple(offset), textcoords="offset points",
            fontsize=8, color=INK, ha="center", va="center", **far,
        ).set_in_layout(False)  # fmt: skip


def _overlap(a: tuple, b: tuple) -> float:
    """The area that two rectangles (centre x and y, width, height) share."""
    sides = [(a[i + 2] + b[i + 2]) / 2 - abs(a[i] - b[i]) for i in (0, 1)]
    return max(0.0, sides[0]) * max(0.0, sides[1])


def _engineering(value: float, _) -> str:
    """1500 -> 1.5k, 23e6 -> 23M."""
    for limit, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{letter}"
    return f"{value:g}"
