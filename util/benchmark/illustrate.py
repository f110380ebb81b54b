"""The pictures of a report: which figure shows which arrays of which protocol."""

from collections.abc import Callable, Sequence
from pathlib import Path

from util.benchmark import figures
from util.benchmark.confusion_figure import confusion_figure
from util.benchmark.errors import error_sheet
from util.benchmark.identification import cluster_order, confusion_counts
from util.benchmark.long_tail import class_accuracies
from util.benchmark.open_set import oscr_curve
from util.benchmark.pairs import KINDS
from util.benchmark.protocols import Outcome
from util.benchmark.report import settings
from util.benchmark.retrieval import precision_recall_curves
from util.benchmark.verification import roc_curve
from util.run.files import write_atomically

FOLDER = "figures"


def draw_figures(
    folder: Path, outcomes: dict[str, Outcome], classes: Sequence[str], load: Callable | None = None
) -> dict[str, list[str]]:
    """Draw what the protocols found into `folder`/figures; {protocol: names of the files, relative to `folder`}.

    load: (split's name, row) -> picture, for the contact sheet of errors.
    """
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    drawers = {
        "closed_set": lambda place, outcome: _closed_set(place, outcome, classes),
        "verification": _verification,
        "open_set": _open_set,
        "few_shot": _few_shot,
        "long_tail": _long_tail,
        "stress": _stress,
        "resolution": _resolution,
        "errors": lambda place, outcome: _errors(place, outcome, classes, load),
    }
    drawn = {}
    for name, outcome in outcomes.items():
        if name in drawers and "skipped" not in outcome.results:
            files = drawers[name](folder / FOLDER, outcome)
            drawn[name] = [f"{FOLDER}/{file.name}" for file in files]
    return drawn


def _closed_set(folder: Path, outcome: Outcome, classes: Sequence[str]) -> list[Path]:
    ranked, labels, scores = (outcome.arrays[name] for name in ("ranked", "labels", "scores"))
    cells = confusion_counts(ranked[:, 0], labels, len(classes))
    files = [folder / "confusion.png"]
    confusion_figure(*cells, cluster_order(cells, len(classes)), classes, files[0])
    if scores is not None:
        found = precision_recall_curves(scores, labels)
        files.append(folder / "precision_recall.png")
        name = outcome.results["method"]
        figures.pr_figure(
            {name: (found["recall"], found["precision"])}, files[1], average_precision={name: found["micro_ap"]}
        )
    return files


def _verification(folder: Path, outcome: Outcome) -> list[Path]:
    pairs, scores = outcome.arrays["pairs"], outcome.arrays["scores"]
    curves, points = {}, {}
    for name, title in (("random", "the model"), ("hard", "the model, pairs in the same colours")):
        block = outcome.results if name == "random" else outcome.results.get("hard", {})
        if "tpr_at_fpr" not in block:
            continue
        chosen = pairs.same | (pairs.kind == KINDS.index(name))
        curve = roc_curve(scores[chosen], pairs.same[chosen])
        curves[title] = (curve["fpr"], curve["tpr"])
        points[title] = {float(fpr): tpr for fpr, tpr in block["tpr_at_fpr"].items() if isinstance(tpr, float)}
    files = [folder / "roc.png", folder / "pair_scores.png"]
    figures.roc_figure(curves, points, files[0])
    threshold = outcome.results.get("threshold", {}).get("value")
    random = pairs.kind == KINDS.index("random")
    figures.score_histogram(scores[pairs.same], scores[random], files[1], threshold=threshold)
    return files


def _open_set(folder: Path, outcome: Outcome) -> list[Path]:
    known, correct, unknown = (outcome.arrays[name] for name in ("known", "correct", "unknown"))
    curve = oscr_curve(known, correct, unknown)
    files = [folder / "oscr.png", folder / "open_set_scores.png"]
    name = outcome.results["score"]
    figures.oscr_figure({name: (curve["fpr"], curve["ccr"])}, files[0])
    chosen = outcome.results["threshold"].get("value")
    names = ("known characters", "characters never trained on")
    figures.score_histogram(
        known, unknown, files[1], threshold=chosen, names=names, xlabel="best cosine to a character"
    )
    if chosen is not None:
        files.append(folder / "threshold.png")
        shown = {"dir": "known: found and named", "far": "unknown: given a name"}
        figures.threshold_figure(outcome.results["threshold_sensitivity"], files[2], chosen=chosen, metrics=shown)
    return files


def _few_shot(folder: Path, outcome: Outcome) -> list[Path]:
    reports: dict[str, dict] = {}
    for key, block in settings(outcome.results):
        for method, figures_of in (
            ("prototype", block),
            ("1-NN", block.get("nearest")),
            ("logistic", block.get("logistic")),
        ):
            if figures_of and "mean" in figures_of:
                mean, half = figures_of["mean"], figures_of["ci95"] or 0.0
                reports.setdefault(method, {})[key] = {"mean": mean, "ci95": [mean - half, mean + half]}
    if not reports:
        return []
    path = folder / "few_shot.png"
    figures.few_shot_figure(reports, path)
    return [path]


def _long_tail(folder: Path, outcome: Outcome) -> list[Path]:
    counts, predicted, labels = (outcome.arrays[name] for name in ("counts", "predicted", "labels"))
    present, accuracy = class_accuracies(predicted, labels, len(counts))
    path, limits = folder / "long_tail.png", outcome.results["thresholds"]
    figures.long_tail_figure(counts[present], accuracy, path, many=limits["many"], few=limits["few"])
    return [path]


def _stress(folder: Path, outcome: Outcome) -> list[Path]:
    bars = {}
    for group, block in outcome.results.items():
        if isinstance(block, dict):
            bars |= {f"{group}: {name}": found for name, found in block.get("strata", {}).items() if _has_drop(found)}
            bars |= {name: found for name, found in block.get("synthetic", {}).items() if _has_drop(found)}
    if not bars:
        return []
    path = folder / "stress.png"
    figures.stress_figure(bars, path)
    return [path]


def _has_drop(found) -> bool:
    return isinstance(found, dict) and "drop" in found


def _resolution(folder: Path, outcome: Outcome) -> list[Path]:
    measured = {key: block for key, block in outcome.results.items() if key.isdigit() and "top1" in block}
    files = [folder / "crop_sizes.png"]
    figures.size_histogram(outcome.arrays["sizes"].min(axis=1), files[0], [int(key) for key in measured])
    if measured:
        files.insert(0, folder / "resolution.png")
        figures.resolution_figure(measured, files[0])
    return files


def _errors(folder: Path, outcome: Outcome, classes: Sequence[str], load: Callable | None) -> list[Path]:
    errors, probes, gallery = (outcome.arrays[name] for name in ("errors", "probes", "gallery"))
    if not errors or load is None:
        return []
    picture = error_sheet(
        errors,
        lambda row: load(probes.name, int(probes.rows[row])),
        lambda row: load(gallery.name, int(gallery.rows[row])),
        classes,
    )
    path = folder / "errors.png"
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
    return [path]
