"""Random draws as pure functions of a seed and of their purpose.

Counter-based generators keyed by purpose: nothing carries state from one draw to the next, so a run resumes from a
cursor alone and every backend sees the same draws. Only Philox's raw stream is used, which NumPy keeps stable across
versions and platforms (NEP 19), not `Generator`'s methods, which it does not.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
from numpy.typing import NDArray


def random_bits(count: int, seed: int, *labels: str | int) -> NDArray[np.uint64]:
    """Return `count` uniform 64-bit words for one purpose, which `labels` name."""
    # JSON keeps labels apart. Joined as plain text, ("ab", "c") and ("a", "bc") would share their draws. A key of
    # Philox has 128 bits, and so has the digest.
    key = hashlib.blake2b(json.dumps([seed, *labels]).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)


def permutation(count: int, seed: int, *labels: str | int) -> NDArray[np.int64]:
    """Return a uniform permutation of `range(count)`."""
    # Sorting random keys is uniform but for ties, and among 64-bit words a tie is as good as impossible.
    return np.argsort(random_bits(count, seed, *labels), kind="stable")


FEISTEL_ROUNDS = 8
"""Twice the four rounds from which on a Feistel network of random functions is a pseudorandom permutation."""


def permuted(places: NDArray[np.int64], count: int, seed: int, *labels: str | int) -> NDArray[np.int64]:
    """Return the numbers at some places of a keyed permutation of `range(count)`, without drawing the others.

    A Feistel network (Luby & Rackoff 1988, How to construct pseudorandom permutations from pseudorandom functions)
    permutes all numbers of as many bits as `count` needs. Where it leaves the range it is applied again until it is
    back, which permutes the range itself (cycle walking; Black & Rogaway 2002, Ciphers with arbitrary finite domains,
    section 3). Fewer than half of the numbers are outside, so a place takes two applications or fewer on average.
    """
    bits = max(2, (count - 1).bit_length())
    keys = random_bits(FEISTEL_ROUNDS, seed, "feistel", *labels)
    values = np.asarray(places).astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _feistel(values[outside], bits, keys)
        outside = outside[values[outside] >= np.uint64(count)]
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Permute numbers of `bits` bits. With an odd number of bits the halves differ by one and take turns."""
    right_bits = bits // 2
    for key in keys:
        left_bits = bits - right_bits
        left, right = values >> np.uint64(right_bits), values & np.uint64(2**right_bits - 1)
        # The right half moves to the left unchanged, so every round can be undone: none maps two numbers to one.
        changed = left ^ (mixed(right + key) & np.uint64(2**left_bits - 1))
        values = (right << np.uint64(left_bits)) | changed
        right_bits = left_bits
    return values


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finaliser of SplitMix64 (Steele, Lea & Flood 2014): each bit of the result depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniform(shape: tuple[int, ...], seed: int, *labels: str | int) -> NDArray[np.float64]:
    """Return uniform numbers in [0, 1) with 53 random bits."""
    bits = random_bits(int(np.prod(shape)), seed, *labels)
    # A float64 has 53 bits of precision: the upper 53 bits of a word, times 2^-53, are exact.
    return ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)
