"""Lists of pairs for verification: which pictures are compared, as a seeded choice, and their scores."""

from dataclasses import dataclass

import numpy as np

from util.run.seed import rng_for

KINDS = ("positive", "random", "hard")  # what the numbers in `Pairs.kind` mean
_ENUMERATE = 2  # a set is listed in full where at least 1 in 2 of it is wanted


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows, each at most once: a < b, (P,) int64. same: (P,) bool. kind: (P,) uint8, a place in KINDS."""

    a: np.ndarray
    b: np.ndarray
    same: np.ndarray
    kind: np.ndarray

    def __len__(self) -> int:
        return len(self.a)


def sample_pairs(
    labels: np.ndarray, *, seed: int, positives_per_identity: int | None = 50, negatives: int = 100_000,
    signatures: np.ndarray | None = None, hard_share: float = 0.2,
) -> Pairs:  # fmt: skip
    """A seeded list of pairs: positive ones first, then random negatives, then hard ones.

    labels: (N,) identity codes; leave rows without an identity out beforehand. positives_per_identity: a frequent
    character would outweigh the rest; None: no cap. negatives: how many in all; each pair of two identities is
    equally likely, none comes twice, and where there are fewer, all are taken. signatures: (N, S), S small,
    what a picture looks like without any model (hair and eye colour, say): `hard_share` of the negatives are then pairs
    of two identities whose signatures are nearest to each other (Euclidean). Random negatives alone flatter a
    model, since most characters share no colour. ValueError for signatures that are not finite.
    """
    labels = np.asarray(labels)
    a, b = all_positive_pairs(labels, positives_per_identity, seed)
    space = _NegativePairs(labels)
    negatives = min(negatives, space.total)
    wanted = 0 if signatures is None else round(hard_share * negatives)
    hard = _hard(space, np.asarray(signatures), wanted, rng_for(seed, "hard pairs")) if wanted else _NONE
    random = _distinct(space.total, negatives - len(hard), hard, rng_for(seed, "random pairs"))
    kind = np.repeat(np.arange(3, dtype=np.uint8), [len(a), len(random), len(hard)])
    first, second = space.pairs(np.concatenate([random, hard]))
    return Pairs(np.concatenate([a, first]), np.concatenate([b, second]), kind == 0, kind)


def all_positive_pairs(labels: np.ndarray, cap: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows with one identity, a < b, each (P,) int64: all, or a random choice of `cap` for each identity."""
    order = np.argsort(labels, kind="stable")
    starts, sizes = _runs(labels[order])
    totals = sizes * (sizes - 1) // 2
    many = totals > (np.inf if cap is None else cap)
    few = np.flatnonzero(~many)
    which = np.repeat(few, totals[few])
    number = np.arange(len(which)) - np.repeat(np.cumsum(totals[few]) - totals[few], totals[few])
    if many.any():
        rng = rng_for(seed, "positive pairs")
        chosen = [rng.choice(total, cap, replace=False, shuffle=False) for total in totals[many].tolist()]
        which = np.concatenate([which, np.repeat(np.flatnonzero(many), cap)])
        number = np.concatenate([number, *chosen])
    low, high = _triangle(number)
    a, b = order[starts[which] + low], order[starts[which] + high]
    by_row = np.lexsort((b, a))  # neighbours in the list read neighbouring embeddings
    return a[by_row], b[by_row]


