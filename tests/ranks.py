"""Several processes for a test without the start-up of torchrun: they are forked from one that has imported torch.

said = run_ranks(2, "main_pretrain:main", argv)       # what each of them printed
"""

import contextlib
import multiprocessing
import os
import pkgutil
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

LIMIT_S = 900  # of processes that share a core with measurements
GRACE_S = 3  # for the others to say what they have to say, when one has failed


def run_ranks(count: int, function: str, *arguments, delays: Sequence[float] = (), fails: bool = False) -> list[str]:
    """Call a function, "module:name", in `count` processes, with the environment that torchrun would give them.

    delays: s that each process sleeps before; none for those left out. fails: whether a process is to fail.
    Returns what each process printed, in rank order. AssertionError, with that, where they fail and should not.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks", "main_pretrain", "main_finetune", "main_lora"])
    with TemporaryDirectory() as folder:
        said, port = [Path(folder) / str(rank) for rank in range(count)], _free_port()
        waits = [*delays, *[0.0] * count]
        processes = [
            context.Process(target=_rank, args=(rank, count, port, said[rank], waits[rank], function, arguments))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        _wait(processes)
        printed = [path.read_text() if path.exists() else "" for path in said]
    assert any(process.exitcode for process in processes) == fails, "\n".join(printed)
    return printed


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _wait(processes: list) -> None:
    """Until all are done; where one fails, the others would wait for it forever."""
    limit = time.monotonic() + LIMIT_S
    while any(process.is_alive() for process in processes) and time.monotonic() < limit:
        if any(process.exitcode for process in processes):
            limit = min(limit, time.monotonic() + GRACE_S)
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()


def _rank(rank: int, count: int, port: int, said: Path, wait: float, function: str, arguments: tuple) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    import torch

    torch.set_num_threads(1)
    with open(said, "w", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            time.sleep(wait)
            pkgutil.resolve_name(function)(*arguments)
        except Exception:
            traceback.print_exc()
            sys.exit(1)
