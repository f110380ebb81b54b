"""Batches on the device. On CUDA the next one is copied there while the step on the present one computes."""

from collections.abc import Iterator

import torch

from util.run.device import side_stream


class DeviceBatches:
    """The batches of a loader, their tensors moved to the device.

    An iterator: `next(batches)` is the next batch, dict of tensors and others. Where the device has a side stream
    (CUDA), `batches.prefetch()`, called when the work on the present batch is queued, has the next one pinned and
    copied beside that work. Elsewhere it does nothing, because nothing would overlap.

    What is prefetched is seen by nobody before it is asked for: neither its damaged images, nor an error of the loader.
    """

    def __init__(self, batches: Iterator[dict], device: torch.device):
        self._batches, self._device = batches, device
        self._stream = side_stream(device)
        self._ahead: dict | Exception | None = None

    def __iter__(self) -> "DeviceBatches":
        return self

    def __next__(self) -> dict:
        if self._stream is None:
            return _moved(next(self._batches), self._device)
        self.prefetch()  # the first batch, or one that was not asked for in time
        batch, self._ahead = self._ahead, None
        if isinstance(batch, Exception):
            raise batch
        present = torch.cuda.current_stream(self._device)
        present.wait_stream(self._stream)
        for tensor in _tensors(batch).values():
            tensor.record_stream(present)  # else its memory could be handed to the next copy before it was read
        return batch

    def prefetch(self) -> None:
        """Begin to copy the batch that `next` will return."""
        if self._stream is None or self._ahead is not None:
            return
        try:
            batch = next(self._batches)
        except Exception as error:  # StopIteration too: for `next` to raise
            self._ahead = error
            return
        with torch.cuda.stream(self._stream):
            self._ahead = _moved(batch, self._device)


def _tensors(batch: dict) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def _moved(batch: dict, device: torch.device) -> dict:
    moved = {}
    for name, tensor in _tensors(batch).items():
        if device.type == "cuda":  # elsewhere a copy that is not waited for is unsafe (MPS) or none (CPU)
            pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
            moved[name] = pinned.to(device, non_blocking=True)
        else:
            moved[name] = tensor.to(device)
    return {**batch, **moved}
