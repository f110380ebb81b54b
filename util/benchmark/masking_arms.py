"""The arms of a masking study: ways of masking in pre-training at a mask ratio, each run with one or several seeds."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from util.benchmark.paired import Difference, difference, holm
from util.benchmark.scores import SCORES_NAME, Measured, heading, read_scores, strategy_of
from util.run.args import BOOKKEEPING
from util.run.errors import UserError

BASELINE = "random"
RANKED = ("psnr_db", "psnr_face_db", "probe_top1", "few_shot_5way_1shot", "few_shot_5way_5shot")
# flags that may differ between the runs of one study; at one mask ratio the epochs may not
_FREE = BOOKKEEPING | {
    "masking", "mask_strength", "mask_random", "mask_schedule", "mask_ratio", "epochs", "seed", "maps",
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Way:
    """A way of masking. strength, share, schedule are None for random masking, which has none."""

    masking: str
    strength: float | None = None
    share: float | None = None
    schedule: str | None = None

    @classmethod
    def of(cls, args: Mapping) -> "Way":
        """From the flags of a pre-training run; without them it masked at random."""
        masking = args.get("masking", BASELINE)
        if masking == BASELINE:
            return cls(BASELINE)
        return cls(masking, float(args["mask_strength"]), float(args["mask_random"]), args["mask_schedule"])

    def label(self, among: Iterable["Way"] = ()) -> str:
        """Its name, with the settings that tell it from others of its strategy."""
        others = [way for way in among if way.masking == self.masking and way != self]
        parts = []
        if any(way.strength != self.strength for way in others):
            parts.append(f"strength {self.strength:g}")
        if any(way.share != self.share for way in others):
            parts.append(f"{self.share:.0%} random")
        if any(way.schedule != self.schedule for way in others):
            parts.append(str(self.schedule).replace("_", " "))
        return ", ".join([self.masking, *parts])


@dataclass(frozen=True)
class Run:
    """One pre-training run and what it scored. args: its flags; train_seconds: None where it is not known."""

    folder: Path
    args: Mapping
    scores: Mapping[str, Measured]
    train_seconds: float | None = None


@dataclass(frozen=True)
class Arm:
    """A way of masking at one mask ratio. runs: by seed."""

    way: Way
    ratio: float
    runs: Mapping[int, Run]

    @property
    def epochs(self) -> int:
        return next(iter(self.runs.values())).args["epochs"]

    @property
    def measures(self) -> list[str]:
        """Those that every run has a value of."""
        first, *others = (run.scores for run in self.runs.values())
        return [name for name in first if all(name in scores for scores in others)]

    def of_each_seed(self, measure: str) -> list[float]:
        """The mean of a measure in each run."""
        return [self.runs[seed].scores[measure].mean for seed in sorted(self.runs)]

    def mean(self, measure: str) -> float:
        """Of a measure over samples and seeds; NaN where a run lacks it."""
        return float(np.mean(self.of_each_seed(measure))) if measure in self.measures else float("nan")

    def minus(self, other: "Arm", measure: str) -> Difference | None:
        """What a measure gains over another arm, paired by seed and sample, in its heading's unit.

        None where the two have no seed, or not the measure, in common. UserError where they scored other samples.
        """
        seeds = sorted(self.runs.keys() & other.runs.keys())
        if not seeds or measure not in self.measures or measure not in other.measures:
            return None
        a, b = ([arm.runs[seed] for seed in seeds] for arm in (other, self))
        ids = a[0].scores[measure].ids
        for run in (*a, *b):
            if not np.array_equal(run.scores[measure].ids, ids):
                raise UserError(f"{run.folder} and {a[0].folder} scored {measure} on other samples: score them again")
        scale = heading(measure).scale
        values = [np.stack([run.scores[measure].values for run in runs]) * scale for runs in (a, b)]
        try:
            return difference(*values, a[0].scores[measure].groups)
        except ValueError:  # nothing to judge in any picture, such as eyes
            return None


# --- reading ----------------------------------------------------------------------------------------------------


def read_runs(folders: Sequence[Path], seeds: Sequence[int] | None = None) -> tuple[list[Run], list[Path]]:
    """The runs of grids that have scores, FOLDER/NAME/SETTINGS with FOLDER/then/NAME/SETTINGS; and those without yet.

    seeds: only these. UserError where nothing is scored, or the scores do not belong together.
    """
    runs, waiting, protocols = [], [], {}
    for folder in folders:
        for path in sorted(folder.glob("*/*/args.json")):
            args = json.loads(path.read_text(encoding="utf-8"))
            if "mask_ratio" not in args or (seeds is not None and args["seed"] not in seeds):
                continue
            scored = folder / "then" / path.parent.relative_to(folder) / SCORES_NAME
            if not scored.is_file():
                waiting.append(path.parent)
                continue
            scores, protocol = read_scores(scored)
            protocols.setdefault(json.dumps(protocol, sort_keys=True), scored)
            runs.append(Run(path.parent, args, scores, _results(path.parent).get("train_seconds")))
    if not runs:
        raise UserError(f"{', '.join(map(str, folders))} has no scored run: see scripts/masking_study.sh")
    if len(protocols) > 1:
        one, other, *_ = protocols.values()
        raise UserError(f"{one} and {other} were scored by two protocols: score all runs in the same way")
    _check_alike(runs)
    return runs, waiting


def with_lora(runs: Sequence[Run], folders: Sequence[Path]) -> list[Run]:
    """The runs with "lora_top1", the test accuracy of what main_lora.py made of each, from anywhere below the folders.

    UserError for a folder without any.
    """
    found = {}
    for folder in folders:
        before = len(found)
        for path in sorted(folder.rglob("args.json")):
            top1 = (_results(path.parent).get("test") or {}).get("top1")
            if top1 is not None:
                init = json.loads(path.read_text(encoding="utf-8")).get("init")
                if init is None:  # of random weights: of none of these runs
                    continue
                place = Path(init).parent.resolve()
                if place in found:
                    raise UserError(f"{path.parent} is a second run of main_lora.py on {place}: give one of them")
                found[place] = top1
        if len(found) == before:
            raise UserError(f"--lora {folder} holds no finished run of main_lora.py with a test accuracy: leave it out")
    one = np.array(["test"])
    return [
        replace(run, scores={**run.scores, "lora_top1": Measured(np.array([found[place]]), one, one)})
        if (place := run.folder.resolve()) in found
        else run
        for run in runs
    ]


def _results(folder: Path) -> dict:
    path = folder / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _check_alike(runs: Sequence[Run]) -> None:
    """UserError where two runs differ in more than their masking: a difference would not be the masking's."""
    first: dict[str, Run] = {}  # of each flag: a run of an older version may lack some
    epochs: dict[float, Run] = {}
    for run in runs:
        for flag in run.args.keys() - _FREE:
            other = first.setdefault(flag, run)
            if run.args[flag] != other.args[flag]:
                values = f"{other.args[flag]} and {run.args[flag]}"
                raise UserError(f"{other.folder} and {run.folder} differ in --{flag}, {values}: compare like with like")
        same = epochs.setdefault(run.args["mask_ratio"], run)
        if same.args["epochs"] != run.args["epochs"]:
            values = f"{same.args['epochs']} and {run.args['epochs']}"
            raise UserError(f"{same.folder} and {run.folder} had other --epochs, {values}: compare like with like")


