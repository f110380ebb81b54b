"""A leaderboard as Markdown, CSV and LaTeX (booktabs)."""

import csv
import io
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from util.benchmark.leaderboard import Board, Column, Comparison, Entry
from util.benchmark.methods import Stage
from util.benchmark.report import table

MISSING = "-"
DONE = ("done", "partial")


@dataclass(frozen=True)
class About:
    """What a reader has to know of a benchmark beside its numbers. facts: title -> text, such as the device."""

    title: str
    budget: str
    seeds: Sequence[int]
    evaluation: Stage
    facts: Mapping[str, str] = field(default_factory=dict)


def shown(column: Column, value: float) -> str:
    """A figure in the unit of its column."""
    return f"{value * column.scale:,.{column.digits}f}"


def cell(column: Column, entry: Entry, join: str = " ± ") -> str:
    """ "61.2 ± 0.8", "61.2" of one seed, "-" where it was not measured; the number of seeds where some lack it."""
    found = entry.mean_std(column.key)
    if found is None:
        return MISSING
    mean, std = found
    # a count that no seed changes needs no spread
    text = shown(column, mean) + (f"{join}{shown(column, std)}" if std else "")
    seeds = len(entry.values(column.key))
    return text if seeds == len(entry.trials) else f"{text} (n={seeds})"


def heading(column: Column) -> str:
    """Such as "Top-1, %"."""
    return f"{column.title}, {column.unit}"


# --- Markdown -------------------------------------------------------------------------------------------------------


def markdown(board: Board, about: About) -> str:
    """The whole leaderboard.md."""
    lines = [f"# {about.title}", "", f"Budget: {about.budget}", ""]
    lines += [f"- {title}: {text}" for title, text in about.facts.items()]
    lines += ["", *_main_table(board), "", *_how_to_read(about)]
    lines += _missing(board.entries)
    lines += _differences(board)
    lines += ["", "## What each method used", "", *_used(board.entries), "", _USED_NOTE]
    lines += ["", "## Recipes", "", *_recipes(board.entries)]
    lines += ["", "Evaluation of every run:", "", f"    {shlex.join(about.evaluation.words())}"]
    return "\n".join(lines) + "\n"


def _main_table(board: Board) -> list[str]:
    def row(entry: Entry) -> list[str]:
        bold = (entry.method.name in board.bold.get(column.key, ()) for column in board.columns)
        cells = (cell(column, entry) for column in board.columns)
        marked = [f"**{text}**" if is_bold else text for text, is_bold in zip(cells, bold, strict=True)]
        return [entry.method.label, entry.method.family, *marked, status(entry)]

    return table(("method", "family", *map(heading, board.columns), "seeds"), map(row, board.entries))


def status(entry: Entry) -> str:
    """The number of seeds that are done, or the word for why there are none."""
    if entry.state == "done":
        return str(len(entry.trials))
    return f"{len(entry.trials)}, {entry.state}" if entry.trials else entry.state


def _how_to_read(about: About) -> list[str]:
    several = len(about.seeds) > 1
    spread = "Mean ± standard deviation (ddof = 1) over seeds. " if several else "One seed: no spread. "
    return [
        spread + "**Bold**: the best mean, and every method whose 95 % interval of the paired difference to it reaches "
        "0; nothing is bold in a column without intervals. The intervals are not adjusted for the number of methods; "
        "p (Holm) in leaderboard.csv is. Top-1, Top-5 and macro-F1 are paired by seed and by test picture (or "
        "character); the other figures are one number for each seed, and their intervals hold for these pictures. "
        "Training time is that of the optimizer steps, a method's own pre-training and a probe's encoder passes "
        "included; what ImageNet, DINO and official MAE weights have cost elsewhere is in no figure. Latency: one "
        "picture at a time, median."
    ]


def _missing(entries: Sequence[Entry]) -> list[str]:
    rest = [entry for entry in entries if entry.state != "done"]
    lines = [f"- {entry.method.label}: {entry.state}: {entry.reason}" for entry in rest]
    return ["", "## Not (wholly) there", "", *lines] if lines else []


def _differences(board: Board) -> list[str]:
    judged = [column for column in board.columns if column.better]
    best = {column.key: found[0].other for column in judged if (found := board.to_best[column.key])}
    lines = []
    if best:
        named = "; ".join(f"{column.title}: {best[column.key]}" for column in judged if column.key in best)
        lines += ["", "## Paired differences to the best", "", f"Best mean: {named}.", ""]
        lines += _difference_table(board, judged, board.to_best)
    if board.reference:
        lines += ["", f"## Paired differences to {board.reference}", ""]
        lines += _difference_table(board, judged, board.to_reference)
    return lines


def _difference_table(board: Board, columns: Sequence[Column], compared: Mapping[str, list[Comparison]]) -> list[str]:
    found = {(each.column.key, each.method): each for comparisons in compared.values() for each in comparisons}
    rows = []
    for entry in board.entries:
        cells = [difference_cell(found.get((column.key, entry.method.name))) for column in columns]
        if any(text != MISSING for text in cells):
            rows.append([entry.method.name, *cells])
    return table(("method", *(f"{column.title}, points" for column in columns)), rows)


def difference_cell(compared: Comparison | None) -> str:
    """ "-3.2 (-5.1 to -1.3)", in the unit of the column as shown."""
    if compared is None or compared.found is None:
        return MISSING
    digits, found = compared.column.digits, compared.found
    interval = "" if found.ci95 is None else f" ({found.ci95[0]:+.{digits}f} to {found.ci95[1]:+.{digits}f})"
    return f"{found.mean:+.{digits}f}{interval}"


