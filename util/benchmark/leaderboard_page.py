"""A leaderboard page of whatever results lie in a folder: Markdown, and one static HTML file.

A result is a results.json of eval_recognition.py or scripts/score_submission.py. submission.json beside it may say
more: {"name", "url", "note"}. Results of one name are runs of one model, such as seeds; without a name it is that of
the folder, and METHOD/seed=0, METHOD/seed=1 are runs of METHOD, as the grid runner names them. Only what was measured
on the same data by the same lists stands in one table.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from util.benchmark.leaderboard import COLUMNS, Column, Entry, Trial, make_board, read_classes, read_predictions
from util.benchmark.leaderboard_tables import MISSING, cell, heading, shown
from util.benchmark.methods import Method, Stage
from util.benchmark.release import Release
from util.benchmark.report import table
from util.run.errors import UserError
from util.run.grid_report import flatten

FIGURES = tuple(column for column in COLUMNS if column.better)
ABOUT = ("name", "url", "note")
# what pair lists and episodes follow from, in the flags of an evaluation
_SETTINGS = ("seed", "negatives", "positives", "episodes", "face_padding")


@dataclass(frozen=True)
class Result:
    """A results.json. folder: where it lies. about: of submission.json. label: its folder, below the one asked for."""

    folder: Path
    results: Mapping
    about: Mapping[str, str]
    label: str

    @property
    def name(self) -> str:
        return self.about.get("name") or f"{self.results['subject']['name']} ({self.label})"


@dataclass(frozen=True)
class Section:
    """Results that can be compared. rows: cells as text, in the order of the table, and whether each is bold."""

    title: str
    models: Sequence[Sequence[Result]]
    rows: Sequence[Sequence[tuple[str, bool]]]


def read_all(folders: Sequence[str | Path]) -> list[Result]:
    """Every evaluation under some folders, in the order of their paths; UserError where there is none."""
    found = [
        Result(path.parent, results, _about(path.with_name("submission.json")), _label(path.parent, Path(folder)))
        for folder in folders
        for path in sorted(Path(folder).rglob("results.json"))
        if (results := _evaluation(path)) is not None
    ]
    if not found:
        raise UserError(f"no results.json of an evaluation under {', '.join(map(str, folders))}: evaluate first")
    return found


def _label(folder: Path, below: Path) -> str:
    """METHOD of BELOW/METHOD/seed=0; the name of the folder itself where nothing is left."""
    parts = [part for part in folder.relative_to(below).parts if not re.fullmatch(r"seed=\d+", part)]
    return "/".join(parts) or folder.name


def _evaluation(path: Path) -> dict | None:
    """What a results.json says; None where it is of a training run."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it, or remove it") from error
    good = isinstance(results, dict) and {"subject", "data", "finished"} <= results.keys()
    return results if good else None


def _about(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        strange = set(about) - set(ABOUT) or [key for key, value in about.items() if not isinstance(value, str)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}): it holds texts under {', '.join(ABOUT)}") from error
    if strange:
        raise UserError(f"{path}: {min(strange)!r} is not one of {', '.join(ABOUT)}, each a text")
    if not about.get("url", "https://").startswith(("https://", "http://")):
        raise UserError(f"{path}: url {about['url']!r} is no web address")
    return about


# --- tables ---------------------------------------------------------------------------------------------------------


def sections(found: Sequence[Result], release: Release | None = None, sha256: str = "") -> list[Section]:
    """A table for each benchmark, that of the most models first.

    release: evaluations by its settings on its samples stand in its table, beside submissions of scores.
    """
    groups: dict[tuple, list[Result]] = {}
    for result in found:
        groups.setdefault(_benchmark(result.results, release, sha256), []).append(result)
    made = [_section(key[0], own) for key, own in groups.items()]
    return sorted(made, key=lambda section: -len(section.models))


def _benchmark(results: Mapping, release: Release | None, sha256: str) -> tuple:
    """(title, what must be equal)."""
    args = results.get("args", {})
    if "release" in results:
        return f"Release {results['release']['version']}", results["release"]["sha256"]
    if release is not None and follows(results, release):
        return f"Release {release.version}", sha256
    data = Path(str(args.get("data_path", "?"))).name
    settings = ", ".join(f"{name} {args[name]}" for name in _SETTINGS if args.get(name) is not None)
    return f"{data} ({settings})" if settings else data, results.get("data_fingerprint")


def follows(results: Mapping, release: Release) -> bool:
    """Whether an evaluation has used a release's settings, and has as many samples of every split that it used."""
    args, splits = results.get("args", {}), {row["split"] for row in release.splits}
    if any(args.get(name) != value for name, value in release.settings.items() if name in args):
        return False
    counts = {role: block for role, block in results["data"].items() if role != "left_out"}
    return bool(counts) and all(
        role in splits
        and block["identities"] == len(set(release.identities(role).values()))
        and block["samples"] == sum(row["split"] == role for row in release.splits)
        for role, block in counts.items()
    )


def _section(title: str, found: Sequence[Result]) -> Section:
    models: dict[str, list[Result]] = {}
    for result in found:
        models.setdefault(result.name, []).append(result)
    entries = [_entry(name, own) for name, own in models.items()]
    headline = FIGURES[0].key
    entries.sort(key=lambda entry: -(entry.mean_std(headline) or (-1.0,))[0])
    board = make_board(entries, columns=FIGURES)
    rows = []
    for entry in entries:
        own = models[entry.method.name]
        cells = [(_cell(column, entry, own), entry.method.name in board.bold[column.key]) for column in FIGURES]
        rows.append([(entry.method.name, False), *cells, (str(len(own)), False)])
    return Section(title, [models[entry.method.name] for entry in entries], rows)


