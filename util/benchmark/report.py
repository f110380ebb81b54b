"""report.md: what the protocols found, in tables and figures that a reader can check against the lists beside it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from util.run.files import write_text

TITLES = {
    "closed_set": "Closed set: who of the known characters is it?",
    "icartoonface": "iCartoonFace, official test",
    "verification": "Verification: are these two one character?",
    "open_set": "Open set: is it a known character, and who?",
    "few_shot": "Few-shot: new characters from one or five pictures",
    "long_tail": "Long tail: frequent and rare characters",
    "stress": "Stress tests",
    "resolution": "Resolution",
}
# the figures of the summary: protocol -> (path in the block, what it is called)
_HEADLINES = {
    "closed_set": (("top1", "Top-1"), ("top5", "Top-5"), ("macro_f1", "macro F1"), ("map", "retrieval mAP")),
    "icartoonface": (("rank1", "Rank-1"), ("rank5", "Rank-5")),
    "verification": (("auc", "ROC-AUC"), ("eer", "EER")),
    "open_set": (("auroc", "AUROC"), ("oscr", "OSCR")),
    "long_tail": (("macro_f1", "macro F1"),),
    "stress": (),
}


def number(value, interval: Sequence[float] | None = None) -> str:
    """A rate in per cent, with its interval: "61.2 (58.0 to 64.1)"; "-" where there is none."""
    if value is None or isinstance(value, Mapping):
        return "-"
    return f"{100 * value:.1f}" + (f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else "")


def not_measured(blocks: Mapping[str, object]) -> list[str]:
    """A line that says why figures are missing: those of `blocks` that are {"skipped": why}; else nothing."""
    reasons = [
        f"{name}: {why['skipped']}" for name, why in blocks.items() if isinstance(why, Mapping) and "skipped" in why
    ]
    return ["", f"Not measured: {'; '.join(reasons)}."] if reasons else []


def table(header: Sequence[str], rows: Iterable[Sequence]) -> list[str]:
    """A Markdown table as lines."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return lines + [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]


def headline(name: str, results: dict) -> str:
    """One line that says what a protocol found."""
    if "skipped" in results:
        return f"{name}: skipped: {results['skipped']}"
    figures = [f"{title} {number(results[key])} %" for key, title in _HEADLINES.get(name, ())]
    if name == "verification":
        figures += [f"TPR@FPR={fpr} {number(value)} %" for fpr, value in results["tpr_at_fpr"].items()]
    if name == "few_shot":
        figures = [f"{key} {number(block.get('mean', block))} %" for key, block in settings(results)]
    if name == "resolution":
        figures = [f"{key} px {number(block.get('top1', block))} %" for key, block in results.items() if key.isdigit()]
    if name == "stress":
        figures = [f"clean Top-1 {number(results['clean']['top1'])} %"]
    return f"{name}: " + "  ".join(figures)


def settings(results: dict) -> list[tuple[str, dict]]:
    """The settings in a few-shot block: ("5way_1shot", {...}), ..."""
    return [(key, block) for key, block in results.items() if "way_" in key]


def _closed_set(results: dict) -> list[str]:
    def row(title: str, block: dict) -> list:
        return [
            title,
            *(number(block[key], block[f"{key}_ci95"]) for key in ("top1", "top5", "macro_f1", "balanced_accuracy")),
        ]

    names = {"head": "trained head", "centroid": "nearest class centre", "knn": "k-NN"}
    lines = table(
        ("named by", "Top-1", "Top-5", "macro F1", "balanced accuracy"),
        (row(names[method], block) for method, block in results["by"].items()),
    )
    lines += [
        "",
        f"{results['probes']} probes of {results['on']}, {results['classes']} characters, {results['gallery']} gallery "
        f"pictures. Retrieval: mAP {number(results['map'], results['map_ci95'])}, Rank-1 "
        f"{number(results['retrieval'].get('rank1'))}.",
    ]
    return lines


