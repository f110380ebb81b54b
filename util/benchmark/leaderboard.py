"""What the runs of a benchmark amount to: figures by method and seed, means, and paired differences.

Differences are paired by seed and, where a figure is a mean over samples or classes, by sample or class as well
(util.benchmark.paired). A figure of another kind (EER, AUROC, few-shot) is one number for each seed: its interval
says how it varies with the seed, for these test samples.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from util.benchmark.chains import Chain
from util.benchmark.methods import Method
from util.benchmark.paired import Difference, difference, holm
from util.run.grid_report import flatten, mean_std


@dataclass(frozen=True)
class Column:
    """A figure of the leaderboard. key: in `Trial.figures`. scale: from its unit to the one shown.

    better: 1 where more is better, -1 where less is, 0 where nothing is best. rows: name in `Trial.samples` of what it
    is the mean of; "" where it is one number for each seed.
    """

    key: str
    title: str
    unit: str
    scale: float = 100.0
    digits: int = 1
    better: int = 1
    rows: str = ""


COLUMNS = (
    Column("closed_set.top1", "Top-1", "%", rows="top1"),
    Column("closed_set.top5", "Top-5", "%", rows="top5"),
    Column("closed_set.macro_f1", "macro-F1", "%", rows="macro_f1"),
    Column("verification.eer", "EER", "%", better=-1),
    Column("verification.tpr_at_fpr.0.01", "TPR at FPR 0.01", "%"),
    Column("open_set.auroc", "open-set AUROC", "%"),
    Column("few_shot.5way_1shot.mean", "5-way 1-shot", "%"),
    Column("few_shot.5way_5shot.mean", "5-way 5-shot", "%"),
    Column("trainable_params", "trainable parameters", "M", 1e-6, 3, 0),
    Column("train_seconds", "training", "min", 1 / 60, 1, 0),
    Column("latency_ms", "latency p50", "ms", 1.0, 1, 0),
)
HEADLINE = COLUMNS[0]


@dataclass(frozen=True)
class Trial:
    """One seed of a method. figures: by dotted name. samples: name -> {sample or class: value}. groups: of samples."""

    figures: Mapping[str, float]
    samples: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A method as it stands. trials: by seed, of those that are done. state: "done", "partial", "failed", "unavailable"
    or "waiting"; reason: of the ones that are not done."""

    method: Method
    trials: Mapping[int, Trial]
    state: str
    reason: str = ""

    def values(self, key: str) -> list[float]:
        """A figure of all seeds that have it, in their order."""
        return [trial.figures[key] for _, trial in sorted(self.trials.items()) if key in trial.figures]

    def mean_std(self, key: str) -> tuple[float, float | None] | None:
        """Mean and sample standard deviation over seeds; None where no seed has the figure."""
        values = self.values(key)
        return mean_std(values) if values else None


# --- from folders ---------------------------------------------------------------------------------------------------


def entry_of(method: Method, chains: Sequence[Chain], unavailable: str | None = None) -> Entry:
    """Read how a method stands. unavailable: why it could not be run at all."""
    if unavailable:
        return Entry(method, {}, "unavailable", unavailable)
    states = {chain.seed: chain.state() for chain in chains}
    trials = {chain.seed: read_trial(chain) for chain in chains if states[chain.seed] == "done"}
    failed = [chain for chain in chains if states[chain.seed] == "failed"]
    if len(trials) == len(chains):
        return Entry(method, trials, "done")
    if failed:
        reason = "; ".join(f"seed {chain.seed}: {chain.error()}" for chain in failed)
        return Entry(method, trials, "failed", reason)
    reason = "; ".join(f"seed {seed}: {state}" for seed, state in states.items() if state != "done")
    return Entry(method, trials, "partial" if trials else "waiting", reason)


def read_trial(chain: Chain) -> Trial:
    """The figures of one seed that is done, costs of its own pre-training included."""
    figures = flatten(chain.evaluation.results())
    figures |= costs(chain.transfer.results(), chain.pretraining.results() if chain.pretraining else {})
    latency = [value for name, value in figures.items() if name.endswith(".latency_ms_p50")]
    if latency:
        figures["latency_ms"] = latency[0]
    folder = chain.evaluation.folder
    samples, groups = read_predictions(folder / "predictions.csv")
    return Trial(figures, samples | read_classes(folder / "per_class.csv"), groups)


def costs(transfer: dict, pretraining: dict) -> dict[str, float]:
    """Seconds, images, memory and parameters, from results.json of the stages. A probe's encoder passes count."""
    own = {stage: _seconds(results) for stage, results in (("transfer", transfer), ("pretrain", pretraining))}
    images = {"transfer": transfer.get("images_seen", 0), "pretrain": pretraining.get("images_seen", 0)}
    peak = max(results.get("peak_memory_bytes") or 0 for results in (transfer, pretraining))
    figures = {
        "trainable_params": transfer["trainable_params"],
        "total_params": transfer["total_params"],
        "train_seconds": sum(own.values()),
        "images_seen": sum(images.values()),
        "transfer_epochs": transfer.get("epochs", 0),
        "pretrain_epochs": pretraining.get("epochs", 0),
        "classes": transfer.get("classes", 0),
        **{f"{stage}_seconds": seconds for stage, seconds in own.items()},
        **{f"{stage}_images": count for stage, count in images.items()},
    }
    return figures | ({"peak_memory_bytes": peak} if peak else {})


