"""Perceptual hashes of pictures and of their mirrors, and the search for near-duplicates among a million of them.

The hash: the upright RGB picture as `util.data.images` decodes it, to grey (ITU-R 601, 8 bit), to 32 x 32 px by
Pillow's antialiased Lanczos filter, orthonormal DCT-II along both axes, the 8 x 8 coefficients of lowest frequency
with the constant one set to 0, bit = coefficient above the median of the 63 others; row by row, the constant one is
the highest bit. All steps after decoding are integer arithmetic, so equal pixels give equal hashes on every platform.

The distance of two pictures is the least of the Hamming distances of a and b, of a and the mirror of b, and of the
mirror of a and b (the last two differ by a few bits: a sign that flips moves the median).
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb, log2
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from util.data.images import BadImage, decode_image
from util.data.sources import FolderSource, Source

SIDE = 32  # px of the picture that is transformed
LOW = 8  # frequencies kept along each axis
BLANK_RANGE = 8  # grey levels: a picture that spans fewer, at 32 x 32, has no structure to hash
MAX_DISTANCE = 16  # bits; beyond it the search is no faster than comparing all pairs
_CHUNK = 64  # pictures a thread takes at a time


@dataclass(frozen=True)
class Hashes:
    """Hashes of N pictures. plain, mirror: (N,) uint64, of the picture and of its mirror image.

    digest: (N,) uint64 of the decoded pixels and the size: equal where two pictures are the same, pixel for pixel.
    blank: (N,) bool, no structure. bad: (row, path, reason) of pictures that cannot be decoded; their values are 0.
    """

    plain: np.ndarray
    mirror: np.ndarray
    digest: np.ndarray
    blank: np.ndarray
    bad: list[tuple[int, str, str]]

    def __len__(self) -> int:
        return len(self.plain)

    @property
    def readable(self) -> np.ndarray:
        """(N,) bool: the picture was decoded."""
        good = np.ones(len(self), dtype=bool)
        good[[row for row, *_ in self.bad]] = False
        return good

    @property
    def comparable(self) -> np.ndarray:
        """(N,) bool: decoded, and not blank."""
        return self.readable & ~self.blank


class NearPairs(NamedTuple):
    """Pairs of near-duplicates, each once, sorted. a < b: (P,) int64 rows. distance: (P,) int64 bits.

    mirrored: (P,) bool, the mirror image is nearer than the picture itself.
    """

    a: np.ndarray
    b: np.ndarray
    distance: np.ndarray
    mirrored: np.ndarray


def join_hashes(parts: Sequence[Hashes]) -> Hashes:
    """The hashes of several lists of pictures, one after the other."""
    starts = np.cumsum([0, *(len(part) for part in parts)]).tolist()
    bad = [(start + row, *rest) for start, part in zip(starts, parts, strict=False) for row, *rest in part.bad]
    names = ("plain", "mirror", "digest", "blank")
    return Hashes(*(np.concatenate([getattr(part, name) for part in parts]) for name in names), bad)


def dct_hash(grey: np.ndarray) -> np.ndarray:
    """The 64-bit hashes (N,) uint64 of (N, 32, 32) uint8 grey pictures."""
    if grey.shape[1:] != (SIDE, SIDE) or grey.dtype != np.uint8:
        raise ValueError(f"grey pictures must be (N, {SIDE}, {SIDE}) uint8, not {grey.shape} {grey.dtype}")
    # whole numbers below 2^50 in float64: exact in whatever order the machine adds them up
    low = (_BASIS @ grey.astype(np.float64) @ _BASIS.T).reshape(len(grey), LOW * LOW)
    median = np.partition(low[:, 1:], (LOW * LOW - 1) // 2, axis=1)[:, (LOW * LOW - 1) // 2]
    low[:, 0] = 0.0
    bits = np.packbits(low > median[:, None], axis=1)
    return np.ascontiguousarray(bits).view(">u8").astype(np.uint64).ravel()


def _basis() -> np.ndarray:
    """The first rows of the orthonormal DCT-II matrix (8, 32) as whole numbers, 2^18 times the true values."""
    k, n = np.arange(LOW)[:, None], np.arange(SIDE)[None]
    rows = np.sqrt(2.0 / SIDE) * np.cos(np.pi * (2 * n + 1) * k / (2 * SIDE))
    rows[0] /= np.sqrt(2.0)
    return np.rint(rows * 2**18)


_BASIS = _basis()


def grey_square(image: Image.Image) -> np.ndarray:
    """What is hashed of an RGB picture: (32, 32) uint8."""
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def hash_images(
    pictures: Source | Sequence[str | Path], *, workers: int = 2, advance: Callable[[int], object] | None = None
) -> Hashes:
    """Hashes of the pictures of a source, or of the files of a list. Rows that share a file are decoded once.

    workers: threads (decoding releases the interpreter). advance: called with the number of rows just done.
    """
    if isinstance(pictures, Sequence):
        names, load = [str(path) for path in pictures], lambda row: decode_image(pictures[row])
    else:
        # of other sources (faces cut out of one file) a name does not settle the picture
        names = pictures.column("file_name") if isinstance(pictures, FolderSource) else range(len(pictures))
        load = pictures.load
    first: dict = {}
    owner = np.array([first.setdefault(name, row) for row, name in enumerate(names)], dtype=np.int64)
    todo, place, rows_of = np.unique(owner, return_inverse=True, return_counts=True)
    chunks = [slice(start, start + _CHUNK) for start in range(0, len(todo), _CHUNK)]
    parts = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for chunk, part in zip(chunks, pool.map(lambda own: _hash_some(load, todo[own]), chunks), strict=True):
            parts.append(part)
            if advance:
                advance(int(rows_of[chunk].sum()))
    if not parts:
        none = np.zeros(0, np.uint64)
        return Hashes(none, none, none, np.zeros(0, bool), [])
    plain, mirror, digest, blank = (
        np.concatenate(column)[place] for column in zip(*(p[0] for p in parts), strict=True)
    )
    reasons = {row: (path, reason) for part in parts for row, path, reason in part[1]}
    bad = [(row, *reasons[own]) for row, own in enumerate(owner.tolist()) if own in reasons]
    return Hashes(plain, mirror, digest, blank, bad)


def _hash_some(load: Callable[[int], Image.Image], rows: np.ndarray) -> tuple[tuple[np.ndarray, ...], list]:
    grey = np.zeros((len(rows), SIDE, SIDE), np.uint8)
    digest, bad = np.zeros(len(rows), np.uint64), []
    for i, row in enumerate(rows.tolist()):
        try:
            image = load(row)
        except BadImage as error:
            bad.append((row, error.path, error.reason))
            continue
        grey[i] = grey_square(image)
        pixels = hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=8).digest()
        digest[i] = int.from_bytes(pixels, "big")
    spans = grey.reshape(len(rows), -1)
    blank = np.ptp(spans, axis=1) < BLANK_RANGE
    unread = np.isin(rows, [row for row, *_ in bad])
    plain, mirror = (np.where(unread, 0, dct_hash(side)).astype(np.uint64) for side in (grey, grey[:, :, ::-1]))
    return (plain, mirror, digest, blank & ~unread), bad


def near_pairs(hashes: Hashes, distance: int) -> NearPairs:
    """All pairs of comparable pictures at a distance of at most `distance` bits, 0..16, exactly."""
    rows = np.flatnonzero(hashes.comparable)
    codes = np.concatenate([hashes.plain[rows], hashes.mirror[rows]])
    values, place = np.unique(codes, return_inverse=True)
    by_value = np.argsort(place, kind="stable")  # occurrences of each value, one after the other
    start = np.searchsorted(place[by_value], np.arange(len(values) + 1))
    left, right, bits = hamming_pairs(values, distance)
    same = np.flatnonzero(np.diff(start) > 1)
    left, right = np.concatenate([left, same]), np.concatenate([right, same])
    bits = np.concatenate([bits, np.zeros(len(same), np.int64)])
    pair, i, j = _products(start, left, right)
    i, j, bits = by_value[i], by_value[j], bits[pair]
    mirrored = (i >= len(rows)) | (j >= len(rows))
    both = (i >= len(rows)) & (j >= len(rows))
    a, b = rows[i % max(1, len(rows))], rows[j % max(1, len(rows))]
    a, b = np.minimum(a, b), np.maximum(a, b)
    kept = (a < b) & ~both
    a, b, bits, mirrored = a[kept], b[kept], bits[kept], mirrored[kept]
    order = np.lexsort((mirrored, bits, b, a))
    a, b, bits, mirrored = a[order], b[order], bits[order], mirrored[order]
    nearest = np.ones(len(a), dtype=bool)  # the first of each pair is its nearest, plain before mirrored
    nearest[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    return NearPairs(a[nearest], b[nearest], bits[nearest], mirrored[nearest])


def _products(start: np.ndarray, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For pairs of groups (left, right), group g being start[g]:start[g + 1]: pair number, member, other member."""
    sizes = np.diff(start)
    counts = sizes[left] * sizes[right]
    pair = np.repeat(np.arange(len(left)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    width = sizes[right][pair]
    return pair, start[left][pair] + within // width, start[right][pair] + within % width


def hamming_pairs(codes: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs i < j of (N,) uint64 codes that differ in at most `distance` bits: i, j, the bits, sorted.

    Multi-index hashing (Norouzi et al., arXiv 1307.2982): of distance + k bands of bits, k stay untouched, so codes
    that agree in some choice of k bands are compared, and no others. k is chosen by the number of codes.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"distance {distance} is out of range: 0 to {MAX_DISTANCE} bits")
    found = [_in_buckets(codes, mask, distance) for mask in _masks(distance, len(codes))]
    i, j = (np.concatenate(part) for part in zip(*found, strict=True))
    keys = np.unique(i * np.int64(max(1, len(codes))) + j)
    i, j = np.divmod(keys, max(1, len(codes)))
    return i, j, popcount(codes[i] ^ codes[j])


def _masks(distance: int, codes: int) -> Iterator[np.uint64]:
    """The bits that must agree, for each choice of bands."""

    def cost(kept: int) -> float:
        agreeing = 64 * kept / (distance + kept)
        return comb(distance + kept, kept) * (codes * log2(codes + 2) + codes * codes / 2 ** (agreeing + 1))

    kept = min((1, 2, 3, 4), key=cost)
    edges = [round(64 * band / (distance + kept)) for band in range(distance + kept + 1)]
    bands = [(1 << high) - (1 << low) for low, high in pairwise(edges)]
    for chosen in combinations(bands, kept):
        yield np.uint64(sum(chosen))


def _in_buckets(codes: np.ndarray, mask: np.uint64, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs i < j within the distance among the codes that agree in the bits of `mask`."""
    key = codes & mask
    order = np.argsort(key, kind="stable")
    key, sorted_codes = key[order], codes[order]
    change = np.flatnonzero(key[1:] != key[:-1]) + 1
    edges = np.concatenate([[0], change, [len(key)]])
    end = np.repeat(edges[1:], np.diff(edges))  # of the bucket each place lies in
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    places, step = np.flatnonzero(np.arange(len(key)) + 1 < end), 1
    while len(places):  # every place with its next neighbour in the bucket, then the one after, ...
        near = places[popcount(sorted_codes[places] ^ sorted_codes[places + step]) <= distance]
        found.append((order[near], order[near + step]))
        step += 1
        places = places[places + step < end[places]]
    one, other = (np.concatenate(part) for part in zip(*found, strict=True))
    return np.minimum(one, other), np.maximum(one, other)


def popcount(codes: np.ndarray) -> np.ndarray:
    """The number of bits set in each of (N,) uint64 codes, (N,) int64."""
    if hasattr(np, "bitwise_count"):  # NumPy 2
        return np.bitwise_count(codes).astype(np.int64)
    return _BITS_OF_16[np.ascontiguousarray(codes).view(np.uint16).reshape(-1, 4)].sum(1, dtype=np.int64)


_BITS_OF_16 = np.array([value.bit_count() for value in range(1 << 16)], dtype=np.uint8)