def _verification(results: dict) -> list[str]:
    def rows(title: str, block: dict) -> list:
        tprs = (number(value, block["tpr_at_fpr_ci95"][fpr]) for fpr, value in block["tpr_at_fpr"].items())
        auc, eer = (number(block[key], block[f"{key}_ci95"]) for key in ("auc", "eer"))
        return [title, *tprs, auc, eer, f"{block['positives']} / {block['negatives']}"]

    fprs = [f"TPR at FPR {100 * float(fpr):g} %" for fpr in results["tpr_at_fpr"]]
    blocks = [("random", results)] + [("same colours", results["hard"])] * ("hard" in results)
    lines = table(
        ("negatives", *fprs, "ROC-AUC", "EER", "positives / negatives"),
        [rows(title, block) for title, block in blocks if "auc" in block],
    )
    points = results["operating_points"]
    lines += [
        "",
        f"Pairs of {results['on']}, {results['identities']} characters. Realised FPR (false accepts): "
        + ", ".join(
            f"{100 * point['realised_fpr']:.3g} % ({point['k']} of {point['negatives']})"
            + (f"; {point['warning']}" if "warning" in point else "")
            for point in points.values()
            if "skipped" not in point
        )
        + ".",
    ]
    lines += not_measured({f"TPR at {fpr}": point for fpr, point in points.items()})
    tried = results.get("threshold", {})
    if "value" in tried:
        lines += [
            "",
            f"The threshold {tried['value']:.4f}, of the {tried['rule']} on {tried['chosen_on']}, gives here "
            f"accuracy {number(tried['accuracy'])}, TPR {number(tried['tpr'])}, FPR {number(tried['fpr'])}.",
        ]
    return lines


def _icartoonface(results: dict) -> list[str]:
    lines = table(
        ("Rank-1", "Rank-5", "MRR", "trials", "distractors"),
        [
            [
                *(number(results[key], results[f"{key}_ci95"]) for key in ("rank1", "rank5", "mrr")),
                results["pairs"],
                results["distractors"],
            ]
        ],
    )
    return [*lines, "", f"Variant: {results['variant']}."]


def _few_shot(results: dict) -> list[str]:
    def cell(block: dict) -> str:
        return number(block) if "mean" not in block else f"{100 * block['mean']:.1f} ± {100 * (block['ci95'] or 0):.1f}"

    rows = []
    for key, block in settings(results):
        methods = (block, block.get("nearest", {}), block.get("logistic", {}))
        classes = number(block.get("mean"), block.get("class_bootstrap_ci95"))
        about = (block.get(name, "-") for name in ("queries", "classes"))
        rows.append([key.replace("_", " "), *map(cell, methods), classes, *about, block["on"]])
    lines = table(
        ("setting", "prototype", "1-NN", "logistic", "prototype, 95 % over characters", "queries", "characters", "of"),
        rows,
    )
    lines += ["", "± is the 95 % interval over episodes; queries of each character in an episode."]
    return lines + not_measured({key.replace("_", " "): block for key, block in settings(results)})


def _long_tail(results: dict) -> list[str]:
    bands = ("head", "mid", "tail")
    lines = table(
        ("characters", "how many", "accuracy, mean over characters"),
        ([name, results["classes"][name], number(results[name], results.get(f"{name}_ci95"))] for name in bands),
    )
    spearman, limits = results["spearman_frequency_accuracy"], results["thresholds"]
    found = f"Macro F1 {number(results['macro_f1'], results['macro_f1_ci95'])}"
    if spearman is not None:
        found += f"; Spearman correlation of frequency and accuracy {spearman:.2f}"
        found += _range(results["spearman_frequency_accuracy_ci95"])
    found += f". Head: more than {limits['many']} training pictures; tail: fewer than {limits['few']}."
    if results["imbalance"] is not None:
        found += (
            f" The gallery was cut to an imbalance of {results['imbalance']:g}: {results['gallery']} pictures are left."
        )
    return [*lines, "", found, *not_measured({name: results[name] for name in bands})]


