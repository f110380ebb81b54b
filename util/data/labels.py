"""Who is who: the classes of a data set, and its labelled samples for each role."""

import argparse
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from util.data.face_crop import open_pictures
from util.data.sources import Source, Subset
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
        numbers = self.numbers
        return np.array([numbers[name] for name in source.column("identity")], dtype=np.int64)


def open_labelled(args: argparse.Namespace) -> Labelled:
    """The labelled samples behind `--data_path`, of which training takes `--label_fraction`.

    Samples without an identity are left out, and counted in the log. UserError where there are no labels, where
    validation or test hold an identity that training does not, and where --nb_classes is another number.
    """

    def open_role(role: str) -> Source:
        source = open_pictures(args, role)
        known = np.array([name is not None for name in source.column("identity")], dtype=bool)
        if not known.any():
            raise UserError(
                f"{args.data_path} has no labels for {role!r}: give class folders, or metadata with identities"
            )
        if known.all():
            return source
        log.info("%s: %d pictures without an identity are left out of %s", source.name, (~known).sum(), role)
        return Subset(source, np.flatnonzero(known))

    train, val, test = open_role("train"), open_role("val"), open_role("test")
    identities = train.column("identity")
    classes = tuple(sorted(set(identities)))
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
        strangers = sorted(set(source.column("identity")) - set(classes))
        if strangers:
            raise UserError(
                f"{args.data_path}: {strangers[0]!r} is in {role} but has no training image ({len(strangers)} such "
                f"identities): move it to open_{role} or novel, add training images, or lower --val_fraction"
            )


def stratified(identities: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """The rows (n,), ascending, of a share of each identity's samples: at least one, rounded to the nearest number.

    A smaller fraction of the same seed is a part of a larger one.
    """
    taken = {name: max(1, round(fraction * count)) for name, count in Counter(identities).items()}
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(identities):
        rows.setdefault(name, []).append(row)
    chosen = [rng_for(seed, name, "labels").permutation(rows[name])[:count] for name, count in taken.items()]
    return np.sort(np.concatenate(chosen))
