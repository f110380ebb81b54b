"""Batches for the training loop, in an order that is a function of (seed, epoch) alone.

The global batch of an optimizer step is a fixed slice of the epoch's permutation. Processes and
accumulated batches share it out, so any of their numbers trains on the same images in the same step,
and an epoch can be entered at any step. A sample is named (epoch, index) on its way to the workers,
which therefore hold no state.
"""

import signal
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from util.data.face_crop import open_pictures
from util.data.images import BadImage
from util.data.stream import open_stream
from util.run.dist import World
from util.run.errors import UserError
from util.run.seed import rng_for

_MAX_HOPS = 100
_GRACE_S = 60  # a worker told to terminate goes on for so long, while the main process saves


class Samples(Dataset):
    """(epoch, index) -> one augmented sample.

    transform: (PIL image, record, rng) -> uint8 (3, H, W). classes: identity -> class number, for labels.
    """

    def __init__(self, source, transform: Callable, seed: int, classes: dict[str, int] | None = None):
        self.source, self.transform, self.seed, self.classes = source, transform, seed, classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        bad = []
        for hop in range(_MAX_HOPS):
            # a damaged image is replaced by a fixed other one, so that batches and ranks stay equal
            place = (index + hop) % len(self.source)
            try:
                image = self.source.load(place)
                break
            except BadImage as error:
                bad.append((place, error.path, error.reason))
        else:
            raise UserError(f"{_MAX_HOPS} images in a row cannot be read, the last: {bad[-1][1]} ({bad[-1][2]})")
        record = self.source.record(place)
        pixels = self.transform(image, record, rng_for(self.seed, epoch, index, "augment"))
        sample = {"image": pixels, "epoch": epoch, "index": index, "bad": bad}
        return sample if self.classes is None else {**sample, "label": self.classes[record["identity"]]}


def collate(samples: list[dict]) -> dict:
    """{"image": uint8 (N, 3, H, W), "index": int64 (N,), "epoch": int, "bad": [(index, path, reason), ...]}

    and "label": int64 (N,), where the samples have one.
    """
    numbers = [name for name in ("index", "label") if name in samples[0]]
    return {
        "epoch": samples[0]["epoch"],
        "image": torch.stack([sample["image"] for sample in samples]),
        **{name: torch.tensor([sample[name] for sample in samples], dtype=torch.int64) for name in numbers},
        "bad": [bad for sample in samples for bad in sample["bad"]],
    }


class StepSampler:
    """Batches of (epoch, index) for one process, entered at any optimizer step of any epoch.

    batch_size: images per process and batch. accum_iter: batches per optimizer step.
    What is left of the permutation after the last whole step is seen in other epochs.
    """

    def __init__(self, length: int, batch_size: int, accum_iter: int, seed: int, world: World):
        self.length, self.batch_size, self.accum_iter = length, batch_size, accum_iter
        self.seed, self.world = seed, world
        self.step_images = batch_size * accum_iter * world.size
        self.steps = length // self.step_images
        self.epoch, self.first_step = 0, 0
        if not self.steps:
            raise UserError(
                f"a step of {self.step_images} images ({batch_size} x {accum_iter} accumulated x {world.size} "
                f"processes) is larger than the data set of {length}: lower --batch_size or --accum_iter"
            )

    def enter(self, epoch: int, step: int) -> None:
        """The next iteration begins here."""
        self.epoch, self.first_step = epoch, step

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accum_iter

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = rng_for(self.seed, self.epoch, "order").permutation(self.length)
        share = self.batch_size * self.accum_iter
        for step in range(self.first_step, self.steps):
            first = step * self.step_images + self.world.rank * share
            for batch in np.split(order[first : first + share], self.accum_iter):
                yield [(self.epoch, int(index)) for index in batch]


class TrainLoader:
    """Training batches of a source: `loader.enter(epoch, step)` gives an iterator from that step on."""

    def __init__(self, source, transform, *, batch_size, accum_iter, seed, world, num_workers, device, classes=None):
        self.images, self.fingerprint = len(source), source.fingerprint
        self._sampler = StepSampler(len(source), batch_size, accum_iter, seed, world)
        self.steps, self.step_images = self._sampler.steps, self._sampler.step_images
        self._loader = DataLoader(
            Samples(source, transform, seed, classes),
            batch_sampler=self._sampler,
            collate_fn=collate,
            persistent_workers=num_workers > 0,
            **worker_options(num_workers, device),
        )
        self._batches: Iterator[dict] | None = None

    def enter(self, epoch: int, step: int) -> Iterator[dict]:
        """Batches from an optimizer step of an epoch to the epoch's end."""
        self._sampler.enter(epoch, step)
        self._batches = iter(self._loader)
        return self._batches

    def close(self) -> None:
        """End the worker processes; the loader is of no use afterwards."""
        _end_workers(self._batches)


