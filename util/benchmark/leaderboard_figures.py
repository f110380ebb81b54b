"""Figures of a leaderboard: accuracy against what it costs, a point for each method."""

from collections.abc import Sequence
from pathlib import Path

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
NEAR = 0.03  # of the width of the axes


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
    _, axis_title, words, factor = AXES[key]
    longest = max(len(short(entry.method.label)) for entry in entries)
    rows = -(-len(entries) // max(1, 96 // (longest + 11)))
    figure, axes = new_figure(height=4.0 + 0.19 * rows)
    families = list(dict.fromkeys(entry.method.family for entry in board.entries))
    places = [entry.mean_std(key)[0] * factor for entry in entries]
    if min(places) > 0 and max(places) > LOG_FROM * min(places):
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
    _name_points(axes, entries, places)
    percent_axis(axes.yaxis)
    axes.xaxis.set_major_formatter(_engineering)
    axes.set_xlabel(axis_title)
    axes.set_ylabel("Top-1, mean over seeds")
    return finish(figure, f"Accuracy against {words}", path, legend_of=axes)


def _name_points(axes, entries: Sequence[Entry], places: Sequence[float]) -> None:
    """A number beside each point; neighbours, such as probes of encoders of one size, take turns at the side."""
    heights = [entry.mean_std(HEADLINE.key)[0] for entry in entries]
    at = axes.transAxes.inverted().transform(axes.transData.transform(list(zip(places, heights, strict=True))))
    side, before = 1, None
    for i in sorted(range(len(entries)), key=lambda i: (round(at[i][0] / NEAR), heights[i])):
        side = -side if before is not None and abs(at[i] - at[before]).max() < 4 * NEAR else 1
        axes.annotate(
            str(i + 1), (places[i], heights[i]), xytext=(6 * side, 3), textcoords="offset points", fontsize=8,
            color=INK, ha="left" if side > 0 else "right",
        )  # fmt: skip
        before = i


def _engineering(value: float, _) -> str:
    """1500 -> 1.5k, 23e6 -> 23M."""
    for limit, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{letter}"
    return f"{value:g}"
