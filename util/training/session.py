"""What every training script does around its recipe: processes and run folder before, resuming and results after."""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from util.run.device import grad_scaler, pick_device, pick_precision, precision_warning
from util.run.dist import World, join, leave, read_world
from util.run.errors import cli
from util.run.files import write_atomically
from util.run.log import RunFolder, provenance
from util.training.checkpoint import Progress, plain_args, restore
from util.training.faults import Stopped
from util.training.loop import Setup, train
from util.training.memory import checkpoint_blocks


@dataclass(frozen=True)
class Session:
    """Where a run takes place. resume_from: the checkpoint it goes on from, None for a fresh run."""

    args: argparse.Namespace
    world: World
    device: torch.device
    run: RunFolder
    resume_from: Path | None


@contextmanager
def session(args: argparse.Namespace) -> Iterator[Session]:
    """Join the other processes and open the run folder; take both down at the end.

    A run that a signal stopped, and that is saved, ends the process with status 128 + the signal.
    """
    world = read_world()
    device = pick_device(args.device, world.local_rank)
    join(world, device)
    run = RunFolder(args.output_dir, is_main=world.is_main, log_dir=args.log_dir)
    try:
        yield Session(args, world, device, run, run.checkpoint_to_resume(args.resume))
    except Stopped as stop:
        sys.exit(stop.exit_status)
    finally:
        run.close()
        leave()


def script(get_args: Callable, experiment: Callable[[argparse.Namespace, Session], None]) -> Callable:
    """The main(argv) of a training script: parse the flags, open a session, run experiment(args, here) in it.

    A UserError becomes one line and exit status 2.
    """

    @cli
    def main(argv: list[str] | None = None) -> None:
        args = get_args(argv)
        with session(args) as here:
            experiment(args, here)

    return main


def fit(here: Session, headline: str, **parts) -> dict | None:
    """Go on from the checkpoint if there is one, then train to the end of the run.

    headline: what the run is, for the person watching. parts: the fields of `Setup` that the script has built.
    Returns what results.json should say, or None for a run that was finished before.
    """
    args, run = here.args, here.run
    precision = pick_precision(args.precision, here.device)
    scaler = grad_scaler(here.device, precision)
    if warning := precision_warning(precision, here.device):
        run.say(warning)
    setup = Setup(args=args, world=here.world, device=here.device, precision=precision, scaler=scaler, run=run, **parts)
    if args.grad_checkpoint:
        checkpoint_blocks(setup.model)
    progress = Progress()
    if here.resume_from:
        progress = restore(
            here.resume_from, setup.model, setup.optimizer, scaler, plain_args(args), setup.loader, run.say,
            saved=setup.saved, notes=setup.notes,
        )  # fmt: skip
        if progress.best_epoch is not None and here.resume_from.parent.resolve() != run.path.resolve():
            _bring_best(here, progress)
    if run.is_finished() and progress.global_step and setup.is_over(progress):
        run.say(f"{run.path} is finished: {progress.epoch} epochs are done")
        return None
    run.start(plain_args(args), progress.epoch, progress.global_step)
    loader = setup.loader
    run.say(
        f"{headline} on {here.device} ({precision}), {loader.images} images, "
        f"{loader.steps} steps of {loader.step_images} images per epoch"
    )
    results = train(setup, progress)
    return {**results, **provenance(plain_args(args), here.device, loader.fingerprint)}


def _bring_best(here: Session, progress: Progress) -> None:
    """A run that goes on in another folder takes its best checkpoint along; without one, the next best counts."""
    best = here.resume_from.with_name(here.run.best.name)
    if not best.is_file():
        here.run.say(f"warning: there is no {best}: the best checkpoint is looked for anew")
        progress.best = progress.best_val = progress.best_epoch = None
    elif here.world.is_main:
        write_atomically(here.run.best, lambda part: shutil.copyfile(best, part))
