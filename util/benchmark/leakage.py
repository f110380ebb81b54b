"""Leakage: what of a test set a model has already seen. Links between pictures, their components, and the repair.

Pictures are linked where they are identical, near-duplicates by perceptual hash (also of the mirror image), alike by
embedding, or cut from one source. A component of linked pictures may lie on one side only; a side is a split of a
pool, a pool is a data set or a pre-training collection. Identities that must be new at test time may not be trained
on under another name. Thresholds: a hash distance of at most 4 of 64 bits is taken as it is, 2 for faces cut to their
boxes; beyond it, up to 8 bits, pairs count only where embeddings agree. How many of these are one drawing depends on
the data: by eye, three quarters of the moeImouto pairs at 5 to 8 bits, an eighth of the tight splcher crops at 5 to 7.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from util.data.identity_names import Alias, alias_groups, may_be_same, without_number
from util.data.phash import Hashes, near_pairs
from util.run.errors import UserError
from util.run.seed import rng_for

KINDS = ("identical", "near", "mirrored", "face", "embedding", "source")  # of a link, the strongest first
TRAINING = ("pretrain", "train")  # splits whose pictures a model learns from
KNOWN = ("train", "val", "test")  # splits that share their identities
UNKNOWN = ("open_val", "open_test", "novel")  # splits whose identities are never trained on
# who keeps a component that lies on several sides: the first; names that are not here keep before all of them
_YIELDING = ("test", "open_test", "novel", "figures", "val", "open_val", "train", "pretrain")
_SAMPLED = 200_000  # random pairs that tell what cosine is ordinary
_TOO_MANY = 1e-3  # of them above the threshold: it tells nothing apart


@dataclass(frozen=True)
class Pictures:
    """The rows that are compared; all lists have N items.

    pool: name of the data set a row belongs to. identity, source: None where not known; sources of different pools
    are different. hashes: of the whole pictures. faces: of what lies in the face boxes, if there are any.
    embeddings: (N, D) float32, a row of NaN where there is none.
    """

    sample_id: Sequence[str]
    pool: Sequence[str]
    split: Sequence[str]
    identity: Sequence[str | None]
    source: Sequence[str | None]
    hashes: Hashes
    faces: Hashes | None = None
    embeddings: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.sample_id)

    def sides(self) -> tuple[np.ndarray, list[tuple[str, str]]]:
        """The number of each row's side (N,) int64, and the (pool, split) of each side, in order of appearance."""
        numbers: dict[tuple[str, str], int] = {}
        rows = [numbers.setdefault(side, len(numbers)) for side in zip(self.pool, self.split, strict=True)]
        return np.array(rows, dtype=np.int64), list(numbers)


class Links(NamedTuple):
    """Pairs of rows a < b (P,) int64. kind: (P,) int64, a place in KINDS. distance: (P,) int64 bits, -1 if not by hash.

    cosine: (P,) float32, NaN where there are no embeddings.
    """

    a: np.ndarray
    b: np.ndarray
    kind: np.ndarray
    distance: np.ndarray
    cosine: np.ndarray

    def take(self, chosen: np.ndarray) -> "Links":
        """Some of the links, by mask or by number."""
        return Links(*(column[chosen] for column in self))


def find_links(
    pictures: Pictures,
    *,
    distance: int = 4,
    face_distance: int = 2,
    far: int = 8,
    cosine: float = 0.95,
    confirm: float = 0.9,
    ignore: Collection[str] = (),
) -> tuple[Links, Links]:
    """The links between pictures, and the pairs beyond `distance` that no embedding confirms (they are no links).

    distance: bits of the hash that make a link; face_distance: of that of the face alone, which has less to go by.
    far: bits up to which a pair is a link where its cosine is at least `confirm`. cosine: makes a link of itself.
    ignore: kinds that make none. Each pair comes once, as the strongest kind, sorted. Within a group of identical
    pictures, or of one source, each is linked to the first of each side, so that their number stays linear. Raises
    UserError where `cosine` is so low that it tells nothing apart.
    """
    vectors = None if pictures.embeddings is None else centred(pictures.embeddings)
    if vectors is not None:
        _refuse_useless(vectors, cosine)
    side, _ = pictures.sides()
    digest = np.where(pictures.hashes.readable, _codes(pictures.hashes.digest.tolist()), -1)
    near = _near(pictures.hashes, ("near", "mirrored"), max(distance, far), vectors)
    sure = (near.distance <= distance) | (near.cosine >= confirm)
    parts = [near.take(sure)]
    if pictures.faces is not None:
        face = _near(pictures.faces, ("face", "face"), max(face_distance, far), vectors)
        parts.append(face.take((face.distance <= face_distance) | (face.cosine >= confirm)))
    if vectors is not None:
        parts.append(_links("embedding", *cosine_pairs(vectors, cosine), vectors))
    # identical pictures are linked as such, and need no other link
    parts = [part.take((digest[part.a] != digest[part.b]) | (digest[part.a] < 0)) for part in parts]
    pairs = zip(pictures.pool, pictures.source, strict=True)
    sources = [None if source is None else (pool, source) for pool, source in pairs]
    groups = [_grouped("identical", digest, side, vectors), _grouped("source", _codes(sources), side, vectors)]
    ignored = [KINDS.index(kind) for kind in KINDS if kind in ignore]
    return _strongest([part.take(~np.isin(part.kind, ignored)) for part in (*parts, *groups)]), near.take(~sure)


