"""mask_sweep.md: the tables of a mask-ratio study, for people."""

from collections.abc import Iterable, Mapping, Sequence

from util.benchmark.reconstruction import METRICS
from visualize.pictures import FLOORS
from visualize.sweep.numbers import COMPARED, Sweep, own_ratio
from visualize.sweep.trained import epochs_done

HEADINGS = {
    "psnr_db": "PSNR dB",
    "psnr_masked_db": "masked dB",
    "ssim": "SSIM",
    "loss": "loss",
    "blockiness": "blockiness",
    "delta_e": "delta E",
    "hf_energy_ratio": "HF energy",
}
_DIGITS = {"psnr_db": 2, "psnr_masked_db": 2, "ssim": 3, "loss": 3, "blockiness": 1, "delta_e": 2, "hf_energy_ratio": 3}
_MOST_GROUPS = 40
_NONE = "-"

READING = """## How to read this

* All rows reconstruct the same pictures under the same masks. *PSNR dB* is of the picture with the visible patches
  kept, *masked dB* of the removed pixels alone. *Blockiness* (grey levels added at patch borders) and *delta E*
  (CIEDE2000, 1 is just noticeable) are better near 0, *HF energy* (share of the fine detail that is there) near 1.
* ± is the standard deviation over runs where a training was repeated under other seeds; brackets are 95 % intervals:
  of means, a bootstrap over pictures; of differences, over seeds and pictures where both trainings were repeated under
  the same seeds, else over pictures alone, and then they do not know what another seed would change.
* Removing less leaves an easier task: compare rows under one test ratio, not the numbers of different ones. The loss of
  models with and without `norm_pix_loss` is not the same quantity.
* In the figures, pictures are of the first run of each training, numbers are means over its runs."""


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(ratio: float) -> str:
    """ "75 %"."""
    return f"{100 * ratio:.3g} %"


def _number(value: float | None, digits: int, sign: bool = False) -> str:
    return _NONE if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def _cell(summary: Mapping, digits: int) -> str:
    spread = summary.get("std_runs")
    return _number(summary["mean"], digits) + (f" ± {spread:.{digits}f}" if spread is not None else "")


def _interval(value: float | None, bounds: Sequence[float] | None, digits: int, sign: bool = False) -> str:
    if value is None or bounds is None:
        return _number(value, digits, sign)
    return f"{_number(value, digits, sign)} [{', '.join(_number(bound, digits, sign) for bound in bounds)}]"


def name_of(row: str) -> str:
    """What a row of a `Sweep` is called."""
    return FLOORS.get(row, row)


