"""What came out of a grid of runs: results.csv (a row per run), results.md (a row per setting), a figure."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from util.run.files import write_atomically, write_text
from util.run.grid_run import Run

MISSING = "-"
REPEATED = "seed"  # the setting that the rows of results.md are averaged over
# entries of results.json that say how, not how well
NO_FIGURES = ("args", "versions", "provenance", "seed", "finished")
LOG_FROM = 10.0  # ratio of the ends of an x axis above which it is logarithmic
MOST_NOTES = 24  # points of a figure that are few enough to be labelled
LOG_ALWAYS = ("rank", "label_fraction", "lr", "trainable_params", "total_params")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# figure of results.json -> heading, number to text
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "val.top1": ("val top-1", "{:.4f}".format),
    "test.top1": ("test top-1", "{:.4f}".format),
    "test.macro_f1": ("test macro-F1", "{:.4f}".format),
    "trainable_params": ("trainable parameters", "{:,.0f}".format),
    "peak_memory_bytes": ("peak memory, MiB", lambda value: f"{value / 2**20:,.0f}"),
    "seconds_per_epoch": ("seconds per epoch", _number),
    "images_per_s": ("images/s", _number),
}


def heading(figure: str) -> str:
    """What a figure of results.json, or a flag, is called in tables and at axes."""
    return COLUMNS[figure][0] if figure in COLUMNS else figure


@dataclass(frozen=True)
class Row:
    """A run as it stands. figures: the numbers of its results.json by dotted name, only if it is done."""

    run: Run
    state: str
    error: str | None
    figures: dict[str, float]


def collect(runs: Iterable[Run]) -> list[Row]:
    """Read how each run stands from its folder."""
    rows = []
    for run in runs:
        state = run.state()
        error = run.error() if state == "failed" else None
        rows.append(Row(run, state, error, flatten(run.results()) if state == "done" else {}))
    return rows


def flatten(results: dict, prefix: str = "") -> dict[str, float]:
    """The finite numbers of nested dictionaries, by names such as "val.top1"."""
    figures = {}
    for key, value in results.items():
        if not prefix and key in NO_FIGURES:
            continue
        if isinstance(value, dict):
            figures |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            figures[prefix + key] = value
    return figures


@dataclass(frozen=True)
class Group:
    """The runs that differ in the seed only. settings: their varied flags, without the seed."""

    name: str
    settings: dict[str, str]
    rows: list[Row]

    def values(self, figure: str) -> list[float]:
        """A figure of all runs that have it."""
        return [row.figures[figure] for row in self.rows if figure in row.figures]

    def states(self) -> str:
        """Such as "2 done, 1 failed"; runs that are stopped or running count as waiting."""
        states = ["waiting" if row.state == "unfinished" else row.state for row in self.rows]
        return ", ".join(f"{states.count(s)} {s}" for s in ("done", "failed", "waiting") if s in states)


def group(rows: Iterable[Row]) -> list[Group]:
    """Rows by command and settings, in the order they come."""
    groups: dict[tuple, Group] = {}
    for row in rows:
        settings = {key: value for key, value in row.run.settings.items() if key != REPEATED}
        key = (row.run.name, *settings.items())
        groups.setdefault(key, Group(row.run.name, settings, [])).rows.append(row)
    return list(groups.values())


def mean_std(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (ddof = 1), which a single value does not have."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _cell(item: Group, figure: str) -> str:
    values = item.values(figure)
    if not values:
        return MISSING
    show = COLUMNS[figure][1] if figure in COLUMNS else _number
    mean, std = mean_std(values)
    # counts that no seed changes need no spread
    text = show(mean) if std is None or (std == 0 and figure.endswith("params")) else f"{show(mean)} ± {show(std)}"
    return text if len(values) == sum(row.state == "done" for row in item.rows) else f"{text} (n={len(values)})"


def _varied(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row.run.settings))


def table(rows: list[Row], columns: Iterable[str] = COLUMNS) -> str:
    """Markdown: a row per command and setting, mean ± standard deviation over its seeds, failures below.

    columns: figures by dotted name. "(n=2)" tells a mean of fewer runs than are done; what is missing is "-".
    """
    varied = [key for key in _varied(rows) if key != REPEATED]
    columns = list(columns)
    lines = [["method", *varied, *map(heading, columns), "runs"]]
    lines.append(["---"] * len(lines[0]))
    for item in group(rows):
        settings = [item.settings.get(key, MISSING) for key in varied]
        lines.append([item.name, *settings, *(_cell(item, figure) for figure in columns), item.states()])
    text = "".join(f"| {' | '.join(cell.replace('|', '¦') for cell in line)} |\n" for line in lines)
    if any(len(item.rows) > 1 for item in group(rows)):
        text += "\nMean ± standard deviation (ddof = 1) over the seeds that are done.\n"
    failed = [f"* {row.run.label}: {row.error}\n" for row in rows if row.state == "failed"]
    return text + ("\nFailed:\n\n" + "".join(failed) if failed else "")


def csv_table(rows: list[Row]) -> str:
    """CSV: a row per run with its settings, state, error and every number of its results.json."""
    varied = _varied(rows)
    figures = list(dict.fromkeys(figure for row in rows for figure in row.figures))
    known = ["method", *varied, "state", "error"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    # the epochs asked for and the epochs it took can both be there
    writer.writerow([*known, *(f"results.{figure}" if figure in known else figure for figure in figures)])
    for row in rows:
        settings = [row.run.settings.get(key, MISSING) for key in varied]
        numbers = [row.figures.get(figure, MISSING) for figure in figures]
        writer.writerow([row.run.name, *settings, row.state, row.error or MISSING, *numbers])
    return text.getvalue()


def write_tables(out: Path, rows: list[Row], columns: Iterable[str] = COLUMNS) -> None:
    """Write results.csv and results.md, each in one step."""
    write_text(out / "results.csv", csv_table(rows))
    write_text(out / "results.md", table(rows, columns))


@dataclass(frozen=True)
class Point:
    """Mean (and spread, if known) of y at x. x is text where it is a flag. note: the settings, if x is a figure."""

    x: str | float
    y: float
    std: float | None
    note: str


def curves(rows: list[Row], x: str, y: str) -> dict[str, list[Point]]:
    """Points by the name of their line. Settings without x or y have no point.

    Where x is a varied flag, the other flags tell lines apart, but for those that x or another one settles; where x
    is a figure, all settings of a command are on one line.
    """
    groups = group(rows)
    free = []
    for key in _varied(rows):
        if key not in (x, REPEATED) and not any(_settled(key, other, groups) for other in (x, *free)):
            free.append(key)
    lines: dict[str, list[Point]] = {}
    for item in groups:
        ys, xs = item.values(y), item.values(x)
        if not ys or not (x in item.settings or xs):
            continue
        mean, std = mean_std(ys)
        if x in item.settings:
            label = ", ".join(f"{key}={item.settings[key]}" for key in free if key in item.settings)
            point = Point(item.settings[x], mean, std, "")
        else:
            label = ""
            point = Point(statistics.fmean(xs), mean, std, ", ".join(f"{k} {v}" for k, v in item.settings.items()))
        several = len({other.name for other in groups}) > 1
        lines.setdefault(f"{item.name} {label}".strip() if several else label or item.name, []).append(point)
    return lines


def _settled(key: str, x: str, groups: list[Group]) -> bool:
    """Whether a flag has one value only for each value of x."""
    pairs = {(item.name, item.settings.get(x), item.settings.get(key)) for item in groups}
    return len({pair[:2] for pair in pairs}) == len(pairs)


def draw(path: Path, rows: list[Row], x: str, y: str) -> bool:
    """Plot y against x as a PNG, a line per command, bars of one standard deviation. False if there is no point."""
    lines = curves(rows, x, y)
    if not lines:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.transforms import ScaledTranslation

    figure, axes = plt.subplots(figsize=(7, 4.5 + 0.2 * _legend_rows(lines)), dpi=150, layout="constrained")
    place = _x_axis(axes, x, [point.x for points in lines.values() for point in points])
    points_in_all = sum(map(len, lines.values()))
    for i, (label, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda point: place(point.x))
        xs, stds = [place(point.x) for point in points], [point.std or 0.0 for point in points]
        drawn = axes.errorbar(
            xs, [point.y for point in points], yerr=stds, label=label, marker="osD^vP*X"[i % 8], markersize=5, capsize=2
        )
        # side by side, so that the bars of many lines do not hide each other
        aside = ScaledTranslation((i - (len(lines) - 1) / 2) * 3 / 72, 0, figure.dpi_scale_trans)
        for artist in drawn.get_children():
            artist.set_transform(axes.transData + aside)
        for position, point in zip(xs, points, strict=True):
            if point.note and points_in_all <= MOST_NOTES:
                axes.margins(x=0.15)
                axes.annotate(point.note, (position, point.y), xytext=(6, -11), textcoords="offset points", fontsize=8)
    axes.set_xlabel(heading(x))
    axes.set_ylabel(heading(y))
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        columns = -(-len(lines) // _legend_rows(lines))
        figure.legend(loc="outside lower center", ncols=columns, fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    plt.close(figure)
    return True


def _legend_rows(lines: dict[str, list[Point]]) -> int:
    columns = max(1, 90 // (max(map(len, lines)) + 8))  # 90 characters are as wide as the figure
    return -(-len(lines) // columns)


def _x_axis(axes, name: str, values: list[str | float]) -> Callable[[str | float], float]:
    """Set up the x axis for these values; returns where on it a value lies."""
    from matplotlib import ticker

    try:
        numbers = sorted({float(value) for value in values})
    except ValueError:
        names = list(dict.fromkeys(map(str, values)))
        axes.set_xticks(range(len(names)), labels=names)
        return lambda value: names.index(str(value))
    if numbers[0] > 0 and (name in LOG_ALWAYS or numbers[-1] >= LOG_FROM * numbers[0]):
        axes.set_xscale("log")
    if isinstance(values[0], str):
        # a flag has few values: these are the ticks
        axes.set_xticks(numbers, labels=[next(v for v in values if float(v) == number) for number in numbers])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    else:
        if axes.get_xscale() == "log":
            axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    return float
