"""`--batch_size auto`: the largest batch per process that fits into the memory there is."""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from util.data.loader import fitting
from util.run.args import AUTO, height_width
from util.run.device import autocast, forget_peak_memory, free_memory_bytes, pick_precision
from util.run.errors import UserError
from util.training.checkpoint import read_checkpoint
from util.training.memory import checkpoint_blocks, measure_step
from util.training.session import Session

# of the free memory. The rest is for what kernels use inside themselves, for fragmentation, and for other programs: the
# real peak on a CPU was 0.91 to 1.17 times the foreseen one (nano to small ViT, 16 to 256 pictures).
SHARE = 0.8
MULTIPLE = 8  # matrix units like whole tiles


def settle_batch_size(
    args: argparse.Namespace, here: Session, model: nn.Module, step_fn: Callable, images: Callable[[], int]
) -> None:
    """Put a number in the place of --batch_size auto, the same on every process, and say why it is this one.

    model: on its device, as it will be trained. step_fn: of util.training.loop. images: the size of the training set.
    Memory is foreseen from two small batches (`measure_step`), and on CUDA the answer is tried out. A run that is
    resumed keeps its batch, whatever is free now. UserError where not one image fits.
    """
    if args.batch_size != AUTO or _keep_batch(args, here):
        return
    if here.sharded:
        raise UserError("--batch_size auto cannot foresee what a share of a model takes: give a number with --fsdp")
    if args.grad_checkpoint:
        checkpoint_blocks(model)
    here.world.barrier()  # the others' weights are to be there already when free memory is read
    free = free_memory_bytes(here.device) // _sharers(here)
    if getattr(args, "memory", None) is not None:
        free = min(free, int(args.memory * 2**30))
    with _undisturbed(model, here.device):
        step = _training_pass(args, here, model, step_fn)
        memory, kept = measure_step(step), _kept_bytes(model, here.world.size)
        most = _least(here, memory.largest(int(SHARE * free) - kept))
        share = fitting(most, args.accum_iter, images(), here.world)
        batch = _rounded(share) if most else 0
        if batch and here.device.type == "cuda":
            batch = _least(here, _tried(step, batch, kept, here.device))
    forget_peak_memory(here.device)
    each, beside = memory.per_image.max(), memory.peak(0) + kept
    why = f"{each / 1e6:.2f} MB each and {beside / 1e6:.0f} MB beside; {free / 1e9:.2f} GB are free"
    if not batch:
        raise UserError(f"--batch_size auto: not one image fits ({why}): give --grad_checkpoint, or a smaller model")
    bound = ", as many as the training set has for a step" if share < most else ""
    here.run.say(f"--batch_size auto: {batch} images per process{bound} ({why})")
    args.batch_size = batch


def _keep_batch(args: argparse.Namespace, here: Session) -> bool:
    """Take the batch that the run to be resumed has; shared out anew if there are other processes now."""
    if not here.resume_from:
        return False
    progress = read_checkpoint(here.resume_from, judged=True).get("progress")
    if progress is None:
        return False  # `restore` has a word on that
    batch, rest = divmod(progress["step_images"], args.accum_iter * here.world.size)
    if rest:
        raise UserError(
            f"{here.resume_from} has {progress['step_images']} images per step, which {here.world.size} processes x "
            f"--accum_iter {args.accum_iter} cannot share out: resume with as many as it had"
        )
    args.batch_size = batch
    return True


def _sharers(here: Session) -> int:
    """The processes that share the memory of this one's device."""
    return 1 if here.device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", here.world.size))


def _training_pass(args: argparse.Namespace, here: Session, model: nn.Module, step_fn: Callable) -> Callable:
    """step(batch size): forward and backward on grey pictures, without the gradients of the time before."""
    precision = pick_precision(args.precision, here.device)
    height, width = height_width(args.input_size)

    def step(size: int) -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        torch.manual_seed(args.seed)
        index = torch.arange(size, device=here.device)
        image = torch.full((size, 3, height, width), 128, dtype=torch.uint8, device=here.device)
        batch = {"image": image, "index": index, "label": torch.zeros_like(index), "epoch": 0, "bad": []}
        with autocast(here.device, precision):
            loss = step_fn(model, batch)["loss"]
        loss.backward()

    return step


def _kept_bytes(model: nn.Module, processes: int) -> int:
    """What a run keeps from step to step and a first pass does not show: AdamW's two moments, gradient buckets."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return trained * (2 if processes == 1 else 3)


def _least(here: Session, batch: int) -> int:
    return -int(here.world.all_reduce(torch.tensor([-batch], device=here.device), "max"))


def _rounded(batch: int) -> int:
    return batch // MULTIPLE * MULTIPLE or batch


def _tried(step: Callable[[int], None], batch: int, kept: int, device: torch.device) -> int:
    """The batch, halved as often as the device runs out of memory; 0 if one image is too many."""
    while batch and not _runs(step, batch, kept, device):
        batch //= 2
    return batch


def _runs(step: Callable[[int], None], batch: int, kept: int, device: torch.device) -> bool:
    try:
        room = torch.empty(kept, dtype=torch.uint8, device=device)  # what the step has to leave for the run
        step(batch)
        del room
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        forget_peak_memory(device)


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Train for a while, and leave no trace in random generators, buffers (batch norm) and gradients."""
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    was_training = model.training
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)
        for name, value in model.named_buffers():
            value.copy_(buffers[name])