def uniform_pairs(labels: np.ndarray, *, positives: int, negatives: int, seed: int) -> Pairs:
    """A seeded sample of all pairs: each positive pair is equally likely, so frequent identities weigh as in the whole.

    labels: (N,) identity codes. positives, negatives: at most that many of each kind, none twice.
    """
    order = np.argsort(labels, kind="stable")
    starts, sizes = _runs(np.asarray(labels)[order])
    total_to = np.cumsum(sizes * (sizes - 1) // 2)
    total = int(total_to[-1]) if len(labels) else 0
    numbers = _distinct(total, min(positives, total), _NONE, rng_for(seed, "uniform positive pairs"))
    which = np.searchsorted(total_to, numbers, "right")
    low, high = _triangle(numbers - total_to[which] + sizes[which] * (sizes[which] - 1) // 2)
    a, b = order[starts[which] + low], order[starts[which] + high]
    space = _NegativePairs(np.asarray(labels))
    negatives = min(negatives, space.total)
    first, second = space.pairs(_distinct(space.total, negatives, _NONE, rng_for(seed, "random pairs")))
    kind = np.repeat(np.arange(2, dtype=np.uint8), [len(a), negatives])
    return Pairs(np.concatenate([a, first]), np.concatenate([b, second]), kind == 0, kind)


def pair_scores(embeddings: np.ndarray, a: np.ndarray, b: np.ndarray, *, block: int = 2048) -> np.ndarray:
    """Cosine of each pair of rows, (P,) float32, `block` pairs at a time.

    embeddings: (N, D), rows L2-normalised, which is not checked. A row of NaN gives NaN.
    """
    embeddings = np.asarray(embeddings, dtype=np.float32)
    scores = np.empty(len(a), dtype=np.float32)
    for start in range(0, len(a), block):  # pieces so small that threads cost more than they give
        part = slice(start, start + block)
        np.einsum("pd,pd->p", embeddings[a[part]], embeddings[b[part]], out=scores[part])
    return scores


# --- negatives: every pair of two identities has a number --------------------------------------------------------

_NONE = np.empty(0, dtype=np.int64)


class _NegativePairs:
    """The pairs of two identities, numbered 0..total-1 without a gap, so that a choice of pairs is one of numbers.

    Rows are ordered by identity; the row at a place is paired with all rows of later identities.
    """

    def __init__(self, labels: np.ndarray):
        self.order = np.argsort(labels, kind="stable")
        starts, sizes = _runs(labels[self.order])
        self.identity = np.repeat(np.arange(len(starts)), sizes)  # of the row at each place
        self._total_to = np.cumsum(len(labels) - np.repeat(starts + sizes, sizes))
        self.total = int(self._total_to[-1]) if len(labels) else 0
        self._place = np.empty_like(self.order)
        self._place[self.order] = np.arange(len(labels))

    def pairs(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows (a, b), a < b, of numbers (P,)."""
        first = np.searchsorted(self._total_to, numbers, "right")
        second = numbers - self._total_to[first] + len(self.order)
        a, b = self.order[first], self.order[second]
        return np.minimum(a, b), np.maximum(a, b)

    def numbers(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The numbers (P,) of pairs of rows of two identities."""
        a, b = self._place[a], self._place[b]
        first, second = np.minimum(a, b), np.maximum(a, b)
        return second - len(self.order) + self._total_to[first]

    def differ(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Whether rows a and b show two identities."""
        return self.identity[self._place[a]] != self.identity[self._place[b]]


def _runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of each run of equal values."""
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)])
    return starts, np.diff(np.r_[starts, len(ordered)])


def _triangle(number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number -> (i, j), i < j: 0 is (0, 1), 1 is (0, 2), 2 is (1, 2), 3 is (0, 3), ..."""
    j = ((1 + np.sqrt(1 + 8 * number.astype(np.float64))) / 2).astype(np.int64)
    j -= j * (j - 1) // 2 > number  # the root may be rounded up
    return number - j * (j - 1) // 2, j


def _distinct(total: int, count: int, taken: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`count` numbers of 0..total-1, ascending, none twice and none of `taken`, all equally likely."""
    if total <= _ENUMERATE * (count + len(taken)):
        free = np.ones(total, dtype=bool)
        free[taken] = False
        free = np.flatnonzero(free)
        return free if count == len(free) else np.sort(rng.choice(free, count, replace=False, shuffle=False))
    found = taken
    while (missing := count + len(taken) - len(found)) > 0:
        drawn = rng.integers(0, total, missing + missing // 10 + 16)
        # np.unique hashes, which takes a hundred times as long as a sort of ten million numbers
        found = np.sort(np.concatenate([found, drawn]))
        found = found[np.r_[True, found[1:] != found[:-1]]]
    if len(taken):
        fresh = np.ones(len(found), dtype=bool)
        fresh[np.searchsorted(found, taken)] = False
        found = found[fresh]
    return np.delete(found, rng.choice(len(found), len(found) - count, replace=False, shuffle=False))


# --- hard negatives ---------------------------------------------------------------------------------------------

_ASKED, _PER_ROW = 50_000, 16  # rows that are asked for their neighbours, or more, to get no more than 16 pairs of each
_CAPS = (8, 16, 32, 64)  # rows of one identity among which neighbours are looked for


def _hard(space: _NegativePairs, signatures: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers, ascending, of up to `count` pairs of two identities with the nearest signatures.

    Rows are asked for their nearest rows of another identity; first choices are taken before second ones. At most
    64 random rows of each identity take part, so a frequent character neither crowds out the others nor hides
    behind itself the strangers that look like it.
    """
    from scipy.spatial import cKDTree  # slow to import

    if not np.isfinite(signatures).all():
        raise ValueError("signatures must be finite: leave rows without one out")
    asked = max(_ASKED, -(-count // _PER_ROW))
    rows, cap = _capped(space, min(asked, count), rng)
    points = np.asarray(signatures, dtype=np.float64).reshape(len(signatures), -1)[rows]
    # a tiny random step apart, so that none of many equal signatures is preferred and the tree stays even
    points += 1e-6 * (points.std() + 1e-12) * rng.standard_normal(points.shape)
    tree = cKDTree(points)
    places = np.sort(rng.choice(len(rows), min(len(rows), asked), replace=False))
    each = -(-2 * count // len(places))  # twice as many as needed: rows choose each other
    k = min(len(rows), each + cap)
    found, rank = [], []
    for part in np.array_split(places, -(-len(places) * k // (1 << 21))):  # 16 MB of neighbours at a time
        other = rows[tree.query(points[part], k, workers=-1)[1].reshape(len(part), k)]
        row = np.broadcast_to(rows[part][:, None], other.shape)
        strangers = space.differ(row, other)
        order = np.cumsum(strangers, axis=1, dtype=np.int32)
        kept = strangers & (order <= each)
        found.append(space.numbers(row[kept], other[kept]))
        rank.append(order[kept])
    return _first_choices(np.concatenate(found), np.concatenate(rank), count, rng)


def _capped(space: _NegativePairs, wanted: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Random rows, ascending, at most `cap` of each identity; (rows, cap) of the least cap that gives `wanted` rows."""
    places = rng.permutation(len(space.order))
    places = places[np.argsort(space.identity[places], kind="stable")]
    starts, sizes = _runs(space.identity[places])
    nth = np.arange(len(places)) - np.repeat(starts, sizes)
    cap = next((cap for cap in _CAPS if np.minimum(sizes, cap).sum() >= wanted), _CAPS[-1])
    return np.sort(space.order[places[nth < cap]]), cap


def _first_choices(numbers: np.ndarray, rank: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """The `count` pairs of the best rank, ascending, each once; a random choice among those of the last rank taken."""
    order = np.lexsort((rank, numbers))
    numbers, rank = numbers[order], rank[order]
    once = np.r_[True, numbers[1:] != numbers[:-1]][: len(numbers)]
    numbers, rank = numbers[once], rank[once]
    return np.sort(numbers[np.lexsort((rng.random(len(rank)), rank))[:count]])
