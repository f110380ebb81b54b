"""Processes that find each other, after a restart by torchrun too, and what is said when one of them is gone.

Run: python -m pytest tests/test_dist.py
"""

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from util.run.causes import outside_cause
from util.run.dist import World, _store_of_attempt
from util.run.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
# one process of an attempt: "late" waits for a line before it joins; all end without taking the group down
PROCESS = """
import os, sys, torch
from util.run.dist import join, read_world
if "late" in sys.argv:
    input()
print("joins", flush=True)
world = read_world()
join(world, torch.device("cpu"))
print(world.gather_objects(sys.argv[1]), flush=True)
os._exit(9)
"""
# the same, but its peer is killed when both have met
BEREAVED = """
import os, signal, torch
from util.run.dist import join, read_world
from util.run.errors import cli

@cli
def main():
    world = read_world()
    join(world, torch.device("cpu"))
    pids = world.gather_objects(os.getpid())
    if world.rank == 1:
        os.kill(pids[0], signal.SIGKILL)
        while True:
            world.barrier()
    signal.pause()

main()
"""


def start(program: str, rank: int, size: int, port: int, *argv: str, agent: bool = True) -> subprocess.Popen:
    """A process as torchrun's agent starts it: its store, at a port, is the agent's, which outlives the processes.

    agent: False where the main process has the store.
    """
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost"}
    place |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": agent, "OMP_NUM_THREADS": 1}
    return subprocess.Popen(
        [sys.executable, "-c", program, *argv], cwd=ROOT, env={**os.environ, **{k: str(v) for k, v in place.items()}},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("late", [0, 2])
def test_processes_started_again_do_not_look_for_the_dead(late):
    """All but one have long read what stands in the agent's store when the last one writes its address there."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for attempt in ("first", "second"):
        names = [f"{attempt}{rank}" for rank in range(3)]
        ranks = [
            start(PROCESS, rank, 3, store.port, name, *["late"] * (rank == late)) for rank, name in enumerate(names)
        ]
        for process in ranks[:late] + ranks[late + 1 :]:
            assert process.stdout.readline() == "joins\n"
        time.sleep(0.5)
        ranks[late].stdin.write("\n")
        ranks[late].stdin.flush()
        for process in ranks:
            said, trouble = process.communicate(timeout=120)
            assert (said.split("\n")[-2], process.returncode) == (str(names), 9), trouble


def test_who_loses_its_peer_says_so_in_one_line():
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ranks = [start(BEREAVED, rank, 2, store.port) for rank in range(2)]
    trouble = ranks[1].communicate(timeout=120)[1]
    assert ranks[1].returncode == 2 and ranks[0].wait(timeout=120) == -9
    assert trouble.splitlines()[-1].startswith("error: another process of this run ended")
    assert "Traceback" not in trouble and "--resume auto" in trouble


def test_who_waits_at_a_store_that_is_gone_says_so_too():
    """Without torchrun's agent the store is the main process's, which is killed before the other has its answer."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    main = start(
        "import os, time; from torch.distributed.rendezvous import rendezvous\n"
        "kept = next(rendezvous('env://')); print('there', flush=True); time.sleep(600)",
        0,
        2,
        port,
        agent=False,
    )
    other = start(BEREAVED, 1, 2, port, agent=False)
    assert main.stdout.readline() == "there\n"
    time.sleep(6)  # for the other to have asked
    main.kill()
    trouble = other.communicate(timeout=120)[1]
    assert main.wait() == -9 and other.returncode == 2
    assert trouble.splitlines()[-1].startswith("error: another process of this run ended"), trouble
    assert "Traceback" not in trouble


def test_who_never_comes_is_named():
    """The word of a process that is dead stands in the store; the one that should take its place hangs."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=0.1))
    store.set("animask/asks/1", "dead")
    with pytest.raises(UserError, match="process 1 of 2 has not come"):
        _store_of_attempt(store, World(0, 0, 2))


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:5001: Connection reset by peer. ", True),
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1", True),
        ("NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited\nncclRemoteError: A call failed", True),
        ("connection to the data was lost", False),
        ("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", False),
    ],
)
def test_a_lost_peer_is_told_from_other_faults(message, lost):
    assert bool(outside_cause(RuntimeError(message))) is lost
    assert outside_cause(ValueError(message)) is None
