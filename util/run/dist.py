"""Several processes under torchrun; a single process needs nothing of it and pays nothing."""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from util.run.errors import UserError

_BETWEEN_LOOKS = 0.005  # seconds


@dataclass(frozen=True)
class World:
    """Which of how many processes this is."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduce a tensor over all processes, in place: op is "sum" or "max"."""
        if self.size > 1:
            dist.all_reduce(tensor, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
        return tensor

    def take_from_main(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give tensors the main process's values, in place; of the same shapes and in the same order everywhere."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, src=0)

    def gather_objects(self, value) -> list:
        """The values of all processes, in rank order, on every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, work: Callable[[], object]):
        """What the main process's work returns, on every process; the others wait for it.

        A UserError of it is raised on all: one process alone would leave the others to a broken connection.
        """
        value = refusal = None
        if self.is_main:
            try:
                value = work()
            except UserError as error:
                refusal = error
        value, message = self.gather_objects((value, refusal and str(refusal)))[0]
        if message is not None:
            raise refusal or UserError(message)
        return value

    def rows(self, count: int) -> list[int]:
        """This process's share of the rows 0, 1, ... of `count`: every size-th one.

        All processes have equally many, because they run a sharded model together: where that does not come out even,
        the first rows are dealt once more.
        """
        return [(self.rank + turn * self.size) % count for turn in range(-(-count // self.size))]

    def collect(self, own: torch.Tensor) -> torch.Tensor:
        """What all processes have computed of their `rows`, in the order of the rows; on every process.

        own: (n, ...) on the device, the same n everywhere: all rows of a process, or the same stretch of them. Returns
        (size * n, ...); rows that were dealt twice come last.
        """
        if self.size == 1:
            return own
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def read_world() -> World:
    """This process's place as torchrun's environment variables give it; a single process without them."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if not all(name in os.environ for name in names):
        return World()
    return World(*(int(os.environ[name]) for name in names))


def join(world: World, device: torch.device) -> None:
    """Form the process group: NCCL between CUDA cards, gloo otherwise. UserError for several processes on MPS."""
    if world.size > 1 and device.type == "mps":  # gloo moves what lies in the memory of the CPU or of CUDA cards
        raise UserError(
            f"{world.size} processes cannot share the gradients of an Apple GPU: start one without torchrun, or give "
            "--device cpu"
        )
    if world.size > 1 and not dist.is_initialized():
        store, _, _ = next(rendezvous("env://"))
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store_of_attempt(store, world), rank=world.rank, world_size=world.size)


def _store_of_attempt(store: dist.Store, world: World) -> dist.Store:
    """The part of torchrun's store that belongs to the processes which are alive now.

    After `--max-restarts` the new processes are given the store of the killed ones, addresses in it included: whoever
    looks before all have written theirs would wait for the dead. How often a machine has restarted does not tell the
    attempts apart either, as machines count for themselves (pytorch/pytorch#135712). So each process shows the main one
    a word that nobody had before and is answered with the name of the attempt.
    """
    name = uuid4().hex
    if not world.is_main:
        store.set(f"animask/asks/{world.rank}", name)
        name = store.get(f"animask/answer/{name}").decode()
        store.set(f"animask/knows/{name}/{world.rank}", "")
    for rank in range(1, world.size) if world.is_main else ():
        until = time.monotonic() + store.timeout.total_seconds()
        while not store.check([f"animask/knows/{name}/{rank}"]):
            # what stands there may still be the word of a dead process: it is answered too, and asked for again
            store.set(f"animask/answer/{store.get(f'animask/asks/{rank}').decode()}", name)
            if time.monotonic() > until:
                raise UserError(f"process {rank} of {world.size} has not come: see what it says on its machine")
            time.sleep(_BETWEEN_LOOKS)
    return dist.PrefixStore(f"animask/{name}", store)


def leave() -> None:
    """Take the process group down, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