def _near(hashes: Hashes, kinds: tuple[str, str], distance: int, vectors: np.ndarray | None) -> Links:
    pairs = near_pairs(hashes, distance)
    plain, mirrored = (KINDS.index(kind) for kind in kinds)
    kind = np.where(pairs.mirrored, mirrored, plain)
    return Links(pairs.a, pairs.b, kind, pairs.distance, _cosines(vectors, pairs.a, pairs.b))


def _links(kind: str, a: np.ndarray, b: np.ndarray, vectors: np.ndarray | None) -> Links:
    unknown = np.full(len(a), 0 if kind == "identical" else -1)
    return Links(a, b, np.full(len(a), KINDS.index(kind)), unknown, _cosines(vectors, a, b))


def _grouped(kind: str, codes: np.ndarray, side: np.ndarray, vectors: np.ndarray | None) -> Links:
    """Links within the groups of rows of one code; -1 is no group."""
    order = np.argsort(codes, kind="stable")
    edges = np.concatenate([[0], np.flatnonzero(np.diff(codes[order])) + 1, [len(order)]])
    pairs = set()
    for low, high in pairwise(edges):
        if high - low < 2 or codes[order[low]] < 0:
            continue
        members = order[low:high].tolist()
        first = {}
        for row in members:
            first.setdefault(int(side[row]), row)
        pairs.update((min(row, top), max(row, top)) for row in members for top in first.values() if row != top)
    table = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    return _links(kind, table[:, 0], table[:, 1], vectors)


def _codes(values: Sequence) -> np.ndarray:
    """A number for each distinct value (N,) int64, -1 for None."""
    numbers: dict = {}
    return np.array([-1 if value is None else numbers.setdefault(value, len(numbers)) for value in values], np.int64)


def _strongest(parts: list[Links]) -> Links:
    """All links, each pair once."""
    every = Links(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    every = every.take(np.lexsort((every.kind, every.b, every.a)))
    new = np.ones(len(every.a), dtype=bool)
    new[1:] = (np.diff(every.a) != 0) | (np.diff(every.b) != 0)
    return every.take(new)


def centred(embeddings: np.ndarray) -> np.ndarray:
    """Embeddings (N, D) less their mean, rows L2-normalised, float32; rows that are not finite become NaN.

    The mean is taken out because that of most encoders is long: without this the cosine of any two pictures is high.
    """
    good = np.isfinite(embeddings).all(1)
    vectors = np.full(embeddings.shape, np.nan, np.float32)
    if good.any():
        own = embeddings[good].astype(np.float64)
        own -= own.mean(0)
        vectors[good] = own / np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-12)
    return vectors


