"""Every question about the device is asked here: which one, in which precision, how much memory."""

import contextlib
import ctypes
import platform
import re
import resource
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from util.run.errors import UserError

# torch.compile costs about a minute on a card; below this many steps it does not come back
COMPILE_PAYS_AFTER_STEPS = 1000
# nothing is kept for a backward pass, so a card that trains on smaller batches has room for this one
INFERENCE_BATCH = 128


def pick_device(name: str = "auto", local_rank: int = 0, *, keep_memory: bool = True) -> torch.device:
    """`auto` takes cuda, then mps, then cpu. A device asked for by name that is not there is a UserError.

    keep_memory: see `keep_freed_memory`; without it `give_back_freed_memory`, for what serves visitors for days.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = name.split(":")[0]
    if name == "auto":
        kind = next(device for device, there in available.items() if there)
    elif not available.get(kind, False):
        raise UserError(
            f"--device {name} is not available here: choose from {', '.join(k for k in available if available[k])}"
        )
    if not keep_memory:
        give_back_freed_memory()
    if kind == "cuda":
        device = torch.device(name if ":" in name else f"cuda:{local_rank}")
        if device.index >= torch.cuda.device_count():
            raise UserError(f"{device} is not there, {torch.cuda.device_count()} cards are: start as many processes")
        torch.cuda.set_device(device)
        # TF32 in matrix products: as accurate as needed beside bf16, several times faster than fp32. Convolutions have
        # it by default. cudnn.benchmark stays off: it picks algorithms by their time, so that a resumed run could get
        # others, which add in another order.
        torch.set_float32_matmul_precision("high")
        return device
    if kind == "cpu" and keep_memory:
        keep_freed_memory()
    return torch.device(kind)


def keep_freed_memory() -> bool:
    """Let this process reuse freed memory instead of giving it back to the system; False where it cannot be told to.

    glibc maps every block above 32 MB anew, so each activation of a large batch costs page faults and zeroing: a
    fifth of a training step of ViT-B at 32 pictures. Of other C libraries nothing is asked.
    """
    no_maps, never_trim, grow_bytes = (-4, 0), (-1, 2**31 - 1), (-2, 1 << 28)  # M_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD
    return _tell_malloc(no_maps, never_trim, grow_bytes)


def give_back_freed_memory() -> bool:
    """Keep this process's memory at its level over days; False where it cannot be told to. Before it starts threads.

    glibc gives threads up to eight arenas per core. Where dozens of them take pictures in turn, each arena fills with
    holes: the demo grew by 110 kB with every visitor, of which nothing was in use. Two arenas are filled again.
    """
    return _tell_malloc((-8, 2))  # M_ARENA_MAX


def _tell_malloc(*options: tuple[int, int]) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, value) for option, value in options)


def pick_precision(name: str, device: torch.device) -> str:
    """fp32, bf16 or fp16. `auto`: bf16 on CUDA cards that have it in hardware, fp16 on older ones, else fp32.

    bf16 on a processor without the instructions is about eight times slower than fp32, so a CPU stays at fp32.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    return "fp32"


def precision_warning(precision: str, device: torch.device) -> str | None:
    """One line on a precision that this device has to emulate; None where it has the instructions."""
    if device.type != "cpu" or precision == "fp32" or (precision == "bf16" and cpu_has_bf16()):
        return None
    return (
        f"warning: this processor has no {precision} instructions: --precision {precision} is several times slower "
        "here than fp32"
    )


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself: AVX512_BF16 or AMX on x86, BF16 on Arm."""
    if sys.platform == "darwin":
        return _sysctl("hw.optional.arm.FEAT_BF16") == 1
    words = set(Path("/proc/cpuinfo").read_text().split())  # "bf16" is Arm's name
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def _sysctl(name: str) -> int:
    """A number that macOS knows by name; 0 for an unknown name."""
    found = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True)
    return int(found.stdout) if found.returncode == 0 else 0


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The autocast context of a precision; nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """A gradient scaler, switched on for fp16 only."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def heeds_found_inf(device: torch.device) -> bool:
    """Whether fused AdamW leaves the weights alone where `optimizer.found_inf` is 1, so that the host need not wait.

    The kernel of MPS is handed the tensor and does not read it (FusedAdamWKernelImpl.mm of PyTorch), neither for a
    gradient that is not finite nor for one that overflowed under a gradient scaler.
    """
    return device.type != "mps"


