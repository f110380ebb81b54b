"""What the tests of hostile files share."""

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from util.data.images import BadImage
from util.run.device import peak_memory_bytes
from util.run.errors import UserError, one_line

MIB = 1 << 20
CPU = torch.device("cpu")
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")


def peak_growth(call) -> int:
    """The most memory that a call takes beside what the process has, bytes."""
    forget_peak()
    before = peak_memory_bytes(CPU)
    call()
    return peak_memory_bytes(CPU) - before


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