def _cosines(vectors: np.ndarray | None, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if vectors is None:
        return np.full(len(a), np.nan, np.float32)
    return np.einsum("ij,ij->i", vectors[a], vectors[b]).astype(np.float32)


def cosine_pairs(vectors: np.ndarray, threshold: float, block: int = 2048) -> tuple[np.ndarray, np.ndarray]:
    """The pairs a < b of unit rows (N, D) whose cosine is at least `threshold`; rows of NaN have none.

    Memory: `block` rows of the N x N matrix at a time; time: N^2 D / 2 multiplications.
    """
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for start in range(0, len(vectors), block):
        rows = vectors[start : start + block]
        a, b = np.nonzero(rows @ vectors[start:].T >= threshold)
        upper = a < b
        found.append((a[upper] + start, b[upper] + start))
    a, b = (np.concatenate(part) for part in zip(*found, strict=True))
    return a, b


def random_cosines(vectors: np.ndarray) -> np.ndarray:
    """Cosines of random pairs of rows (M,), to see a threshold against; empty where there are fewer than two rows."""
    good = np.flatnonzero(np.isfinite(vectors[:, 0]))
    if len(good) < 2:
        return np.zeros(0, np.float32)
    pairs = rng_for(0, len(good), "random cosines").integers(0, len(good), (2, _SAMPLED))
    pairs = pairs[:, pairs[0] != pairs[1]]
    return _cosines(vectors, good[pairs[0]], good[pairs[1]])


def _refuse_useless(vectors: np.ndarray, cosine: float) -> None:
    ordinary = random_cosines(vectors)
    if len(vectors) > 1000 and (ordinary >= cosine).mean() > _TOO_MANY:
        enough = np.quantile(ordinary, 0.9999)
        raise UserError(
            f"{(ordinary >= cosine).mean():.1%} of random pairs of these embeddings have a cosine of {cosine:g} or "
            f"more: give a --cosine above {enough:.3f}, or the embeddings of an encoder that tells pictures apart"
        )


def components(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The connected components (count,) int64 of `count` rows linked by the pairs a, b: the least row of each.

    Union-find with path halving; the smaller root wins, so the numbers do not depend on the order of the pairs.
    """
    parent = list(range(count))

    def find(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for one, other in zip(a.tolist(), b.tolist(), strict=True):
        one, other = find(one), find(other)
        parent[max(one, other)] = min(one, other)
    return np.array([find(row) for row in range(count)], dtype=np.int64)


def forbidden_sides(
    sides: Sequence[tuple[str, str]], training: Collection[tuple[str, str]] | None = None
) -> np.ndarray:
    """Which sides may not share a component: (S, S) bool, symmetric.

    Within a pool any two splits, but for those that are both trained on. Of two pools, where one side is trained on
    and the other is not. training: the (pool, split) a model learns from; default: the splits in TRAINING of each.
    """
    learns = [split in TRAINING if training is None else (pool, split) in training for pool, split in sides]
    table = np.zeros((len(sides), len(sides)), dtype=bool)
    for i, (pool, split) in enumerate(sides):
        for j, (other, its_split) in enumerate(sides):
            one_pool = pool == other and split != its_split and not (learns[i] and learns[j])
            table[i, j] = one_pool or learns[i] != learns[j]
    return table


def leaks(links: Links, side: np.ndarray, forbidden: np.ndarray) -> Links:
    """The links that join two sides which may not be joined."""
    return links.take(forbidden[side[links.a], side[links.b]])


def straddling(component: np.ndarray, side: np.ndarray, forbidden: np.ndarray) -> np.ndarray:
    """The components (K,), ascending, that lie on two sides which may not be joined."""
    return np.array(
        [own for own, sides in _sides_of(component, side) if forbidden[np.ix_(sides, sides)].any()], np.int64
    )


def _sides_of(component: np.ndarray, side: np.ndarray) -> list[tuple[int, list[int]]]:
    """The components that lie on more than one side, and these sides."""
    found: dict[int, list[int]] = {}
    for own, its in np.unique(np.stack([component, side], axis=1), axis=0).tolist():
        found.setdefault(own, []).append(its)
    return [(own, sides) for own, sides in found.items() if len(sides) > 1]


class Repair(NamedTuple):
    """split: (N,) list, the split of each row, None where it is dropped. moved, dropped: numbers of rows."""

    split: list[str | None]
    moved: int
    dropped: int


def repair(
    pictures: Pictures, component: np.ndarray, forbidden: np.ndarray, *, yielding: np.ndarray | None = None,
    move: bool = False,
) -> Repair:  # fmt: skip
    """An assignment without straddling components: training yields to validation, validation to test.

    Rows on the side that yields are dropped, so that held-out sets stay as they are; with `move` they join the other
    side if it is of the same pool and knows their identity. yielding: (N,) bool rows to drop before (identities).
    """
    side, sides = pictures.sides()
    split: list[str | None] = list(pictures.split)
    for row in np.flatnonzero(yielding) if yielding is not None else ():
        split[row] = None
    alive = np.array([own is not None for own in split])
    identities: dict[int, set] = {}
    for row in np.flatnonzero(alive):
        identities.setdefault(int(side[row]), {None}).add(pictures.identity[row])
    rank = [_YIELDING.index(own) if own in _YIELDING else -1 for _, own in sides]
    rows_of: dict[int, list[int]] = {}
    for row in np.flatnonzero(alive):
        rows_of.setdefault(int(component[row]), []).append(int(row))
    moved = 0
    for own, its in _sides_of(component[alive], side[alive]):
        kept: list[int] = []
        for one in sorted(its, key=lambda number: (rank[number], number)):
            winner = next((other for other in kept if forbidden[one, other]), None)
            if winner is None:
                kept.append(one)
                continue
            for row in rows_of[own]:
                if side[row] == one:
                    fits = sides[winner][0] == sides[one][0] and pictures.identity[row] in identities[winner]
                    split[row] = sides[winner][1] if move and fits else None
                    moved += split[row] is not None
    return Repair(split, moved, sum(own is None for own in split))


class Named(NamedTuple):
    """An identity in one split of one pool, and its number of pictures."""

    pool: str
    split: str
    identity: str
    alias: Alias
    pictures: int


class IdentityLeak(NamedTuple):
    """An identity that should be new, and those it may be: the reasons are of `identity_names.may_be_same`."""

    unknown: Named
    seen: list[tuple[Named, str]]


def identity_leaks(
    pictures: Pictures, same_as: Mapping[str, str] | None = None, ignore: Collection[str] = ()
) -> list[IdentityLeak]:
    """Identities of UNKNOWN splits that may be known: in a KNOWN split of their pool, or in the train split of another.

    Those of open_val may not be in open_test either (a threshold is chosen on the one and judged on the other).
    Numbers in front of names (004_rei) are left out where the names of a pool stay distinct without them. same_as: as
    in `alias_groups`. ignore: reasons that do not count.
    """
    counts = Counter(zip(pictures.pool, pictures.split, pictures.identity, strict=True))
    counts = {key: number for key, number in counts.items() if key[2] is not None and key[1] in KNOWN + UNKNOWN}
    spelled = _without_numbers({(pool, identity) for pool, _, identity in counts})
    names = sorted(set(spelled.values()))
    aliases = dict(zip(names, alias_groups(names, same_as=same_as), strict=True))
    by_base: dict[str, list[Named]] = {}
    for (pool, split, identity), number in counts.items():
        alias = aliases[spelled[pool, identity]]
        by_base.setdefault(alias.base, []).append(Named(pool, split, identity, alias, number))
    found = []
    for cluster in by_base.values():
        for one in cluster:
            seen = [(other, may_be_same(one.alias, other.alias)) for other in cluster if _must_differ(one, other)]
            seen = [(other, reason) for other, reason in seen if reason and reason not in ignore]
            if seen:
                found.append(IdentityLeak(one, seen))
    return sorted(found, key=lambda leak: leak.unknown[:3])


def not_new(pictures: Pictures, found: Sequence[IdentityLeak]) -> np.ndarray:
    """The rows (N,) bool of the identities that should be new and are not."""
    keys = {leak.unknown[:3] for leak in found}
    return np.array([key in keys for key in zip(pictures.pool, pictures.split, pictures.identity, strict=True)], bool)


def lost_identities(pictures: Pictures, split: Sequence[str | None]) -> int:
    """How many identities have training pictures, but none in the repaired `split` (N,)."""
    rows = zip(pictures.pool, pictures.identity, pictures.split, split, strict=True)
    before, after = set(), set()
    for pool, identity, own, new in rows:
        if own == "train" and identity is not None:
            before.add((pool, identity))
            after.update({(pool, identity)} if new == "train" else ())
    return len(before - after)


def _must_differ(unknown: Named, other: Named) -> bool:
    """Whether the identity `unknown` has to give way to `other`, should they be one person."""
    if unknown.split not in UNKNOWN:
        return False
    if unknown.pool == other.pool:
        return other.split in KNOWN or (unknown.split, other.split) == ("open_val", "open_test")
    # names that are mere numbers mean something else in each pool
    return other.split == "train" and any(letter.isalpha() for letter in unknown.alias.base)


def _without_numbers(names: set[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """(pool, name) -> the name without the number in front, for pools whose names stay distinct."""
    spelled = {}
    for pool in {pool for pool, _ in names}:
        own = [name for its, name in names if its == pool]
        short = {name: without_number(name) for name in own}
        distinct = len(set(short.values())) == len(own)
        spelled.update({(pool, name): short[name] if distinct else name for name in own})
    return spelled


def count_leaks(found: Links, side: np.ndarray, sides: Sequence[tuple[str, str]]) -> list[dict]:
    """How many, by kind and by pair of sides: pairs, and the distinct pictures on either side (sorted)."""
    one, other = side[found.a], side[found.b]
    first, second = np.minimum(one, other), np.maximum(one, other)
    table = []
    for kind, low, high in np.unique(np.stack([found.kind, first, second], axis=1), axis=0).tolist():
        own = found.take((found.kind == kind) & (first == low) & (second == high))
        rows = np.unique(np.concatenate([own.a, own.b]))
        here, there = ({"pool": sides[number][0], "split": sides[number][1],
                        "pictures": int((side[rows] == number).sum())} for number in (low, high))  # fmt: skip
        table.append({"kind": KINDS[kind], "sides": [here, there], "pairs": len(own.a)})
    return table
