"""The plots of a mask-ratio study: curves.png and regions.png."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from util.benchmark.figure_style import COLOURS, MARKERS, finish, new_figure
from visualize.pictures import percent_masked

_NAMES = {
    "epoch": "epochs",
    "pflop": "computation, operations (by formula)",
    "loss": "held-out loss",
    "psnr_masked_db": "PSNR of the removed pixels, dB",
}
_PANELS = {"psnr_db": "PSNR, dB (more is better)", "delta_e": "delta E (less is better)"}


def curves_figure(curves: Mapping[str, Sequence[Mapping]], path: Path) -> bool:
    """Quality on held-out pictures over epochs, and over computation where that differs, else the loss.

    curves: label -> [{"seed", "epochs": [entries of `trained.learning_curve`]}]. False, and no file, where no run
    has a log.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator  # slow to import

    drawn = {label: [run["epochs"] for run in runs if run["epochs"]] for label, runs in curves.items()}
    drawn = {label: runs for label, runs in drawn.items() if runs}
    if not drawn:
        return False
    costs = {run[-1]["pflop"] for runs in drawn.values() for run in runs}
    second = ("pflop", "psnr_masked_db") if len(costs) > 1 and None not in costs else ("epoch", "loss")
    figure, panels = new_figure(columns=2, height=4.2)
    for axes, (x, y) in zip(panels, (("epoch", "psnr_masked_db"), second), strict=True):
        scale = 1e15 if x == "pflop" else 1
        for i, (label, runs) in enumerate(drawn.items()):
            for run in runs:
                style = {**_style(i), "markersize": 4, "linewidth": 1.5, "label": f"trained at {label}"}
                axes.plot([scale * entry[x] for entry in run], [entry[y] for entry in run], **style)
        axes.set(xlabel=_NAMES[x], ylabel=_NAMES[y])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ends = {label: np.mean([run[-1]["psnr_masked_db"] for run in runs]) for label, runs in drawn.items()}
    best, worst = max(ends, key=ends.get), min(ends, key=ends.get)
    title = f"While training, each under its own ratio: {best} ends at {ends[best]:.1f}\N{NO-BREAK SPACE}dB"
    if len(ends) > 1:
        title += f", {worst} at {ends[worst]:.1f}\N{NO-BREAK SPACE}dB (a lower ratio is an easier task)"
    finish(figure, title, path, legend_of=panels[0])
    return True


def regions_figure(rows: Mapping[str, Mapping], labels: Sequence[str], ratio: str, path: Path) -> None:
    """PSNR and colour error of each region under one test ratio, with 95 % intervals.

    rows: label -> {ratio: {region: {figure: {"mean", "ci95"}}}}, and shares of pixels. labels: the rows to draw.
    """
    first = rows[labels[0]][ratio]
    places = np.arange(len(first))[::-1]
    figure, panels = new_figure(columns=2, height=1.9 + 0.13 * len(first) * (len(labels) + 1.5))
    for axes, (name, text) in zip(panels, _PANELS.items(), strict=True):
        for i, label in enumerate(labels):
            entries = [region[name] for region in rows[label][ratio].values()]
            means = [_or_nan(entry["mean"]) for entry in entries]
            bounds = [entry["ci95"] or (mean, mean) for entry, mean in zip(entries, means, strict=True)]
            beside = places + ((len(labels) - 1) / 2 - i) * 0.7 / len(labels)
            axes.hlines(beside, *np.transpose(bounds), color=_style(i)["color"], linewidth=1.8)
            axes.plot(means, beside, linestyle="", label=f"trained at {label}", **_style(i))
        axes.set(xlabel=text, ylim=(-0.6, len(places) - 0.4))
        axes.set_yticks(places, [""] * len(places))
    shares = {region: 100 * _or_nan(entry["share"]["mean"]) for region, entry in first.items()}
    panels[0].set_yticks(places, [f"{region}\n({share:.1f} % of pixels)" for region, share in shares.items()])
    means = {region: [_or_nan(rows[label][ratio][region]["psnr_db"]["mean"]) for label in labels] for region in first}
    known = {region: np.mean(values) for region, values in means.items() if np.isfinite(values).all()}
    title = f"The removed pixels by region, {percent_masked(float(ratio))} in the test (lines: 95 % intervals)"
    if len(known) > 1:
        title += f": {min(known, key=known.get)} worst, {max(known, key=known.get)} best"
    finish(figure, title, path, legend_of=panels[0])


def _style(i: int) -> dict:
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
