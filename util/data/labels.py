"""Who is who: the classes of a data set, and its labelled samples for each role."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from util.data.face_crop import open_pictures
from util.data.sources import Source, Subset, column_array
from util.run.errors import UserError
from util.run.seed import rng_for

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labelled:
    """The labelled samples of a data set.

    classes: identities in alphabetical order; a class number is a place in it. test: None where the data has
    no test split of its own.
    """

    classes: tuple[str, ...]
    train: Source
    val: Source
    test: Source | None

    @property
    def numbers(self) -> dict[str, int]:
        """Identity -> class number."""
        return {name: number for number, name in enumerate(self.classes)}

    def labels(self, source: Source) -> np.ndarray:
        """Class numbers (N,) int64 of one of the sources."""
        found = pc.index_in(column_array(source, "identity"), value_set=pa.array(self.classes, pa.string()))
        if found.null_count:
            raise ValueError(f"{found.null_count} samples of {source.name} are of no class")
        return found.to_numpy().astype(np.int64)


def open_labelled(args: argparse.Namespace) -> Labelled:
    """The labelled samples behind `--data_path`, of which training takes `--label_fraction`.

    Samples without an identity are left out, and counted in the log. UserError where there are no labels, where
    validation or test hold an identity that training does not, and where --nb_classes is another number.
    """

    def open_role(role: str) -> Source:
        source = open_pictures(args, role)
        known = np.asarray(column_array(source, "identity").is_valid())
        if not known.any():
            raise UserError(
                f"{args.data_path} has no labels for {role!r}: give class folders, or metadata with identities"
            )
        if known.all():
            return source
        log.info("%s: %d pictures without an identity are left out of %s", source.name, (~known).sum(), role)
        return Subset(source, np.flatnonzero(known))

    train, val, test = open_role("train"), open_role("val"), open_role("test")
    identities = column_array(train, "identity")
    classes = tuple(sorted(pc.unique(identities).to_pylist()))
    _check_classes(args, classes, {"val": val, "test": test})
    if args.label_fraction < 1:
        train = Subset(train, stratified(identities, args.label_fraction, args.seed))
    return Labelled(classes, train, val, None if test.fingerprint == val.fingerprint else test)


def _check_classes(args: argparse.Namespace, classes: tuple[str, ...], others: dict[str, Source]) -> None:
    if len(classes) < 2:
        raise UserError(f"{args.data_path} has one identity only, {classes[0]!r}: recognition needs two or more")
    if args.nb_classes not in (None, len(classes)):
        raise UserError(
            f"--nb_classes {args.nb_classes} does not fit {args.data_path}, which has {len(classes)} identities: "
            "leave the flag out"
        )
    for role, source in others.items():
        strangers = sorted(set(pc.unique(column_array(source, "identity")).to_pylist()) - set(classes))
        if strangers:
            raise UserError(
                f"{args.data_path}: {strangers[0]!r} is in {role} but has no training image ({len(strangers)} such "
                f"identities): move it to open_{role} or novel, add training images, or lower --val_fraction"
            )


def stratified(identities: Sequence[str] | pa.Array, fraction: float, seed: int) -> np.ndarray:
    """The rows (n,), ascending, of a share of each identity's samples: at least one, rounded to the nearest number.

    A smaller fraction of the same seed is a part of a larger one.
    """
    encoded = pa.array(identities, pa.string()).dictionary_encode()
    numbers = encoded.indices.to_numpy()
    ends = np.bincount(numbers).cumsum()
    rows = np.split(np.argsort(numbers, kind="stable"), ends[:-1])  # of each identity, ascending
    chosen = [
        rng_for(seed, name, "labels").permutation(own)[: max(1, round(fraction * len(own)))]
        for name, own in zip(encoded.dictionary.to_pylist(), rows, strict=True)
    ]
    return np.sort(np.concatenate(chosen))
