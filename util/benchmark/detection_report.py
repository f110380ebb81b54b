"""report.md of eval_detection.py: tables and figures that a reader can check against the files beside it."""

from collections.abc import Mapping
from pathlib import Path

from util.benchmark.detection import NAMES, SIZES
from util.benchmark.detection_errors import KINDS
from util.benchmark.report import number, table
from util.run.files import write_text

_COLUMNS = {
    "ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "AP small", "ap_medium": "AP medium",
    "ap_large": "AP large", "ar1": "AR1", "ar10": "AR10", "ar100": "AR100",
}  # fmt: skip
_MEANING = {
    "localisation": "overlaps a true box by an IoU of 0.1 up to 0.5",
    "duplicate": "a better find has the true box already",
    "background": "overlaps no true box by 0.1",
    "missed": "a true box that no find has, nor a localisation error would have",
}


def rate(value: float | None, interval=None) -> str:
    """A fraction in per cent; "-" for a figure of nothing (None, NaN)."""
    return "-" if value is None or value != value else number(value, interval)


def headline(results: Mapping) -> str:
    """One line that says how well faces are found."""
    figures = ", ".join(f"{title} {rate(results[key])} %" for key, title in list(_COLUMNS.items())[:3])
    point = results["operating_point"]
    return f"{figures}; at score {point['score_threshold']:g}: precision {rate(point['precision'])} %, recall " + (
        f"{rate(point['recall'])} %"
    )


def write_report(path: Path, title: str, results: Mapping, figures: Mapping[str, str]) -> None:
    """Write report.md. results: as stored. figures: {"precision_recall", "found", "sizes", any of KINDS: file}."""
    lines = [f"# {title}", "", "Rates in per cent, with 95 % intervals by bootstrap over pictures.", ""]
    lines += [headline(results), "", "## What was compared", "", *_data(results["data"])]
    lines += ["", "## Average precision", "", *_classes(results["classes"]), *_figure(figures, "precision_recall")]
    lines += ["", "## At a score threshold", "", *_points(results["operating_point"]), *_figure(figures, "found")]
    if results["sizes"]:
        lines += ["", "## Input sizes", "", *_sizes(results["sizes"]), *_figure(figures, "sizes")]
    lines += ["", "## Why average precision is lost", "", *_errors(results["errors"])]
    for kind in KINDS:
        lines += _figure(figures, kind)
    made = f"{results['device']}, commit {results['git_commit']}, {results['date']}, {results['wall_seconds']} s."
    lines += ["", "## How", "", f"    {results['command']}", "", made]
    write_text(path, "\n".join(lines) + "\n")


def _figure(figures: Mapping[str, str], name: str) -> list[str]:
    return ["", f"![{name}]({figures[name]})"] if name in figures else []


def _data(data: Mapping) -> list[str]:
    names = {name: f"{name}s" for name in NAMES.values()}
    lines = table(
        ("pictures", "without a face", *names.values()),
        [[data["pictures"], data["pictures_without_a_face"], *(data[plural] for plural in names.values())]],
    )
    left_out = [f"{count} {what.replace('_', ' ')}" for what, count in data["left_out"].items() if count]
    lines += ["", f"Left out: {', '.join(left_out) or 'nothing'}. Sizes by area in the original picture: small below "
              "32 x 32 px, medium up to 96 x 96 px, large."]  # fmt: skip
    return lines


def _classes(classes: Mapping[str, Mapping]) -> list[str]:
    rows = [
        [name, *(rate(block[key], block[f"{key}_ci95"]) for key in _COLUMNS)]
        for name, block in classes.items()
        if "skipped" not in block
    ]
    lines = table(("class", *_COLUMNS.values()), rows)
    skipped = [f"{name}: {block['skipped']}" for name, block in classes.items() if "skipped" in block]
    lines += ["", f"Not measured: {'; '.join(skipped)}."] * bool(skipped)
    return [*lines, "", "AP: mean over IoU 0.50 to 0.95; AR: recall with so many finds in a picture. COCO's rules."]


def _points(point: Mapping) -> list[str]:
    rows = [
        [
            name, f"{block['score_threshold']:.3g}", *(rate(block[key]) for key in ("precision", "recall", "f1")),
            block["finds"], f"{block['false_positives_per_picture']:.3g}",
        ]
        for name, block in (("as asked", point), ("best F1 here", point["best_f1"]))
        if block
    ]  # fmt: skip
    lines = table(("threshold", "score", "precision", "recall", "F1", "finds", "wrong finds a picture"), rows)
    return [*lines, "", "At IoU 0.5. The best threshold is chosen on these very pictures: its figures flatter."]


def _sizes(sizes: Mapping[str, Mapping]) -> list[str]:
    keys = ("ap", "ap50", "ap_small", "ap_medium", "ap_large")
    rows = [
        [
            px, *(rate(block[key], block[f"{key}_ci95"]) for key in keys),
            *(f"{block[key]:.1f}" for key in ("latency_ms_p50", "latency_ms_p95", "images_per_s")),
        ]
        for px, block in sorted(sizes.items(), key=lambda pair: int(pair[0]))
    ]  # fmt: skip
    lines = table(("px", *(_COLUMNS[key] for key in keys), "latency ms, p50", "p95", "images/s"), rows)
    lines += ["", "px: longer side of the input. One picture at a time, decoded before; resizing is counted."]
    return lines + [f"All else here is of {next(iter(sizes))} px."] * (len(sizes) > 1)


def _errors(errors: Mapping) -> list[str]:
    names = ("size", *(("occlusion",) if "skipped" not in errors["missed"]["by_occlusion"] else ()))
    rows = [
        [kind, _MEANING[kind], rate(errors[kind]["dap50"], errors[kind]["dap50_ci95"]), errors[kind]["count"]]
        for kind in KINDS
    ]
    threshold = f"{errors['score_threshold']:g}"
    lines = table(("error", "what it is", "dAP50", f"count, score from {threshold}"), rows)
    for name in names:
        lines += ["", *_strata(errors, name)]
    wrong, unfound = (rate(errors[name]["dap50"]) for name in ("false_positives", "false_negatives"))
    lines += [
        "",
        "dAP50: points of AP50 gained if this kind of error alone is mended (TIDE, arXiv 2008.08115); they do not add "
        f"up. AP50 would gain {wrong} without any wrong find, and {unfound} if only the faces found were asked for.",
    ]
    return lines


def _strata(errors: Mapping, what: str) -> list[str]:
    totals = errors["faces"][f"by_{what}"]
    blocks = {kind: errors[kind][f"by_{what}"] for kind in KINDS}
    names = [*SIZES] if what == "size" else sorted({name for block in blocks.values() for name in block} | set(totals))

    def cell(kind: str, name: str) -> str:
        found = blocks[kind].get(name)
        return "-" if found is None else f"{rate(found['dap50'])} ({found['count']})"

    header = (what, "true boxes", *(f"{kind}, dAP50 (count)" for kind in KINDS))
    return table(header, ([name, totals.get(name, 0), *(cell(kind, name) for kind in KINDS)] for name in names))
