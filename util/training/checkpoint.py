"""Checkpoints in the official MAE layout, written so that a kill at any moment leaves a whole file."""

import argparse
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch

from util.run.args import BOOKKEEPING
from util.run.errors import UserError
from util.run.files import write_atomically
from util.run.log import RunFolder

# what building a model from stored values, and loading stored weights into it, raises where they do not fit
MISFITS = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError)


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


def save_checkpoint(path: Path, checkpoint: dict, previous: Path | None = None) -> None:
    """Write {"model": ..., "optimizer": ..., "epoch": ..., ...}: tensors and plain types only.

    previous: what was at `path` before goes on under this name.
    """

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # to a path torch would not say why it cannot write
            torch.save(checkpoint, file)
        if previous is not None and path.exists():  # only now: until the new one is whole, both are kept
            write_atomically(previous, lambda spare: _link(path, spare))

    write_atomically(path, write)


def _link(path: Path, name: Path) -> None:
    """Give a file a second name; a copy where the file system knows no such thing."""
    name.unlink()
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)


def damage(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint; None where nothing is, or nothing is known.

    torch.save stores a CRC-32 of every tensor, but torch.load does not look at it and returns wrong weights. Files of
    torch before 1.6, and those written without checksums, cannot be judged. UserError where it cannot be opened.
    """
    with _open(path) as file:
        return _damage(file) if _is_archive(file) else None


def _open(path: Path) -> BinaryIO:
    try:
        if not path.is_file():
            raise UserError(f"checkpoint {path} does not exist: check the path")
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): let it be read, or name another file") from error


def _is_archive(file: BinaryIO) -> bool:
    """Whether a file begins as those of torch.save do since torch 1.6."""
    begins = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    return begins


def _damage(file: BinaryIO) -> str | None:
    try:
        with zipfile.ZipFile(file) as stored:
            if sum(entry.file_size for entry in stored.infolist()) > os.fstat(file.fileno()).st_size:
                return "it unpacks to more than it holds, and torch.save packs nothing"
            unchecked = not any(entry.CRC for entry in stored.infolist())
            wrong = None if unchecked else stored.testzip()
    except Exception as error:  # a flipped bit makes zipfile fail in many ways, NotImplementedError included
        return f"cut short or damaged: {error}"
    return wrong and f"{wrong} differs from its checksum"


def _refuse_tar(file: BinaryIO) -> None:
    """ValueError for an archive as of torch 0.1: torch.load would unpack it into a folder, links and all."""
    with suppress(tarfile.TarError), tarfile.open(fileobj=file, mode="r:"):
        raise ValueError("a tar archive")
    file.seek(0)


def checkpoint_to_resume(run: RunFolder, resume: str) -> Path | None:
    """The checkpoint that --resume means: none, a file, or with "auto" the folder's last one that is whole, if any.

    Says so where that is not the last, and sets a damaged last one aside. UserError where none is whole, and where a
    new run would write over an old one: nothing is lost by accident.
    """
    there = [path for path in (run.last, run.previous) if path.exists()]
    if there and not resume:
        raise UserError(f"{run.path} holds a run already: go on with --resume auto, or choose another --output_dir")
    if not resume or (resume == "auto" and not there):
        return None
    if resume == "auto":
        chosen = _first_whole(run, there)
    else:
        chosen = Path(resume)
        _refuse_damaged(chosen)
    if run.last in there and not chosen.samefile(run.last):
        _set_aside_damaged(run)
    return chosen


def _first_whole(run: RunFolder, there: list[Path]) -> Path:
    for path in there:
        reason = _harm(path)
        if reason is None:
            if path == run.previous and run.last in there:
                run.say(f"going on from the checkpoint before it, {path}")
            return path
        run.say(f"warning: {path} cannot be used ({reason})")
    raise UserError(f"no checkpoint in {run.path} is whole: restore one, or remove them to begin anew")


def _harm(path: Path) -> str | None:
    """The damage of a checkpoint of our own, which is an archive or cut short."""
    with _open(path) as file:
        return _damage(file) if _is_archive(file) else "cut short or damaged"


def _set_aside_damaged(run: RunFolder) -> None:
    """Where a run goes on from another checkpoint, its next save may not take a damaged last one for the previous."""
    if _harm(run.last):
        os.replace(run.last, run.damaged)
        run.say(f"the damaged {run.last} is now {run.damaged}")


def _refuse_damaged(path: Path) -> None:
    if reason := damage(path):
        raise UserError(f"{path} is damaged ({reason}): restore it, or name another file")


def read_checkpoint(path: Path, *, judged: bool = False) -> dict:
    """Read a checkpoint without running any code it may carry.

    judged: its checksums have been compared already. The one class allowed besides plain types is argparse.Namespace,
    which the official code stores. UserError for a missing file, a damaged one, and one that carries code.
    """
    if not judged:
        _refuse_damaged(path)
    file = _open(path)
    try:
        with file, torch.serialization.safe_globals([argparse.Namespace]):
            _refuse_tar(file)
            return torch.load(file, map_location="cpu", weights_only=True)
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


def _progress_of(checkpoint: dict, path: Path) -> Progress:
    try:
        progress = Progress(**checkpoint["progress"])
        counts = (progress.epoch, progress.step, progress.global_step, progress.step_images, progress.val_epoch)
        if not all(type(number) is int and number >= 0 for number in counts):
            raise ValueError(f"epoch and steps {counts}")
        if not isinstance(progress.sums, list) or not isinstance(checkpoint["args"], dict):
            raise ValueError("its sums or flags are none")
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} does not say where its run stands ({error}): resume from another one") from error
    return progress


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

    path: from `checkpoint_to_resume`, whose judgement is not repeated.
    loader: util.data.loader.TrainLoader or StreamLoader; its images per optimizer step must be what they were, and
    inside an epoch its data too. saved, notes: as in util.training.loop.Setup; the notes must be what they were.
    UserError otherwise, and for a checkpoint of another model or without an optimizer.
    """
    checkpoint = read_checkpoint(path, judged=True)
    if not isinstance(checkpoint, dict) or not {"model", "optimizer", "progress", "args"} <= checkpoint.keys():
        raise UserError(f"{path} holds weights but no run to go on with: start from it with --init")
    for name, value in (notes or {}).items():
        if checkpoint.get(name) != value:
            raise UserError(f"{path} was made with other {name}: resume with the data and flags it was made with")
    configured = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        others = select(model.state_dict(), lambda name: saved is not None and not saved(name))
        model.load_state_dict({**others, **checkpoint["model"]})
        optimizer.load_state_dict(checkpoint["optimizer"])
    except torch.OutOfMemoryError:  # of the device: nothing is wrong with the file
        raise
    except MISFITS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise UserError(f"{path} is of another model ({reason}): resume with the flags it was made with") from error
    for group, values in zip(optimizer.param_groups, configured, strict=True):
        group.update(values)  # a changed --weight_decay counts
    if checkpoint.get("scaler") and scaler.is_enabled():
        scaler.load_state_dict(checkpoint["scaler"])
    progress = _progress_of(checkpoint, path)
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
