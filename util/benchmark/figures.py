"""The figures of the recognition report: plain arrays in, a PNG about 1,000 px wide out.

Each function writes its file in one step and returns the matplotlib Figure. A title says what the figure shows, from
the numbers themselves. Rates are fractions in 0..1. The confusion matrix is in `util.benchmark.confusion_figure`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from util.benchmark.figure_style import (
    COLOURS,
    GREY,
    INK,
    MARKERS,
    draw_intervals,
    finish,
    in_points,
    line_style,
    new_figure,
    percent,
    percent_axis,
    plain_log_ticks,
    short,
)

LOWEST_FPR = 1e-4  # where the logarithmic axis of the ROC begins
_RESOLUTIONS = (112, 224, 336, 448)

Curve = tuple[np.ndarray, np.ndarray]


# --- curves of rates


def roc_figure(curves: Mapping[str, Curve], points: Mapping[str, Mapping], path: Path):
    """ROC on a logarithmic axis. curves: {name: (fpr, tpr)}, ascending. points: {name: {fpr: tpr}}, marked."""
    figure, axes = new_figure()
    marks = {name: _numbers(points.get(name, {})) for name in curves}
    _draw_curves(axes, curves, marks, LOWEST_FPR)
    for i, own in enumerate(marks.values()):
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % 8]}
        axes.plot(list(own), list(own.values()), linestyle="", markeredgecolor="white", markersize=7, zorder=3, **style)
    chance = np.geomspace(LOWEST_FPR, 1, 100)
    axes.plot(chance, chance, color=GREY, linestyle=":", label="chance")
    axes.set(xlabel="false positive rate: pairs of two characters accepted", ylabel="true positive rate")
    title = "Pairs of one character accepted, against pairs of two characters"
    if rates := sorted({rate for own in marks.values() for rate in own}):
        best = max(marks, key=lambda name: marks[name].get(rates[0], -1))
        value = percent(marks[best][rates[0]])
        title = f"With {percent(rates[0])} of false pairs accepted, {best} accepts {value} of the true ones"
    return finish(figure, title, path, legend_of=axes)


def oscr_figure(curves: Mapping[str, Curve], path: Path, at: float = 0.1):
    """Open-set classification rate (arXiv 1811.04110): strangers accepted against known faces named rightly.

    curves: {name: (fpr, ccr)}, fpr ascending. at: the false positive rate that the title is about.
    """
    title = "When {at} of the strangers are accepted, {name} names {value} of the known faces rightly"
    labels = ("strangers accepted (false positive rate)", "known faces named rightly (CCR)")
    return _open_set_figure(curves, path, at, labels, title)


def dir_figure(curves: Mapping[str, Curve], path: Path, at: float = 0.01):
    """Detection and identification rate against false alarms. curves: {name: (far, dir)}, far ascending."""
    title = "With {at} of the strangers given a name, {name} finds and names {value} of the known faces"
    labels = ("false alarms: strangers given a name (FAR)", "known faces found and named (DIR)")
    return _open_set_figure(curves, path, at, labels, title)


def pr_figure(curves: Mapping[str, Curve], path: Path, average_precision: Mapping[str, float] | None = None):
    """Precision against recall. curves: {name: (recall, precision)}, recall ascending."""
    figure, axes = new_figure()
    known = average_precision or {}
    for i, (name, (recall, precision)) in enumerate(curves.items()):
        label = short(name) + (f": average precision {known[name]:.3f}" if name in known else "")
        axes.plot(recall, precision, label=label, **line_style(i))
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    percent_axis(axes.xaxis, axes.yaxis)
    title = "How many of the answers are right, against how many there are"
    if known:
        best = max(known, key=known.get)
        title = f"{best} has an average precision of {known[best]:.3f}" + (", the highest" if len(known) > 1 else "")
    return finish(figure, title, path, legend_of=axes)


def _open_set_figure(curves, path, at, labels, title):
    figure, axes = new_figure()
    values = {name: _value_at(curve, at) for name, curve in curves.items()}
    _draw_curves(axes, curves, {name: {at: value} for name, value in values.items()}, 1e-3)
    axes.axvline(at, color=GREY, linestyle=":", linewidth=1)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    best = max(values, key=values.get)
    title = title.format(at=percent(at), name=best, value=percent(values[best]))
    return finish(figure, title, path, legend_of=axes)


def _draw_curves(axes, curves: Mapping[str, Curve], marks: Mapping[str, Mapping[float, float]], lowest: float) -> None:
    """Curves of rates from `lowest` to 1, their values at some rates in the legend."""
    axes.set_xscale("log")
    for i, (name, (x, y)) in enumerate(curves.items()):
        values = ", ".join(f"{percent(value)} at {percent(rate)}" for rate, value in sorted(marks[name].items()))
        # a rate holds until the next threshold; what lies left of the axis enters at its edge
        x = np.maximum(np.asarray(x, dtype=float), lowest / 10)
        label = f"{short(name)}: {values}" if values else short(name)
        axes.plot(x, y, drawstyle="steps-post", label=label, **line_style(i))
    axes.set(xlim=(lowest, 1), ylim=(0, 1.02))
    percent_axis(axes.xaxis, axes.yaxis)


def _value_at(curve: Curve, rate: float) -> float:
    """The height of a step curve at a rate: of the last point that is not beyond it."""
    x, y = (np.asarray(values, dtype=float) for values in curve)
    reached = x <= rate
    return float(y[reached].max()) if reached.any() else 0.0


def _numbers(marks: Mapping) -> dict[float, float]:
    """{rate: value} with numbers as keys, as JSON cannot have them; values that are not known are left out."""
    return {float(rate): float(value) for rate, value in marks.items() if value is not None}


# --- distributions


def score_histogram(
    same: np.ndarray,
    different: np.ndarray,
    path: Path,
    *,
    threshold: float | None = None,
    names: tuple[str, str] = ("one character", "two characters"),
    xlabel: str = "cosine similarity of a pair",
):
    """How two kinds of scores are spread, (N,) and (M,): of pairs, or of known and unknown probes under other names."""
    figure, axes = new_figure()
    edges = np.linspace(min(same.min(), different.min()), max(same.max(), different.max()), 61)
    shares = []
    for values, name, colour in zip((same, different), names, COLOURS, strict=False):
        shares.append(np.histogram(values, edges)[0] / len(values))
        axes.stairs(shares[-1], edges, fill=True, alpha=0.35, color=colour)
        axes.stairs(shares[-1], edges, color=colour, linewidth=1.6, label=f"{name} ({len(values):,})")
    if threshold is not None:
        accepted = " and ".join(percent((values >= threshold).mean()) for values in (same, different))
        label = f"threshold {threshold:.3f} accepts {accepted} of them"
        axes.axvline(threshold, color=INK, linestyle="--", linewidth=1.2, label=label)
    axes.set(xlabel=xlabel, ylabel="share of each kind, in a bin", ylim=(0, None))
    percent_axis(axes.yaxis)
    title = f"The scores of {names[0]} and of {names[1]} overlap by {percent(np.minimum(*shares).sum())}"
    return finish(figure, title, path, legend_of=axes)


def size_histogram(short_sides: np.ndarray, path: Path, resolutions: Sequence[int] = _RESOLUTIONS):
    """How large the face crops are, beside the resolutions that a model is tested at. short_sides: (N,) px."""
    figure, axes = new_figure(height=3.8)
    sides = np.asarray(short_sides)
    low = min(max(1, np.quantile(sides, 0.001)), *resolutions, np.inf)
    high = max(np.quantile(sides, 0.999), *resolutions, low)
    edges = np.geomspace(low / 1.1, high * 1.1, 41)
    counts, _, _ = axes.hist(sides.clip(edges[0], edges[-1]), edges, color=COLOURS[0], alpha=0.8)
    top = counts.max() * 1.4  # room for the labels above the bars
    for resolution in resolutions:
        below = f"{percent((sides < resolution).mean())} below "
        axes.axvline(resolution, color=COLOURS[1], linestyle="--", linewidth=1.2)
        axes.text(resolution, top * 0.98, below, rotation=90, ha="right", va="top", fontsize=8.5, color=COLOURS[1],
                  bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1})  # fmt: skip
    axes.set_xscale("log")
    ticks = [tick for tick in (8, 16, 32, 64, 1024, 2048) if edges[0] <= tick <= edges[-1]]
    plain_log_ticks(axes.xaxis, sorted({*ticks, *resolutions}))
    axes.set(xlabel="short side of the face crop in the stored picture, px", ylabel="crops", ylim=(0, top))
    axes.set_xlim(edges[0], edges[-1])
    if not resolutions:
        return finish(figure, f"Half of the face crops are {np.median(sides):.0f} px or larger", path)
    largest = max(resolutions)
    title = f"{percent((sides < largest).mean())} of the face crops hold less detail than {largest} px can show"
    return finish(figure, title, path)


def long_tail_figure(counts: np.ndarray, accuracy: np.ndarray, path: Path, *, many: int = 100, few: int = 20):
    """Accuracy of each class against its training pictures. counts, accuracy: (C,), NaN where there are no probes.

    head: more than `many`; mid: `few` to `many`; tail: fewer than `few` (arXiv 1904.05160).
    """
    figure, axes = new_figure()
    shown = np.isfinite(accuracy) & (counts > 0)
    if not shown.any():
        raise ValueError("no class has both training pictures and probes")
    counts, accuracy = counts[shown], accuracy[shown]
    axes.scatter(counts, accuracy, s=16, alpha=0.35, color=COLOURS[0], linewidths=0)
    # wide enough for the label of each band
    low, high = min(counts.min(), few / 2) / 1.15, max(counts.max(), many * 2.5 if (counts > many).any() else 0) * 1.15
    bands = {
        "tail": (low, few, counts < few),
        "mid": (few, many, (counts >= few) & (counts <= many)),
        "head": (many, high, counts > many),
    }
    means = {name: float(accuracy[inside].mean()) for name, (*_, inside) in bands.items() if inside.any()}
    for name, mean in means.items():
        left, right, inside = bands[name]
        left, right = max(left, low), min(right, high)
        axes.axvspan(left, right, color=GREY, alpha={"tail": 0.04, "mid": 0.1, "head": 0.16}[name], linewidth=0)
        axes.plot([left, right], [mean, mean], color=COLOURS[1], linewidth=2.4)
        label = f"{name}: {percent(mean)}\n{inside.sum():,} classes"
        axes.text(np.sqrt(left * right), 1.04, label, ha="center", va="bottom", fontsize=9)
    axes.set_xscale("log")
    plain_log_ticks(axes.xaxis, [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000) if low <= t <= high])
    axes.set(xlabel="training pictures of the character", ylabel="accuracy", xlim=(low, high), ylim=(-0.03, 1.18))
    axes.set_yticks(np.linspace(0, 1, 6))
    percent_axis(axes.yaxis)
    (rare, least), (common, most) = next(iter(means.items())), list(means.items())[-1]
    title = f"{common.capitalize()} characters are named rightly {in_points(most - least)} more often than {rare} ones"
    if len(means) == 1:
        title = f"All {len(counts):,} characters are {common}: {percent(most)} named rightly, mean over characters"
    elif most <= least:
        title = f"Rare characters are named as well: {rare} {percent(least)}, {common} {percent(most)}"
    return finish(figure, title, path)


# --- comparisons


def stress_figure(report: Mapping[str, Mapping], path: Path):
    """Drops of accuracy with their intervals, the largest on top. report: {name: {"drop", "drop_ci95"}}."""
    names = sorted(report, key=lambda name: report[name]["drop"])
    places, drops = range(len(names)), [report[name]["drop"] for name in names]
    bounds = [report[name].get("drop_ci95") or (drop, drop) for name, drop in zip(names, drops, strict=True)]
    low, high = min(0, *drops, *(b[0] for b in bounds)), max(0.005, *drops, *(b[1] for b in bounds))
    figure, axes = new_figure(height=1.3 + 0.3 * len(names))
    sure = [b[0] != b[1] and (b[0] > 0 or b[1] < 0) for b in bounds]
    colours = [COLOURS[0] if certain else "#B8C4CE" for certain in sure]
    axes.barh(places, drops, color=colours, height=0.68)
    draw_intervals(axes, drops, bounds, places)
    for place, drop, bound in zip(places, drops, bounds, strict=True):
        x = max(drop, bound[1], 0) + 0.015 * (high - low)
        axes.text(x, place, f"{100 * drop:.1f}", va="center", fontsize=8.5)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(places, [short(name) for name in names])
    axes.set(xlabel="accuracy lost, percentage points\n(lines: 95 % intervals; pale: 0 inside, or none)")
    axes.set_xlim(low - 0.03 * (high - low), high + 0.1 * (high - low))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}")
    axes.grid(False, axis="y")
    return finish(figure, f"{names[-1]} costs most: {in_points(drops[-1])} of accuracy", path)


def resolution_figure(report: Mapping, path: Path):
    """Accuracy and latency by input size. report: {px: {"top1", "top1_ci95", "latency_ms_p50", "latency_ms_p95",
    "gmacs"}}, the intervals, the p95 and the GMACs may be None."""
    sizes = sorted(report, key=int)
    entries, places = [report[size] for size in sizes], range(len(sizes))
    figure, (left, right) = new_figure(columns=2, height=3.7)
    top1, latency = ([entry[name] for entry in entries] for name in ("top1", "latency_ms_p50"))
    left.plot(places, top1, color=COLOURS[0], marker="o")
    bounds = [entry.get("top1_ci95") or (entry["top1"],) * 2 for entry in entries]
    draw_intervals(left, top1, bounds, places, vertical=True)
    left.set(ylabel="accuracy (with 95 % interval)")
    percent_axis(left.yaxis)
    right.plot(places, latency, color=COLOURS[1], marker="o")
    slow = [entry.get("latency_ms_p95") or entry["latency_ms_p50"] for entry in entries]
    right.fill_between(places, latency, slow, alpha=0.2, color=COLOURS[1], linewidth=0)
    right.set(ylabel="latency, ms (median to p95)", ylim=(0, None))
    for axes, what in ((left, None), (right, "gmacs")):
        costs = [f"\n{entry[what]:.3g} GMACs" if what and entry.get(what) else "" for entry in entries]
        axes.set_xticks(places, [f"{size}{cost}" for size, cost in zip(sizes, costs, strict=True)])
        axes.set(xlabel="input side, px", xlim=(-0.35, len(sizes) - 0.65))
    if len(sizes) == 1:
        return finish(figure, f"{sizes[0]} px: {percent(top1[0])} named rightly, {latency[0]:.3g} ms a picture", path)
    gain, cost = top1[-1] - top1[0], latency[-1] / latency[0]
    title = f"{sizes[-1]} px instead of {sizes[0]}: {100 * gain:+.1f} points of accuracy, {cost:.1f} times the latency"
    return finish(figure, title, path)


def few_shot_figure(reports: Mapping[str, Mapping[str, Mapping]], path: Path):
    """Few-shot accuracy. reports: {model or method: {"5way_1shot": {"mean", "ci95"}, ...}}; skipped ones stay empty."""
    every = dict.fromkeys(setting for report in reports.values() for setting in report)
    settings = [setting for setting in every if any("mean" in report.get(setting, {}) for report in reports.values())]
    figure, axes = new_figure()
    width = min(0.8 / len(reports), 0.3)
    for i, (name, report) in enumerate(reports.items()):
        for place, setting in enumerate(settings):
            entry = report.get(setting, {})
            if "mean" not in entry:
                continue
            x, mean = place + (i - (len(reports) - 1) / 2) * width, entry["mean"]
            bound = entry.get("ci95") or (mean, mean)
            axes.bar(x, mean, width * 0.92, color=COLOURS[i % len(COLOURS)], label=short(name))
            draw_intervals(axes, [mean], [bound], [x], vertical=True)
            if len(reports) * len(settings) <= 12:
                axes.text(x, max(bound[1], mean) + 0.01, f"{100 * mean:.1f}", ha="center", va="bottom", fontsize=8.5)
    for place, setting in enumerate(settings):
        chance = 1 / _ways_and_shots(setting)[0]
        axes.plot([place - 0.45, place + 0.45], [chance, chance], color=INK, linestyle=":", label="chance")
    axes.set_xticks(range(len(settings)), ["{}-way, {}-shot".format(*_ways_and_shots(setting)) for setting in settings])
    axes.set(ylabel="accuracy, mean over episodes", ylim=(0, 1.08))
    axes.set_yticks(np.linspace(0, 1, 6))
    percent_axis(axes.yaxis)
    axes.grid(False, axis="x")
    best = max(reports, key=lambda name: reports[name].get(settings[0], {}).get("mean", -1))
    ways, shots = _ways_and_shots(settings[0])
    mean, pictures = percent(reports[best][settings[0]]["mean"]), f"{shots} picture{'s' * (shots > 1)}"
    title = f"From {pictures} of each, {best} tells {ways} new characters apart with an accuracy of {mean}"
    return finish(figure, title, path, legend_of=axes)


def _ways_and_shots(setting: str) -> tuple[int, int]:
    """ "5way_1shot" -> (5, 1)."""
    ways, shots = setting.removesuffix("shot").split("way_")
    return int(ways), int(shots)


def threshold_figure(
    sensitivity: Sequence[Mapping], path: Path, *, chosen: float | None = None, metrics: Mapping[str, str] | None = None
):
    """What becomes of the rates when the threshold is moved.

    sensitivity: dicts with "threshold" and rates. chosen: the threshold in use, else the middle one. metrics: {key:
    label} of the rates to draw, else all that are in 0..1 in every dict, apart from "offset".
    """
    rows = sorted(sensitivity, key=lambda row: row["threshold"])
    keys = metrics or {key: key.replace("_", " ") for key in rows[0] if _is_rate(key, rows)}
    thresholds = [row["threshold"] for row in rows]
    chosen = thresholds[len(thresholds) // 2] if chosen is None else chosen
    figure, axes = new_figure()
    spans = {}
    for i, (key, label) in enumerate(keys.items()):
        values = [row[key] for row in rows]
        axes.plot(thresholds, values, marker=MARKERS[i % 8], markersize=5, label=label, **line_style(i))
        spans[label] = max(values) - min(values)
    axes.axvline(chosen, color=INK, linestyle="--", linewidth=1.2, label=f"threshold in use, {chosen:.3f}")
    axes.set(xlabel="threshold on the score", ylabel="rate", ylim=(-0.02, 1.02))
    percent_axis(axes.yaxis)
    most = max(spans, key=spans.get)
    title = f"Thresholds from {thresholds[0]:.3f} to {thresholds[-1]:.3f} move {most} by {in_points(spans[most])}"
    return finish(figure, title, path, legend_of=axes)


def _is_rate(key: str, rows: Sequence[Mapping]) -> bool:
    numbers = [row.get(key) for row in rows]
    known = key not in ("threshold", "offset") and all(isinstance(number, (int, float)) for number in numbers)
    return known and all(0 <= number <= 1 for number in numbers)
