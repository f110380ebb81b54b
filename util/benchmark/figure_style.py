"""The style that all figures of the benchmark's report share.

Nothing global is touched: no pyplot, no rcParams. Colours are Okabe and Ito's, told apart by people of any colour
vision.
"""

import functools
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from util.run.files import write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X"
GREY, INK = "#888888", "#222222"
_DPI = 140
_WIDTH = 7.2  # inches, 1008 px
_TITLE = 68  # characters of a line
_EASTERN = ("Noto Sans CJK JP", "Noto Sans JP", "IPAGothic", "Hiragino Sans", "Yu Gothic", "MS Gothic", "SimHei")


def new_figure(columns: int = 1, height: float = 4.4, rows: int = 1, dpi: int = _DPI, **options):
    """A matplotlib Figure of 7.2 inches (1008 px) in width and its axes: one, or an array, `columns` or rows x columns.

    height: inches, of all of it.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(_WIDTH, height), dpi=dpi, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    axes = figure.subplots(rows, columns, **options)
    for each in [axes] if columns == rows == 1 else axes.flat:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.3, linewidth=0.6)
        each.set_axisbelow(True)
    return figure, axes


def finish(figure, title: str, path: Path, legend_of=None, settled: Callable[[], None] | None = None):
    """Put a title, and a legend of the labels in the axes `legend_of`, around the axes; write the PNG.

    settled: called when the axes have their final size, for what is placed by the distances on paper.
    """
    lines = textwrap.wrap(plain(title), _TITLE)
    even = textwrap.wrap(plain(title), len(title) // len(lines) + 6)  # no single word on the last line
    text = "\n".join(even if len(even) == len(lines) else lines)
    figure.suptitle(text, x=0.01, ha="left", fontsize=11.5, fontweight="bold", fontfamily=families())
    if legend_of is not None:
        handles, labels = legend_of.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        unique |= {label: unique.pop(label) for label in ("chance",) if label in unique}  # behind what is measured
        longest = max(map(len, unique))
        columns = max(1, min(len(unique), 96 // (longest + 8)))
        figure.legend(unique.values(), unique, loc="outside lower center", ncols=columns, frameon=False,
                      prop={"size": 9, "family": families()})  # fmt: skip
    if settled is not None:
        figure.draw_without_rendering()
        settled()
    path.parent.mkdir(parents=True, exist_ok=True)
    # no version inside: the same numbers give the same file
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))
    return figure


def line_style(i: int) -> dict:
    """Of the i-th curve of a figure."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % 4], "linewidth": 1.8}


def draw_intervals(axes, values, bounds, places, vertical: bool = False) -> None:
    """Intervals (low, high) as thin bars; the values need not lie inside."""
    for value, (low, high), place in zip(values, bounds, places, strict=True):
        if (low, high) != (value, value):
            (axes.vlines if vertical else axes.hlines)(place, low, high, color=INK, linewidth=1.3, zorder=3)


def percent_axis(*axis) -> None:
    """Write the fractions on an axis as percentages."""
    for each in axis:
        each.set_major_formatter(lambda value, _: percent(value))


def plain_log_ticks(axis, ticks: Sequence[int]) -> None:
    """Whole numbers as the only ticks of a logarithmic axis."""
    from matplotlib.ticker import NullLocator  # slow to import

    axis.set_ticks(list(ticks), [f"{tick:,}" for tick in ticks])
    axis.set_minor_locator(NullLocator())


def percent(value: float) -> str:
    """A fraction as a percentage of two to three digits: 0.0123 -> 1.2 %, 0.5 -> 50 %, 0.0001 -> 0.01 %."""
    value = 100 * float(value)
    number = f"{value:.2g}" if abs(value) < 0.1 else f"{value:.1f}".removesuffix(".0")
    return f"{number}\N{NO-BREAK SPACE}%"


def in_points(difference: float) -> str:
    """A difference of fractions in percentage points."""
    return f"{100 * difference:.1f}\N{NO-BREAK SPACE}points"


def short(name: str, length: int = 40) -> str:
    """A name for a legend or an axis."""
    return plain(name if len(name) <= length else name[: length - 3] + "...")


def plain(text: str) -> str:
    """Text that matplotlib does not take for a formula, a box for each character that no font here has."""
    if len(families()) == 1:
        there = _characters()
        text = "".join(c if c.isascii() or ord(c) in there else "\N{WHITE SQUARE}" for c in text)
    return text.replace("$", r"\$")


@functools.cache
def families() -> list[str]:
    """Fonts for names, which may be Japanese or Chinese."""
    from matplotlib.font_manager import fontManager  # slow to import

    there = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _EASTERN if name in there)]


@functools.cache
def _characters() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font  # slow to import

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())
