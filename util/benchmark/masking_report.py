"""masking.md: the arms of a masking study in words and tables that a reader can check."""

from collections.abc import Sequence
from pathlib import Path

from util.benchmark.masking_arms import Arm, Judged
from util.benchmark.paired import Difference
from util.benchmark.report import table
from util.benchmark.scores import heading, strategy_of

UP, DOWN = "\N{BLACK UP-POINTING TRIANGLE}", "\N{BLACK DOWN-POINTING TRIANGLE}"


def report(
    judged: Sequence[Judged],
    measures: Sequence[str],
    ranked_by: Sequence[str],
    best: Arm,
    chosen: Sequence[Arm],
    waiting: Sequence[Path],
    baseline: str,
) -> str:
    """The whole text. best: the baseline's best arm. chosen: the finalists. waiting: folders of runs without scores."""
    ways = list(dict.fromkeys(one.arm.way for one in judged))

    def name(arm: Arm) -> list[str]:
        return [arm.way.label(ways), f"{arm.ratio:g}", str(arm.epochs), str(len(arm.runs))]

    head = ["masking", "ratio", "epochs", "seeds"]
    titles = [f"{heading(measure).name}, {_unit(measure)}" for measure in measures]
    by_rank = sorted(judged, key=lambda one: one.rank)
    means = ([*name(one.arm), f"{one.rank:.1f}", *(_mean(one.arm, key) for key in measures)] for one in by_rank)
    lines = ["# Ways of masking in pre-training, all tested under the same random masks", ""]
    lines += table([*head, "mean rank", *titles], means)
    lines += ["", *_rule(ranked_by, chosen, ways, baseline), "", f"## Against {baseline} masking of the same ratio", ""]
    lines += table([*head, *titles], _rows(judged, "same_ratio", measures, name))
    lines += ["", f"## Against {baseline} masking at its best ratio, {best.ratio:g}", ""]
    lines += table([*head, *titles], _rows(judged, "best", measures, name))
    lines += ["", *_intervals(judged)]
    lines += _cross([one.arm for one in judged], name, head)
    if waiting:
        lines += ["", "Not scored yet:", "", *(f"* {folder}" for folder in waiting)]
    return "\n".join(lines) + "\n"


def _unit(measure: str) -> str:
    return "%" if heading(measure).unit == "points" else heading(measure).unit


def _mean(arm: Arm, measure: str) -> str:
    if measure not in arm.measures:
        return "-"
    shown = heading(measure)
    return f"{shown.scale * arm.mean(measure):.{shown.digits}f}"


def _rows(judged: Sequence[Judged], which: str, measures: Sequence[str], name) -> list[list[str]]:
    rows = []
    for one in judged:
        gains = getattr(one, which)
        p_holm = one.p_holm if which == "same_ratio" else {}
        if gains:
            rows.append([*name(one.arm), *(_gain(gains.get(key), key, p_holm.get(key)) for key in measures)])
    return rows


def _gain(gain: Difference | None, measure: str, p_holm: float | None) -> str:
    """Such as "+0.20 [+0.10, +0.30] ▲, p 0.03"."""
    if gain is None:
        return "-"
    digits = heading(measure).digits
    text = f"{gain.mean:+.{digits}f}"
    if gain.ci95 is not None:
        text += f" [{gain.ci95[0]:+.{digits}f}, {gain.ci95[1]:+.{digits}f}]"
    mark = {1: f" {UP}", -1: f" {DOWN}", 0: ""}[gain.sign]
    return text + mark + ("" if p_holm is None else f", p {p_holm:.2g}")


def _rule(ranked_by: Sequence[str], chosen: Sequence[Arm], ways, baseline: str) -> list[str]:
    names = ", ".join(heading(name).name for name in ranked_by)
    arms = "; ".join(f"{arm.way.label(ways)} at {arm.ratio:g}" for arm in chosen)
    return [
        f"Mean rank: the rank of an arm's mean among all arms, 1 for the best, averaged over {names}. Finalists are "
        f"the {len(chosen)} ways of best mean rank, each at its best ratio, {baseline} always among them: {arms}."
    ]


def _intervals(judged: Sequence[Judged]) -> list[str]:
    """What the intervals mean: for one seed, for several."""
    every = [gain for one in judged for gains in (one.same_ratio, one.best) for gain in gains.values()]
    signs = [gain.sign for one in judged for gain in one.same_ratio.values()]
    lines = [
        f"{UP} and {DOWN}: the 95 % interval excludes 0. Of {len(signs)} differences at the same ratio "
        f"{signs.count(1)} are {UP} and {signs.count(-1)} are {DOWN}. Differences are paired: the same seeds, and "
        "the same pictures, masks, folds and episodes.",
    ]
    if any(gain.over == "samples" for gain in every):
        lines += [
            "",
            "With one seed in common an interval is a bootstrap over pictures (PSNR) or characters (probe, few-shot): "
            "it tells how the difference of these two runs would vary with other pictures, not with other runs, and "
            "is too narrow for a statement on the way of masking. Nor is it corrected for the number of comparisons: "
            f"even if runs never varied, chance would mark about {0.05 * len(signs):.0f}. This is a screening.",
        ]
    if any(gain.p is not None for gain in every):
        lines += [
            "",
            "With several seeds in common an interval covers other runs as well as other pictures or characters "
            "(two-way clustered variance, Student's t); of LoRA, one figure per run, other runs only. p: two-sided, "
            "corrected by Holm's method for the number of arms, for each measure on its own. A seed that the "
            "finalists were chosen by favours them: see the table without it.",
        ]
    return lines


def _cross(arms: Sequence[Arm], name, head: list[str]) -> list[str]:
    """PSNR of each arm under the masks of other strategies; nothing where it was not measured."""
    tests = list(dict.fromkeys(key for arm in arms for key in arm.measures if strategy_of(key)))
    if not tests:
        return []
    columns = ["psnr_db", *tests]
    titles = ["random", *(strategy_of(key) for key in tests)]
    rows = ([*name(arm), *(_mean(arm, key) for key in columns)] for arm in arms)
    return ["", "## Trained with (rows), tested under (columns): PSNR, dB", "", *table([*head, *titles], rows)]
