"""Methods x seeds as runs of the grid runner: pre-training, transfer and evaluation, each in a folder of its own.

OUT/pretrain/NAME/seed=0       shared by every method that names this pre-training
OUT/transfer/METHOD/seed=0
OUT/eval/METHOD/seed=0
OUT/calibration/...            a few steps of each stage, where a budget in minutes has to know its pace
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from util.benchmark.budget import Pace
from util.benchmark.methods import Method, Stage
from util.run.errors import UserError
from util.run.grid_run import Run

EVALUATION_SEED = "0"  # of pair lists, episodes and bootstraps: the same ones for every run
CALIBRATION_STEPS = 20


@dataclass(frozen=True)
class Chain:
    """The runs of a method with one seed; `pretraining` None where it has none of its own."""

    method: Method
    seed: int
    pretraining: Run | None
    transfer: Run
    evaluation: Run

    @property
    def runs(self) -> list[Run]:
        """In the order in which they need each other."""
        return [run for run in (self.pretraining, self.transfer, self.evaluation) if run]

    def state(self) -> str:
        """ "done", "failed", or else what stands of the first run that is not done, with its stage."""
        for stage, run in zip(("pre-training", "transfer", "evaluation")[-len(self.runs) :], self.runs, strict=True):
            if (state := run.state()) != "done":
                return state if state == "failed" else f"{stage} {state}"
        return "done"

    def error(self) -> str | None:
        """What the first run that is not done has failed of."""
        return next((run.error() for run in self.runs if run.state() != "done"), None)


@dataclass(frozen=True)
class Bench:
    """What all runs share. weights: key -> what --init is given. extra: flags added to every command."""

    out: Path
    data: str
    evaluation: Stage
    weights: Mapping[str, str]
    extra: tuple[str, ...] = ()

    def chain(self, method: Method, seed: int) -> Chain:
        """The runs of a method with one seed."""
        before, start = None, self.weights.get(method.weights or "")
        if method.pretraining:
            own = method.pretraining
            init = self.weights.get(own.weights or "")
            before = self._run("pretrain", own.name, seed, self._training(own.stage, init, seed))
            start = str(before.folder / "checkpoint-last.pth")
        transfer = self._run("transfer", method.name, seed, self._training(method.transfer, start, seed))
        checkpoint = ("--ckpt", str(transfer.folder / "checkpoint-best.pth"))
        cache = ("--feature_cache", str(self.out / "features"))
        words = (*self.evaluation.words(), *self._data(EVALUATION_SEED), *checkpoint, *cache, *self.extra)
        return Chain(method, seed, before, transfer, self._run("eval", method.name, seed, words))

    def chains(self, methods: Sequence[Method], seeds: Sequence[int]) -> list[Chain]:
        """Those of all methods, seed by seed, so that a whole table is there as soon as it can be."""
        return [self.chain(method, seed) for seed in seeds for method in methods]

    def calibrations(self, methods: Sequence[Method], seed: int) -> dict[str, "Calibration"]:
        """A short run for each stage that trains, by its key of `calibration_keys`.

        A stage that goes on from another one starts from random numbers: its pace does not depend on them.
        """
        found = {}
        for method in methods:
            before, after = calibration_keys(method)
            if before and before not in found:
                found[before] = self._calibration(before, method.pretraining.stage, method.pretraining.weights, seed)
            found[after] = self._calibration(after, method.transfer, method.weights, seed)
        return found

    def _calibration(self, key: str, stage: Stage, weights: str | None, seed: int) -> "Calibration":
        words = self._training(stage, self.weights.get(weights or ""), seed, self.out / "calibration" / "features")
        folder = self.out / "calibration" / key
        return Calibration(f"calibration {key}", (*words, "--max_steps", str(CALIBRATION_STEPS)), {}, folder)

    def _training(self, stage: Stage, init: str | None, seed: int, cache: Path | None = None) -> tuple[str, ...]:
        words = (*stage.words(), *self._data(str(seed)), *(("--init", init) if init else ()))
        if stage.script == "main_linprobe.py":
            words += ("--feature_cache", str(cache or self.out / "features"))
        return (*words, *self.extra)

    def _data(self, seed: str) -> tuple[str, ...]:
        return ("--data_path", self.data, "--seed", seed)

    def _run(self, stage: str, name: str, seed: int, words: tuple[str, ...]) -> Run:
        settings = {"seed": str(seed)}
        return Run(f"{stage} {name}", words, settings, self.out / stage / name / f"seed={seed}")


def unique(chains: Sequence[Chain]) -> list[Run]:
    """Every run once, in an order in which each comes after what it needs."""
    return list({run.folder: run for chain in chains for run in chain.runs}.values())


def needs(chains: Sequence[Chain]) -> dict[Path, list[Run]]:
    """What has to be done before a run can start, by the run's folder."""
    return {run.folder: chain.runs[:place] for chain in chains for place, run in enumerate(chain.runs)}


def calibration_keys(method: Method) -> tuple[str | None, str]:
    """What the calibrations of a method's pre-training and transfer are called."""
    before = f"pretrain/{method.pretraining.name}" if method.pretraining else None
    return before, f"transfer/{method.name}"


class Calibration(Run):
    """A run that is over after a few steps."""

    def results(self) -> dict:
        results = super().results()
        enough = results.get("finished") or results.get("steps", 0) >= CALIBRATION_STEPS
        return {**results, "finished": enough} if results else {}

    def pace(self) -> Pace:
        """Seconds of an epoch of optimizer steps, and of a probe's encoder, once. UserError where it is not done."""
        results = self.results()
        if not results.get("finished"):
            raise UserError(f"its pace could not be measured: {self.error() or 'the calibration was stopped'}")
        steps, seconds = results["steps"], results["train_seconds"]
        batch = results["images_seen"] // steps
        per_epoch = seconds / steps * (results["train_images"] // batch)
        # a probe's rate counts the encoder's passes, too
        whole = results["images_seen"] / results["images_per_s"]
        return Pace(per_epoch, max(0.0, whole - seconds) if "encoder_pass_seconds" in results else 0.0)
