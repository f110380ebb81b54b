"""The tables of a reproduction, out of what its runs have left, in one Markdown file.

python scripts/reproduce_report.py --runs runs/reproduce --out runs/reproduce/report.md

RUNS is the folder of scripts/reproduce.sh; runs that are not finished are left out, and said to be missing.
"""

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.run.args import Parser
from util.run.errors import UserError, cli
from util.run.files import write_text
from util.run.grid_report import flatten, mean_std

MISSING = "-"
PERCENT, PLAIN, COUNT = (lambda x: f"{100 * x:.1f}"), (lambda x: f"{x:.3f}"), (lambda x: f"{x:,.0f}")
DECIBEL = "{:.2f}".format
# figure of metrics.json under its mask ratio -> heading, number to text
RECONSTRUCTION = {
    "psnr_db": ("PSNR dB", DECIBEL),
    "psnr_masked_db": ("masked dB", DECIBEL),
    "ssim": ("SSIM", PLAIN),
    "loss": ("loss", PLAIN),
    "blockiness": ("blockiness", "{:.1f}".format),
    "delta_e": ("delta E", "{:.1f}".format),
    "hf_energy_ratio": ("HF", PLAIN),
}
# figures of results.json
ADAPTATION = {
    "val.loss": ("held-out loss", PLAIN),
    "val.psnr_db": ("held-out PSNR dB", DECIBEL),
    "seconds_per_epoch": ("s per epoch", "{:.1f}".format),
    "images_per_s": ("images/s", COUNT),
    "peak_memory_bytes": ("peak memory, MiB", lambda x: f"{x / 2**20:,.0f}"),
}
TRANSFER = {
    "val.top1": ("val top-1", PERCENT),
    "test.top1": ("test top-1", PERCENT),
    "test.top5": ("test top-5", PERCENT),
    "test.macro_f1": ("test macro-F1", PERCENT),
    "trainable_params": ("trainable parameters", COUNT),
    "seconds_per_epoch": ("s per epoch", "{:.1f}".format),
}
RECOGNITION = {
    "closed_set.top1": ("closed set top-1", PERCENT),
    "verification.auc": ("verification AUC", PERCENT),
    "verification.eer": ("EER", PERCENT),
    "verification.tpr_at_fpr.0.01": ("TPR at FPR 1 %", PERCENT),
    "open_set.auroc": ("open-set AUROC", PERCENT),
    "open_set.oscr": ("OSCR", PERCENT),
    "few_shot.5way_1shot.mean": ("5-way 1-shot", PERCENT),
    "few_shot.5way_5shot.mean": ("5-way 5-shot", PERCENT),
    "long_tail.macro_f1": ("long-tail macro-F1", PERCENT),
}
SHORT = {"batch_size": "batch"}
METHODS = {"probe": "linear probe", "lora": "LoRA", "full": "full fine-tuning"}
FLOORS = {"visible_mean": "visible mean colour", "mean_image": "shifted mean image", "inpaint": "inpainting (Telea)"}

Columns = dict[str, tuple[str, Callable[[float], str]]]


@dataclass(frozen=True)
class Result:
    """What one run has left. settings: the varied flags, from its folder's name. figures: numbers by dotted name."""

    name: str
    settings: dict[str, str]
    figures: dict[str, float]
    command: tuple[str, ...]

    @property
    def group(self) -> tuple[tuple[str, str], ...]:
        """What runs have in common that differ in their seed alone."""
        return tuple((key, value) for key, value in self.settings.items() if key != "seed")


def read_json(path: Path):
    """The content of a file, None where it is not there or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_results(folder: Path, file: str = "results.json") -> tuple[list[Result], int]:
    """The finished runs below FOLDER/NAME/SETTINGS, in the order of their names, and how many are not finished."""
    found, missing = [], 0
    for path in sorted(folder.glob("*/*/command.json"), key=lambda path: _in_order(path.parent)):
        content = read_json(path.parent / file)
        if not isinstance(content, dict) or (file == "results.json" and not content.get("finished")):
            missing += 1
            continue
        settings = dict(part.partition("=")[::2] for part in path.parent.name.split(",") if "=" in part)
        command = (read_json(path) or {}).get("command", ())
        found.append(Result(path.parents[1].name, settings, flatten(content), tuple(command)))
    return found, missing


def _in_order(folder: Path) -> tuple:
    """Names in the order of their numbers: 16 before 100."""
    numbers = [part.partition("=")[2] for part in folder.name.split(",")]
    return folder.parent.name, [(float(n), "") if n.replace(".", "", 1).isdigit() else (0.0, n) for n in numbers]


def grouped(results: Iterable[Result]) -> dict[tuple, list[Result]]:
    """Results by name and settings, the seed left out."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault((result.name, result.group), []).append(result)
    return groups


def cell(results: Sequence[Result], figure: str, show: Callable[[float], str]) -> str:
    """Mean and spread over the runs that have a figure."""
    values = [result.figures[figure] for result in results if figure in result.figures]
    if not values:
        return MISSING
    mean, std = mean_std(values)
    return show(mean) if not std else f"{show(mean)} ± {show(std)}"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(labels: dict[str, Callable[[Result], str]], results: Sequence[Result], columns: Columns) -> str:
    """A row for each group of runs. labels: heading -> what a run has there, for the columns on the left."""
    rows = [
        [
            *(label(members[0]) for label in labels.values()),
            str(len(members)),
            *(cell(members, figure, show) for figure, (_, show) in columns.items()),
        ]
        for members in grouped(results).values()
    ]
    return markdown([*labels, "seeds", *(head for head, _ in columns.values())], rows)


