"""Stateless randomness: every number is a function of a key such as (seed, epoch, sample index).

There is no generator state to save, so a run draws the same numbers with any number of
workers and processes, and resumes bit for bit from the middle of an epoch.
"""

import hashlib

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence

_MASK32 = 0xFFFFFFFF
_ROUNDS = 6  # of the Feistel network; four already leave no pattern (Luby and Rackoff, 1988)


def rng_for(*key: int | str) -> np.random.Generator:
    """A NumPy generator keyed by `key`, e.g. `rng_for(seed, epoch, index, "crop")`.

    Equal keys give equal streams on every platform; different keys give independent ones.
    """
    return np.random.Generator(np.random.Philox(_Key(key)))


class _Key(ISeedSequence):
    """Hands `_key128(key)` to a bit generator; given as an argument, NumPy would first ask the system for a seed."""

    def __init__(self, key: tuple):
        self.words = np.frombuffer(_digest(key), dtype="<u8")

    def generate_state(self, n_words: int, dtype=np.uint32) -> np.ndarray:
        return self.words


def torch_seed(*key: int | str) -> int:
    """A 63-bit seed for `torch.manual_seed` keyed by `key`."""
    return _key128(key) >> 65


def _key128(key: tuple) -> int:
    return int.from_bytes(_digest(key), "little")


def _digest(key: tuple) -> bytes:
    text = "\0".join(f"{type(part).__name__[0]}{part}" for part in key)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def permuted(places: np.ndarray, length: int, *key: int | str) -> np.ndarray:
    """What a permutation of range(length) keyed by `key` has at `places` (n,): (n,) int64. It is never laid out.

    A Feistel network over the next power of four, followed until it comes back into the range (Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002): one pass in the mean of 1 to 4. Its round function is the finalizer
    of SplitMix64.
    """
    half = np.uint64((max(length - 1, 1).bit_length() + 1) // 2)
    mask, rounds = np.uint64((1 << int(half)) - 1), rng_for(*key).integers(0, 2**64, _ROUNDS, dtype=np.uint64)
    values = np.array(places, dtype=np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> half, values[outside] & mask
        for word in rounds:
            left, right = right, left ^ (_mix64(right ^ word) & mask)
        values[outside] = (left << half) | right
        outside = outside[values[outside] >= length]
    return values.astype(np.int64)


def _mix64(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform_for(seed: int, epoch: int, index: torch.Tensor, count: int, purpose: str = "uniform") -> torch.Tensor:
    """Uniform numbers in [0, 1), a row for each sample, computed where `index` lives.

    index: (N,) int64 sample indices. purpose: other words give other, independent numbers. Returns (N, count) float32
    with 24 random bits each. Row i depends only on (seed, epoch, index[i], purpose) and is the same on every device: it
    is a counter-based generator, a chain of 32-bit integer hashes (the finalizer `lowbias32` by
    C. Wellons, constants 0x7feb352d and 0x846ca68b) in int64 arithmetic.
    """
    base = _key128((seed, epoch, purpose))
    low, high = base & _MASK32, (base >> 32) & _MASK32
    row = hash32((index & _MASK32) ^ low)
    row = hash32((row + (index >> 32) + high) & _MASK32)
    counter = torch.arange(1, count + 1, device=index.device, dtype=torch.int64)
    cell = hash32((row[:, None] + counter * 0x9E3779B9) & _MASK32)
    cell = hash32((cell ^ row[:, None]) & _MASK32)
    return (cell >> 8).to(torch.float32) * (1.0 / (1 << 24))


def hash32(x: torch.Tensor) -> torch.Tensor:
    """A one-to-one hash of 32-bit numbers, int64 in 0 .. 2^32 - 1, that leaves no pattern."""
    x = x ^ (x >> 16)
    x = _mul32(x, 0x7FEB352D)
    x = x ^ (x >> 15)
    x = _mul32(x, 0x846CA68B)
    return x ^ (x >> 16)


def _mul32(x: torch.Tensor, constant: int) -> torch.Tensor:
    # 32-bit product by 16-bit halves, so that no intermediate leaves the 63 positive bits
    low = x * (constant & 0xFFFF)
    high = (x * (constant >> 16)) & 0xFFFF
    return (low + (high << 16)) & _MASK32
