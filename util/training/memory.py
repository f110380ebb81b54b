"""Memory of a training step: spending less by recomputing blocks, and foreseeing what a batch needs."""

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from util.run.errors import UserError


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of an encoder and a decoder, in which nearly all of the weights lie; none of a convolutional one."""
    return [block for name in ("blocks", "decoder_blocks") for block in getattr(model, name, ())]


def checkpoint_blocks(model: nn.Module) -> int:
    """Keep the inputs alone of the blocks in `blocks` and `decoder_blocks`; their insides are computed twice.

    Activation checkpointing (arXiv 1604.06174): about a third more compute, the same gradients bit for bit, random
    numbers of dropout and stochastic depth included. The state dict stays as it is. Returns the number of blocks;
    calling it again changes nothing. UserError for a model without such blocks.
    """
    blocks = transformer_blocks(model)
    if not blocks:
        raise UserError("--grad_checkpoint recomputes transformer blocks, and there are none to train: leave it out")
    for block in blocks:
        if "forward" not in vars(block):
            block.forward = _recomputed(block.forward)
    return len(blocks)


def _recomputed(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def run(x: torch.Tensor, *args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(x, *args, **kwargs)
        # of the generators torch.utils.checkpoint itself sees to those of the CPU and of CUDA
        more = {"context_fn": _same_mps_numbers} if x.device.type == "mps" else {}
        return checkpoint(forward, x, *args, use_reentrant=False, **more, **kwargs)

    return run


def _same_mps_numbers() -> tuple[AbstractContextManager, AbstractContextManager]:
    state = torch.mps.get_rng_state()

    @contextmanager
    def again():
        present = torch.mps.get_rng_state()
        torch.mps.set_rng_state(state)
        yield
        torch.mps.set_rng_state(present)

    return nullcontext(), again()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside it and still alive, after every operation.

    The same on every device, the backward pass included. What kernels use inside themselves is not seen.
    timeline: the bytes after operation 0, 1, ...
    """

    def __init__(self):
        super().__init__()
        self.timeline: list[int] = []
        self._alive: dict[int, weakref.ref] = {}
        self._bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in _tensors_in((args, kwargs or {}))}
        for tensor in _tensors_in(out):
            storage = tensor.untyped_storage()
            if id(storage) not in given and id(storage) not in self._alive:
                self._follow(storage)
        self.timeline.append(self._bytes)
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_) -> None:
            del self._alive[key]
            self._bytes -= size

        self._alive[key] = weakref.ref(storage, gone)
        self._bytes += size


def _tensors_in(values) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


@dataclass(frozen=True)
class StepMemory:
    """What a forward and backward pass needs beside the weights, as a function of the batch size.

    At each operation of the pass it is linear in the batch, so the peak is the largest of many straight lines.
    fixed, per_image: (operations,) bytes.
    """

    fixed: np.ndarray
    per_image: np.ndarray

    def peak(self, batch: int) -> int:
        """Bytes at the worst moment with a batch of so many images."""
        return int((self.fixed + self.per_image * batch).max())

    def largest(self, budget: int) -> int:
        """The most images whose peak is within a budget in bytes; 0 if there is none."""
        if self.peak(0) > budget:
            return 0
        grows = self.per_image > 0
        return int(((budget - self.fixed[grows]) / self.per_image[grows]).min())


def measure_step(step: Callable[[int], None], sizes: tuple[int, int] = (2, 4)) -> StepMemory:
    """The memory of step(batch size), a forward and backward pass, from two small batches. Nothing large is allocated.

    The step makes all gradients anew: it begins, or ends, without any.
    """
    lines = []
    step(sizes[0])  # what the first pass alone does, such as filling caches
    for size in sizes:
        with LiveBytes() as live:
            step(size)
        lines.append(np.array(live.timeline, dtype=np.float64))
    small, large = lines
    if len(small) != len(large):  # other operations for another size: the peaks have to do
        small, large = (line.max(keepdims=True) for line in lines)
    slope = (large - small) / (sizes[1] - sizes[0])
    return StepMemory(small - slope * sizes[0], slope)
