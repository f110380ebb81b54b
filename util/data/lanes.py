"""Which samples of a stream a batch takes, so that each process and each worker reads shards of its own.

An optimizer step consists of M = step_images / batch_size micro-batches. The order of an epoch has L lanes, L a
multiple of M, and micro-batch g (counted over the whole epoch: step * M + its place in the step) takes the next
samples of lane g mod L. A process always has the same places in a step and therefore lanes of its own; so has each of
its workers, where their number divides the process's lanes.

Lane l walks through the shards l, l + L, ... of the epoch's permutation. The rows of a shard are shuffled in windows,
so that no more than a window is held. A lane whose shards are used up begins them again with other permutations.

All this is a function of (seed, epoch, M, number of shards): neither processes nor workers enter, and to resume, a
lane skips shards by their number of rows.
"""

from collections.abc import Iterable, Iterator
from itertools import count as count_up
from itertools import islice
from typing import NamedTuple

from util.data.stream import SHARD, Sample, StreamSource
from util.run.errors import UserError
from util.run.seed import rng_for

_SPREADS = (8, 4, 2)  # lanes for one micro-batch of a step: as many workers can have lanes of their own
_LANE_SHARDS = 4  # lanes are multiplied while each has so many shards: short lanes come out uneven
_WINDOW_ROWS = 1024
_WINDOW_BYTES = 2**26
_TURN = SHARD * 2**20  # the index of a sample that a lane meets again is this much larger: other crops, other masks


class Lanes(NamedTuple):
    """number: L. parts: lanes that share one shard, each taking every parts-th row; 1 where there are shards enough."""

    number: int
    parts: int


def lay_out(micro_batches: int, shards: int) -> Lanes:
    """The lanes for steps of M micro-batches."""
    spread = next((spread for spread in _SPREADS if micro_batches * spread * _LANE_SHARDS <= shards), 1)
    number = micro_batches * spread
    return Lanes(number, -(-number // shards))


class Lane:
    """The samples of one lane in an epoch, read forwards. turn: how often it has come to the end of its shards."""

    def __init__(self, source: StreamSource, lanes: Lanes, number: int, seed: int, epoch: int):
        self.source, self.parts, self.seed, self.epoch = source, lanes.parts, seed, epoch
        order = rng_for(seed, epoch, "shards").permutation(source.num_shards).tolist()
        shares = [(shard, part) for shard in order for part in range(lanes.parts)]
        self._shares = shares[number :: lanes.number]
        self._samples: Iterator[Sample] | None = None
        self._place = 0  # of the next sample that _samples yields
        self.turn = 0

    def take(self, start: int, count: int) -> list[Sample]:
        """`count` samples from the place `start` on, which is not before the end of what was taken last."""
        if self._samples is None:
            self._samples, self._place = self._walk(start), start
        skipped = start - self._place
        self._place = start + count
        return [self._sample(*found) for found in islice(self._samples, skipped, skipped + count)]

    def _sample(self, turn: int, shard: int, row: int, cells: dict) -> Sample:
        self.turn = turn
        index, record, load = self.source.sample(shard, row, cells)
        return index + turn * _TURN, record, load

    def _walk(self, skip: int) -> Iterator[tuple[int, int, int, dict]]:
        """(turn, shard, row, cells), without the first `skip`; it has no end."""
        for turn in count_up():
            total = 0  # of the lane's shards
            for shard, part in self._shares:
                if skip and skip >= (rows := self._count(shard, part)):
                    skip, total = skip - rows, total + rows
                    continue
                for number, window in enumerate(self._windows(shard, part)):
                    rng = rng_for(self.seed, self.epoch, shard, part, number, turn, "rows")
                    for place in rng.permutation(len(window))[skip:].tolist():
                        yield turn, shard, *window[place]
                    skip, total = max(0, skip - len(window)), total + len(window)
                    window.clear()  # before the next is read
            if not total:
                raise UserError(
                    f"{self.source.name} leaves a lane of {len(self._shares)} shards without a picture: "
                    "check --val_fraction, and that its shards are not empty"
                )

    def _count(self, shard: int, part: int) -> int:
        return len(self._own(shard, part, range(self.source.count(shard))))

    def _own(self, shard: int, part: int, rows: Iterable[int]) -> list[int]:
        return self.source.own(shard, [row for row in rows if row % self.parts == part])

    def _windows(self, shard: int, part: int) -> Iterator[list[tuple[int, dict]]]:
        """The lane's (row, cells) of a shard, in parts of so many rows or bytes of the shard."""
        window, rows, size = [], 0, 0
        for chunk in self.source.read(shard):
            rows += len(chunk)
            size += sum(self.source.columns.size(cells) for _, cells in chunk)
            held = dict(chunk)
            window += [(row, held[row]) for row in self._own(shard, part, held)]
            if rows >= _WINDOW_ROWS or size >= _WINDOW_BYTES:
                yield window
                window, rows, size = [], 0, 0
        if window:
            yield window


def plain_index(index: int) -> int:
    """shard * 2**32 + row of a sample, whichever turn it was met in."""
    return index % _TURN