def group(runs: Iterable[Run]) -> list[Arm]:
    """Runs by arm: the order of the ways is that of the runs, the ratios of a way rise. UserError for a seed twice."""
    arms: dict[tuple[Way, float], dict[int, Run]] = {}
    for run in runs:
        own = arms.setdefault((Way.of(run.args), run.args["mask_ratio"]), {})
        if own.setdefault(run.args["seed"], run) is not run:
            raise UserError(f"{run.folder} repeats {own[run.args['seed']].folder}: give each arm and seed once")
    ways = list(dict.fromkeys(way for way, _ in arms))
    order = sorted(arms, key=lambda key: (key[0].masking != BASELINE, ways.index(key[0]), key[1]))
    return [Arm(*key, arms[key]) for key in order]


# --- judging ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """An arm beside its references: {measure: Difference}. rank: mean rank, 1 is best. p_holm: of same_ratio."""

    arm: Arm
    rank: float
    same_ratio: Mapping[str, Difference]
    best: Mapping[str, Difference]
    p_holm: Mapping[str, float]


def shared_measures(arms: Sequence[Arm]) -> list[str]:
    """The measures of any arm, in their order, those under other masks left out."""
    names = dict.fromkeys(name for arm in arms for name in arm.measures)
    return [name for name in names if strategy_of(name) is None]


