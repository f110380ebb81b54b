"""What an embedding costs: latency, throughput and multiplications; and how much detail the pictures hold."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from util.run.device import autocast, describe_device, synchronize
from util.run.seed import torch_seed

RESOLUTIONS = (112, 224, 336, 448)
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_FEWEST = 3  # timed calls, however long one takes


def measure_speed(
    model: nn.Module,
    size: tuple[int, int],
    device: torch.device,
    precision: str,
    *,
    batch: int = 64,
    warmup: int = 20,
    repeats: int = 100,
    seconds: float = 30.0,
) -> dict:
    """How fast a model on `device` embeds pictures of `size` (H, W) px that lie there already: no decoding, no copies.

    model: has `embed`, images (N, 3, H, W) in [0, 1] -> (N, D). precision: fp32, bf16 or fp16. seconds: about the most
    to take; warm-up and repeats are cut to fit, to 1 and 3 at least, and a batch that would not fit, or that the memory
    does not hold, is halved. Returns {"latency_ms_p50", "latency_ms_p95": one picture at a time, from call to result;
    "latency_repeats", "latency_warmup"; "images_per_s": the median batch, "batch", "batch_repeats"; "gmacs": billions
    of multiply-accumulates for one picture; "params": of the model without its head; "precision", "device"}.
    """
    with _evaluating(model):
        with torch.inference_mode(), autocast(device, precision):
            one = _time(_embedding(model, size, device, 1), device, warmup, repeats, seconds / 2)
            many, batch = _time_largest(model, size, device, batch, warmup, repeats, seconds / 2, one["p50"])
        macs = count_macs(model, size, device)
    return {
        "latency_ms_p50": one["p50"] * 1000,
        "latency_ms_p95": one["p95"] * 1000,
        "latency_repeats": one["repeats"],
        "latency_warmup": one["warmup"],
        "images_per_s": batch / many["p50"],
        "batch": batch,
        "batch_repeats": many["repeats"],
        "gmacs": macs / 1e9,
        "params": sum(p.numel() for name, p in model.named_parameters() if not name.startswith("head.")),
        "precision": precision,
        "device": describe_device(device),
    }


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # one by one: frozen parts of a model in training may be in eval mode
            module.training = training


def _embedding(model: nn.Module, size: tuple[int, int], device: torch.device, batch: int) -> Callable[[], None]:
    # noise, not zeros: processors are faster on numbers that are all alike
    generator = torch.Generator().manual_seed(torch_seed("speed"))
    images = torch.rand(batch, 3, *size, generator=generator).to(device)
    return lambda: model.embed(images)


def _time(run: Callable[[], None], device: torch.device, warmup: int, repeats: int, seconds: float) -> dict:
    """Median and 95 % quantile of the seconds that a call takes until the device is done with it."""
    begin = time.perf_counter()

    def timed(most: int, fewest: int, until: float) -> Iterator[float]:
        for number in range(most):
            start = time.perf_counter()
            if number >= fewest and start >= until:
                return
            run()
            synchronize(device)
            yield time.perf_counter() - start

    synchronize(device)
    warm = list(timed(max(1, warmup), 1, begin + seconds / 4))
    durations = list(timed(max(1, repeats), min(_FEWEST, repeats), begin + seconds))
    p50, p95 = np.quantile(durations, [0.5, 0.95]).tolist()
    return {"p50": p50, "p95": p95, "repeats": len(durations), "warmup": len(warm)}


def _time_largest(model, size, device, batch, warmup, repeats, seconds, latency) -> tuple[dict, int]:
    """Time the largest batch up to `batch` of which four fit into the seconds (at the pace of single pictures)."""
    while batch > 1 and (1 + _FEWEST) * batch * latency > seconds:
        batch //= 2
    while True:
        with contextlib.suppress(torch.OutOfMemoryError) if batch > 1 else contextlib.nullcontext():
            return _time(_embedding(model, size, device, batch), device, warmup, repeats, seconds), batch
        batch //= 2


class _MacCounter(TorchDispatchMode):
    """Counts floating-point operations by PyTorch's own formulas, of this thread alone.

    FlopCounterMode would do, but it hooks into every module of the process, and gives 0 to the attention kernels of
    CPU and MPS, which are 4 % of a ViT-B at 224 px and 14 % at 448 px.
    """

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        operation = getattr(func, "overloadpacket", func)
        if operation in flop_registry:
            self.flops += flop_registry[operation](*args, **(kwargs or {}), out_val=out)
        elif "scaled_dot_product" in str(operation):
            self.flops += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
        return out


@torch.no_grad()
def count_macs(model: nn.Module, size: tuple[int, int], device: torch.device) -> int:
    """Multiply-accumulates of products and convolutions for embedding one picture of `size` (H, W): FLOPs / 2."""
    # in inference mode a linear layer would reach the counter in one piece, for which there is no formula
    with torch.inference_mode(False), _MacCounter() as counter:
        model.embed(torch.zeros(1, 3, *size, device=device))
    return counter.flops // 2


def crop_size_summary(sizes: np.ndarray, resolutions: Sequence[int] = RESOLUTIONS) -> dict:
    """How large the face crops are that a benchmark cuts from its pictures: beyond that, resolution adds no detail.

    sizes: (N, 2) width and height, px of the stored pictures, before any resampling. Returns {"images",
    "short_side_px": {"p5", "p25", "p50", "p75", "p95"}, "share_below": {resolution: fraction of the crops whose short
    side is smaller}}.
    """
    sizes = np.asarray(sizes)
    if sizes.ndim != 2 or sizes.shape[1] != 2 or not len(sizes):
        raise ValueError(f"sizes must be (N, 2) with N > 0, not {sizes.shape}")
    if not (sizes > 0).all():
        raise ValueError("a crop has no area")
    short = sizes.min(axis=1)
    return {
        "images": len(short),
        "short_side_px": {f"p{round(q * 100)}": float(np.quantile(short, q)) for q in _QUANTILES},
        "share_below": {str(resolution): float((short < resolution).mean()) for resolution in resolutions},
    }


def matmul_rate(device: torch.device, precision: str, sides: Sequence[int] = (1024, 2048, 4096)) -> float:
    """The peak of square matrix products that the device reaches here, FLOP/s: the best of several sizes and tries.

    precision: fp32, bf16 or fp16, of the factors; on CUDA with the TF32 setting of `pick_device`.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    best = 0.0
    for side in sides:
        a = torch.randn(side, side, device=device, dtype=dtype)
        for _ in range(8):
            synchronize(device)
            started = time.perf_counter()
            for _ in range(max(1, 4096 // side)):
                a @ a
            synchronize(device)
            best = max(best, 2 * side**3 * max(1, 4096 // side) / (time.perf_counter() - started))
    return best