def _stress(results: dict) -> list[str]:
    rows = [["clean", "", number(results["clean"]["top1"], results["clean"]["top1_ci95"]), ""]]
    skipped = []
    for group, block in results.items():
        if not isinstance(block, dict) or not {"strata", "synthetic"} & block.keys():
            continue
        for kind in ("strata", "synthetic"):
            for name, figures in block.get(kind, {}).items():
                if name == "skipped":
                    skipped.append(f"{group}, {kind}: {figures}")
                elif isinstance(figures, dict):
                    title = f"{group}: {name}" if kind == "strata" else f"{name}, {figures['strength']:g}"
                    top1, drop = (number(figures[key], figures[f"{key}_ci95"]) for key in ("top1", "drop"))
                    rows.append([title, figures["probes"], top1, drop])
    lines = table(("pictures", "probes", "Top-1", "drop"), rows)
    return lines + ["", "Not measured: " + "; ".join(skipped) + "."] * bool(skipped)


def _resolution(results: dict) -> list[str]:
    rows = []
    for key, block in results.items():
        if key.isdigit():
            rows.append([key, *["-"] * 5] if "skipped" in block else [
                key, number(block["top1"], block["top1_ci95"]), f"{block['latency_ms_p50']:.1f}",
                f"{block['latency_ms_p95']:.1f}", f"{block['images_per_s']:.0f}", f"{block['gmacs']:.2f}",
            ])  # fmt: skip
    lines = table(("px", "Top-1", "latency ms, p50", "p95", "images/s", "GMACs"), rows)
    crops = results["source_crops"]["short_side_px"]
    found = ", ".join(f"{name[1:]} %: {value:.0f}" for name, value in crops.items())
    lines += ["", f"Short side of the source crops, quantiles in px: {found}. Enlarging them adds no information."]
    if "resolutions" in results.get("cascade", {}):
        lines += ["", _cascade(results["cascade"])]
    blocks = {f"{key} px": block for key, block in results.items() if key.isdigit()}
    return lines + not_measured(blocks | {"cascade": results.get("cascade")})


def _cascade(block: dict) -> str:
    largest = block["resolutions"][-1]
    decided = ", ".join(f"at {side} px {number(share)} %" for side, share in block["share"].items())
    pace = f"{block['images_per_s']:.0f} images/s against {block['images_per_s_highest']:.0f}"
    return (
        f"A cascade, {' then '.join(map(str, block['resolutions']))} px: Top-1 "
        f"{number(block['top1'], block['top1_ci95'])} against {number(block['top1_highest'])} of {largest} px for all; "
        f"lost {number(block['lost'], block['lost_ci95'])} points. Decided {decided}. {block['gmacs']:.3g} GMACs a "
        f"picture against {block['gmacs_highest']:.3g}; {pace}, by the speed of each size. A picture goes on where its "
        f"margin is below {block['threshold']:.4g}, chosen on {block['chosen_on']} to lose "
        f"{number(block['most_lost'])} points there at most."
    )


