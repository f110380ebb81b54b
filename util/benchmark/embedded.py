"""Embedded splits of a data set: what every recognition protocol works on.

Whatever cannot be compared is left out here, once, and counted: damaged pictures, embeddings that are not finite or
zero, samples that an embeddings file lacks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from util.run.errors import UserError
from util.run.untrusted import read_arrays

FACTS = ("sample_id", "identity", "source", "style", "pose", "occlusion", "expression")
_EMBEDDED = ("embeddings", "sample_id")  # what is read of an embeddings file


@dataclass(frozen=True)
class Split:
    """Samples of one split with their embeddings.

    embeddings: (N, D) float32, rows L2-normalised. norms: (N,) float32, their lengths before that. rows: (N,) int64,
    numbers of the samples in the source that they come from. facts: a column (N,) for each of FACTS, None where
    nothing is known.
    """

    name: str
    embeddings: np.ndarray
    norms: np.ndarray
    rows: np.ndarray
    facts: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def identity(self) -> np.ndarray:
        """(N,) object: who it is, None where that is not known."""
        return self.facts["identity"]

    @property
    def raw(self) -> np.ndarray:
        """(N, D) float32: the embeddings at their own length, as a trained head takes them."""
        return self.embeddings * self.norms[:, None]

    @cached_property
    def known(self) -> np.ndarray:
        """(N,) bool: the samples whose identity is known."""
        return np.array([name is not None for name in self.identity], dtype=bool)

    @cached_property
    def sources(self) -> np.ndarray:
        """(N,) int64: which picture or upload a sample was cut from; one of its own where that is not known."""
        numbers: dict = {}
        keys = (row if source is None else ("source", source) for row, source in enumerate(self.facts["source"]))
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)

    def take(self, chosen: np.ndarray) -> "Split":
        """Some of the samples: `chosen` is a mask (N,) or row numbers (n,)."""
        facts = {name: column[chosen] for name, column in self.facts.items()}
        return Split(self.name, self.embeddings[chosen], self.norms[chosen], self.rows[chosen], facts)

    def labelled(self) -> "Split":
        """The samples whose identity is known."""
        return self if self.known.all() else self.take(self.known)

    def labels(self, classes: Sequence[str]) -> np.ndarray:
        """Class numbers (N,) int64, places in `classes`; -1 for everybody else."""
        numbers = {name: number for number, name in enumerate(classes)}
        return np.array([numbers.get(name, -1) for name in self.identity], dtype=np.int64)

    def codes(self) -> np.ndarray:
        """Identities as numbers (N,) int64 in alphabetical order; ValueError where one is not known."""
        if not self.known.all():
            raise ValueError(f"{self.name} holds samples without an identity")
        return np.unique(self.identity.astype(str), return_inverse=True)[1].astype(np.int64)


def join_splits(first: Split, second: Split) -> Split:
    """The samples of two splits. `rows` are those of their own sources, so no picture can be asked of the whole."""
    facts = {name: np.concatenate([first.facts[name], second.facts[name]]) for name in FACTS}
    arrays = (np.concatenate([getattr(first, name), getattr(second, name)]) for name in ("embeddings", "norms", "rows"))
    return Split(f"{first.name} + {second.name}", *arrays, facts)


class Bench:
    """What the protocols compare: splits, embedded when they are first asked for, and the trained head if there is one.

    load: role -> Split, or None where the data have no such split. head: raw embeddings (n, D) -> scores (n, C) for
    `classes`, or None; without a head the classes are the identities of the train split. seed, replicates: of pair
    lists, episodes and the bootstrap.
    """

    def __init__(
        self,
        load: Callable[[str], Split | None],
        *,
        head: Callable[[np.ndarray], np.ndarray] | None = None,
        classes: Sequence[str] = (),
        seed: int = 0,
        replicates: int = 1000,
    ):
        self._load, self._splits, self._worked_out = load, {}, {}
        self.head, self._classes, self.seed, self.replicates = head, tuple(classes), seed, replicates

    def split(self, role: str) -> Split | None:
        """The split of a role with all its samples, None where there is none."""
        if role not in self._splits:
            self._splits[role] = self._load(role)
        return self._splits[role]

    def first(self, *roles: str) -> Split | None:
        """The labelled samples of the first of these roles that has any."""
        for role in roles:
            split = self.split(role)
            if split is not None and split.known.any():
                return split.labelled()
        return None

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """make() the first time it is asked for under a key, and what that gave ever after."""
        if key not in self._worked_out:
            self._worked_out[key] = make()
        return self._worked_out[key]

    def describe(self) -> dict[str, dict[str, int]]:
        """{role: {"samples", "identities", "unlabelled"}} of the splits that were asked for and are there."""
        return {
            role: {
                "samples": len(split),
                "identities": len(set(split.identity) - {None}),
                "unlabelled": int((~split.known).sum()),
            }
            for role, split in self._splits.items()
            if split is not None
        }

    @property
    def embedded(self) -> list[Split]:
        """The splits that were asked for and are there."""
        return [split for split in self._splits.values() if split is not None]

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The identities that can be answered, in the order of the class numbers."""
        if self._classes:
            return self._classes
        train = self.first("train")
        return tuple(sorted(set(train.identity))) if train is not None else ()


