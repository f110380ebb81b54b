"""Trained checkpoints side by side: what each was trained with, which are repetitions, how each learned."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from models_mae import MAE_MODELS
from models_mae_weights import has_decoder
from util.benchmark.cost import Shape, pretraining
from util.mae.masking import visible_count
from util.run.args import BOOKKEEPING
from util.run.errors import UserError
from util.training.hub import load_weights

# flags that do not make one training another kind of training
_NOT_THE_RECIPE = BOOKKEEPING | {"seed", "mask_ratio", "maps"}


@dataclass(frozen=True)
class Trained:
    """A checkpoint. ckpt: as it was named. args: its flags, possibly none. folder: its run folder, if it is a file."""

    ckpt: str
    args: dict
    folder: Path | None

    @property
    def mask_ratio(self) -> float | None:
        """What it was trained at, fraction in 0..1; None if the checkpoint does not say."""
        ratio = self.args.get("mask_ratio")
        return None if ratio is None else float(ratio)

    def log(self) -> list[dict]:
        """The lines of its log.txt, one for each epoch; none where there is no such file."""
        path = self.folder and self.folder / "log.txt"
        if path is None or not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]  # a crash may have cut the last one short

    def results(self) -> dict:
        """Its results.json, or {}."""
        path = self.folder and self.folder / "results.json"
        return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}


def open_trained(ckpts: Iterable[str]) -> list[Trained]:
    """The checkpoints that --ckpt names; UserError for one without a decoder, or named twice."""
    runs = []
    for ckpt in ckpts:
        if any(run.ckpt == ckpt for run in runs):
            raise UserError(f"--ckpt names {ckpt} twice: name each checkpoint once")
        weights = load_weights(ckpt)
        if not has_decoder(weights.state):
            raise UserError(f"{ckpt} holds an encoder only: reconstruction needs a checkpoint with a decoder")
        path = Path(ckpt)
        folder = path if path.is_dir() else path.parent if path.is_file() else None
        runs.append(Trained(ckpt, weights.args, folder))
    return runs


def by_recipe(runs: Sequence[Trained]) -> dict[str, list[Trained]]:
    """Runs that differ in the seed only, by what they are called, in the order of their mask ratios.

    Such as "75 %"; where runs of one ratio differ in other flags, those follow: "75 %, masking face". UserError for two
    of one seed: that is no repetition.
    """
    groups: dict[str, list[Trained]] = {}
    for run in sorted(runs, key=lambda run: (run.mask_ratio is None, run.mask_ratio)):
        own = groups.setdefault(_label(run, runs), [])
        if same := next((other for other in own if other.args.get("seed") == run.args.get("seed")), None):
            raise UserError(f"{same.ckpt} and {run.ckpt} are of one training and seed: name one of them")
        own.append(run)
    return groups


def _label(run: Trained, runs: Sequence[Trained]) -> str:
    if run.mask_ratio is None:
        return run.ckpt
    peers = [other.args for other in runs if other.mask_ratio == run.mask_ratio]
    parts = [f"{100 * run.mask_ratio:.3g} %"]
    for flag in dict.fromkeys(flag for args in peers for flag in args if flag not in _NOT_THE_RECIPE):
        values = {json.dumps(args[flag], default=str) for args in peers if flag in args}
        if len(values) > 1 and flag in run.args:
            parts.append(f"{flag} {run.args[flag]}")
    return ", ".join(parts)


def epochs_done(run: Trained) -> tuple[int, int] | None:
    """(epochs done, epochs asked for), as its log and its flags say; None where they do not."""
    log = run.log()
    return (log[-1]["epoch"] + 1, int(run.args["epochs"])) if log and "epochs" in run.args else None


def learning_curve(run: Trained, patches: int) -> list[dict]:
    """How it did on its own held-out pictures, under its own mask ratio, after each epoch that was evaluated.

    patches: L of a picture. Each entry: epoch (done, from 1), loss, psnr_db (visible patches pasted), psnr_masked_db
    (of the removed pixels alone: of pictures with one number of removed patches the two differ by a constant), and
    pflop, the computation so far, 10^15 operations by formula, or None where the size of a step is not known.
    """
    if run.mask_ratio is None:
        return []
    removed = 1 - visible_count(patches, run.mask_ratio) / patches
    step = _pflop_of_step(run, patches)
    return [
        {
            "epoch": line["epoch"] + 1,
            "loss": line["val_loss"],
            "psnr_db": line["val_psnr_db"],
            "psnr_masked_db": line["val_psnr_db"] + 10 * math.log10(removed),
            "pflop": None if step is None else step * line["global_step"],
        }
        for line in run.log()
        if line.get("val_loss") is not None and line.get("val_psnr_db") is not None
    ]


def _pflop_of_step(run: Trained, patches: int) -> float | None:
    """The computation of an optimizer step, 10^15 operations."""
    args, results = run.args, run.results()
    if args.get("model") not in MAE_MODELS:
        return None
    if results.get("steps") and results.get("images_seen"):
        images = results["images_seen"] / results["steps"]
    elif isinstance(args.get("batch_size"), int):
        images = args["batch_size"] * args.get("accum_iter", 1)
    else:
        return None
    cost = pretraining(
        Shape.of(MAE_MODELS[args["model"]].keywords),
        patches,
        visible_count(patches, run.mask_ratio),
        predict_ratio=args.get("predict_ratio", 1.0),
        decoder=args.get("decoder", "self"),
        fill=args.get("fill", False),
    )
    return images * cost / 1e15
