"""Linear probes of pre-trained encoders: which training each belongs to, and how good its features are."""

import glob
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from util.run.errors import UserError
from visualize.sweep.trained import Trained

FIGURES = ("top1", "top5", "macro_f1")
PARTS = ("test", "val")  # the first that a probe has is reported


def read_probes(spec: str) -> list[dict]:
    """The results of finished probes: {"init", "part", "top1", ...} each, rates as fractions in 0..1.

    spec: a folder, searched for results.json at any depth, or a pattern of such files or of their folders. UserError
    where there are none.
    """
    if Path(spec).is_dir():
        files = sorted(Path(spec).rglob("results.json"))
    else:
        found = [Path(path) for path in sorted(glob.glob(spec, recursive=True))]
        files = [path / "results.json" if path.is_dir() else path for path in found]
    probes = []
    for file in filter(Path.is_file, files):
        results = _read(file)
        init, part = results.get("args", {}).get("init"), next((p for p in PARTS if p in results), None)
        if results.get("finished") and init and part and FIGURES[0] in results[part]:
            rates = {name: results[part][name] for name in FIGURES if name in results[part]}
            probes.append({"init": init, "part": part, **rates})
    if not probes:
        raise UserError(f"--probes {spec} finds no results.json of a finished probe: run main_linprobe.py first")
    if len({probe["part"] for probe in probes}) > 1:
        raise UserError(f"--probes {spec} finds probes with and without test pictures: name those of one data set")
    return probes


def by_training(probes: Sequence[Mapping], trainings: Mapping[str, Sequence[Trained]]) -> dict:
    """{"part", "unused", "trainings": {label: {"runs", figure: {"mean", "std"}}}}.

    A probe belongs to the checkpoint that it started from. std: sample deviation over the probes, None of one. unused:
    probes of other checkpoints. UserError if all are.
    """
    label_of = {_file_of(run.ckpt): label for label, runs in trainings.items() for run in runs}
    found: dict[str, list[Mapping]] = {}
    for probe in probes:
        if label := label_of.get(_file_of(probe["init"])):
            found.setdefault(label, []).append(probe)
    if not found:
        raise UserError(f"--probes: none of {len(probes)} is of a checkpoint of --ckpt; one is of {probes[0]['init']}")
    report = {}
    for label in filter(found.get, trainings):
        own, figures = found[label], {}
        for name in FIGURES:
            values = [probe[name] for probe in own if name in probe]
            if values:
                std = statistics.stdev(values) if len(values) > 1 else None
                figures[name] = {"mean": statistics.fmean(values), "std": std}
        report[label] = {"runs": len(own), **figures}
    used = sum(map(len, found.values()))
    return {"part": probes[0]["part"], "unused": len(probes) - used, "trainings": report}


def _read(file: Path) -> dict:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{file} is damaged: remove it, or run its probe again") from None
    return results if isinstance(results, dict) else {}


def _file_of(ckpt: str) -> Path:
    """The file that a checkpoint's name means, the same under every name."""
    path = Path(ckpt).resolve()
    return path / "checkpoint-last.pth" if path.is_dir() else path
