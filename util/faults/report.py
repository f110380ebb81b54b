"""The table of a fault campaign."""

from collections import Counter
from collections.abc import Iterable

_WORDS = {"moment": "random moment", "at": "at a change to a file", "after": "within 20 ms after one"}


def passed(trial: dict) -> bool:
    """Whether nothing was lost, unreadable or left over in a trial."""
    return not (trial["unreadable"] or trial["differs"] or trial["failed"] or trial["left_behind"])


def kills_of(trials: Iterable[dict]) -> list[dict]:
    """The kills that hit."""
    return [kill for trial in trials for kill in trial["kills"] if kill["hit"]]


def markdown(trials: dict[str, list[dict]], about: dict[str, str]) -> str:
    """The results as tables: a row for each job, and what the kills hit. trials: by job."""
    everything = [trial for own in trials.values() for trial in own]
    lines = [
        "# Fault campaign", "",
        f"{len(kills_of(everything))} kills (SIGKILL) in {len(everything)} trials of {len(trials)} jobs; "
        f"{sum(map(passed, everything))} trials ended as an undisturbed run does, with every file readable after "
        "every kill.", "",
        *(f"- {title}: {text}" for title, text in about.items()), "",
        "| job | kills | trials | as undisturbed | unreadable files | other outcomes | failed restarts | left behind |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for job, own in trials.items():
        counts = [len(kills_of(own)), len(own), sum(map(passed, own))]
        counts += [sum(len(trial[key]) for trial in own) for key in ("unreadable", "differs")]
        counts += [sum(bool(trial["failed"]) for trial in own), sum(trial["left_behind"] for trial in own)]
        lines.append(f"| {job} | " + " | ".join(map(str, counts)) + " |")
    lines += ["", "| killed | kills |", "|---|---|"]
    hit = kills_of(everything)
    ways, kinds = Counter(kill["way"] for kill in hit), Counter(kill["kind"] for kill in hit if kill["kind"])
    lines += [f"| {_WORDS[way]} | {number} |" for way, number in sorted(ways.items())]
    lines += [f"| of those at or after a change: {kind} | {number} |" for kind, number in sorted(kinds.items())]
    for trial in everything:
        if not passed(trial):
            what = [*trial["unreadable"], *trial["differs"], *filter(None, [trial["failed"]])]
            what += [f"{trial['left_behind']} processes left behind"] * bool(trial["left_behind"])
            lines += ["", f"**{trial['job']}, trial {trial['trial']}**: " + "; ".join(what)]
    return "\n".join(lines) + "\n"