def _entry(name: str, found: Sequence[Result]) -> Entry:
    trials = {}
    for number, result in enumerate(found):
        samples, groups = read_predictions(result.folder / "predictions.csv")
        samples |= read_classes(result.folder / "per_class.csv")
        trials[number] = Trial(flatten(dict(result.results)), samples, groups)
    return Entry(Method(name, name, "", Stage("", {})), trials, "done")


def _cell(column: Column, entry: Entry, found: Sequence[Result]) -> str:
    """ "61.2 (58.0 to 64.1)" of one run, "61.2 ± 0.8" of several: mean and deviation over runs."""
    interval = interval_of(found[0].results, column.key) if len(found) == 1 else None
    text = cell(column, entry)
    if text == MISSING or interval is None:
        return text
    return f"{text} ({shown(column, interval[0])} to {shown(column, interval[1])})"


def interval_of(results: Mapping, key: str) -> tuple[float, float] | None:
    """The 95 % interval of a figure: its sibling NAME_ci95, or half a width beside a mean over episodes."""
    parts = key.split(".")
    for place in range(len(parts) - 1, 0, -1):
        value = _get(results, [*parts[:place], f"{parts[place]}_ci95", *parts[place + 1 :]])
        if isinstance(value, (list, tuple)) and len(value) == 2:
            return float(value[0]), float(value[1])
    mean, half = _get(results, parts), _get(results, [*parts[:-1], "ci95"])
    if isinstance(half, float) and isinstance(mean, float):
        return mean - half, mean + half
    return None


def _get(results, parts: Sequence[str]):
    for part in parts:
        results = results.get(part) if isinstance(results, Mapping) else None
    return results


# --- pages ----------------------------------------------------------------------------------------------------------

HEADER = ("model", *map(heading, FIGURES), "runs")
HOW_TO_READ = (
    "In brackets: 95 % intervals, by bootstrap over characters (few-shot: over episodes). With several runs: mean ± "
    "deviation over runs. Bold: the best, and all whose paired difference to it has a 95 % interval that reaches 0; "
    "a figure without such intervals has nothing in bold."
)


def markdown_page(title: str, made: Sequence[Section]) -> str:
    """The leaderboard as Markdown."""
    lines = [f"# {title}", "", HOW_TO_READ]
    for section in made:
        rows = [[f"**{text}**" if bold else text for text, bold in row] for row in section.rows]
        for row, model in zip(rows, section.models, strict=True):
            row[0] = _linked(row[0].replace("|", "\\|"), model[0].about)
        lines += ["", f"## {section.title}", "", *table(HEADER, rows)]
        lines += [
            f"\n{model[0].name}: {model[0].about['note']}" for model in section.models if "note" in model[0].about
        ]
    return "\n".join(lines) + "\n"


def _linked(name: str, about: Mapping[str, str]) -> str:
    return f"[{name}]({about['url']})" if about.get("url") else name


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff }
body { margin: 2rem auto; max-width: 96rem; padding: 0 1rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th { cursor: pointer; border-bottom: 2px solid #222 } th:first-child, td:first-child { text-align: left }
tbody tr:hover { background: #f4f6f8 } small { color: #666 } a { color: #0b5cad }
"""
_SORT = """
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], at = head.cellIndex, up = head.dataset.up = head.dataset.up ? "" : "1";
  const value = row => { const text = row.cells[at].textContent, n = parseFloat(text); return isNaN(n) ? text : n };
  const order = (a, b) => value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0;
  body.append(...[...body.rows].sort((a, b) => up ? order(b, a) : order(a, b)));
};
"""


def html_page(title: str, made: Sequence[Section]) -> str:
    """The same as one static HTML file that needs nothing else; a click on a heading sorts."""
    parts = ["<!doctype html>", '<html lang="en">', '<meta charset="utf-8">']
    parts += ['<meta name="viewport" content="width=device-width">', f"<title>{html.escape(title)}</title>"]
    parts += [f"<style>{_STYLE}</style>", f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(HOW_TO_READ)}</p>"]
    for section in made:
        heads = "".join(f"<th>{html.escape(text)}</th>" for text in HEADER)
        parts += [f"<h2>{html.escape(section.title)}</h2>", '<div class="wide"><table>']
        parts += [f"<thead><tr>{heads}</tr></thead><tbody>"]
        for row, model in zip(section.rows, section.models, strict=True):
            cells = "".join(f"<td>{_html_cell(text, bold)}</td>" for text, bold in row[1:])
            parts.append(f"<tr><td>{_html_name(model[0])}</td>{cells}</tr>")
        parts.append("</tbody></table></div>")
    return "\n".join([*parts, f"<script>{_SORT}</script>", "</html>"]) + "\n"


def _html_cell(text: str, bold: bool) -> str:
    value, bracket, interval = html.escape(text).partition(" (")
    value = f"<strong>{value}</strong>" if bold else value
    return f"{value} <small>({interval}</small>" if bracket else value


def _html_name(model: Result) -> str:
    name = html.escape(model.name)
    linked = f'<a href="{html.escape(model.about["url"])}">{name}</a>' if model.about.get("url") else name
    return linked + (f"<br><small>{html.escape(model.about['note'])}</small>" if model.about.get("note") else "")
