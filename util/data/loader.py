"""Batches for the training loop, in an order that is a function of (seed, epoch) alone.

The global batch of an optimizer step is a fixed slice of the epoch's permutation. Processes and
accumulated batches share it out, so any of their numbers trains on the same images in the same step,
and an epoch can be entered at any step. A sample is named (epoch, index) on its way to the workers,
which therefore hold no state.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset

from util.data.augment import WithMaps
from util.data.augment_batch import placed
from util.data.batches import StepSampler, collate, end_workers, worker_options
from util.data.face_crop import open_pictures
from util.data.images import BadImage, Picture
from util.data.maps import MappedSource, open_maps
from util.data.sources import reader
from util.data.stream import open_stream
from util.data.stream_loader import StreamLoader
from util.run.dist import World
from util.run.errors import UserError
from util.run.seed import rng_for

_MAX_HOPS = 100


class Samples(Dataset):
    """(epoch, index) -> one augmented sample.

    transform: (picture, record, rng) -> uint8 (3, H, W), or a dict of tensors with such an "image", or with a stored
    picture under that name, an array, and what to do with it. classes: identity -> class number, for labels.
    """

    def __init__(self, source, transform: Callable, seed: int, classes: dict[str, int] | None = None):
        self.source, self.transform, self.seed, self.classes = source, transform, seed, classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        read, bad = reader(self.source), []
        for hop in range(_MAX_HOPS):
            # a damaged image is replaced by a fixed other one, so that batches and ranks stay equal
            place = (index + hop) % len(self.source)
            try:
                image = read(place)
                break
            except BadImage as error:
                bad.append((place, error.path, error.reason))
        else:
            raise UserError(f"{_MAX_HOPS} images in a row cannot be read, the last: {bad[-1][1]} ({bad[-1][2]})")
        record = self.source.record(place)
        seen = self.transform(image, record, rng_for(self.seed, epoch, index, "augment"))
        sample = {**_named(seen), "epoch": epoch, "index": index, "bad": bad}
        return sample if self.classes is None else {**sample, "label": self.classes[record["identity"]]}


def _named(seen: torch.Tensor | dict) -> dict:
    return seen if isinstance(seen, dict) else {"image": seen}


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
        end_workers(self._batches)


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


def open_loader(
    args, transform: Callable, world: World, device: torch.device, maps: tuple[str, ...] = (), grid=None
) -> TrainLoader | StreamLoader:
    """The training batches that the flags of `add_data_args` describe.

    maps: semantic maps that a batch has as "maps" too, uint8 (N, C, rows, columns) on the `grid` of (rows, columns).
    """
    options = loader_options(args, world, device)
    if not args.streaming:
        source = open_pictures(args, "train")
        seen = placed(transform, args.augment_on, source, device)
        if maps:
            source, seen = MappedSource(source, open_maps(source, maps, args.maps)), WithMaps(seen, grid)
        return TrainLoader(source, seen, **options)
    _refuse_cropping(args)
    if maps:
        raise UserError("semantic maps need a stored data set: leave out --streaming, or choose another --masking")
    if args.augment_on == "device":
        raise UserError("a stream has pictures of many sizes: leave out --augment_on device, or --streaming")
    if not args.epoch_images:
        raise UserError("the length of a stream is not known: give --epoch_images with --streaming")
    source = open_stream(args.data_path, "train", val_fraction=args.val_fraction)
    return StreamLoader(source, transform, epoch_images=args.epoch_images, **options)


def _refuse_cropping(args) -> None:
    if args.face_padding is not None:
        raise UserError("--face_padding needs the boxes of a stored data set: leave out --streaming")


def held_out(args) -> Iterator[tuple[dict, Callable]]:
    """(record, load) of the validation images, in a fixed order; load() gives one decoded, or raises BadImage."""
    if args.streaming:
        _refuse_cropping(args)
        stream = open_stream(args.data_path, "val", val_fraction=args.val_fraction)
        return ((record, load) for _, record, load in stream.iterate(args.seed, 0))
    source = open_pictures(args, "val")
    # shuffled: the first images of a folder are often of one character
    order = rng_for(args.seed, "held out").permutation(len(source))
    # a few are asked for: no list of ten million numbers is made for them
    return ((source.record(index), partial(reader(source), index)) for index in map(int, order))


def first_held_out(args, say: Callable[[str], None]) -> Iterator[tuple[Picture, dict]]:
    """(picture, record) of the first --eval_images validation images that can be read; `say` is told of the others.

    UserError where there is none.
    """
    found = 0
    for record, load in held_out(args):
        try:
            picture = load()
        except BadImage as error:
            say(f"left out of the evaluation: {error}")
            continue
        yield picture, record
        found += 1
        if found == args.eval_images:
            break
    if not found:
        raise UserError(f"{args.data_path} has no held-out images: raise --val_fraction or give --eval_images 0")


def in_order(
    source, transform: Callable, *, batch_size, num_workers, device, seed=0, view=0, rows=None, classes=None
) -> Iterator[dict]:
    """Batches of all samples in their order, or of `rows`; the last may be smaller. view: stands for the epoch."""
    rows = range(len(source)) if rows is None else rows
    batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    options = {"num_workers": num_workers, "device": device, "seed": seed, "view": view, "classes": classes}
    yield from in_batches(source, transform, batches, **options)


def in_batches(
    source, transform: Callable, batches: Sequence[Sequence[int]], *, num_workers, device, seed=0, view=0, classes=None
) -> Iterator[dict]:
    """The batches of rows that are asked for, one after the other. view: stands for the epoch."""
    keys = ([(view, int(row)) for row in rows] for rows in batches)  # a million at once would take 100 MB
    samples = Samples(source, transform, seed, classes)
    loader = DataLoader(samples, batch_sampler=keys, collate_fn=collate, **worker_options(num_workers, device))
    loaded = iter(loader)
    try:
        yield from loaded
    finally:
        end_workers(loaded)


def readable(batch: dict) -> torch.Tensor:
    """Which samples of a batch show their own picture (N,) bool, not the one put in the place of a damaged one."""
    return ~torch.isin(batch["index"].cpu(), torch.tensor([place for place, *_ in batch["bad"]], dtype=torch.int64))