_USED_NOTE = (
    "Means over seeds. Images: shown to a network or, in a probe, to its head; an image of SimCLR counts once though "
    "it is seen in two views. Pre-training that several methods share is counted for each of them in full."
)
# what is used -> heading, number to text
_USED: dict[str, tuple[str, Callable[[float], str]]] = {
    "pretrain_epochs": ("epochs of pre-training", "{:g}".format),
    "transfer_epochs": ("epochs", "{:g}".format),
    "pretrain_images": ("images in pre-training", "{:,.0f}".format),
    "transfer_images": ("images", "{:,.0f}".format),
    "pretrain_seconds": ("seconds of pre-training", "{:,.0f}".format),
    "transfer_seconds": ("seconds", "{:,.0f}".format),
    "peak_memory_bytes": ("peak memory, GiB", lambda value: f"{value / 2**30:.2f}"),
    "trainable_params": ("trainable parameters", "{:,.0f}".format),
    "total_params": ("parameters", "{:,.0f}".format),
}


def _used(entries: Sequence[Entry]) -> list[str]:
    def row(entry: Entry) -> list[str]:
        found = (entry.mean_std(key) for key in _USED)
        return [
            entry.method.name,
            *(
                MISSING if each is None else text(each[0])
                for each, (_, text) in zip(found, _USED.values(), strict=True)
            ),
        ]

    return table(("method", *(title for title, _ in _USED.values())), (row(entry) for entry in entries if entry.trials))


def _recipes(entries: Sequence[Entry]) -> list[str]:
    lines = []
    for entry in entries:
        method = entry.method
        stages = [method.pretraining.stage] if method.pretraining else []
        commands = "; ".join(f"`{shlex.join(stage.words())}`" for stage in (*stages, method.transfer))
        start = f" start: {method.needed_weights} weights." if method.needed_weights else ""
        lines.append(f"- **{method.name}**: {commands}.{start}{_margin_note(entry)} Settings: {method.tuned}.")
    return lines


def _margin_note(entry: Entry) -> str:
    """Margin, scale and the least scale that so many classes need, of a method with a margin."""
    stage, classes = entry.method.transfer, entry.values("classes")
    if "margin" not in stage.flags:
        return ""
    note = f" Margin {stage.number('margin'):g}, scale {stage.number('scale'):g}"
    note += f", epochs of margin warm-up {stage.number('margin_warmup'):g}"
    if classes and classes[0] > 1:
        from util.transfer.heads import minimal_scale  # with torch, slow to import

        note += f"; minimal scale for {classes[0]:g} classes: {minimal_scale(int(classes[0])):.1f} (arXiv 1801.09414)"
    return note + "."


# --- CSV ------------------------------------------------------------------------------------------------------------


def csv_table(board: Board) -> str:
    """A row for each method: mean, std and n of each figure as shown, bold, differences with intervals and p-values."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ["method", "label", "family", "state", "reason"]
    parts = ("difference", "low", "high", "over", "p", "p_holm")
    for column in board.columns:
        header += [f"{column.key} {part}" for part in ("mean", "std", "n")]
        if column.better:
            header += [f"{column.key} bold"]
            header += [f"{column.key} to_{name} {part}" for name in ("best", "reference") for part in parts]
    writer.writerow([*header, *(key for key in _USED if key != "trainable_params")])
    for entry in board.entries:
        row = [entry.method.name, entry.method.label, entry.method.family, entry.state, entry.reason]
        for column in board.columns:
            row += _csv_figure(column, entry)
            if column.better:
                row += [int(entry.method.name in board.bold[column.key])]
                row += _csv_difference(board.to_best[column.key], entry.method.name)
                row += _csv_difference(board.to_reference[column.key], entry.method.name)
        used = (entry.mean_std(key) for key in _USED if key != "trainable_params")
        writer.writerow([*row, *(found and found[0] for found in used)])
    return text.getvalue()


def _csv_figure(column: Column, entry: Entry) -> list:
    found = entry.mean_std(column.key)
    if found is None:
        return [None, None, 0]
    mean, std = found
    return [mean * column.scale, None if std is None else std * column.scale, len(entry.values(column.key))]


def _csv_difference(compared: Sequence[Comparison], name: str) -> list:
    each = next((each for each in compared if each.method == name and each.found), None)
    if each is None:
        return [None] * 6
    return [each.found.mean, *(each.found.ci95 or (None, None)), each.found.over, each.found.p, each.p_holm]


# --- LaTeX ----------------------------------------------------------------------------------------------------------

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
}  # fmt: skip


def escape(text: str) -> str:
    """Text as LaTeX shows it."""
    return "".join(_SPECIAL.get(character, character) for character in text)


def latex(board: Board, about: About) -> str:
    """A table for a paper: \\usepackage{booktabs}. Methods without a number are listed under it."""
    columns = board.columns
    lines = [
        f"% {about.title}: {about.budget}".replace("\n", " "),
        r"% needs \usepackage{booktabs}",
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        " & ".join(["method", *(escape(heading(column)) for column in columns)]) + r" \\",
        r"\midrule",
    ]
    family = None
    for entry in board.entries:
        if not entry.trials:
            continue
        if family not in (None, entry.method.family):
            lines.append(r"\addlinespace")
        family = entry.method.family
        cells = [_latex_cell(column, entry, board.bold.get(column.key, ())) for column in columns]
        lines.append(" & ".join([escape(entry.method.label), *cells]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [f"% {entry.method.label}: {entry.state}" for entry in board.entries if entry.state not in DONE]
    return "\n".join(lines) + "\n"


def _latex_cell(column: Column, entry: Entry, bold) -> str:
    text = escape(cell(column, entry))
    return rf"\textbf{{{text}}}" if entry.method.name in bold else text
