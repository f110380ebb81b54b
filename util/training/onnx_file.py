"""Networks as ONNX files, for runtimes without PyTorch; each is checked against the network that it was made of."""

import importlib.util
from pathlib import Path

import torch
from torch import nn

from util.run.errors import UserError
from util.run.files import write_atomically

NEEDED = ("onnx", "onnxscript", "onnxruntime")
BATCHES = (1, 3)  # sizes that a file is checked at; it is traced at another one
TOLERANCE = 1e-3  # of the largest value; two runtimes add float32 numbers in other orders


def require_onnx() -> None:
    """UserError where a library is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx needs {', '.join(missing)}: pip install -r requirements-dev.txt")


def write_onnx(module: nn.Module, size: tuple[int, int], path: str | Path, outputs: tuple[str, ...]) -> float:
    """Export images (N, 3, H, W) in [0, 1], N of any size -> outputs; returns the largest error of a check.

    module: in eval mode on the CPU. size: (H, W) px, fixed. The error is relative to the largest value of an output,
    between onnxruntime and PyTorch on random images, over BATCHES. UserError above TOLERANCE; no file is left then.
    """
    require_onnx()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    images = _images(2, size)
    program = torch.onnx.export(
        module, (images,), dynamo=True, input_names=["images"], output_names=list(outputs),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), verbose=False,
    )  # fmt: skip

    def write(temporary: Path) -> None:
        nonlocal error
        program.save(str(temporary))
        error = largest_error(module, temporary, size)
        if error > TOLERANCE:
            raise UserError(
                f"{path}: onnxruntime differs from PyTorch by {error:.1e} of the largest value: not written"
            )

    error = 0.0
    write_atomically(path, write)
    return error


def largest_error(module: nn.Module, path: str | Path, size: tuple[int, int]) -> float:
    """The largest difference between a file's outputs and a network's, relative to the largest value of an output."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for count in BATCHES:
        images = _images(count, size)
        with torch.inference_mode():
            expected = module(images)
        expected = (expected,) if isinstance(expected, torch.Tensor) else expected
        try:
            found = session.run(None, {"images": images.numpy()})
        except Exception as error:  # onnxruntime's classes are its own; a batch that was fixed in tracing ends here
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the network cannot be exported: its file does not take {count} images ({reason})"
            ) from error
        for own, other in zip(expected, found, strict=True):
            if own.shape != other.shape:
                raise UserError(f"the ONNX file gives {other.shape} for {count} images, PyTorch {tuple(own.shape)}")
            worst = max(worst, float((own - torch.from_numpy(other)).abs().max() / own.abs().max().clamp(min=1e-12)))
    return worst


def _images(count: int, size: tuple[int, int]) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(count))