def reconstruction_table(official: dict | None, adapted: Sequence[Result]) -> str:
    """Under each mask ratio the official weights, each adapted run, and the floors."""
    ratios = list((official or {}).get("ratios", {}))
    ratios += [ratio for ratio in _ratios(adapted) if ratio not in ratios]
    rows = []
    for ratio in sorted(ratios, key=float):
        masked = f"{100 * float(ratio):g} %"
        if official and ratio in official["ratios"]:
            rows.append([masked, "start weights", *_metrics(official["ratios"][ratio])])
        for (_, settings), members in grouped(adapted).items():
            name = "adapted, " + ", ".join(f"{SHORT.get(key, key)} {value}" for key, value in settings)
            figures = [
                cell(members, f"ratios.{ratio}.{metric}.mean", show) for metric, (_, show) in RECONSTRUCTION.items()
            ]
            rows.append([masked, name, *figures])
        for floor, name in FLOORS.items():
            known = (official or {}).get("floors", {}).get(ratio, {}).get(floor, {})
            if known and "skipped" not in known:
                rows.append([masked, name, *_metrics(known)])
    return markdown(["masked", "weights", *(head for head, _ in RECONSTRUCTION.values())], rows)


def _ratios(results: Iterable[Result]) -> list[str]:
    names = (name for result in results for name in result.figures if name.startswith("ratios."))
    return list(dict.fromkeys(name[len("ratios.") :].rsplit(".", 2)[0] for name in names))


def _metrics(values: dict) -> list[str]:
    means = {metric: values.get(metric, {}).get("mean") for metric in RECONSTRUCTION}
    return [MISSING if mean is None else RECONSTRUCTION[metric][1](mean) for metric, mean in means.items()]


def by_method(result: Result) -> tuple:
    """Rows in the order of METHODS, those from the official weights first."""
    method, start = result.name.split("-")[0], start_of(result)
    return list(METHODS).index(method) if method in METHODS else len(METHODS), start != "official", start


def method_of(result: Result) -> str:
    """Such as "LoRA, rank 8"."""
    rank = result.settings.get("rank")
    return METHODS.get(result.name.split("-")[0], result.name) + (f", rank {rank}" if rank else "")


def start_of(result: Result) -> str:
    """What a run of transfer began with."""
    return result.name.partition("-")[2] or MISSING


def commands(results: Sequence[Result]) -> str:
    """The command of one run of each name, as a block of code."""
    first = {result.name: result for result in reversed(results)}
    return "\n".join(f"    python {shlex.join(result.command)} --output_dir RUN" for result in reversed(first.values()))


def report(runs: Path) -> str:
    """The whole file. UserError where nothing is finished."""
    official = read_json(runs / "mask_ratio" / "metrics.json")
    adaptation, unadapted = read_results(runs / "adapt")
    pictures, _ = read_results(runs / "adapt" / "then", "metrics.json")
    transfer, untrained = read_results(runs / "transfer")
    recognition, unjudged = read_results(runs / "transfer" / "then")
    if not any((official, adaptation, transfer, recognition)):
        raise UserError(f"{runs} holds no finished run: start bash scripts/reproduce.sh {runs} first")
    facts = (official or {}).get("provenance", {})
    missing = unadapted + untrained + unjudged
    who = {"method": method_of, "start": start_of}
    settings = {
        SHORT.get(key, key): (lambda one, key=key: one.settings.get(key, MISSING)) for key in ("epochs", "batch_size")
    }
    transfer, recognition = sorted(transfer, key=by_method), sorted(recognition, key=by_method)
    parts = [
        "# Reproduction of the first report",
        f"Device: {facts.get('device', 'unknown')}; commit {facts.get('git_commit', 'unknown')}; "
        f"pictures: {facts.get('args', {}).get('data_path', 'unknown')}. ± is the standard deviation over seeds. "
        + (f"**{missing} runs are not finished and not in the tables.**" if missing else "All runs are finished."),
        f"## Mask ratios: {(official or {}).get('images', 0)} pictures, the same masks for every row",
        reconstruction_table(official, pictures),
        "![reconstructions by the start weights](mask_ratio/reconstruction.png)" if official else "",
        "## Domain-adaptive pre-training",
        table(settings, adaptation, ADAPTATION),
        commands(adaptation),
        "## Transfer (per cent)",
        table(who, transfer, TRANSFER),
        commands(transfer),
        "## Recognition (per cent)",
        table(who, recognition, RECOGNITION),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


@cli
def main(argv: list[str] | None = None) -> None:
    parser = Parser("The tables of a reproduction in one Markdown file")
    parser.add_argument("--runs", required=True, type=Path, metavar="DIR", help="OUT of scripts/reproduce.sh")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the Markdown file to write")
    args = parser.parse_args(argv)
    text = report(args.runs)
    write_text(args.out, text)
    print(f"report: {args.out}")


if __name__ == "__main__":
    main()
