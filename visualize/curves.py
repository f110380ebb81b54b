"""Training curves of several runs in one figure, from their log.txt.

    python -m visualize.curves runs/a runs/b --out curves.png
    python -m visualize.curves "from scratch=runs/a" "domain-adapted=runs/b" --out curves.png

On the left the training loss, on the right a figure on held-out pictures (--metric; default: the first of METRICS that
any run has). A run is its folder, or NAME=FOLDER; runs of one recipe under several seeds are drawn alike when they get
one name.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from util.benchmark.figure_style import MARKERS, finish, line_style, new_figure, percent_axis, short
from util.run.args import Parser
from util.run.device import pick_device
from util.run.errors import UserError, cli
from visualize.views import DPI, check_out, write_numbers

# on held-out pictures, what log.txt calls it: (words, whether it is a fraction)
METRICS = {
    "val_top1": ("top-1 accuracy, held-out", True),
    "val_psnr_db": ("PSNR, held-out, dB", False),
    "val_loss": ("loss, held-out", False),
    "val_top5": ("top-5 accuracy, held-out", True),
    "val_macro_f1": ("macro F1, held-out", True),
}
LOSS = "train_loss"
_MOST = 28  # curves that can still be told apart: colours x dashes


@dataclass(frozen=True)
class Curve:
    """name: of the run. log: the lines of its log.txt. args: its flags, possibly none."""

    name: str
    folder: Path
    log: list[dict]

    def points(self, metric: str) -> tuple[list[int], list[float]]:
        """(epochs done, values), where the metric was measured and is a number."""
        lines = [
            line for line in self.log if isinstance(line.get(metric), (int, float)) and math.isfinite(line[metric])
        ]
        return [line["epoch"] + 1 for line in lines], [line[metric] for line in lines]


def read_run(text: str) -> Curve:
    """The run that a word of the command line names: FOLDER, its log.txt, or NAME=FOLDER; UserError where none is."""
    name, equals, folder = text.partition("=")
    if Path(text).exists() or not equals:  # a folder may have a = in its name
        name, folder = "", text
    path = Path(folder)
    file = path if path.is_file() else path / "log.txt"
    if not file.is_file():
        raise UserError(f"{folder} is no run: it has no log.txt; name the folder of a training, or NAME=FOLDER")
    lines = []
    for text_line in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text_line)
        except ValueError:  # a crash may have cut the last one short
            continue
        if isinstance(line, dict) and isinstance(line.get("epoch"), int):
            lines.append(line)
    if not lines:
        raise UserError(f"{file} has no epoch yet: wait for the first to end")
    return Curve(name or "/".join(file.parent.parts[-2:]), file.parent, lines)


def tell_apart(runs: Sequence[Curve]) -> dict[str, list[Curve]]:
    """Runs by name; UserError for more names than can be told apart."""
    groups: dict[str, list[Curve]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    if len(groups) > _MOST:
        raise UserError(f"{len(groups)} runs are too many for one figure: give at most {_MOST}")
    return groups


def pick_metric(runs: Sequence[Curve], wanted: str | None) -> str | None:
    """The metric of the right panel: the one asked for, else the first of METRICS that a run has, None without."""
    if wanted:
        if not any(run.points(wanted)[1] for run in runs):
            raise UserError(f"--metric {wanted}: no run has it; they have {', '.join(sorted(_numbers(runs)))}")
        return wanted
    return next((name for name in METRICS if any(run.points(name)[1] for run in runs)), None)


def _numbers(runs: Sequence[Curve]) -> set[str]:
    lines = (line for run in runs for line in run.log)
    return {name for line in lines for name, value in line.items() if isinstance(value, (int, float))} - {"epoch"}


def draw(groups: Mapping[str, Sequence[Curve]], metrics: Sequence[str], log_loss: bool):
    """A panel for each metric, all over the same epochs."""
    from matplotlib.ticker import MaxNLocator  # slow to import

    figure, panels = new_figure(columns=len(metrics), height=4.4, sharex=True, dpi=DPI)
    panels = [panels] if len(metrics) == 1 else list(panels)
    for axes, metric in zip(panels, metrics, strict=True):
        for i, (name, runs) in enumerate(groups.items()):
            for run in runs:
                epochs, values = run.points(metric)
                style = {**line_style(i), "marker": MARKERS[i % len(MARKERS)], "markersize": 4, "linewidth": 1.5}
                # a marker at each of a hundred epochs would be a smear
                axes.plot(epochs, values, markevery=max(1, len(epochs) // 12), label=short(name, 44), **style)
        words, fraction = METRICS.get(metric, (metric.replace("_", " "), False))
        axes.set(xlabel="epochs", ylabel="loss, training" if metric == LOSS else words)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if fraction:
            percent_axis(axes.yaxis)
        if log_loss and "loss" in metric:
            axes.set_yscale("log")
    return figure, panels


def describe(groups: Mapping[str, Sequence[Curve]], metric: str | None) -> str:
    """The title: how many runs, and which ends best."""
    total = sum(map(len, groups.values()))
    title = f"{total} training{'s' * (total > 1)}"
    if metric is None:
        return f"{title}, none with a figure on held-out pictures"
    ends = {name: [values[-1] for run in runs if (values := run.points(metric)[1])] for name, runs in groups.items()}
    means = {name: sum(values) / len(values) for name, values in ends.items() if values}
    if len(means) < 2:
        return title
    lower = "loss" in metric
    best = (min if lower else max)(means, key=means.get)
    words, fraction = METRICS.get(metric, (metric, False))
    value = f"{100 * means[best]:.1f} %" if fraction else f"{means[best]:.3g}" + " dB" * words.endswith("dB")
    return f"{title}: {short(best, 44)} ends with the {'lowest' if lower else 'highest'} {words.split(',')[0]}, {value}"


def get_args(argv: list[str] | None = None):
    parser = Parser("Training curves of several runs in one figure")
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="folders of trainings, with a log.txt")
    parser.add_argument("--out", required=True, metavar="FILE", help="the figure, a .png file; numbers go into a .json")
    parser.add_argument(
        "--metric", default=None, metavar="NAME", help="a number of log.txt; default: a validation figure"
    )
    parser.add_argument("--log_loss", action="store_true", help="losses on a logarithmic axis")
    return parser.parse_args(argv)


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    out = check_out(args.out)
    runs = [read_run(text) for text in args.runs]
    groups, metric = tell_apart(runs), pick_metric(runs, args.metric)
    metrics = [name for name in dict.fromkeys((LOSS, metric)) if name and any(run.points(name)[1] for run in runs)]
    if not metrics:
        raise UserError(f"no run has {LOSS}: name one of {', '.join(sorted(_numbers(runs)))} as --metric")
    figure, panels = draw(groups, metrics, args.log_loss)
    finish(figure, describe(groups, metric), out, legend_of=panels[0])
    numbers = {
        "runs": [
            {"name": run.name, "epochs": run.log[-1]["epoch"] + 1}
            | {name: list(zip(*run.points(name), strict=True)) for name in metrics}
            for run in runs
        ]
    }
    print(f"{len(runs)} runs: {out}; numbers: {write_numbers(out, numbers, args, pick_device('cpu'))}")


if __name__ == "__main__":
    main()