def report(sweep: Sweep, metrics: Mapping, source_name: str, shown_ratio: float) -> str:
    """The whole file. metrics: what metrics.json holds. shown_ratio: the test ratio of the table of groups."""
    parts = [
        "# Mask ratios: what each training reconstructs",
        f"{metrics['images']} pictures of {source_name}. Rows named by a ratio were trained at it.",
        _runs(sweep),
        "## Pictures and features",
        _answer(sweep, metrics),
        "## Trained ratio against test ratio",
        _matrix(sweep),
        *(_ratio_table(sweep, metrics, ratio) for ratio in sweep.ratios),
        _differences(sweep, metrics),
        _regions(sweep, metrics),
        *(_groups(sweep, column, found, shown_ratio) for column, found in metrics["groups"].items()),
        _curves(metrics),
        READING,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _runs(sweep: Sweep) -> str:
    rows = []
    for label, runs in sweep.trainings.items():
        seeds = ", ".join(str(run.args.get("seed", "?")) for run in runs)
        done = [epochs_done(run) for run in runs]
        epochs = {f"{d[0]} of {d[1]}" if d[0] < d[1] else str(d[0]) for d in done if d}
        rows.append([label, str(len(runs)), seeds, ", ".join(sorted(epochs)) or _NONE])
    return markdown(["trained at", "runs", "seeds", "epochs"], rows)


def _answer(sweep: Sweep, metrics: Mapping) -> str:
    """One table with both: how good the pictures are, and how good the features."""
    ratios, probes = list(filter(None, sweep.ratios)), metrics["probes"]
    part = probes.get("part", "")
    headings = ["trained at", "PSNR dB at its own ratio", *(f"at {percent(ratio)}" for ratio in ratios)]
    rows = []
    for label, runs in sweep.trainings.items():
        own = own_ratio(runs, ratios)
        cells = [_cell(sweep.summary(label, own, "psnr_db"), 2) if own else _NONE]
        for ratio in ratios:
            text = _cell(sweep.summary(label, ratio, "psnr_db"), 2)
            cells.append(f"**{text}**" if label == sweep.best(ratio) and len(sweep.trainings) > 1 else text)
        if "trainings" in probes:
            found = probes["trainings"].get(label)
            cells += [_NONE if found is None else _rate(found.get(figure)) for figure in ("top1", "macro_f1")]
        rows.append([label, *cells])
    if "trainings" in probes:
        headings += [f"probe {part} top-1 %", "macro-F1 %"]
    return "\n".join([markdown(headings, rows), "", *(f"* {line}" for line in _conclusions(sweep, metrics))])


def _rate(summary: Mapping | None) -> str:
    if summary is None:
        return _NONE
    spread = "" if summary["std"] is None else f" ± {100 * summary['std']:.1f}"
    return f"{100 * summary['mean']:.1f}{spread}"


def _conclusions(sweep: Sweep, metrics: Mapping) -> list[str]:
    """What the numbers say, in sentences, and whether the intervals bear it out."""
    lines = [_best_pictures(sweep, metrics, ratio) for ratio in sweep.ratios if ratio]
    probes = metrics["probes"]
    if "skipped" in probes:
        return [*lines, f"Features: {probes['skipped']}."]
    lines.append(_best_features(probes))
    if probes["unused"]:
        lines.append(f"{probes['unused']} probes are of other checkpoints, and not in the table.")
    return lines


def _best_features(probes: Mapping) -> str:
    """Which training's probe is best, by how much, and whether that is more than the runs differ among themselves."""
    means = {label: 100 * found["top1"]["mean"] for label, found in probes["trainings"].items()}
    best, *others = sorted(means, key=means.get, reverse=True)
    text = f"Best features: trained at {best}, {means[best]:.1f} % {probes['part']} top-1 of a linear probe"
    if not others:
        return f"{text}."
    text += f", {means[best] - means[others[0]]:.1f} points over {others[0]}"
    pair = [probes["trainings"][label] for label in (best, others[0])]
    if min(one["runs"] for one in pair) < 2:
        return f"{text} (one run of some: not certain)."
    return f"{text}." if _differ(*(one["top1"] | {"runs": one["runs"]} for one in pair)) else f"{text}, not certain."


def _differ(one: Mapping, other: Mapping) -> bool:
    """Whether two means over runs differ by more than chance at 5 % (Welch's t-test)."""
    from scipy import stats  # slow to import

    values = [part for way in (one, other) for part in (way["mean"], way["std"], way["runs"])]
    return bool(stats.ttest_ind_from_stats(*values, equal_var=False).pvalue < 0.05)


def _best_pictures(sweep: Sweep, metrics: Mapping, ratio: float) -> str:
    """Which training wins at a test ratio, by how much, and whether it beats what needs no model."""
    best, text = sweep.best(ratio), f"With {percent(ratio)} removed"
    if len(sweep.trainings) > 1:
        own = [d for d in metrics["differences"] if d["test_ratio"] == ratio and d["metric"] == "psnr_db"]
        leads = [_lead(entry, best) for entry in own if best in (entry["a"], entry["b"])]
        rival, difference, bounds, over = min(leads, key=lambda lead: lead[1])
        sure = ", which is not certain"
        if bounds and bounds[0] > 0:
            sure = "" if over != "samples" else " (of these runs; other seeds may differ)"
        text += (
            f", best pictures: trained at {best}, {_interval(difference, bounds, 2, sign=True)} dB over {rival}{sure}"
        )
    floors = {floor: sweep.summary(floor, ratio, "psnr_db")["mean"] for floor in sweep.floors}
    strongest = max(floors, key=floors.get)
    gain = sweep.summary(best, ratio, "psnr_db")["mean"] - floors[strongest]
    return f"{text}; {abs(gain):.2f} dB {'over' if gain > 0 else 'BELOW'} the best floor, {name_of(strongest)}."


def _lead(difference: Mapping, best: str) -> tuple[str, float, list[float] | None, str]:
    """The other training, by how much the best one is before it, and what the interval covers."""
    if difference["a"] == best:
        return difference["b"], difference["difference"], difference["ci95"], difference["over"]
    bounds = difference["ci95"] and [-difference["ci95"][1], -difference["ci95"][0]]
    return difference["a"], -difference["difference"], bounds, difference["over"]


def _matrix(sweep: Sweep) -> str:
    """PSNR over the removed pixels, trained against tested, with the floors."""
    ratios = list(filter(None, sweep.ratios))
    rows = [
        [name_of(row), *(_cell(sweep.summary(row, ratio, "psnr_masked_db"), 2) for ratio in ratios)]
        for row in sweep.rows
    ]
    table = markdown(["masked dB; trained at", *(f"tested at {percent(ratio)}" for ratio in ratios)], rows)
    return f"Over the removed pixels alone, so that the columns can be compared:\n\n{table}"


def _ratio_table(sweep: Sweep, metrics: Mapping, ratio: float) -> str:
    rows = []
    for row in sweep.rows:
        cells = [_cell(sweep.summary(row, ratio, metric), _DIGITS[metric]) for metric in METRICS]
        rows.append([f"**{row}**" if row in sweep.trainings else name_of(row), *cells])
    for name, reason in metrics["missing_floors"].items():
        rows.append([name_of(name), f"skipped: {reason}", *[_NONE] * (len(METRICS) - 1)])
    table = markdown(["trained at", *(HEADINGS[metric] for metric in METRICS)], rows)
    return f"### Tested at {percent(ratio)}\n\n{table}"


def _differences(sweep: Sweep, metrics: Mapping) -> str:
    if not metrics["differences"]:
        return ""
    rows: dict[tuple, list[str]] = {}
    for entry in metrics["differences"]:
        key = percent(entry["test_ratio"]), f"{entry['a']} − {entry['b']}"
        digits = _DIGITS[entry["metric"]]
        cell = _interval(entry["difference"], entry["ci95"], digits, sign=True)
        rows.setdefault(key, list(key)).append(cell)
    headings = ["tested at", "trained at", *(HEADINGS[metric] for metric in COMPARED)]
    return f"## Paired differences between trainings\n\n{markdown(headings, rows.values())}"


def _regions(sweep: Sweep, metrics: Mapping) -> str:
    found = metrics["regions"]
    if "skipped" in found:
        return f"## By region\n\nSkipped: {found['skipped']}."
    rows = []
    for ratio in filter(None, sweep.ratios):
        for row in sweep.rows:
            cells = []
            for region in sweep.regions:
                entry = found["rows"][row][f"{ratio:g}"][region]
                psnr = _interval(entry["psnr_db"]["mean"], entry["psnr_db"]["ci95"], 2)
                cells.append(f"{psnr}; {_number(entry['delta_e']['mean'], 2)}")
            rows.append([percent(ratio), name_of(row), *cells])
    hardest = found["rows"][sweep.rows[0]][f"{sweep.ratios[-1]:g}"]
    headings = [
        f"{region} ({_number(100 * (hardest[region]['share']['mean'] or 0), 1)} % of the removed pixels)"
        for region in sweep.regions
    ]
    note = f"\n\nNot told apart, as their maps are not there: {found['missing']}." if found.get("missing") else ""
    table = markdown(["tested at", "trained at", *headings], rows)
    return f"## By region: dB over the removed pixels; delta E\n\n{table}{note}"


def _groups(sweep: Sweep, column: str, found: Mapping, ratio: float) -> str:
    """PSNR of each group under one test ratio, sorted by name; of very many, those with most pictures."""
    title = f"## PSNR per group: {column}, tested at {percent(ratio)}"
    if "skipped" in found:
        return f"{title}\n\nSkipped: {found['skipped']}."
    shown = sorted(sorted(found, key=lambda value: -found[value]["images"])[:_MOST_GROUPS], key=list(found).index)
    rows = []
    for value in shown:
        psnr = found[value]["psnr_db"]
        cells = [_interval(*psnr[row][f"{ratio:g}"].values(), 2) for row in sweep.rows]
        rows.append([value.replace("|", "\\|"), str(found[value]["images"]), *cells])
    more = len(found) - len(shown)
    note = f"\n\n{more} more, with fewer pictures, are in metrics.json." if more else ""
    return f"{title}\n\n{markdown([column, 'n', *map(name_of, sweep.rows)], rows)}{note}"


def _curves(metrics: Mapping) -> str:
    rows = []
    for label, curves in metrics["curves"].items():
        for run in curves:
            if run["epochs"]:
                last = run["epochs"][-1]
                cost = _NONE if last["pflop"] is None else f"{last['pflop']:.3g}"
                values = [
                    _number(last[name], 3 if name == "loss" else 2) for name in ("loss", "psnr_db", "psnr_masked_db")
                ]
                rows.append([label, str(run["seed"]), str(last["epoch"]), cost, *values])
    if not rows:
        return ""
    headings = ["trained at", "seed", "epochs", "PFLOP", "held-out loss", "PSNR dB", "masked dB"]
    note = "Each on the held-out pictures of its own training, under its own ratio (curves.png):"
    return f"## While training\n\n{note}\n\n{markdown(headings, rows)}"
