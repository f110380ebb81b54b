"""Every question about the device is asked here: which one, in which precision, how much memory."""

import contextlib
import ctypes
import platform
import re
import resource
import sys
from pathlib import Path

import torch

from util.run.errors import UserError

# torch.compile costs about a minute; below this many steps it does not come back
COMPILE_PAYS_AFTER_STEPS = 1000


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """`auto` takes cuda, then mps, then cpu. A device asked for by name that is not there is a UserError."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = name.split(":")[0]
    if name == "auto":
        kind = next(device for device, there in available.items() if there)
    elif not available.get(kind, False):
        raise UserError(
            f"--device {name} is not available here: choose from {', '.join(k for k in available if available[k])}"
        )
    if kind == "cuda":
        device = torch.device(name if ":" in name else f"cuda:{local_rank}")
        if device.index >= torch.cuda.device_count():
            raise UserError(f"{device} is not there, {torch.cuda.device_count()} cards are: start as many processes")
        torch.cuda.set_device(device)
        # TF32 in matrix products: as accurate as needed beside bf16, several times faster than fp32
        torch.set_float32_matmul_precision("high")
        return device
    if kind == "cpu":
        keep_freed_memory()
    return torch.device(kind)


def keep_freed_memory() -> bool:
    """Let this process reuse freed memory instead of giving it back to the system; False where it cannot be told to.

    glibc maps every block above 32 MB anew, so each activation of a large batch costs page faults and zeroing: a
    fifth of a training step of ViT-B at 32 pictures. Of other C libraries nothing is asked.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    no_maps, never_trim, grow_bytes = (-4, 0), (-1, 2**31 - 1), (-2, 1 << 28)  # M_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, value) for option, value in (no_maps, never_trim, grow_bytes))


def pick_precision(name: str, device: torch.device) -> str:
    """fp32, bf16 or fp16. `auto`: bf16 on CUDA cards that have it in hardware, fp16 on older ones, else fp32.

    bf16 on a processor without the instructions is about eight times slower than fp32, so a CPU stays at fp32.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    return "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The autocast context of a precision; nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """A gradient scaler, switched on for fp16 only."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def use_compile(choice: str, device: torch.device, steps: int) -> bool:
    """`auto` compiles on CUDA when the run is long enough to earn the compilation back."""
    if choice == "auto":
        return device.type == "cuda" and steps >= COMPILE_PAYS_AFTER_STEPS
    return choice == "on"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; for honest timing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on a CUDA card, held by the driver on MPS, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes there, KiB on Linux
    # ru_maxrss would count what the process that started this one held
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def describe_device(device: torch.device) -> str:
    """The device in words, for result files."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}, {torch.get_num_threads()} threads"
