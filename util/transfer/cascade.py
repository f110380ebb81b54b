"""Naming at the lowest resolution that is sure: small pictures first, and larger ones of what is left.

    block = try_cascade(bench, subject, (112, 224), most_lost=0.005, ...)   # what a cascade saves, and what it costs
    classes, stages = Cascade(encoder, Pyramid((112, 224)), scorers, threshold).name(source, ...)

The threshold is chosen on embeddings that are cached anyway; `Cascade` is what then runs on new pictures.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from util.benchmark.cascade import SURE, cascade_report, choose_threshold
from util.benchmark.embedded import Bench, Split
from util.benchmark.identification import NOBODY
from util.benchmark.protocols import Namer, decide, known_probes, known_val, methods
from util.benchmark.speed import measure_speed
from util.data.augment import EvalCrop
from util.data.images import Picture
from util.data.loader import in_order, readable
from util.data.sources import Source
from util.run.device import pick_precision
from util.run.errors import UserError
from util.transfer.encoder import Encoder
from util.transfer.subject import ModelSubject

Scorer = Callable[[torch.Tensor], torch.Tensor]  # embeddings (n, D) -> scores (n, C), where they lie


@dataclass(frozen=True)
class Stage:
    """Naming at one size. see: shows a split at it. namer: ranks the classes for what was seen."""

    size: tuple[int, int]
    namer: Namer
    see: Callable[[Split], Split]


def stage_at(bench: Bench, subject: ModelSubject, gallery: Split, size: tuple[int, int]) -> Stage:
    """Naming at (H, W) px, of which the gallery is too where its pictures decide; UserError for a size that fails."""
    method, label = methods(bench)[0], f"at {size[0]} px"
    if size == subject.size:
        return Stage(size, decide(bench, method)[0], lambda split: split)
    if subject.model.fixed_size:
        raise UserError(f"{subject.name} takes {subject.size[0]} x {subject.size[1]} px only")
    subject.model.check_size(size)

    def see(split: Split) -> Split:
        return subject.again(split, f"{split.name} {label}", size=size)

    if method == "centroid":
        gallery = see(gallery)
        gallery = gallery.take(gallery.norms > 0)
    return Stage(size, Namer(bench, method, gallery), see)


def speed_at(subject: ModelSubject, size: tuple[int, int], seconds: float) -> dict:
    """`measure_speed` of the subject's network, in its precision."""
    device = subject.model.pixel_mean.device
    precision = pick_precision(subject.here.args.precision, device)
    return measure_speed(subject.model, size, device, precision, seconds=seconds)


def try_cascade(
    bench: Bench,
    subject: ModelSubject,
    sides: Sequence[int] | None,
    most_lost: float,
    measured: dict[str, dict],
    seconds: float,
) -> dict:
    """The "cascade" block: a threshold chosen on val, and what the cascade does with it on the probes.

    sides: of square inputs, px, ascending; None: half the size of training, and all of it. most_lost: of accuracy on
    val, in 0..1. measured: {side: "gmacs", "images_per_s"} of sizes that are known. seconds: to time another size.
    """
    probes, gallery, _ = known_probes(bench)
    val, sides = known_val(bench), sides or _half_and_whole(subject)
    if val is None:
        return {"skipped": "no val split beside the probes to choose the threshold on"}
    try:
        stages = [stage_at(bench, subject, gallery, (side, side)) for side in sides]
    except UserError as error:
        return {"skipped": str(error)}
    predicted, margins = _decisions(stages, val)
    right = predicted == val.labels(bench.classes)
    threshold = choose_threshold(right, margins, most_lost)
    speeds = [_known_speed(measured, side) or speed_at(subject, (side, side), seconds) for side in sides]
    passes = 2 if subject.flip_test else 1
    report = cascade_report(
        *_decisions(stages, probes), probes.labels(bench.classes), threshold,
        np.array([speed["gmacs"] for speed in speeds]) * passes,
        np.array([speed["images_per_s"] for speed in speeds]) / passes,
        probes.codes(), replicates=bench.replicates, seed=bench.seed,
    )  # fmt: skip
    share = dict(zip(map(str, sides), report.pop("share"), strict=True))
    chosen = {"threshold": threshold, "chosen_on": val.name, "most_lost": most_lost}
    return {"resolutions": list(sides), **chosen, **report, "share": share}


