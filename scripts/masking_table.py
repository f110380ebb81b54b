"""What does each way of masking in pre-training gain over random masking? Tables and a figure of paired differences.

python scripts/masking_table.py --runs runs/masking_study --out runs/masking_study

reads what the grid runner has left there (scripts/masking_study.sh): RUNS/NAME/SETTINGS/args.json of the pre-training
runs and RUNS/then/NAME/SETTINGS/scores.npz of scripts/score_pretraining.py. Writes masking.md, .csv, .json and .png to
OUT, and with --write the flags that run the finalists with more seeds. --lora adds what main_lora.py made of the runs.
"""

import csv
import io
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.benchmark.masking_arms import (
    BASELINE,
    RANKED,
    Arm,
    Judged,
    best_of,
    finalists,
    group,
    judge,
    mean_ranks,
    ranked_by,
    read_runs,
    shared_measures,
    with_lora,
)
from util.benchmark.masking_figure import masking_figure
from util.benchmark.masking_report import report
from util.benchmark.scores import heading
from util.run import args as flags
from util.run.errors import UserError, cli
from util.run.files import write_text
from util.run.log import git_commit, write_json

MOST_PANELS = 5  # of the figure


def csv_table(judged: Sequence[Judged]) -> str:
    """A row per arm and measure. Means as they were measured, differences in the unit that the row names."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    differences = [
        f"{name}_{part}" for name in ("same_ratio", "best") for part in ("difference", "low", "high", "over")
    ]
    arm = ["masking", "strength", "random_share", "schedule", "mask_ratio", "epochs", "seeds", "mean_rank"]
    writer.writerow([*arm, "measure", "unit", "mean", *differences, "same_ratio_p", "same_ratio_p_holm"])
    for one in judged:
        way, own = one.arm.way, one.arm
        settings = [way.masking, way.strength, way.share, way.schedule, own.ratio, own.epochs, len(own.runs), one.rank]
        for name in own.measures:
            cells = []
            for gains in (one.same_ratio, one.best):
                gain = gains.get(name)
                cells += [None] * 4 if gain is None else [gain.mean, *(gain.ci95 or (None, None)), gain.over]
            same = one.same_ratio.get(name)
            p = [same.p if same else None, one.p_holm.get(name)]
            writer.writerow([*settings, name, heading(name).unit, own.mean(name), *cells, *p])
    return text.getvalue()


def as_json(one: Judged) -> dict:
    """An arm with all that was found of it, differences in the unit of their measure."""
    arm = one.arm
    seconds = [run.train_seconds for run in arm.runs.values() if run.train_seconds is not None]
    return {
        **asdict(arm.way),
        "mask_ratio": arm.ratio,
        "epochs": arm.epochs,
        "seeds": sorted(arm.runs),
        "runs": [str(arm.runs[seed].folder) for seed in sorted(arm.runs)],
        "train_seconds": math.fsum(seconds) / len(seconds) if seconds else None,
        "mean_rank": one.rank,
        "means": {name: arm.mean(name) for name in arm.measures},
        "of_each_seed": {name: arm.of_each_seed(name) for name in arm.measures},
        "same_ratio": {name: asdict(gain) for name, gain in one.same_ratio.items()},
        "same_ratio_p_holm": dict(one.p_holm),
        "best": {name: asdict(gain) for name, gain in one.best.items()},
    }


def grid_flags(arms: Sequence[Arm]) -> list[str]:
    """The flags of util.run.grid that run these arms as before, so that further seeds can be added: a word each."""
    commands, axes = {}, {}
    for arm in arms:
        record = next(iter(arm.runs.values())).folder / "command.json"
        if not record.is_file():
            raise UserError(f"--write needs runs of the grid runner, and there is no {record}")
        known = json.loads(record.read_text(encoding="utf-8"))
        settings = {flag: value for flag, value in known["settings"].items() if flag != "seed"}
        # the varied flags stand last
        varied = 2 * len(known["settings"])
        commands[known["name"]] = shlex.join(known["command"][: len(known["command"]) - varied])
        if settings:
            axes.setdefault((known["name"], "/".join(settings)), []).append("/".join(settings.values()))
    words = [word for name, command in commands.items() for word in ("--command", f"{name}: {command}")]
    return words + [
        word for (name, axis), values in axes.items() for word in ("--vary", f"{name}:{axis}={','.join(values)}")
    ]


def with_references(chosen: Sequence[Arm], arms: Sequence[Arm], baseline: str) -> list[Arm]:
    """The finalists and, after them, the baseline at their mask ratios, which they are judged against."""
    own = [arm for arm in arms if arm.way.masking == baseline and arm.ratio in {arm.ratio for arm in chosen}]
    return [*chosen, *(arm for arm in own if arm not in chosen)]


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Table and figure of a masking study")
    add = parser.add_argument
    add("--runs", nargs="+", type=Path, required=True, metavar="DIR", help="--out of the grid runner, one or several")
    add("--lora", nargs="+", type=Path, default=[], metavar="DIR", help="the same, of main_lora.py on these runs")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for masking.md, .csv, .json and .png")
    add("--baseline", default=BASELINE, metavar="STRATEGY", help="what the others are compared with, as of --masking")
    add("--seeds", nargs="+", type=flags.count0, help="use only the runs of these seeds; default: all")
    add("--min_seeds", type=flags.count, default=1, help="leave out arms with fewer seeds")
    add("--finalists", type=flags.count, default=6, help="how many ways to choose, the baseline among them")
    add("--write", type=Path, metavar="FILE", help="write the grid runner's flags for the finalists, a word per line")
    add("--rank_by", nargs="+", default=list(RANKED), metavar="MEASURE", help="measures of the mean rank")
    return parser.parse_args(argv)


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    runs, waiting = read_runs(args.runs, args.seeds)
    every = group(with_lora(runs, args.lora))
    arms = [arm for arm in every if len(arm.runs) >= args.min_seeds]
    if not arms:
        raise UserError(f"no arm has {args.min_seeds} seeds: lower --min_seeds")
    names = ranked_by(arms, args.rank_by)
    ranks = mean_ranks(arms, names)
    judged, measures = judge(arms, ranks, args.baseline), shared_measures(arms)
    chosen = finalists(arms, ranks, args.finalists, args.baseline)
    best = arms[best_of(arms, ranks, args.baseline)]
    args.out.mkdir(parents=True, exist_ok=True)
    text = report(judged, measures, names, best, chosen, waiting, args.baseline)
    write_text(args.out / "masking.md", text)
    write_text(args.out / "masking.csv", csv_table(judged))
    about = {"git_commit": git_commit(), "args": vars(args), "ranked_by": names, "waiting": waiting}
    write_json(args.out / "masking.json", {"arms": [as_json(one) for one in judged], **about})
    panels = [name for name in (*names, *measures) if any(name in one.same_ratio for one in judged)]
    if panels:
        panels = list(dict.fromkeys(panels))[:MOST_PANELS]
        masking_figure(judged, panels, args.out / "masking.png", args.baseline)
    if args.write:
        write_text(
            args.write, "".join(f"{word}\n" for word in grid_flags(with_references(chosen, arms, args.baseline)))
        )
    print(f"{len(arms)} arms of {len(runs)} runs, {len(waiting)} not scored yet; table: {args.out / 'masking.md'}")
    print("finalists: " + "; ".join(f"{arm.way.label(a.way for a in arms)} at {arm.ratio:g}" for arm in chosen))


if __name__ == "__main__":
    main()
