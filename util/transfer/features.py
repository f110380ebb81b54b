"""Embeddings of a data set by a frozen backbone: computed once per view, kept on disk, fed to the training loop.

A cache entry is a folder named by what its numbers depend on: weights, data, transform, view and precision. It is
written in chunks, each whole or not there, so a computation that was stopped goes on, and processes share the work.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

from util.data.loader import StepSampler, fitting, in_batches, readable
from util.data.sources import Source
from util.run.device import inference_batch, peak_memory_bytes, pick_precision
from util.run.dist import World
from util.run.errors import UserError
from util.run.files import write_atomically
from util.run.log import write_json
from util.run.seed import rng_for
from util.run.untrusted import read_arrays
from util.training.session import Session
from util.transfer.encoder import Encoder, make_encoder

CHUNK = 4096  # images per file
_VERSION = 1  # of what this file does with the pictures


@dataclass(frozen=True)
class Features:
    """One view of a data set. embeddings: (N, D) float32, a row of NaN where the image is damaged.

    bad: (row, path, reason) of those. seconds, peak_memory_bytes: what decoding and encoding took, whenever that was.
    """

    embeddings: torch.Tensor
    bad: list[tuple[int, str, str]]
    seconds: float
    peak_memory_bytes: int = 0

    @property
    def readable(self) -> torch.Tensor:
        """(N,) bool."""
        good = torch.ones(len(self.embeddings), dtype=torch.bool)
        good[[row for row, *_ in self.bad]] = False
        return good


def cached_features(
    here: Session,
    folder: Path,
    model: torch.nn.Module,
    weights: str,
    source: Source,
    transform: Callable,
    view: int = 0,
    name: str = "images",
) -> Features:
    """The embeddings of all images of a source, from the cache in `folder` or computed into it.

    model: a Backbone in eval mode. weights: their fingerprint. view: number of the random view that `transform` draws
    for each image from (seed, view, image). name: what to call the images to the person watching.
    """
    precision = pick_precision(here.args.precision, here.device)
    facts = {
        "version": _VERSION, "model": here.args.model, "weights": weights, "precision": precision,
        "pixels": [model.pixel_mean.flatten().tolist(), model.pixel_std.flatten().tolist()],
        "data": source.fingerprint, "files": source.stamp(), "images": len(source), "chunk": CHUNK,
        "transform": repr(transform), "view": view, "seed": here.args.seed,
    }  # fmt: skip
    entry = folder / hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12).hexdigest()
    chunks = [range(first, min(first + CHUNK, len(source))) for first in range(0, len(source), CHUNK)]
    files = [entry / f"{number:05d}.npz" for number in range(len(chunks))]
    if here.world.is_main:
        entry.mkdir(parents=True, exist_ok=True)
        write_json(entry / "facts.json", facts)
    here.world.barrier()
    own = range(here.world.rank, len(chunks), here.world.size)
    todo = {files[number]: chunks[number] for number in own if _read(files[number]) is None}
    here.run.say(f"features of {len(source)} {name}, view {view}: " + ("computing" if todo else f"from {entry}"))
    if todo:
        images = sum(map(len, todo.values()))
        encoder = make_encoder(here, model, precision, images)
        with (
            here.run.progress(total=images, unit="img", desc=name) as bar,
            closing(_compute(here, encoder, source, transform, view, list(todo.values()), bar)) as parts,
        ):
            for file, part in zip(todo, parts, strict=True):
                write_atomically(file, lambda path, part=part: _write(path, part))
    here.world.barrier()
    parts = [_read(file) for file in files]
    features = Features(
        torch.from_numpy(np.concatenate([part["embeddings"] for part in parts])),
        [tuple(bad) for part in parts for bad in json.loads(str(part["bad"]))],
        float(sum(part["seconds"] for part in parts)),
        int(max(part["peak"] for part in parts)),
    )
    good = features.readable
    if not good.any():
        raise UserError(f"none of the {name} can be read, the first: {features.bad[0][1]}: mend them")
    if not features.embeddings[good].isfinite().all():
        raise UserError(
            f"the encoder's embeddings of the {name} are not finite: check --init, or give --precision fp32"
        )
    return features


def _compute(
    here: Session, encoder: Encoder, source: Source, transform: Callable, view: int, chunks: list[range], bar
) -> Iterator[dict]:
    """The parts of all chunks, each as soon as it is known.

    One loader serves them all, so that workers decode ahead while a chunk is written, and no batch is of two chunks.
    Embeddings stay on the device until their chunk is whole: fetched batch by batch, each would be waited for.
    """
    size = inference_batch(here.args.batch_size, here.device)
    batches = [[chunk[first : first + size] for first in range(0, len(chunk), size)] for chunk in chunks]
    loader = in_batches(
        source, transform, list(chain.from_iterable(batches)), view=view, seed=here.args.seed,
        num_workers=here.args.num_workers, device=here.device,
    )  # fmt: skip
    started = time.perf_counter()
    with closing(loader):
        for chunk, parts in zip(chunks, batches, strict=True):
            embeddings, good, bad = [], [], {}
            for batch in islice(loader, len(parts)):
                embeddings.append(encoder(batch["image"]))
                good.append(readable(batch))
                bad |= {entry[0]: entry for entry in batch["bad"]}
                bar.update(len(batch["image"]))
            rows = torch.cat(embeddings).cpu()
            rows[~torch.cat(good)] = torch.nan
            ended = time.perf_counter()
            yield {
                "embeddings": rows.numpy(),
                "bad": np.array(json.dumps([entry for row, entry in sorted(bad.items()) if row in chunk])),
                "seconds": np.array(ended - started),
                "peak": np.array(peak_memory_bytes(here.device)),
            }
            started = ended


def _write(path: Path, part: dict) -> None:
    with open(path, "wb") as file:
        np.savez(file, **part)


def _read(path: Path) -> dict | None:
    """A chunk, or None where there is none or it is damaged: it is computed then."""
    try:
        part = read_arrays(path)
        return {name: part[name] for name in ("embeddings", "bad", "seconds", "peak")}
    except (OSError, ValueError, KeyError):
        return None


class FeatureLoader:
    """Batches of cached features for the training loop: epoch e reads view e modulo the number of views.

    labels: (N,) int64, for the rows of every view. Rows that are damaged in a view, hence in all, are left out.
    Batches are no larger than the data allows. balanced: an epoch draws as many rows as there are, each of a class that
    is as likely as any other (for re-training a classifier, arXiv 1910.09217).
    """

    def __init__(
        self, views: list[Features], labels: np.ndarray, fingerprint: str,
        *, batch_size: int, seed: int, world: World, accum_iter: int = 1, balanced: bool = False,
    ):  # fmt: skip
        good = views[0].readable
        self.views = [view.embeddings[good] for view in views]
        self.labels = torch.from_numpy(labels)[good]
        self.bad, self.images, self.fingerprint = views[0].bad, len(labels), fingerprint
        self.seed, self.balanced = seed, balanced
        self.batch_size = fitting(batch_size, accum_iter, len(self.labels), world)
        self._sampler = StepSampler(len(self.labels), self.batch_size, accum_iter, seed, world)
        self.steps, self.step_images = self._sampler.steps, self._sampler.step_images

    def enter(self, epoch: int, step: int) -> Iterator[dict]:
        """Batches from an optimizer step of an epoch to the epoch's end."""
        self._sampler.enter(epoch, step)
        view, bad = self.views[epoch % len(self.views)], self.bad
        drawn = self._draw(epoch) if self.balanced else None
        for keys in self._sampler:
            rows = torch.tensor([row for _, row in keys])
            rows = rows if drawn is None else drawn[rows]
            yield {"epoch": epoch, "features": view[rows], "label": self.labels[rows], "index": rows, "bad": bad}
            bad = []

    def _draw(self, epoch: int) -> torch.Tensor:
        """As many rows (N,) as there are, every class as likely as any other; a function of the seed and the epoch."""
        labels, rng = self.labels.numpy(), rng_for(self.seed, epoch, "balanced")
        by_class = np.argsort(labels, kind="stable")
        _, first, count = np.unique(labels[by_class], return_index=True, return_counts=True)
        chosen = rng.integers(len(count), size=len(labels))
        within = (rng.random(len(labels)) * count[chosen]).astype(np.int64)
        return torch.from_numpy(by_class[first[chosen] + within])

    def close(self) -> None:
        """There are no processes to end."""
