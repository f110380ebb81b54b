"""What a process and its descendants hold, read from /proc (Linux)."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from util.run.errors import UserError

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Usage(NamedTuple):
    """Of a process and all its descendants together; `resident` and `private` of the process alone.

    memory: bytes that they have taken themselves, pages that several share counted in parts (anonymous PSS). Libraries
    and other mapped files are not in it: their parts change as other programs come and go. resident: bytes (RSS).
    private: bytes that no other process maps (USS). handles: open files, sockets and pipes. cpu_seconds: with those of
    descendants that have ended and were waited for, so they never fall.
    """

    memory: int
    resident: int
    private: int
    handles: int
    threads: int
    children: int
    cpu_seconds: float


def usage(pid: int) -> Usage:
    """What `pid` and its descendants hold now. ProcessLookupError once it has ended; UserError without /proc."""
    if not (_PROC / "self/smaps_rollup").exists():
        raise UserError("memory and open files are read from /proc, which this system does not have: run it on Linux")
    try:
        own, everyone = memory(pid), [pid, *descendants(pid)]
        cpu, handles, threads = _cpu_seconds(pid), _count(pid, "fd"), _count(pid, "task")
    except FileNotFoundError as error:
        raise ProcessLookupError(f"process {pid} has ended") from error
    taken = own["Pss_Anon"]
    for child in everyone[1:]:
        try:  # one may end while it is looked at
            parts = memory(child)["Pss_Anon"], _cpu_seconds(child), _count(child, "fd"), _count(child, "task")
        except (FileNotFoundError, ProcessLookupError):
            continue
        taken, cpu, handles, threads = (a + b for a, b in zip((taken, cpu, handles, threads), parts, strict=True))
    private = own["Private_Clean"] + own["Private_Dirty"]
    return Usage(taken, own["Rss"], private, handles, threads, len(everyone) - 1, cpu)


def descendants(pid: int) -> list[int]:
    """The processes that `pid` started, and those that they started, alive now."""
    found = []
    for listed in (_PROC / str(pid) / "task").glob("*/children"):
        try:
            children = [int(child) for child in listed.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def has_ended(pid: int) -> bool:
    """Whether a process is no more, or has only not been waited for yet."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def memory(pid: int) -> dict[str, int]:
    """The sums of /proc/PID/smaps_rollup, bytes: "Rss", "Pss_Anon", "Private_Clean", "Private_Dirty", ..."""
    text = (_PROC / str(pid) / "smaps_rollup").read_text()
    if not text:  # it has ended, and was not waited for yet
        raise ProcessLookupError(f"process {pid} has ended")
    return {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _count(pid: int, folder: str) -> int:
    return len(os.listdir(_PROC / str(pid) / folder))


def _cpu_seconds(pid: int) -> float:
    # behind the name, which may hold spaces: state is field 3, user and system time 14 and 15, those of the dead 16, 17
    fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS
