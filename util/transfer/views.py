"""What needs the pictures once more: stress tests, other resolutions, and why faces were named wrongly."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from util.benchmark.bootstrap import mean_interval
from util.benchmark.embedded import Bench, Split
from util.benchmark.errors import Evidence, colour_evidence, find_neighbours, list_errors, tag_probes, taxonomy_table
from util.benchmark.protocols import Outcome, Skipped, decide, known_probes, methods
from util.benchmark.speed import crop_size_summary
from util.benchmark.stress import strata_report, stress_report
from util.data.images import BadImage
from util.data.sources import Source
from util.data.stress import STRESSES, stress_view
from util.run.errors import UserError
from util.transfer.cascade import speed_at, stage_at, try_cascade
from util.transfer.subject import ModelSubject, Subject

STRATA = ("style", "pose", "occlusion", "expression")
SPEED_SECONDS = 8.0  # at each resolution
SIZES_SEEN = 2000  # pictures whose size is looked at: the quantiles no longer change


def stress(bench: Bench, subject: Subject, names: Sequence[str] | None) -> Outcome:
    """Closed-set accuracy by what the metadata say of the probes, and under synthetic changes of the same probes.

    The gallery stays clean. names: of STRESSES; None: all.
    """
    probes, _, excluded = known_probes(bench)
    unknown = sorted(set(names or ()) - set(STRESSES))
    if unknown:
        raise UserError(f"--stresses {unknown[0]} is not known: choose from {', '.join(STRESSES)}")
    method = methods(bench)[0]
    (namer, ranked), labels, groups = decide(bench, method), probes.labels(bench.classes), probes.codes()
    options = {"replicates": bench.replicates, "seed": bench.seed}
    correct = ranked[:, 0] == labels
    blocks: dict[str, dict] = {}
    for name in STRATA:
        strata = probes.facts[name]
        known = any(value is not None for value in strata)
        report = (
            strata_report(correct, strata, groups, **options) if known else {"skipped": f"no {name} in the metadata"}
        )
        blocks[name] = {"strata": report}
    chosen = {name: found for name, found in STRESSES.items() if names is None or name in names}
    if not isinstance(subject, ModelSubject):
        for name in {found.group for found in chosen.values()}:
            blocks.setdefault(name, {})["synthetic"] = {"skipped": "embeddings alone: the pictures cannot be changed"}
    else:
        stressed = {}
        for name in chosen:
            again = subject.again(probes, f"probes under {name}", partial(stress_view, name=name))
            stressed[name] = namer(again)[:, 0] == labels
        for name, figures in stress_report(correct, stressed, groups, **options).items():
            found = chosen[name]
            figures |= {"strength": found.strength, "meaning": found.meaning}
            blocks.setdefault(found.group, {}).setdefault("synthetic", {})[name] = figures
    clean = {"top1": float(correct.mean()), "top1_ci95": mean_interval(correct, groups, **options)}
    return Outcome({**blocks, "clean": clean, "method": method, "probes": len(probes), "excluded": excluded})


def resolution(
    bench: Bench,
    subject: Subject,
    sizes: Sequence[int] | None,
    *,
    cascade: Sequence[int] | None = None,
    most_lost: float = 0.0,
) -> Outcome:
    """The same weights on larger pictures: accuracy, speed, cost; and how large the pictures were to begin with.

    sizes: sides of square inputs, px; None: 1, 1.5 and 2 times that of training (224, 336 and 448 for a model of 224).
    Gallery and probes are shown at the same size. cascade, most_lost: see `try_cascade`; an empty one is left out.
    """
    if not isinstance(subject, ModelSubject):
        raise Skipped("embeddings alone: there is no network to run")
    probes, gallery, excluded = known_probes(bench)
    height, width = subject.size
    if sizes is None:
        sizes = [height, height * 3 // 2, height * 2] if height == width else []
    results: dict = {}
    for side in sizes:
        try:
            results[str(side)] = _at_size(bench, subject, probes, gallery, (side, side))
        except UserError as error:
            results[str(side)] = {"skipped": str(error)}
    if not results:
        raise Skipped(f"the model takes {height} x {width} px: name square sizes with --resolutions")
    if cascade is None or len(cascade):
        results["cascade"] = try_cascade(bench, subject, cascade, most_lost, results, SPEED_SECONDS)
    sides = face_sizes(subject.pictures(probes.name), probes.rows)
    return Outcome(
        {**results, "method": methods(bench)[0], "excluded": excluded, "source_crops": crop_size_summary(sides)},
        {"sizes": sides},
    )


def _at_size(bench: Bench, subject: ModelSubject, probes: Split, gallery: Split, size: tuple[int, int]) -> dict:
    stage = stage_at(bench, subject, gallery, size)
    correct = stage.namer(stage.see(probes))[:, 0] == probes.labels(bench.classes)
    interval = mean_interval(correct, probes.codes(), replicates=bench.replicates, seed=bench.seed)
    return {"top1": float(correct.mean()), "top1_ci95": interval, **speed_at(subject, size, SPEED_SECONDS)}


def face_sizes(source: Source, rows: np.ndarray, every: bool = False) -> np.ndarray:
    """(n, 2) width and height in px of the faces, or whole pictures, behind some samples.

    every: of all rows, NaN where a picture cannot be read; else of up to 2,000, evenly spread, that can be.
    """
    if not every and len(rows) > SIZES_SEEN:
        rows = rows[np.arange(SIZES_SEEN) * len(rows) // SIZES_SEEN]
    boxes, sizes = source.column("box"), []
    for row in rows.tolist():
        if boxes[row] is not None:
            x1, y1, x2, y2 = boxes[row]
            sizes.append((x2 - x1, y2 - y1))
            continue
        try:
            sizes.append(source.load(row).size)
        except BadImage:
            sizes.append((np.nan, np.nan))
    sizes = np.array(sizes, dtype=np.float64).reshape(-1, 2)
    return sizes if every else sizes[~np.isnan(sizes).any(axis=1)]


def mistakes(subject: Subject, closed: Outcome, **options) -> Outcome:
    """Why probes of the closed set were named wrongly: tags, how much more frequent each is among the errors, the list.

    closed: of `protocols.closed_set`. options: of the bootstrap.
    """
    probes, gallery, labels = (closed.arrays[name] for name in ("probes", "gallery", "labels"))
    predicted, gallery_labels = closed.arrays["ranked"][:, 0], closed.arrays["gallery_labels"]
    found = find_neighbours(probes.embeddings, gallery.embeddings, labels, gallery_labels, predicted)
    nearest_own = found["own_row"]
    evidence = Evidence(
        labels,
        predicted,
        **found,
        **colour_evidence(subject.looks(probes), subject.looks(gallery), labels, found["rivals"], gallery_labels),
        short_side=face_sizes(subject.pictures(probes.name), probes.rows, every=True).min(axis=1),
        occlusion=_known(probes.facts["occlusion"]),
        style=_known(probes.facts["style"]),
        own_style=_known(gallery.facts["style"][nearest_own]),
    )
    tags = tag_probes(evidence)
    table = taxonomy_table(tags, evidence.wrong, labels, **options)
    return Outcome(table, {"errors": list_errors(evidence, tags), "probes": probes, "gallery": gallery})


def _known(column: np.ndarray) -> np.ndarray | None:
    return column if any(value is not None for value in column) else None
