"""The figure of a masking study: what each way of masking gains over the baseline, measure by measure."""

from collections.abc import Sequence
from pathlib import Path

from util.benchmark.figure_style import COLOURS, INK, MARKERS, finish, new_figure, short
from util.benchmark.masking_arms import BASELINE, Judged, Way
from util.benchmark.scores import heading

_PALE = "#B8C4CE"


def masking_figure(judged: Sequence[Judged], measures: Sequence[str], path: Path, baseline: str = BASELINE):
    """Differences to the baseline at the same mask ratio with 95 % intervals: a panel per measure, a row per way.

    The best mean rank is on top; mask ratios have a colour and a marker each, filled where the interval excludes 0.
    """
    shown = [one for one in judged if any(name in one.same_ratio for name in measures)]
    if not shown:
        raise ValueError("no arm has a baseline at its mask ratio")
    ways = sorted(dict.fromkeys(one.arm.way for one in shown), key=lambda way: _best_rank(way, shown))
    ratios = sorted({one.arm.ratio for one in shown})
    height = 1.9 + len(ways) * max(0.26, 0.13 * len(ratios))
    figure, panels = new_figure(columns=len(measures), height=height, sharey=True)
    panels = [panels] if len(measures) == 1 else list(panels)
    for axes, name in zip(panels, measures, strict=True):
        axes.axvline(0, color=INK, linewidth=0.9)
        for number, ratio in enumerate(ratios):
            aside = (number - (len(ratios) - 1) / 2) * 0.72 / max(len(ratios), 2)
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            for one in shown:
                if one.arm.ratio == ratio and name in one.same_ratio:
                    _draw(axes, one.same_ratio[name], ways.index(one.arm.way) + aside, style)
            label = f"{ratio:.0%} masked"
            axes.plot([], [], linestyle="", markersize=5.5, label=label, **style)
        _panel(axes, name, len(ways))
    hollow = {"color": _PALE, "marker": "o", "markerfacecolor": "white", "markersize": 5.5}
    panels[0].plot([], [], linestyle="", label="0 lies inside the 95\N{NO-BREAK SPACE}% interval", **hollow)
    labels = [short(way.label(ways), 30) for way in ways]
    panels[0].set_yticks(range(len(ways)), labels)
    panels[0].set_ylim(len(ways) - 0.5, -0.5)
    return finish(figure, _title(shown, ways, measures, baseline), path, legend_of=panels[0])


def _draw(axes, gain, place: float, style: dict) -> None:
    """A point with its interval; hollow and pale where 0 lies inside, or nothing is known."""
    low, high = gain.ci95 or (gain.mean, gain.mean)
    sure = gain.sign != 0
    axes.hlines(place, low, high, color=style["color"] if sure else _PALE, linewidth=1.5, zorder=2)
    face = style["color"] if sure else "white"
    axes.plot(gain.mean, place, style["marker"], markersize=4.5, zorder=3, color=style["color"], markerfacecolor=face)


def _panel(axes, name: str, rows: int) -> None:
    from matplotlib.ticker import MaxNLocator  # slow to import

    title = heading(name)
    for row in range(0, rows, 2):
        axes.axhspan(row - 0.5, row + 0.5, color=INK, alpha=0.04, linewidth=0)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.2g}" if value else "0")
    axes.set_title(title.name, fontsize=9)
    axes.set_xlabel(title.unit, fontsize=9)


def _best_rank(way: Way, judged: Sequence[Judged]) -> float:
    return min(one.rank for one in judged if one.arm.way == way)


def _title(judged: Sequence[Judged], ways: Sequence[Way], measures: Sequence[str], baseline: str) -> str:
    """How many differences stand out, each way, and who ranks first."""
    gains = [one.same_ratio[name] for one in judged for name in measures if name in one.same_ratio]
    signs = [gain.sign for gain in gains]
    seeds = sorted({len(gain.of_each_seed) for gain in gains})
    runs = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seed" + "s" * (seeds[0] > 1)
    return (
        f"Against {baseline} masking of the same ratio ({runs}), {signs.count(1)} of {len(signs)} differences are "
        f"gains and {signs.count(-1)} losses; {ways[0].label(ways)} ranks first"
    )
