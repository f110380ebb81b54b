"""What devices can do on paper: peaks as their makers publish them, and the share that training makes of them."""

from dataclasses import dataclass

import torch

from util.benchmark.speed import matmul_rate
from util.run.device import describe_device, free_memory_bytes, pick_precision
from util.run.errors import UserError

GIB = 2**30
# of the rate of square matrix products that is measured on the device itself. On the CPU found by `plan.py --validate`
# (RESULTS.md); on the others an assumption.
OF_MATMUL = {"cpu": 0.7, "cuda": 0.5, "mps": 0.5}
# what a process holds before the model: the CUDA context and its libraries, or Python with torch; about
RUNTIME_BYTES = {"cuda": 0.6e9, "mps": 0.6e9, "cpu": 0.6e9}


@dataclass(frozen=True)
class Device:
    """kind: cuda, mps or cpu. rate: peak of dense matrix products in `precision`, FLOP/s; bandwidth: of its memory, B/s.

    efficiency: the share of `rate` that a training step keeps, 0..1. memory: bytes. measured: whether rate is.
    """

    name: str
    kind: str
    precision: str
    rate: float
    memory: float
    bandwidth: float
    efficiency: float
    measured: bool = False


def _card(name: str, tflops: float, gib: float, gb_per_s: float, efficiency: float, precision: str = "bf16") -> Device:
    return Device(name, "cuda", precision, tflops * 1e12, gib * GIB, gb_per_s * 1e9, efficiency)


# TFLOP/s are dense, with sums in fp32. The efficiencies are assumptions: timm's training benchmark of ViT-S/16 on an
# RTX 3090 (results/benchmark-train-amp-nchw-pt112-cu113-rtx3090.csv: 1,053 images/s) is 41 % of its peak; the more a
# card computes per byte that it reads, the more norms and residuals weigh.
TABLE = [
    _card("T4", 65, 15, 320, 0.35, "fp16"),  # NVIDIA T4 datasheet
    _card("V100", 125, 32, 900, 0.35, "fp16"),  # NVIDIA V100 datasheet, SXM2 32 GB
    _card("RTX 3060", 51, 12, 360, 0.4),  # GA10x whitepaper: half of its 102 TFLOP/s with sums in fp16
    _card("RTX 3090", 71, 24, 936, 0.4),  # NVIDIA GA102 whitepaper, table of GeForce RTX 3090
    _card("RTX 4090", 165.2, 24, 1008, 0.35),  # NVIDIA Ada whitepaper, appendix A
    _card("RTX 5090", 209.5, 32, 1792, 0.4),  # NVIDIA RTX Blackwell whitepaper, appendix A
    _card("A100", 312, 80, 2039, 0.35),  # NVIDIA A100 datasheet, SXM 80 GB
    _card("A100 40GB", 312, 40, 1555, 0.35),  # the same, SXM 40 GB
    _card("L40S", 362, 48, 864, 0.3),  # NVIDIA L40S datasheet
    _card("H100", 989, 80, 3350, 0.3),  # NVIDIA H100 datasheet, SXM5, without sparsity
    _card("H200", 989, 141, 4800, 0.3),  # NVIDIA H200 datasheet, without sparsity
    # Apple publishes bandwidth and memory; the rate is 2 x 128 lanes x cores x clock (10 at 1.58 GHz, 40 at 1.62 GHz)
    Device("M4", "mps", "fp32", 4.0e12, 16 * GIB, 120e9, 0.4),
    Device("M4 Max", "mps", "fp32", 16.6e12, 64 * GIB, 546e9, 0.4),
]


def find_device(name: str) -> Device | None:
    """An entry of the table by a name as people, or drivers, write it: "h100", "NVIDIA GeForce RTX 4090"; or None."""
    wanted = _letters(name)
    inside = [device for device in TABLE if _letters(device.name) in wanted]
    return max(inside, key=lambda device: len(device.name), default=None)


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def named_device(name: str) -> Device:
    """The same; UserError for a device that is not in the table."""
    if found := find_device(name):
        return found
    known = ", ".join(device.name for device in TABLE)
    raise UserError(f"--device {name} is not in the table: give cpu, auto, or one of {known}")


def measure_device(device: torch.device) -> Device:
    """This machine's own, its rate measured in some seconds."""
    precision, kind = pick_precision("auto", device), device.type
    rate = matmul_rate(device, precision, sides=(1024, 2048) if kind == "cpu" else (2048, 4096))
    listed = find_device(describe_device(device))
    bandwidth = listed.bandwidth if listed else _copy_rate(device)
    return Device(
        describe_device(device), kind, precision, rate, free_memory_bytes(device), bandwidth, OF_MATMUL[kind], True
    )


def _copy_rate(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes: the best of some."""
    import time

    from util.run.device import synchronize

    source, best = torch.ones(1 << 25, device=device), 0.0
    target = torch.empty_like(source)
    for _ in range(4):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - started))
    return best
