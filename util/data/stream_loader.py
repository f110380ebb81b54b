"""Training batches of a data set that is not stored. `util.data.lanes` says which samples a batch takes."""

import logging
from collections.abc import Callable, Iterator
from math import gcd

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from util.data.batches import StepSampler, collate, end_workers, worker_options
from util.data.images import BadImage
from util.data.lanes import Lane, Lanes, lay_out, plain_index
from util.data.stream import Sample, StreamSource
from util.run.errors import UserError
from util.run.seed import rng_for

log = logging.getLogger(__name__)


class StreamSamples(IterableDataset):
    """Whole batches of a stream for one process; workers take turns, a batch each, so their number changes nothing.

    A batch is that of `collate`, and "turn": how often its lane had come to the end of its shards.
    """

    def __init__(self, source: StreamSource, transform: Callable, sampler: StepSampler, lanes: Lanes):
        self.source, self.transform, self.sampler, self.lanes = source, transform, sampler, lanes

    def __iter__(self) -> Iterator[dict]:
        sampler, worker = self.sampler, get_worker_info()
        turn, turns = (worker.id, worker.num_workers) if worker else (0, 1)
        open_lanes: dict[int, Lane] = {}
        for number in range(sampler.first_step * sampler.accum_iter + turn, sampler.steps * sampler.accum_iter, turns):
            step, micro = divmod(number, sampler.accum_iter)
            micro += (step * sampler.world.size + sampler.world.rank) * sampler.accum_iter  # counted over the epoch
            time, lane = divmod(micro, self.lanes.number)
            if lane not in open_lanes:
                open_lanes[lane] = Lane(self.source, self.lanes, lane, sampler.seed, sampler.epoch)
            batch = open_lanes[lane].take(time * sampler.batch_size, sampler.batch_size)
            yield {**self._load(batch), "turn": open_lanes[lane].turn}

    def _load(self, batch: list[Sample]) -> dict:
        images, bad = [], []
        for index, record, load in batch:
            try:
                images.append((load(), record))
            except BadImage as error:
                images.append(None)
                bad.append((plain_index(index), error.path, error.reason))
        readable = [image for image in images if image]
        if not readable:
            raise UserError(f"{len(batch)} images in a row cannot be read, the last: {bad[-1][1]} ({bad[-1][2]})")
        samples = []
        for place, (index, _, _) in enumerate(batch):
            # a damaged image is replaced by a fixed other one of its batch
            image, record = images[place] or readable[place % len(readable)]
            rng = rng_for(self.sampler.seed, self.sampler.epoch, index, "augment")
            pixels = self.transform(image, record, rng)
            samples.append({"image": pixels, "epoch": self.sampler.epoch, "index": index, "bad": []})
        return {**collate(samples), "bad": bad}


class StreamLoader:
    """Training batches of a data set that is not stored; an epoch is its first `epoch_images` images, shuffled anew."""

    def __init__(self, source, transform, *, epoch_images, batch_size, accum_iter, seed, world, num_workers, device):
        self.name, self.images, self.fingerprint = source.name, epoch_images, source.fingerprint
        sampler = StepSampler(epoch_images, batch_size, accum_iter, seed, world)
        self.steps, self.step_images = sampler.steps, sampler.step_images
        lanes = lay_out(accum_iter * world.size, source.num_shards)
        self._samples = StreamSamples(source, transform, sampler, lanes)
        self._options = worker_options(num_workers, device)
        self._batches: Iterator[dict] | None = None
        self._said = False
        if world.is_main:
            self._tell_traffic(source.num_shards, lanes, lanes.number // world.size, num_workers)

    def _tell_traffic(self, shards: int, lanes: Lanes, own: int, workers: int) -> None:
        if lanes.parts > 1:
            log.warning(
                "%s has %d shards for %d batches per step: each shard is read %d times, every time for other rows",
                self.name, shards, lanes.number, lanes.parts,
            )  # fmt: skip
        if workers and own % workers:
            better = max(number for number in range(1, workers + 1) if own % number == 0)
            log.warning(
                "%s: %d workers share %d lanes, so each shard is read %d times; --num_workers %d would not",
                self.name, workers, own, workers // gcd(workers, own), better,
            )  # fmt: skip

    def enter(self, epoch: int, step: int) -> Iterator[dict]:
        """Batches from an optimizer step of an epoch to the epoch's end."""
        self._samples.sampler.enter(epoch, step)
        self._batches = iter(DataLoader(self._samples, batch_size=None, **self._options))
        return self._tell_turns(self._batches)

    def _tell_turns(self, batches: Iterator[dict]) -> Iterator[dict]:
        for batch in batches:
            if batch.pop("turn") and not self._said:
                self._said = True
                log.warning(
                    "%s: an epoch of %d images comes to the end of some shards and begins them again, in another order",
                    self.name, self.images,
                )  # fmt: skip
            yield batch

    def close(self) -> None:
        """End the worker processes; the loader is of no use afterwards."""
        end_workers(self._batches)
