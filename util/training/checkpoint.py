"""Checkpoints in the official MAE layout, written so that a kill at any moment leaves a whole file."""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from util.run.args import BOOKKEEPING
from util.run.errors import UserError
from util.run.files import write_atomically


@dataclass
class Progress:
    """Where a run stands: all that exact resuming needs beside the model, the optimizer and the scaler."""

    epoch: int = 0  # epochs done
    step: int = 0  # optimizer steps done in the epoch after those
    global_step: int = 0
    step_images: int = 0  # images per optimizer step
    data: str = ""  # fingerprint of the training data
    seconds: float = 0.0  # of training, evaluation left out
    epoch_seconds: float = 0.0  # the same, of this epoch
    compile_seconds: float = 0.0  # of the first step through a compiled model; they are not in `seconds`
    compile_steps: int = 0  # how many such steps there were: one in each process that trained
    sums: list[dict[str, float]] = field(default_factory=list)  # of this epoch's scalars so far, for each process
    best: float | None = None  # the best evaluation figure, lower is better
    val: dict[str, float] | None = None  # the last evaluation
    val_epoch: int = 0  # epochs done when it was made
    best_val: dict[str, float] | None = None  # the best one
    best_epoch: int | None = None  # the same for the best one


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write {"model": ..., "optimizer": ..., "epoch": ..., ...}: tensors and plain types only."""
    write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint without running any code it may carry.

    The one class allowed besides plain types is argparse.Namespace, which the official code stores.
    UserError for a missing file, a damaged one, and one that carries code.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: check the path")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a file of another kind torch fails in any way at all, IndexError included
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} carries code or Python objects ({found[1]}) and was not loaded: "
                "re-save its weights alone as {'model': state_dict}"
            ) from error
        raise UserError(f"{path} is damaged or no checkpoint: restore it, or name another file") from error


def select(state: dict, saved: Callable[[str], bool] | None) -> dict:
    """The part of a state dict whose names `saved` accepts; all of it for None."""
    return state if saved is None else {name: value for name, value in state.items() if saved(name)}


def plain_args(args: argparse.Namespace) -> dict:
    """The flags of a run as plain types."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


# flags that may change between the parts of a run; of any other a change is announced
_FREE_FLAGS = BOOKKEEPING | {"data_path", "batch_size", "accum_iter", "init"}


def restore(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    args: dict,
    loader,
    say: Callable[[str], None],
    saved: Callable[[str], bool] | None = None,
    notes: dict | None = None,
) -> Progress:
    """Put a run back to where its checkpoint stands, and say which flags have changed since.

    loader: util.data.loader.TrainLoader or StreamLoader; its images per optimizer step must be what they were, and
    inside an epoch its data too. saved, notes: as in util.training.loop.Setup; the notes must be what they were.
    UserError otherwise, and for a checkpoint of another model or without an optimizer.
    """
    checkpoint = read_checkpoint(path)
    if not {"model", "optimizer", "progress"} <= checkpoint.keys():
        raise UserError(f"{path} holds weights but no run to go on with: start from it with --init")
    for name, value in (notes or {}).items():
        if checkpoint.get(name) != value:
            raise UserError(f"{path} was made with other {name}: resume with the data and flags it was made with")
    configured = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        others = select(model.state_dict(), lambda name: saved is not None and not saved(name))
        model.load_state_dict({**others, **checkpoint["model"]})
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} is of another model ({reason}): resume with the flags it was made with") from error
    for group, values in zip(optimizer.param_groups, configured, strict=True):
        group.update(values)  # a changed --weight_decay counts
    if checkpoint["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(checkpoint["scaler"])
    progress = Progress(**checkpoint["progress"])
    if progress.step_images != loader.step_images:
        raise UserError(
            f"{path} is of a run with {progress.step_images} images per step, now there are {loader.step_images}: "
            "resume with the same --batch_size x --accum_iter x processes"
        )
    batch_size = checkpoint["args"].get("batch_size")
    if progress.step and args.get("streaming") and batch_size != args.get("batch_size"):
        raise UserError(
            f"{path} was left inside an epoch of a stream, whose order is for --batch_size {batch_size}: resume with it"
        )
    if progress.data != loader.fingerprint:
        if progress.step:
            raise UserError(f"{path} was left inside an epoch of other data: resume with the data it was made with")
        say("warning: the training data has changed")
    for name, value in args.items():
        before = checkpoint["args"].get(name)
        if name not in _FREE_FLAGS and before != value:
            say(f"warning: --{name} was {before} and is now {value}")
    say(f"resuming {path} at epoch {progress.epoch}, step {progress.step}")
    return progress