def _open_set(results: dict) -> list[str]:
    blocks = {results["score"]: results, **results["by"]}
    fars = list(results["dir_at_far"])

    def row(name: str, block: dict) -> list:
        rates = (number(block["dir_at_far"][far], block["dir_at_far_ci95"][far]) for far in fars)
        figures = (number(block[key], block[f"{key}_ci95"]) for key in ("auroc", "oscr"))
        return [name.replace("_", " "), *figures, *rates, number(block["fpr95"])]

    header = ("score of being known", "AUROC", "OSCR", *(f"DIR at FAR {100 * float(far):g} %" for far in fars), "FPR95")
    lines = table(header, (row(name, block) for name, block in blocks.items()))
    lines += ["", f"{results['known']} probes of known characters, {results['unknown']} of "
              f"{results['unknown_identities']} that were never trained on."]  # fmt: skip
    lines += not_measured({f"DIR at {far}": value for far, value in results["dir_at_far"].items()})
    chosen = results["threshold"]
    if "value" in chosen:
        test = chosen["test"]
        found = f"finds and names {number(test['dir'])} % of the known here"
        named = f"gives a name to {number(test['far'])} % of the unknown"
        lines += ["", f"The threshold {chosen['value']:.4f} ({chosen['rule']}) {found} and {named}."]
    else:
        lines += ["", f"No threshold for use: {chosen['skipped']}."]
    return lines


_SECTIONS: dict[str, Callable[[dict], list[str]]] = {
    "closed_set": _closed_set,
    "icartoonface": _icartoonface,
    "verification": _verification,
    "open_set": _open_set,
    "few_shot": _few_shot,
    "long_tail": _long_tail,
    "stress": _stress,
    "resolution": _resolution,
}


def errors_section(results: dict) -> list[str]:
    """The error taxonomy as lines."""
    rows = []
    for tag, found in results["tags"].items():
        if "skipped" in found:
            rows.append([tag, "-", "-", "-"])
            continue
        ratio = "-" if found["ratio"] is None else f"{found['ratio']:.2f}" + _range(found["ratio_ci95"])
        shares = (number(found[key], found[f"{key}_ci95"]) for key in ("share_of_errors", "share_of_correct"))
        rows.append([tag, *shares, ratio])
    lines = table(("tag", "of the errors", "of the rightly named", "ratio"), rows)
    counted = f"{results['errors']} errors of {results['probes']} probes; {number(results['untagged'])} % have no tag."
    lines += ["", f"{counted} A tag explains errors only where its ratio is above 1, interval and all."]
    return lines + not_measured(results["tags"])


def _range(interval: list[float] | None) -> str:
    return f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""


def write_report(
    path: Path, title: str, results: dict, figures: Mapping[str, Sequence[str]], lists: Mapping[str, Sequence[str]]
) -> None:
    """Write report.md. results: of results.json. figures, lists: names of the files beside it, by protocol."""
    lines = [f"# {title}", "", "Rates in per cent, with 95 % intervals by bootstrap over characters.", ""]
    lines += [f"- {headline(name, results[name])}" for name in TITLES if name in results]
    lines += ["", "## What was compared", ""]
    splits = {role: block for role, block in results["data"].items() if role != "left_out"}
    lines += table(
        ("split", "pictures", "characters", "without a name", "left out"),
        (
            [role, block["samples"], block["identities"], block["unlabelled"], results["data"]["left_out"].get(role, 0)]
            for role, block in splits.items()
        ),
    )
    for name, section in _SECTIONS.items():
        if name not in results:
            continue
        lines += ["", f"## {TITLES[name]}", ""]
        lines += [f"Skipped: {results[name]['skipped']}."] if "skipped" in results[name] else section(results[name])
        lines += _attachments(name, figures, lists)
    if "errors" in results:
        lines += ["", "## Why faces were named wrongly", "", *errors_section(results["errors"])]
        lines += _attachments("errors", figures, lists)
    made = f"{results['device']}, commit {results['git_commit']}, {results['date']}, {results['wall_seconds']} s."
    lines += ["", "## How", "", f"    {results['command']}", "", made]
    write_text(path, "\n".join(lines) + "\n")


def _attachments(name: str, figures: Mapping[str, Sequence[str]], lists: Mapping[str, Sequence[str]]) -> list[str]:
    lines = [line for file in figures.get(name, ()) for line in ("", f"![{Path(file).stem}]({file})")]
    if lists.get(name):
        lines += ["", "Lists: " + ", ".join(f"[{file}]({file})" for file in lists[name])]
    return lines
