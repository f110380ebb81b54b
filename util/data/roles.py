"""Which rows a role ("train", "val", "test", ...) gets, by one rule for folders, manifests and Hub data sets.

* A role reads the split of its own where the data have one; "train" is the splits pretrain and train.
* "open_val", "open_test" (identities never trained on) and "novel" (few-shot) have no stand-in.
* Data without a validation split: a fixed hash of the sample's name puts the fraction `val_fraction` of the
  training rows into "val". A sample never changes sides when others are added or removed.
* Data without a test split: "test" is "val", and the log says so.
"""

import hashlib
import logging
from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np

from util.run.errors import UserError

log = logging.getLogger(__name__)

# the splits of a manifest behind each role
ROLES = {
    "train": ("pretrain", "train"),
    "val": ("val",),
    "test": ("test",),
    "open_val": ("open_val",),
    "open_test": ("open_test",),
    "novel": ("novel",),
}
# what folders and Hub data sets call them
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
    "open_val": ("open_val",),
    "open_test": ("open_test",),
    "novel": ("novel",),
}


_DIGEST_BYTES = 8


class MissingRole(UserError):
    """The data have no rows for a role."""


class Share(NamedTuple):
    """The rows a role gets: of the role `of` in ROLES, the `part` "all", "train" or "val" (the last two by hash)."""

    of: str
    part: str


def share_of(role: str, available: Collection[str], name: str) -> Share | None:
    """The share of `role` in data that have rows for the roles `available`; None if there is nothing to read.

    name: the data path, for the log line that is written where "val" stands in for "test".
    """
    if role == "test" and "test" not in available:
        log.warning("%s has no test split: its validation part stands in for it", name)
        role = "val"
    if role in available:
        return Share(role, "train" if role == "train" and "val" not in available else "all")
    return Share("train", "val") if role == "val" and "train" in available else None


def in_part(keys: Iterable[str], part: str, val_fraction: float) -> np.ndarray:
    """Which rows belong to `part`: (N,) bool. keys: a name for each row; rows of one name stay together."""
    if part == "all":
        return np.ones(sum(1 for _ in keys), dtype=bool)
    digests = bytearray()
    for key in keys:
        digests += hashlib.blake2b(key.encode(), digest_size=_DIGEST_BYTES).digest()
    held_out = np.frombuffer(digests, "<u8") / 2.0 ** (8 * _DIGEST_BYTES) < val_fraction
    return held_out if part == "val" else ~held_out


def role_of_name(split: str) -> str | None:
    """The role of a split called `split` in a folder or on the Hub, None if the name says nothing."""
    return next((role for role, names in SPLIT_NAMES.items() if split.lower() in names), None)