def mean_ranks(arms: Sequence[Arm], measures: Sequence[str]) -> list[float]:
    """The rank of each arm among all, 1 for the highest mean, averaged over the measures; equal ones share theirs."""
    values = np.array([[arm.mean(name) for name in measures] for arm in arms])
    better = (values[None] > values[:, None]).sum(axis=1)
    equal = (values[None] == values[:, None]).sum(axis=1)
    return (better + (equal + 1) / 2).mean(axis=1).tolist()


def ranked_by(arms: Sequence[Arm], wanted: Sequence[str] = RANKED) -> list[str]:
    """Those of the measures that all arms have. UserError where there is none."""
    names = [name for name in wanted if all(np.isfinite(arm.mean(name)) for arm in arms)]
    if not names:
        raise UserError(f"no measure of {', '.join(wanted)} is there for every arm: give other --rank_by")
    return names


def best_of(arms: Sequence[Arm], ranks: Sequence[float], baseline: str) -> int:
    """The place of the baseline's arm of best mean rank. UserError where it has no run."""
    own = [place for place, arm in enumerate(arms) if arm.way.masking == baseline]
    if not own:
        raise UserError(f"no run masks by {baseline}: pre-train with it too, or give another --baseline")
    return min(own, key=lambda place: ranks[place])


def judge(arms: Sequence[Arm], ranks: Sequence[float], baseline: str = BASELINE) -> list[Judged]:
    """Every arm against the baseline at its own mask ratio, and against the baseline's best ratio."""
    best = arms[best_of(arms, ranks, baseline)]
    references = {arm.ratio: arm for arm in arms if arm.way.masking == baseline}
    judged = []
    for arm, rank in zip(arms, ranks, strict=True):
        same = references.get(arm.ratio)
        own = {} if same is None or same is arm else _differences(arm, same)
        judged.append(Judged(arm, rank, own, {} if arm is best else _differences(arm, best), {}))
    return _with_holm(judged)


def _differences(arm: Arm, reference: Arm) -> dict[str, Difference]:
    found = {name: arm.minus(reference, name) for name in arm.measures}
    return {name: gain for name, gain in found.items() if gain is not None}


def _with_holm(judged: list[Judged]) -> list[Judged]:
    """p-values of each measure, corrected for the number of arms that have several seeds."""
    corrected: list[dict[str, float]] = [{} for _ in judged]
    for name in dict.fromkeys(name for one in judged for name in one.same_ratio):
        gains = [one.same_ratio.get(name) for one in judged]
        places = [place for place, gain in enumerate(gains) if gain is not None and gain.p is not None]
        for place, p in zip(places, holm([gains[place].p for place in places]), strict=True):
            corrected[place][name] = p
    return [replace(one, p_holm=own) for one, own in zip(judged, corrected, strict=True)]


def finalists(arms: Sequence[Arm], ranks: Sequence[float], count: int, baseline: str = BASELINE) -> list[Arm]:
    """The ways of best mean rank, each at its best ratio, the baseline among them in any case; best first."""
    best = best_of(arms, ranks, baseline)
    chosen: dict[Way, int] = {}
    for place in sorted(range(len(arms)), key=lambda place: ranks[place]):
        chosen.setdefault(arms[place].way, place)
    places = list(chosen.values())
    kept = places[:count]
    if best not in kept:
        kept[-1] = best
    return [arms[place] for place in kept]