class StreamSamples(IterableDataset):
    """Whole batches of a stream for one process; workers take turns, a batch each, so their number changes nothing."""

    def __init__(self, source, transform: Callable, sampler: StepSampler):
        self.source, self.transform, self.sampler = source, transform, sampler

    def __iter__(self) -> Iterator[dict]:
        sampler, worker = self.sampler, get_worker_info()
        turn, turns = (worker.id, worker.num_workers) if worker else (0, 1)
        place = sampler.first_step * sampler.step_images
        order = self.source.iterate(sampler.seed, sampler.epoch, start=place)
        for number in range(sampler.first_step * sampler.accum_iter + turn, sampler.steps * sampler.accum_iter, turns):
            step, micro = divmod(number, sampler.accum_iter)
            first = step * sampler.step_images + sampler.batch_size * (sampler.world.rank * sampler.accum_iter + micro)
            batch = list(islice(order, first - place, first - place + sampler.batch_size))
            place = first + sampler.batch_size
            if len(batch) < sampler.batch_size:
                raise UserError(f"{self.source.name} ended before image {place}: lower --epoch_images")
            yield self._load(batch)

    def _load(self, batch: list[tuple]) -> dict:
        images, bad = [], []
        for index, record, load in batch:
            try:
                images.append((load(), record))
            except BadImage as error:
                images.append(None)
                bad.append((index, error.path, error.reason))
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
        self.images, self.fingerprint = epoch_images, source.fingerprint
        self._samples = StreamSamples(source, transform, StepSampler(epoch_images, batch_size, accum_iter, seed, world))
        self.steps, self.step_images = self._samples.sampler.steps, self._samples.sampler.step_images
        self._options = worker_options(num_workers, device)
        self._batches: Iterator[dict] | None = None

    def enter(self, epoch: int, step: int) -> Iterator[dict]:
        """Batches from an optimizer step of an epoch to the epoch's end."""
        self._samples.sampler.enter(epoch, step)
        self._batches = iter(DataLoader(self._samples, batch_size=None, **self._options))
        return self._batches

    def close(self) -> None:
        """End the worker processes; the loader is of no use afterwards."""
        _end_workers(self._batches)


def fitting(batch_size: int, accum_iter: int, images: int, world: World) -> int:
    """The batch size per process, lowered to what the images suffice for; at least 1."""
    return max(1, min(batch_size, images // (accum_iter * world.size)))


def loader_options(args, world: World, device: torch.device) -> dict:
    """What the flags say of any loader."""
    return {
        "batch_size": args.batch_size,
        "accum_iter": args.accum_iter,
        "seed": args.seed,
        "world": world,
        "num_workers": args.num_workers,
        "device": device,
    }


def open_loader(args, transform: Callable, world: World, device: torch.device) -> TrainLoader | StreamLoader:
    """The training batches that the flags of `add_data_args` describe."""
    options = loader_options(args, world, device)
    if not args.streaming:
        return TrainLoader(open_pictures(args, "train"), transform, **options)
    _refuse_cropping(args)
    if not args.epoch_images:
        raise UserError("the length of a stream is not known: give --epoch_images with --streaming")
    source = open_stream(args.data_path, "train", val_fraction=args.val_fraction)
    return StreamLoader(source, transform, epoch_images=args.epoch_images, **options)


def _refuse_cropping(args) -> None:
    if args.face_padding is not None:
        raise UserError("--face_padding needs the boxes of a stored data set: leave out --streaming")


def held_out(args) -> Iterator[tuple[dict, Callable]]:
    """(record, load) of the validation images, in a fixed order; load() decodes one or raises BadImage."""
    if args.streaming:
        _refuse_cropping(args)
        stream = open_stream(args.data_path, "val", val_fraction=args.val_fraction)
        return ((record, load) for _, record, load in stream.iterate(args.seed, 0))
    source = open_pictures(args, "val")
    # shuffled: the first images of a folder are often of one character
    order = rng_for(args.seed, "held out").permutation(len(source)).tolist()
    return ((source.record(index), partial(source.load, index)) for index in order)


def in_order(
    source, transform: Callable, *, batch_size, num_workers, device, seed=0, view=0, rows=None, classes=None
) -> Iterator[dict]:
    """Batches of all samples in their order, or of `rows`; the last may be smaller. view: stands for the epoch."""
    rows = range(len(source)) if rows is None else rows
    keys = [(view, int(row)) for row in rows]
    batches = [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]
    samples = Samples(source, transform, seed, classes)
    loader = DataLoader(samples, batch_sampler=batches, collate_fn=collate, **worker_options(num_workers, device))
    batches = iter(loader)
    try:
        yield from batches
    finally:
        _end_workers(batches)


def readable(batch: dict) -> torch.Tensor:
    """Which samples of a batch show their own picture (N,) bool, not the one put in the place of a damaged one."""
    return ~torch.isin(batch["index"].cpu(), torch.tensor([place for place, *_ in batch["bad"]], dtype=torch.int64))


def worker_options(num_workers: int, device: torch.device) -> dict:
    """DataLoader options for a number of worker processes; 0 decodes in the main process."""
    options = {"num_workers": num_workers, "pin_memory": device.type == "cuda"}
    if num_workers:
        options |= {"prefetch_factor": 4, "worker_init_fn": _start_worker}
    return options


def _end_workers(batches: Iterator | None) -> None:
    """End the processes behind an iterator now: after an exception its traceback would keep it, and them, alive."""
    if shutdown := getattr(batches, "_shutdown_workers", None):  # what the iterator's own __del__ calls
        shutdown()


def _start_worker(_: int) -> None:
    # one thread each: the workers are the parallelism. Signals often reach the whole process group; the main
    # process decides what they mean and ends its workers itself, and orphans notice that their parent is gone.
    torch.set_num_threads(1)
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    # never deaf to this one: a parent that leaves in a hurry ends its workers by it, and then waits for them
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))
