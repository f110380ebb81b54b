"""What a checkpoint scored on every single sample, on disk: two of them can be compared without running the network.

A file holds for each measure the values of its samples, what they are and what a bootstrap would draw, and the
protocol they were taken by (masks, data, seed): scores of two protocols are not compared.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.run.errors import UserError
from util.run.files import write_atomically
from util.run.untrusted import parse_json, read_arrays

SCORES_NAME = "scores.npz"
_PARTS = ("values", "ids", "groups")


@dataclass(frozen=True)
class Measured:
    """One measure of one checkpoint. values: (N,) float64. ids: (N,) str, which sample each is of.

    groups: (N,) str; samples of one group (source, character) are not independent.
    """

    values: np.ndarray
    ids: np.ndarray
    groups: np.ndarray

    @property
    def mean(self) -> float:
        """Over the samples that have a value; NaN where none has."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite.mean()) if len(finite) else float("nan")


@dataclass(frozen=True)
class Heading:
    """How a measure is shown: its name, the unit of `scale` times its values, and the digits after the point."""

    name: str
    unit: str
    scale: float
    digits: int


_HEADINGS = {
    "psnr_db": Heading("PSNR", "dB", 1.0, 2),
    "psnr_face_db": Heading("PSNR of the face", "dB", 1.0, 2),
    "psnr_eyes_db": Heading("PSNR of the eyes", "dB", 1.0, 2),
    "psnr_figure_db": Heading("PSNR of the figure", "dB", 1.0, 2),
    "psnr_background_db": Heading("PSNR of the background", "dB", 1.0, 2),
    "probe_top1": Heading("linear probe", "points", 100.0, 1),
    "few_shot_5way_1shot": Heading("5-way 1-shot", "points", 100.0, 1),
    "few_shot_5way_5shot": Heading("5-way 5-shot", "points", 100.0, 1),
    "lora_top1": Heading("LoRA", "points", 100.0, 1),
}
MEASURES = tuple(_HEADINGS)
_UNDER = "psnr_db.under."  # of pictures under the masks of another strategy


def under(strategy: str) -> str:
    """The measure "PSNR under the masks of a strategy"."""
    return _UNDER + strategy


def strategy_of(measure: str) -> str | None:
    """The strategy of a measure that `under` named, None for any other."""
    return measure.removeprefix(_UNDER) if measure.startswith(_UNDER) else None


def heading(measure: str) -> Heading:
    """How a measure is shown."""
    strategy = strategy_of(measure)
    return Heading(f"PSNR under {strategy}", "dB", 1.0, 2) if strategy else _HEADINGS[measure]


def write_scores(path: Path, scores: Mapping[str, Measured], protocol: Mapping) -> None:
    """Write measures, and the protocol (plain values), in one step."""
    arrays = {f"{name}/{part}": getattr(measured, part) for name, measured in scores.items() for part in _PARTS} | {
        "protocol": np.array(json.dumps(protocol, sort_keys=True))
    }

    def save(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # to a path without .npz NumPy would add it
            np.savez_compressed(file, **arrays)

    write_atomically(path, save)


def read_scores(path: Path) -> tuple[dict[str, Measured], dict]:
    """What `write_scores` wrote. UserError for a file that is missing or not one of its."""
    try:
        arrays = read_arrays(path)
        protocol = parse_json(str(arrays.pop("protocol")))
        names = dict.fromkeys(name.rsplit("/", 1)[0] for name in arrays)
        scores = {name: Measured(*(arrays[f"{name}/{part}"] for part in _PARTS)) for name in names}
        for name, measured in scores.items():
            kinds = [part.dtype.kind for part in (measured.values, measured.ids, measured.groups)]
            if kinds != ["f", "U", "U"] or not len(measured.values) == len(measured.ids) == len(measured.groups):
                raise ValueError(f"{name} is not of equally many values, ids and groups")
        return scores, protocol
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no scores ({error}): make it with scripts/score_pretraining.py") from None
