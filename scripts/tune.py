"""The hyper-parameters of each method by validation: learning rate, then augmentation, then schedule.

python scripts/tune.py --data_path data/toonfaces --preset tiny --jobs 2 --out runs/tune -- --num_workers 0
python scripts/benchmark.py --data_path data/toonfaces --preset tiny --tuned runs/tune/tuned.json --jobs 2

One thing after the other, each from the best so far, the recipe of the preset among what is tried: the search costs the
sum of what there is to try, not the product (scripts/sweep.sh tries every combination for one method). A method's own
pre-training comes first, judged by a probe on it; a probe chooses its rate itself, out of --lr_grid, on validation. The
test pictures play no part. OUT gets tuned.json and tuning.md, which has every trial. The same call again goes on.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.benchmark.availability import named_weights, unavailable
from util.benchmark.chains import Bench, Chain, needs, unique
from util.benchmark.methods import PRESETS, WEIGHTS, Method, Stage, with_settings
from util.run import args as flags
from util.run.errors import UserError, cli
from util.run.files import write_text
from util.run.grid import folder_name, parse_runner_args, run_all

PROBE = "main_linprobe.py"
RATES = ("lr", "blr", "head_lr")


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Tune each method by validation; flags after a lone -- are added to every command")
    add = parser.add_argument
    add("--data_path", required=True, metavar="DIR", help="prepared or class folders, or hf:OWNER/NAME")
    add("--out", type=Path, default=Path("runs/tune"), metavar="DIR", help="folder for runs, tuned.json and tuning.md")
    add("--preset", choices=PRESETS, default="full", help="of scripts/benchmark.py")
    add("--methods", nargs="+", default=["all"], metavar="NAME", help="of the preset, or all")
    add("--seeds", nargs="+", type=flags.count0, default=[0], help="whose validation top-1 is averaged")
    add("--rates", nargs="*", type=flags.positive, default=[0.3, 3], metavar="X", help="times the recipe's rates")
    add("--crops", nargs="*", type=flags.fraction, default=[0.2, 0.5], metavar="X", help="--min_crop to try, 0..1")
    add(
        "--schedules", nargs="*", type=schedule, default=[], metavar="E/W",
        help="epochs/warm-up epochs to try for transfer, such as 20/2 50/5",
    )  # fmt: skip
    add("--weights", nargs="+", default=[], metavar="KEY=FILE", help=f"instead of a download: {', '.join(WEIGHTS)}")
    args = parse_runner_args(parser, argv)
    args.seeds = list(dict.fromkeys(args.seeds))
    return args


def schedule(text: str) -> dict[str, str]:
    """An argparse type: EPOCHS/WARM-UP as flags."""
    epochs, slash, warmup = text.partition("/")
    flags.count(epochs)
    if not slash or flags.rate(warmup) >= int(epochs):
        raise ValueError(text)
    return {"epochs": epochs, "warmup_epochs": warmup}


# --- what is tuned, and what is tried -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """Something with settings of its own: the transfer of a method, or a pre-training, judged by a method on it."""

    name: str
    method: Method

    @property
    def is_pretraining(self) -> bool:
        return self.name != self.method.name

    @property
    def stage(self) -> Stage:
        return self.method.pretraining.stage if self.is_pretraining else self.method.transfer

    def differences(self, recipe: Stage) -> dict[str, str]:
        """The flags that are not as in the recipe."""
        return {flag: value for flag, value in self.stage.flags.items() if recipe.flags.get(flag) != value}

    def place(self, recipe: Stage) -> str:
        """The folder of its runs."""
        return f"{self.name}/{folder_name(self.differences(recipe)) or 'recipe'}"

    def but(self, settings: Mapping) -> "Subject":
        """The same with some flags set otherwise."""
        [method] = with_settings([self.method], {self.name: settings})
        return replace(self, method=method)


def subjects(methods: Iterable[Method]) -> tuple[list[Subject], list[Subject]]:
    """The pre-trainings among them, each judged by a probe where a method has one, and the transfers."""
    judges: dict[str, Method] = {}
    for method in sorted(methods, key=lambda m: m.transfer.script != PROBE):
        if method.pretraining:
            judges.setdefault(method.pretraining.name, method)
    transfers = [Subject(method.name, method) for method in methods if method.transfer.script != PROBE]
    return [Subject(name, method) for name, method in judges.items()], transfers


def axes_of(args, pretraining: bool) -> dict[str, list]:
    """What is tried one after the other."""
    axes = {"rate": args.rates, "crop": args.crops, "schedule": [] if pretraining else args.schedules}
    return {axis: values for axis, values in axes.items() if values}


def settings_of(axis: str, value, stage: Stage) -> dict:
    """The flags that a value of an axis stands for."""
    if axis == "rate":
        return {flag: stage.number(flag) * value for flag in RATES if flag in stage.flags}
    return {"min_crop": value} if axis == "crop" else value


@dataclass(frozen=True)
class Trial:
    """A subject with settings that differ from its recipe, and its runs, one chain for each seed."""

    subject: Subject
    settings: Mapping[str, str]
    chains: Sequence[Chain]

    def score(self) -> float | None:
        """Mean validation top-1 over the seeds; None where a run is not done."""
        results = [chain.transfer.results() for chain in self.chains]
        return mean(r["val"]["top1"] for r in results) if all(r.get("finished") for r in results) else None


def trial(bench: Bench, subject: Subject, recipe: Stage, seeds: Sequence[int]) -> Trial:
    """The runs of a subject as it stands, in folders named after what differs from the recipe."""
    place, method = subject.place(recipe), subject.method
    renamed = replace(method, name=f"{method.name}/{place}" if subject.is_pretraining else place)
    if subject.is_pretraining:
        renamed = replace(renamed, pretraining=replace(method.pretraining, name=place))
    return Trial(subject, subject.differences(recipe), [bench.chain(renamed, seed) for seed in seeds])


# --- the search -----------------------------------------------------------------------------------------------------


def search(args, bench: Bench, start: list[Subject], axes: Mapping[str, list]) -> tuple[list[Subject], list[Trial]]:
    """The subjects with their best settings, and all that was tried; an axis of all subjects at once."""
    recipes, tried = {subject.name: subject.stage for subject in start}, {}
    found = start
    for axis, values in axes.items():
        trials = []
        for subject in found:
            varied = [subject.but(settings_of(axis, value, subject.stage)) for value in values]
            trials.append([trial(bench, s, recipes[subject.name], args.seeds) for s in (subject, *varied)])
        run(args, [chain for of_one in trials for each in of_one for chain in each.chains])
        found = [best(of_one) for of_one in trials]
        tried |= {each.chains[0].transfer.folder: each for of_one in trials for each in of_one}
    return found, list(tried.values())


def on_chosen(methods: Iterable[Method], found: list[Subject], recipes: Mapping[str, Stage]) -> list[Method]:
    """The methods on the pre-training that was chosen, where it lies."""
    chosen = {
        subject.name: replace(subject.method.pretraining, name=subject.place(recipes[subject.name]))
        for subject in found
    }
    return [replace(m, pretraining=chosen[m.pretraining.name]) if m.pretraining else m for m in methods]


def run(args, chains: list[Chain]) -> None:
    """What is not done of them, but for the evaluation: nothing here looks at test pictures. Ends at a signal."""
    wanted = needs(chains)
    runs = [each for each in unique(chains) if each.folder not in {chain.evaluation.folder for chain in chains}]
    signum = run_all(runs, jobs=args.jobs, devices=args.devices, needs=lambda each: wanted[each.folder])
    if signum:
        print("stopped: the same command goes on from here")
        sys.exit(128 + signum)


def best(trials: list[Trial]) -> Subject:
    """The one with the highest validation top-1, the first of equals; UserError where none is done."""
    done = [each for each in trials if each.score() is not None]
    if not done:
        error = next(filter(None, (chain.error() for each in trials for chain in each.chains)), "its runs stopped")
        raise UserError(f"no setting of {trials[0].subject.name} could be tried: {error}")
    return max(done, key=Trial.score).subject


# --- what is left of it ---------------------------------------------------------------------------------------------


def tuned_settings(args, found: list[Subject], recipes: Mapping[str, Stage], tried: list[Trial]) -> dict[str, dict]:
    """For benchmark.py --tuned: the flags of each subject that were tuned, whether or not they stayed."""
    settings = {}
    for subject in found:
        own = [each for each in tried if each.subject.name == subject.name]
        names = sorted({name for each in own for name in each.settings})
        kept = {name: subject.stage.flags.get(name, recipes[subject.name].flags.get(name)) for name in names}
        seeds = " ".join(map(str, args.seeds))
        origin = f"validation top-1 on {args.data_path}, {len(own)} settings tried (scripts/tune.py, seeds {seeds})"
        settings[subject.name] = {**{k: v for k, v in kept.items() if v is not None}, "from": origin}
    return settings


def table(found: list[Subject], tried: list[Trial]) -> str:
    """Markdown: every trial, the chosen one in bold."""
    chosen = {subject.name: subject.stage.flags for subject in found}
    lines = ["# Tuning", "", "By validation top-1; bold: chosen.", ""]
    lines += ["| what | setting | val top-1, % |", "|---|---|---|"]
    for each in sorted(tried, key=lambda each: each.subject.name):
        setting = ", ".join(f"{flag} {value}" for flag, value in each.settings.items()) or "recipe"
        score = "failed" if each.score() is None else f"{100 * each.score():.1f}"
        mark = "**" if each.subject.stage.flags == chosen[each.subject.name] else ""
        lines.append(f"| {each.subject.name} | {mark}{setting}{mark} | {score} |")
    return "\n".join(lines) + "\n"


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    preset = PRESETS[args.preset]
    methods = preset.choose(args.methods)
    weights = {**preset.weights, **named_weights(args.weights, preset.weights)}
    missing = unavailable({m.needed_weights: weights[m.needed_weights] for m in methods if m.needed_weights})
    for method in methods:
        if method.needed_weights in missing:
            print(f"unavailable: {method.name}: {missing[method.needed_weights]}", file=sys.stderr)
    methods = [method for method in methods if method.needed_weights not in missing]
    bench = Bench(args.out, args.data_path, preset.evaluation, weights, args.extra)
    before, _ = subjects(methods)
    found, tried = search(args, bench, before, axes_of(args, pretraining=True))
    recipes = {subject.name: subject.stage for subject in before}
    settings = tuned_settings(args, found, recipes, tried)
    _, transfers = subjects(on_chosen(methods, found, recipes))
    more, further = search(args, bench, transfers, axes_of(args, pretraining=False))
    settings |= tuned_settings(args, more, {s.name: s.stage for s in transfers}, further)
    write_text(args.out / "tuned.json", json.dumps(settings, indent=2) + "\n")
    write_text(args.out / "tuning.md", table([*found, *more], [*tried, *further]))
    print(f"settings: {args.out / 'tuned.json'}; every trial: {args.out / 'tuning.md'}")


if __name__ == "__main__":
    main()