def embed_split(name: str, embeddings: np.ndarray, facts: dict[str, list]) -> tuple[Split, np.ndarray]:
    """(Split, left out): the samples whose embedding has a direction, and the numbers of the others.

    embeddings: (N, D) float32 at their own length, rows of NaN where there is none. facts: columns of N values.
    """
    directions, norms = unit_rows(embeddings)
    good, columns = norms > 0, {}
    for key in FACTS:
        columns[key] = np.empty(len(embeddings), dtype=object)
        columns[key][:] = facts[key]
    facts = {key: column[good] for key, column in columns.items()}
    return Split(name, directions[good], norms[good], np.flatnonzero(good), facts), np.flatnonzero(~good)


def unit_rows(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows of length 1 (N, D), their lengths before that (N,)), both float32; zeros where there is no direction."""
    norms = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    norms = np.where(np.isfinite(norms), norms, 0.0)
    there = norms > 0
    directions = np.zeros(embeddings.shape, dtype=np.float32)
    directions[there] = embeddings[there] / norms[there, None]
    return directions, norms.astype(np.float32)


def read_embeddings(path: str) -> tuple[np.ndarray, np.ndarray]:
    """(embeddings (N, D) float32, sample_id (N,) str) of an .npz file that anybody's model may have written.

    UserError where the file cannot be read, an array is missing or does not fit, or a sample_id stands twice.
    """
    try:
        stored = read_arrays(path, _EMBEDDED)
        arrays = {name: stored[name] for name in _EMBEDDED}
    except FileNotFoundError:
        raise UserError(f"--embeddings {path} does not exist: write it with numpy.savez") from None
    except KeyError as error:
        raise UserError(f"--embeddings {path} lacks {error}: it holds embeddings (N, D) and sample_id (N,)") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"--embeddings {path} cannot be read ({error}): write it with numpy.savez, sample_id as strings"
        ) from error
    embeddings, sample_id = arrays["embeddings"], arrays["sample_id"]
    if (
        embeddings.ndim != 2
        or embeddings.dtype.kind != "f"
        or sample_id.shape != embeddings.shape[:1]
        or sample_id.dtype.kind not in "Uiu"
    ):
        raise UserError(
            f"--embeddings {path}: embeddings {embeddings.shape} {embeddings.dtype} and sample_id {sample_id.shape} "
            f"{sample_id.dtype} do not fit: floats (N, D) and strings (N,) are needed"
        )
    sample_id = sample_id.astype(str)
    if len(np.unique(sample_id)) < len(sample_id):
        values, counts = np.unique(sample_id, return_counts=True)
        raise UserError(f"--embeddings {path}: sample_id {values[counts > 1][0]!r} stands there twice: keep one")
    return embeddings.astype(np.float32, copy=False), sample_id
