"""Which images make a batch, how they become tensors, and the processes that read them."""

import signal
from collections.abc import Callable, Iterator

import numpy as np
import torch

from util.run.dist import World
from util.run.errors import UserError
from util.run.seed import permuted, rng_for

# samples whose order is laid out, 64 MiB in each process; of 100 million that would be 400, and 10 s in each epoch
LONGEST_TABLE = 2**24
_STEPS_AHEAD = 64  # whose samples are looked up together
_GRACE_S = 60  # a worker told to terminate goes on for so long, while the main process saves


def collate(samples: list[dict]) -> dict:
    """{"image": uint8 (N, 3, H, W), "index": int64 (N,), "epoch": int, "bad": [(index, path, reason), ...]}

    and "label": int64 (N,), where the samples have one; other tensors and arrays of theirs are stacked too. An array
    may be a view of a file on disk: this is the one copy that is made of it.
    """
    numbers = [name for name in ("index", "label") if name in samples[0]]
    stacked = {
        name: _stack([sample[name] for sample in samples])
        for name, value in samples[0].items()
        if isinstance(value, (torch.Tensor, np.ndarray))
    }
    return {
        "epoch": samples[0]["epoch"],
        **stacked,
        **{name: torch.tensor([sample[name] for sample in samples], dtype=torch.int64) for name in numbers},
        "bad": [bad for sample in samples for bad in sample["bad"]],
    }


def _stack(values: list[torch.Tensor] | list[np.ndarray]) -> torch.Tensor:
    return torch.stack(values) if isinstance(values[0], torch.Tensor) else torch.from_numpy(np.stack(values))


class StepSampler:
    """Batches of (epoch, index) for one process, entered at any optimizer step of any epoch.

    batch_size: images per process and batch. accum_iter: batches per optimizer step.
    What is left of the permutation after the last whole step is seen in other epochs.
    """

    def __init__(self, length: int, batch_size: int, accum_iter: int, seed: int, world: World):
        self.length, self.batch_size, self.accum_iter = length, batch_size, accum_iter
        self.seed, self.world = seed, world
        self.step_images = batch_size * accum_iter * world.size
        self.steps = length // self.step_images
        self.epoch, self.first_step = 0, 0
        if not self.steps:
            raise UserError(
                f"a step of {self.step_images} images ({batch_size} x {accum_iter} accumulated x {world.size} "
                f"processes) is larger than the data set of {length}: lower --batch_size or --accum_iter"
            )

    def enter(self, epoch: int, step: int) -> None:
        """The next iteration begins here."""
        self.epoch, self.first_step = epoch, step

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accum_iter

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = _order(self.length, self.seed, self.epoch, "order")
        share = self.batch_size * self.accum_iter
        own = self.world.rank * share + np.arange(share)  # this process's places in a step
        for first in range(self.first_step, self.steps, _STEPS_AHEAD):
            steps = np.arange(first, min(first + _STEPS_AHEAD, self.steps))
            found = order((steps[:, None] * self.step_images + own).ravel())
            for batch in found.reshape(-1, self.batch_size).tolist():
                yield [(self.epoch, index) for index in batch]


def _order(length: int, *key: int | str) -> Callable[[np.ndarray], np.ndarray]:
    """What gives the samples at some places of a permutation keyed by `key`."""
    if length > LONGEST_TABLE:
        return lambda places: permuted(places, length, *key)
    # the same order as permutation(length) gives, in half the memory
    table = rng_for(*key).permutation(np.arange(length, dtype=np.int32))
    return lambda places: table[places]


def worker_options(num_workers: int, device: torch.device) -> dict:
    """DataLoader options for a number of worker processes; 0 decodes in the main process."""
    options = {"num_workers": num_workers, "pin_memory": device.type == "cuda"}
    if num_workers:
        options |= {"prefetch_factor": 4, "worker_init_fn": _start_worker}
    return options


def end_workers(batches: Iterator | None) -> None:
    """End the processes behind an iterator now: after an exception its traceback would keep it, and them, alive."""
    if shutdown := getattr(batches, "_shutdown_workers", None):  # what the iterator's own __del__ calls
        shutdown()


def _start_worker(_: int) -> None:
    # one thread each: the workers are the parallelism. Signals often reach the whole process group; the main
    # process decides what they mean and ends its workers itself, and orphans notice that their parent is gone.
    torch.set_num_threads(1)
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    # never deaf to this one: a parent that leaves in a hurry ends its workers by it, and then waits for them
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))
