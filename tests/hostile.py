"""What the tests of hostile files share."""

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest

from util.data.images import BadImage
from util.run.errors import UserError, one_line

MIB = 1 << 20
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")


def peak_growth(call) -> int:
    """The most memory that a call takes beside what the process has, bytes."""

    def high_water() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

    forget_peak()
    before = high_water()
    call()
    return high_water() - before


def forget_peak() -> None:
    """Hand back what earlier tests have freed, which the call would take again unseen, and let the peak begin anew."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    with suppress(AttributeError, OSError):  # of glibc alone
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def refused(call, match: str | None = None) -> str:
    """The one line with which a reader refuses."""
    with pytest.raises((UserError, BadImage), match=match) as found:
        call()
    return one_line(str(found.value))
