"""What every training script does around its recipe: processes and run folder before, resuming and results after."""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from util.run.device import grad_scaler, pick_device, pick_precision, precision_warning
from util.run.dist import World, join, leave, read_world
from util.run.errors import UserError, cli
from util.run.files import only_writer, read_lock, write_atomically
from util.run.log import RunFolder, provenance
from util.training.checkpoint import Progress, checkpoint_to_resume, plain_args, restore
from util.training.faults import Stopped
from util.training.loop import Setup, train
from util.training.memory import checkpoint_blocks
from util.training.sharded import shard


@dataclass(frozen=True)
class Session:
    """Where a run takes place. resume_from: the checkpoint it goes on from, None for a fresh run."""

    args: argparse.Namespace
    world: World
    device: torch.device
    run: RunFolder
    resume_from: Path | None

    @property
    def sharded(self) -> bool:
        """Whether the processes share the model out."""
        return getattr(self.args, "fsdp", False) and self.world.size > 1

    def placed(self, model: nn.Module) -> nn.Module:
        """The model on the device; one to be shared out stays where it is until `fit` moves it there block by block."""
        return model if self.sharded else model.to(self.device)


@contextmanager
def session(args: argparse.Namespace) -> Iterator[Session]:
    """Join the other processes and open the run folder; take both down at the end.

    A run that a signal stopped, and that is saved, ends the process with status 128 + the signal.
    """
    world = read_world()
    device = pick_device(args.device, world.local_rank)
    join(world, device)
    try:
        with _run_folder(args, world) as (run, resume_from):
            here = Session(args, world, device, run, resume_from)
            if here.sharded and args.compile == "on":
                raise UserError("--compile on does not work with --fsdp: leave one of them out")
            yield here
    except Stopped as stop:
        sys.exit(stop.exit_status)
    finally:
        leave()


@contextmanager
def _run_folder(args: argparse.Namespace, world: World) -> Iterator[tuple[RunFolder, Path | None]]:
    """The run folder, which the main process holds for all, and the checkpoint to go on from, which it has chosen.

    UserError on all processes where it cannot do so, and on machines that share no folder.
    """
    run = RunFolder(args.output_dir, is_main=False, log_dir=args.log_dir)
    with ExitStack() as held:

        def take() -> tuple[Path | None, bytes]:
            nonlocal run
            run = RunFolder(args.output_dir, is_main=True, log_dir=args.log_dir)
            lock = held.enter_context(only_writer(run.path))
            return checkpoint_to_resume(run, args.resume), lock

        resume_from, lock = world.from_main(take)
        _all_see(world, run.path, lock)
        try:
            yield run, resume_from
            run.close()
        finally:
            with suppress(OSError):  # a full disk has been told of
                run.close()


def _all_see(world: World, folder: Path, lock: bytes) -> None:
    """UserError on machines that share no folder: some could not read what the main process saves."""
    seen = world.gather_objects(world.is_main or read_lock(folder) == lock)
    if not all(seen):
        raise UserError(
            f"process {seen.index(False)} does not see the folder {folder} that process 0 writes to: "
            "give an --output_dir that all machines share"
        )


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
    setup = Setup(
        args=args, world=here.world, device=here.device, precision=precision, scaler=scaler, run=run,
        sharded=here.sharded, **parts,
    )  # fmt: skip
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
    if here.sharded:  # after its whole state was put back, whatever kind of run had saved it
        shard(setup.model, setup.optimizer, here.world, here.device)
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
