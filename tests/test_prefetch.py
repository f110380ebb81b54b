"""Batches on their way to the device. Run: python -m pytest tests/test_prefetch.py"""

from contextlib import contextmanager

import pytest
import torch

from util.data import prefetch
from util.data.prefetch import DeviceBatches

CPU = torch.device("cpu")


def batches(count: int, events: list | None = None):
    """Batches 0, 1, ..., each with a damaged image; what is taken from the loader goes into `events`."""
    for number in range(count):
        if events is not None:
            events.append(f"load {number}")
        yield {"image": torch.full((2, 3), number), "epoch": 0, "bad": [(number, f"{number}.png", "cut short")]}


def numbers(found) -> list[int]:
    return [int(batch["image"][0, 0]) for batch in found]


def test_without_a_side_stream_batches_pass_through_one_by_one():
    events = []
    moved = DeviceBatches(batches(3, events), CPU)
    first = next(moved)
    moved.prefetch()
    assert events == ["load 0"]  # a processor gains nothing from the next one
    assert first["epoch"] == 0 and first["bad"] == [(0, "0.png", "cut short")]
    assert numbers([first, *moved]) == [0, 1, 2]
    with pytest.raises(StopIteration):
        next(moved)


class Card:
    """The part of CUDA that prefetching uses, on the CPU: it writes down what is asked of it."""

    def __init__(self, monkeypatch):
        self.events: list[str] = []
        self.place = "present"
        monkeypatch.setattr(prefetch, "side_stream", lambda device: "side")
        monkeypatch.setattr(prefetch, "_moved", self._move)
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        events = self.events

        class OnCard(torch.Tensor):
            def record_stream(self, stream):
                events.append(f"keep {int(self.as_subclass(torch.Tensor)[0, 0])}")

        self.kind = OnCard

    @contextmanager
    def _on(self, stream):
        self.place = stream
        yield
        self.place = "present"

    def _move(self, batch, device):
        self.events.append(f"copy {int(batch['image'][0, 0])} on {self.place}")
        return {**batch, "image": batch["image"].as_subclass(self.kind)}

    def wait_stream(self, stream):
        self.events.append(f"wait for {stream}")


def test_the_next_batch_is_copied_on_the_side_stream_before_it_is_asked_for(monkeypatch):
    card = Card(monkeypatch)
    moved = DeviceBatches(batches(2, card.events), torch.device("cuda"))
    next(moved)
    assert card.events == ["load 0", "copy 0 on side", "wait for side", "keep 0"]
    moved.prefetch()
    moved.prefetch()  # one ahead, no more
    assert card.events[4:] == ["load 1", "copy 1 on side"]
    next(moved)
    assert card.events[6:] == ["wait for side", "keep 1"]
    moved.prefetch()
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(moved)


def test_what_is_ahead_is_neither_lost_nor_seen_early(monkeypatch):
    Card(monkeypatch)
    seen = []
    moved = DeviceBatches(batches(5), torch.device("cuda"))
    for _ in range(3):
        seen.append(next(moved))
        moved.prefetch()
    assert numbers(seen) == [0, 1, 2]
    assert [bad[0] for batch in seen for bad in batch["bad"]] == [0, 1, 2]  # 3 lies ready, and nobody has heard of it
    assert numbers(moved) == [3, 4]


def test_an_error_of_the_loader_comes_when_its_batch_is_asked_for(monkeypatch):
    Card(monkeypatch)

    def broken():
        yield from batches(1)
        raise OSError("the disk is gone")

    moved = DeviceBatches(broken(), torch.device("cuda"))
    assert numbers([next(moved)]) == [0]
    moved.prefetch()
    with pytest.raises(OSError, match="disk"):
        next(moved)


class OnHost(torch.Tensor):
    """A tensor that says how it is moved."""

    moves: list = []  # noqa: RUF012

    def is_pinned(self):
        return False

    def pin_memory(self):
        self.moves.append("pin")
        return self

    def to(self, device, **options):
        self.moves.append((device.type, options))
        return self


@pytest.mark.parametrize("kind, moves", [("mps", [("mps", {})]), ("cuda", ["pin", ("cuda", {"non_blocking": True})])])
def test_only_cuda_copies_without_waiting_and_from_pinned_memory(kind, moves):
    OnHost.moves.clear()
    batch = {"image": torch.zeros(2).as_subclass(OnHost), "bad": []}
    prefetch._moved(batch, torch.device(kind))
    assert OnHost.moves == moves
