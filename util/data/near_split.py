"""Splits that a near-copy cannot cross: groups of pictures, not pictures, are held out.

Frames of one album, or several faces cut from one picture, are all but the same; a split picture by picture would
put copies of the training pictures into the test. A group is whatever belongs together: a component of near-identical
pictures, a chain of uploads.
"""

import os
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from util.benchmark.leakage import components
from util.data.face_crop import cut_face
from util.data.images import decode_image
from util.data.phash import hash_images, near_pairs
from util.data.prepare import Preparation
from util.data.roles import in_part
from util.run.errors import UserError
from util.run.log import progress
from util.run.seed import rng_for

NEAR = 4  # bits; at more, faces of different characters begin to match
TRAIN = "train"


def add_split(
    work: Preparation,
    rows: Sequence[Mapping],
    groups: Iterable[Hashable],
    bad: Collection[int],
    fractions: Mapping[str, float],
    open_identities: Mapping[str, str] | None = None,
) -> None:
    """Add rows to a prepared folder with the splits of `split_groups`; `source` is what was held out as a whole.

    groups: of each row. bad: numbers of the rows that cannot be decoded; they are dropped, like those that yield.
    """
    kept = []
    for number, (row, group) in enumerate(zip(rows, groups, strict=True)):
        if number in bad:
            work.drop("file damaged", row["file_name"])
        else:
            kept.append((row, group))
    names = name_groups([row["sample_id"] for row, _ in kept], [group for _, group in kept])
    splits = split_groups(names, [row["identity"] for row, _ in kept], fractions, open_identities)
    for (row, _), name, split in zip(kept, names, splits, strict=True):
        if split is None:
            work.drop("near-copy of a picture of a held-out identity", row["sample_id"])
        else:
            work.add({**row, "split": split, "source": name})


def near_groups(root: Path, rows: Sequence[Mapping], distance: int = NEAR) -> tuple[list[int], list[int]]:
    """A number for the component of near-identical pictures each row belongs to, (N,), and the rows without a picture.

    Two rows are linked where their whole pictures, or their faces where they have a `box`, are at most `distance` bits
    apart (64-bit DCT hash, the mirror image too; `util.data.phash`), or equal pixel for pixel. Whole pictures find
    the other characters of one frame, faces the same drawing on a background that moved. Decodes each picture once,
    with boxes twice.
    """
    views = [("pictures", [root / row["file_name"] for row in rows])]
    if any(row.get("box") is not None for row in rows):
        views.append(("faces", _Faces(root, rows)))
    ends, bad = [], set()
    for label, view in views:
        with progress(total=len(rows), desc=f"hashing {label}", unit="img") as bar:
            hashes = hash_images(view, workers=os.cpu_count() or 1, advance=bar.update)
        near = near_pairs(hashes, distance)
        bad.update(row for row, *_ in hashes.bad)
        readable = np.flatnonzero(hashes.readable)
        _, first, same = np.unique(hashes.digest[readable], return_index=True, return_inverse=True)
        ends += [(near.a, near.b), (readable, readable[first[same]])]
    one, other = (np.concatenate(side) for side in zip(*ends, strict=True))
    return components(len(rows), one, other).tolist(), sorted(bad)


class _Faces:
    """The faces of rows as a source of pictures, one a row; a row without a box shows its picture."""

    def __init__(self, root: Path, rows: Sequence[Mapping]):
        self.root, self.rows = root, rows

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, i: int) -> Image.Image:
        return cut_face(decode_image(self.root / self.rows[i]["file_name"]), self.rows[i].get("box"), 0.0)


def name_groups(ids: Sequence[str], groups: Sequence[Hashable]) -> list[str]:
    """A name for the group of each sample, that of its alphabetically first member; (N,) ids, groups.

    So a group keeps its name, and its split, when other samples come or go.
    """
    first: dict[Hashable, str] = {}
    for name, group in zip(ids, groups, strict=True):
        first[group] = min(name, first.get(group, name))
    return [first[group] for group in groups]


def pick_identities(identities: Iterable[str], wanted: Mapping[str, int], seed: int) -> dict[str, str]:
    """{identity: split}: whole identities, drawn by seed, that are never trained on; disjoint between splits.

    wanted: how many identities each split gets, e.g. {"open_val": 100}. UserError where fewer than two are left.
    """
    names = sorted(set(identities))
    asked = sum(wanted.values())
    if asked and asked > len(names) - 2:
        raise UserError(f"{asked} identities cannot be held out of {len(names)}, two must stay: ask for fewer")
    order = [names[i] for i in rng_for(seed, "held-out identities").permutation(len(names))]
    chosen, first = {}, 0
    for split, count in wanted.items():
        chosen |= dict.fromkeys(order[first : first + count], split)
        first += count
    return chosen


def split_groups(
    groups: Sequence[str],
    identities: Sequence[str],
    fractions: Mapping[str, float],
    open_identities: Mapping[str, str] | None = None,
) -> list[str | None]:
    """The split of each sample, (N,): that of its group; None where a sample has to yield.

    groups, identities: (N,) names. fractions: {"test": 0.2, "val": 0.1}, the share of the groups that a fixed hash of
    the name puts into each split; the rest is "train". open_identities: {identity: split} of `pick_identities`. Where
    a group holds such an identity, its samples of other identities yield (None): they would be near-copies, in
    training, of what is held out. A group with identities of two such splits goes to open_test before open_val.
    An identity that would have no training group left gets the first of its groups back.
    """
    chosen = open_identities or {}
    held_out = set(chosen.values())
    split_of = _by_hash(sorted(set(groups)), fractions)
    members = defaultdict(set)
    for group, identity in zip(groups, identities, strict=True):
        members[group].add(identity)
    for group, own in members.items():
        taken = sorted({chosen[identity] for identity in own if identity in chosen})
        if taken:
            split_of[group] = taken[0]
    _keep_trainable(split_of, members, chosen)
    splits = []
    for group, identity in zip(groups, identities, strict=True):
        split, own = split_of[group], chosen.get(identity)
        yields = split != own if own is not None else split in held_out
        splits.append(None if yields else split)
    return splits


def _by_hash(groups: list[str], fractions: Mapping[str, float]) -> dict[str, str]:
    split_of, upper = dict.fromkeys(groups, TRAIN), 0.0
    for split, fraction in fractions.items():
        upper += fraction
        held_out = in_part(groups, "val", upper)
        split_of |= {
            group: split for group, held in zip(groups, held_out, strict=True) if held and split_of[group] == TRAIN
        }
    return split_of


def _keep_trainable(split_of: dict[str, str], members: Mapping[str, set[str]], chosen: Mapping[str, str]) -> None:
    """Return a group to training for every identity that is not held out and has none there."""
    held_out = set(chosen.values())
    groups_of = defaultdict(list)
    for group in sorted(members):
        if split_of[group] not in held_out:
            for identity in members[group]:
                groups_of[identity].append(group)
    for _, own in sorted(groups_of.items()):
        if all(split_of[group] != TRAIN for group in own):
            split_of[own[0]] = TRAIN