def _seconds(results: dict) -> float:
    if not results:
        return 0.0
    if "encoder_pass_seconds" in results:
        return results["images_seen"] / results["images_per_s"]
    return results["train_seconds"]


def read_predictions(path: Path) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """({"top1": ..., "top5": {sample_id: 0 or 1}}, {sample_id: identity}) of what eval_recognition.py has written."""
    rows = _rows(path)
    top1 = {row["sample_id"]: float(row["correct"]) for row in rows}
    top5 = {row["sample_id"]: float(row["identity"] in _answers(row)) for row in rows}
    return {"top1": top1, "top5": top5}, {row["sample_id"]: row["identity"] for row in rows}


def _answers(row: Mapping[str, str]) -> list[str]:
    return [answer for name, answer in row.items() if name.startswith("answer") and answer]


def read_classes(path: Path) -> dict[str, dict[str, float]]:
    """{"macro_f1": {identity: F1}}: macro-F1 is their mean, of which a class without probes counts 0."""
    return {"macro_f1": {row["identity"]: float(row["f1"] or 0) for row in _rows(path)}}


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- comparisons ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A method against another one in one figure, in the unit of the column as shown.

    found: `method` less `other`; None where they have no seed in common. p_holm: adjusted for all methods that were
    set against the same one in this figure.
    """

    column: Column
    method: str
    other: str
    found: Difference | None
    p_holm: float | None = None


def compare(column: Column, entry: Entry, other: Entry) -> Difference | None:
    """`entry` less `other`, paired by seed and by sample, in the unit of the column as shown; None without pairs."""
    seeds = [seed for seed in sorted(entry.trials) if seed in other.trials and _has(column, entry, other, seed)]
    if not seeds:
        return None
    if not column.rows:
        a, b = ([[one.trials[seed].figures[column.key]] for seed in seeds] for one in (other, entry))
        return difference(np.array(a) * column.scale, np.array(b) * column.scale, np.zeros(1, dtype=np.int64))
    tables = [[one.trials[seed].samples[column.rows] for seed in seeds] for one in (other, entry)]
    names = sorted(set.intersection(*(set(table) for way in tables for table in way)))
    if not names:
        return None
    a, b = (np.array([[table[name] for name in names] for table in way]) * column.scale for way in tables)
    groups = entry.trials[seeds[0]].groups
    return difference(a, b, np.array([groups.get(name, name) for name in names]))


def _has(column: Column, entry: Entry, other: Entry, seed: int) -> bool:
    if column.rows:
        return all(one.trials[seed].samples.get(column.rows) for one in (entry, other))
    return all(column.key in one.trials[seed].figures for one in (entry, other))


def best_of(column: Column, entries: Sequence[Entry]) -> Entry | None:
    """The method with the best mean; of those with the most seeds, so that one lucky run wins nothing."""
    known = [entry for entry in entries if entry.values(column.key)]
    if not known or not column.better:
        return None
    most = max(len(entry.values(column.key)) for entry in known)
    full = [entry for entry in known if len(entry.values(column.key)) == most]
    return max(full, key=lambda entry: column.better * entry.mean_std(column.key)[0])


def against(column: Column, entries: Sequence[Entry], other: Entry | None) -> list[Comparison]:
    """Every other method with the figure against one of them, p-values adjusted for their number."""
    if other is None:
        return []
    rest = [entry for entry in entries if entry is not other and entry.values(column.key)]
    found = [compare(column, entry, other) for entry in rest]
    tested = [i for i, each in enumerate(found) if each is not None and each.p is not None]
    adjusted = dict(zip(tested, holm([found[i].p for i in tested]), strict=True)) if tested else {}
    return [
        Comparison(column, entry.method.name, other.method.name, each, adjusted.get(i))
        for i, (entry, each) in enumerate(zip(rest, found, strict=True))
    ]


@dataclass(frozen=True)
class Board:
    """A leaderboard. bold: column key -> methods that are best as far as the intervals can tell, possibly none.

    to_best, to_reference: column key -> comparisons.
    """

    entries: Sequence[Entry]
    columns: Sequence[Column]
    reference: str | None
    to_best: Mapping[str, list[Comparison]]
    to_reference: Mapping[str, list[Comparison]]
    bold: Mapping[str, frozenset[str]]


def make_board(entries: Sequence[Entry], reference: str | None = None, columns: Sequence[Column] = COLUMNS) -> Board:
    """Compare all methods. reference: the name of one that all are set against, too."""
    chosen = next((entry for entry in entries if entry.method.name == reference and entry.trials), None)
    judged = [column for column in columns if column.better]
    to_best = {column.key: against(column, entries, best_of(column, entries)) for column in judged}
    to_reference = {column.key: against(column, entries, chosen) for column in judged}
    bold = {column.key: _bold(column, best_of(column, entries), to_best[column.key]) for column in judged}
    return Board(entries, columns, chosen.method.name if chosen else None, to_best, to_reference, bold)


def _bold(column: Column, best: Entry | None, compared: Sequence[Comparison]) -> frozenset[str]:
    """The best, and all whose 95 % interval of the difference to it reaches 0.

    None at all where no difference has an interval (one seed, and a figure that is one number for each).
    """
    told = [each for each in compared if each.found is not None and each.found.ci95 is not None]
    if best is None or not told:
        return frozenset()
    tied = (each.method for each in told if each.found.sign * column.better >= 0)
    return frozenset({best.method.name, *tied})
