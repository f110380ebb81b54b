"""What devices can do on paper: peaks as their makers publish them, and the share that training makes of them."""

import re
import time
from dataclasses import dataclass

import torch
from torch import nn

from util.benchmark.speed import matmul_rate
from util.run.device import autocast, describe_device, free_memory_bytes, pick_precision, synchronize
from util.run.errors import UserError

GIB = 2**30
# what a process holds before the model: the CUDA context and its libraries, or Python with torch; about
RUNTIME_BYTES = {"cuda": 0.6e9, "mps": 0.7e9, "cpu": 0.7e9}
# of the pace of a single block a training run keeps: the rest goes into embedding, losses, update and reading
OF_BLOCK = 0.9


@dataclass(frozen=True)
class Device:
    """kind: cuda, mps or cpu. rate: peak of dense matrix products in `precision`, FLOP/s.

    memory: bytes. bandwidth: of that memory, bytes/s. efficiency: the share of `rate` that a training step keeps, 0..1.
    measured: whether rate and efficiency are of this machine.
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
    words = _words(name)
    inside = [
        device
        for device in TABLE
        if set(_words(device.name)) <= set(words) or "".join(_words(device.name)) == "".join(words)
    ]
    return max(inside, key=lambda device: len(device.name), default=None)


def _words(name: str) -> list[str]:
    return re.findall("[a-z0-9]+", name.lower())


def named_device(name: str) -> Device:
    """The same; UserError for a device that is not in the table."""
    if found := find_device(name):
        return found
    known = ", ".join(device.name for device in TABLE)
    raise UserError(f"--device {name} is not in the table: give cpu, auto, or one of {known}")


def measure_device(device: torch.device, block: nn.Module, tokens: torch.Tensor, flops: int) -> Device:
    """This machine's own: its rate and what training makes of it, measured in some seconds.

    block: of the network to be planned, with an input (N, T, D) that requires a gradient, both on the device. flops:
    of a forward and backward pass.
    """
    precision, kind = pick_precision("auto", device), device.type
    rate = matmul_rate(device, precision, sides=(1024, 2048) if kind == "cpu" else (2048, 4096))
    listed = find_device(describe_device(device))
    bandwidth = listed.bandwidth if listed else _copy_rate(device)
    efficiency = OF_BLOCK * flops / _seconds_of(block, tokens, device, precision) / rate
    return Device(
        describe_device(device), kind, precision, rate, free_memory_bytes(device), bandwidth, min(1.0, efficiency), True
    )


def _seconds_of(block: nn.Module, tokens: torch.Tensor, device: torch.device, precision: str) -> float:
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        with autocast(device, precision):
            out = block(tokens)
        out.sum().backward()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def _copy_rate(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes: the best of some."""
    source, best = torch.ones(1 << 25, device=device), 0.0
    target = torch.empty_like(source)
    for _ in range(4):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - started))
    return best
