"""When a job is killed: at a moment, at a change to a file of some kind, or shortly after one."""

import ctypes
import os
import re
import select
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from util.faults.forked import fork, run_script, tell_changes
from util.run.process_tree import descendants, has_ended
from util.run.seed import rng_for

WAYS = ("moment", "at", "after")
_DEAR, _OFTEN = ("checkpoint", "pack", "embeddings", "maps", "data set"), 4
_LATEST_S = 0.02  # after a change to a file
_POLL_S = 0.005
_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux
# what a file is, by its name; the first that fits
_KINDS = (
    ("checkpoint", r"\.pth"),
    ("pack", r"data\.pack"),
    ("embeddings", r"\.npz"),
    ("maps", r"(^|/)maps/"),
    ("data set", r"(^|/)data/|metadata\.parquet|preparation\.json"),
    ("events", r"tfevents"),
    ("results", r"\.(json|jsonl|txt|csv|md|tex)"),
    ("pictures", r"\.png"),
)


def kind_of(name: str) -> str:
    """What a file of a job is, also under its temporary name."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), "other")


@dataclass(frozen=True)
class Plan:
    """moment: killed when it has used `amount` seconds (of the CPU, or of the clock). at: at the `amount`-th change to
    a file of `kind`, before that is made. after: `delay` seconds after it."""

    way: str
    amount: float
    kind: str = ""
    delay: float = 0.0


@dataclass(frozen=True)
class End:
    """How a process ended. status: its exit status, negative for a signal.

    seconds: on the CPU, with the children that it has waited for. changes: the names of the files that it changed, in
    order.
    """

    pid: int
    status: int
    seconds: float
    wall_seconds: float
    changes: tuple[str, ...]

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


def draw_plan(key: Sequence[int | str], whole: End, ways: Sequence[str] = WAYS, clock: bool = False) -> Plan:
    """A kill as the key decides. whole: how an undisturbed run ended.

    clock: moments are of the clock, not of the CPU.
    """
    rng = rng_for(*key)
    counts = Counter(map(kind_of, whole.changes))
    way = ways[rng.integers(len(ways))] if counts else "moment"
    if way == "moment":
        return Plan(way, float(rng.uniform(0, whole.wall_seconds if clock else whole.seconds)))
    kinds = sorted(counts)  # rare ones as often as frequent ones, but first of all what cannot be made again
    weights = np.array([_OFTEN if kind in _DEAR else 1 for kind in kinds])
    kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
    delay = float(rng.uniform(0, _LATEST_S)) if way == "after" else 0.0
    return Plan(way, int(rng.integers(1, counts[kind] + 1)), kind, delay)


def run(argv: Sequence[str], folder: Path, output: Path, plan: Plan | None = None, clock: bool = False) -> End:
    """Run a script in a fork to its end, or to its death as planned. folder: whose files count."""
    read, write = os.pipe()
    counted = Counter()

    def stop_at(name: str) -> bool:
        counted[kind_of(name)] += 1
        return (
            plan is not None and plan.way == "at" and counted[plan.kind] == plan.amount and kind_of(name) == plan.kind
        )

    def work() -> None:
        os.close(read)
        tell_changes(folder, write, stop_at)
        run_script(argv, output)

    started = time.monotonic()
    pid = fork(work)
    os.close(write)
    told = _Told(read)
    due = _due(plan, pid, started, told, clock)
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        told.listen(_POLL_S)
        if due():
            os.kill(pid, signal.SIGKILL)
    told.listen(0)
    os.close(read)
    spent = usage.ru_utime + usage.ru_stime
    return End(pid, os.waitstatus_to_exitcode(status), spent, time.monotonic() - started, tuple(told.names))


class _Told:
    """What the process says of its changes."""

    def __init__(self, descriptor: int):
        self.descriptor, self.names, self._rest = descriptor, [], b""

    def listen(self, patience: float) -> None:
        """Read what is there; wait for it so many seconds."""
        while select.select([self.descriptor], [], [], patience)[0]:
            data = os.read(self.descriptor, 65536)
            if not data:
                time.sleep(patience)  # all that could write have ended
                return
            *lines, self._rest = (self._rest + data).split(b"\n")
            self.names += [os.fsdecode(line) for line in lines]
            patience = 0


def _due(plan: Plan | None, pid: int, started: float, told: _Told, clock: bool) -> Callable[[], bool]:
    """Whether the time has come to kill from outside."""
    if plan is None or plan.way == "at":
        return lambda: False
    if plan.way == "moment":
        return lambda: (time.monotonic() - started if clock else cpu_seconds(pid)) >= plan.amount
    seen: list[float] = []

    def after() -> bool:
        if not seen and sum(kind_of(name) == plan.kind for name in told.names) >= plan.amount:
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= plan.delay

    return after


def cpu_seconds(pid: int) -> float:
    """What a living process has used of the CPU, all its threads; without its children."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # the kernel's number for the clock of a process
    except OSError:
        return 0.0


@contextmanager
def orphans() -> Iterator[None]:
    """Let this process inherit the processes that killed ones leave, in whatever session (Linux)."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(_CHILD_SUBREAPER, 0)


def left_behind(before: Collection[int], patience_s: float) -> list[int]:
    """Descendants of this process, but for those of `before`, that are still alive after so many seconds.

    Orphans that have ended are collected; nothing that anybody waits for may run meanwhile.
    """
    end = time.monotonic() + patience_s
    while alive := _living(before):
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    return alive


def _living(before: Collection[int]) -> list[int]:
    new = [pid for pid in descendants(os.getpid()) if pid not in before]
    ended = set(filter(has_ended, new))
    for pid in ended:
        with suppress(ChildProcessError):  # another one's child
            os.waitpid(pid, os.WNOHANG)
    return [pid for pid in new if pid not in ended]


def as_json(plan: Plan, end: End) -> dict:
    """A kill for the results."""
    last = end.changes[-1] if end.changes else None
    return {**asdict(plan), "hit": end.killed, "last_change": last, "cpu_seconds": round(end.seconds, 3)}