def upsampled(layer: torch.nn.ConvTranspose2d, x: torch.Tensor) -> torch.Tensor:
    """layer(x); on MPS in float32, because transposed convolutions of bfloat16 fail there.

    torch lists them so (torch/testing/_internal/common_mps.py, 2.14).
    """
    if x.device.type != "mps":
        return layer(x)
    with torch.autocast("mps", enabled=False):
        return layer(x.float())


def area_average(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(N, C, H, W) -> (N, C, *size), the mean over the area of each new pixel.

    MPS averages where sizes divide alone (pytorch/pytorch issue 96056); for others the CPU does it.
    """
    if x.device.type == "mps" and any(old % new for old, new in zip(x.shape[-2:], size, strict=True)):
        return F.interpolate(x.cpu(), size=size, mode="area").to(x.device)
    return F.interpolate(x, size=size, mode="area")


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or on MPS, which has none, float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def use_compile(choice: str, device: torch.device, steps: int) -> bool:
    """`auto` compiles on CUDA when the run is long enough to earn the compilation back.

    The answer depends on the run alone, so that a resumed one goes on in the same way, bit for bit. On a CPU `auto` is
    off: matrix products take nearly all of the time there, and they are the same ones. One thread of an AMD EPYC,
    forward and backward of a masked autoencoder, eager against compiled: ViT-nano/8 at 32 px, batch 32, 54 and 50 ms;
    ViT-nano/16 at 224 px, batch 16, 306 and 304 ms; ViT-small/16, batch 16, 2.64 and 2.68 s; for 92 to 128 s of
    compilation. MPS is not measured.
    """
    if choice == "auto":
        return device.type == "cuda" and steps >= COMPILE_PAYS_AFTER_STEPS
    return choice == "on"


def inference_batch(batch_size: int, device: torch.device) -> int:
    """Images that are embedded at a time: --batch_size, or on CUDA more, where small batches leave the card idle."""
    return max(batch_size, INFERENCE_BATCH) if device.type == "cuda" else batch_size


def augments_batches(device: torch.device) -> bool:
    """Whether random crops of a whole batch are cheaper there than one by one in the workers of the loader."""
    return device.type == "cuda"


def side_stream(device: torch.device) -> "torch.cuda.Stream | None":
    """A queue of work beside the present one, for copies; None where a device has one queue only."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


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


def forget_peak_memory(device: torch.device) -> None:
    """Give unused memory back to the card, and count its peak from now on; only CUDA keeps either."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def free_memory_bytes(device: torch.device) -> int:
    """Memory that this process can still take: of the card on CUDA, of what Metal recommends on MPS, of the machine.

    Of the machine it is what Linux calls available, within the limits of the control groups that hold the process.
    macOS keeps little memory free on purpose, so there it is half of all memory.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if sys.platform == "darwin":
        return _sysctl("hw.memsize") // 2
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return min([int(available[1]) * 1024, *_control_group_rooms(Path("/"))])


def _control_group_rooms(root: Path) -> list[int]:
    """Bytes left under each memory limit of this process's control groups, of version 1 and 2. root: of the files."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = (
                "sys/fs/cgroup/memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):  # a group is held by the limits of those above it too
            rooms += _room(root / top / folder, *names)
    return rooms


def _room(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> list[int]:
    """What one control group leaves, or nothing to say: no limit, or no such folder in this container."""
    try:
        limit, usage = ((folder / name).read_text().strip() for name in (limit_name, usage_name))
        cache = re.search(rf"^{cache_name} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return []
    if limit == "max" or int(limit) >= 1 << 60:
        return []
    return [max(0, int(limit) - int(usage) + (int(cache[1]) if cache else 0))]  # cached files give way


def describe_device(device: torch.device) -> str:
    """The device in words, for result files."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}, {torch.get_num_threads()} threads"