def _half_and_whole(subject: ModelSubject) -> list[int]:
    side, patch = subject.size[0], getattr(subject.model, "patch_size", 1)
    return [max(patch, side // 2 // patch * patch), side]


def _known_speed(measured: dict[str, dict], side: int) -> dict | None:
    found = measured.get(str(side), {})
    return found if "gmacs" in found else None


def _decisions(stages: Sequence[Stage], split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Class numbers (S, N) and margins (S, N) of a split at every stage."""
    seen = [(stage.namer, stage.see(split)) for stage in stages]
    return np.stack([namer(at)[:, 0] for namer, at in seen]), np.stack([namer.margins(at) for namer, at in seen])


class Pyramid:
    """The smart crop at several sizes, from one decoded picture: `(image, record) -> uint8 (sum of 3 H W,)`.

    sizes: (H, W) px of one proportion. Each is drawn from the picture itself, as EvalCrop draws it, and not from a
    larger one: so a stage sees the very pixels that it was judged by, and decoding is what takes the time.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]]):
        self.sizes = [tuple(size) for size in sizes]
        if len({height / width for height, width in self.sizes}) != 1:
            raise ValueError(f"sizes {self.sizes} are not of one proportion")

    def __call__(self, image: Picture, record: dict, rng: np.random.Generator | None = None) -> torch.Tensor:
        drawn = EvalCrop(self.sizes[-1]).draw(image, record)
        return torch.cat([drawn.apply(image, size).flatten() for size in self.sizes])

    def levels(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """A batch of what it makes -> uint8 (N, 3, H, W) of each size."""
        parts = packed.split([3 * height * width for height, width in self.sizes], dim=1)
        return [part.unflatten(1, (3, *size)) for part, size in zip(parts, self.sizes, strict=True)]


class Cascade:
    """Names pictures: a batch at the smallest size, what is unsure in it at the next, and so on.

    scorers: one for each size of the pyramid, with two classes or more. threshold: margin that a decision needs, see
    `choose_threshold`.
    """

    def __init__(self, encoder: Encoder, pyramid: Pyramid, scorers: Sequence[Scorer], threshold: float):
        self.encoder, self.pyramid, self.scorers, self.threshold = encoder, pyramid, scorers, threshold

    @torch.inference_mode()
    def __call__(self, levels: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (N, 3, H, W) of each size -> class numbers (N,), stages that decided (N,), int64 on the CPU."""
        left = torch.arange(len(levels[0]))
        predicted, stages = torch.empty_like(left), torch.empty_like(left)
        for stage, (level, scorer) in enumerate(zip(levels, self.scorers, strict=True)):
            pictures = level if len(left) == len(level) else level[left.to(level.device)]
            scores, classes = (found.cpu() for found in scorer(self.encoder(pictures)).float().topk(2))
            predicted[left], stages[left] = classes[:, 0], stage
            margins = scores[:, 0].double() - scores[:, 1].double()
            left = left[~(margins.clamp(max=SURE) >= self.threshold)]
            if not len(left):
                break
        return predicted, stages

    def name(self, source: Source, *, batch_size: int, num_workers: int) -> tuple[np.ndarray, np.ndarray]:
        """Class numbers (N,) and stages (N,) int64 of all pictures, each decoded once; NOBODY (-1) if damaged."""
        found = []
        options = {"batch_size": batch_size, "num_workers": num_workers, "device": self.encoder.device}
        with closing(in_order(source, self.pyramid, **options)) as batches:
            for batch in batches:
                predicted, stages = self(self.pyramid.levels(batch["image"]))
                found.append((np.where(readable(batch), predicted, NOBODY), stages.numpy()))
        return tuple(np.concatenate(column) for column in zip(*found, strict=True))


def head_scorer(head: torch.nn.Module) -> Scorer:
    """Scores by a trained head in eval mode; the same one serves every size."""
    return lambda embeddings: head(embeddings).float()


def centre_scorer(centres: np.ndarray, device: torch.device) -> Scorer:
    """Cosines to class centres (C, D) of length 1; rows of NaN are nobody's answer."""
    rows = torch.from_numpy(np.ascontiguousarray(centres, dtype=np.float32)).to(device)
    empty = rows.isnan().any(dim=1)
    rows = rows.nan_to_num()

    def scores(embeddings: torch.Tensor) -> torch.Tensor:
        return (functional.normalize(embeddings.float(), dim=1) @ rows.T).masked_fill(empty, -torch.inf)

    return scores
