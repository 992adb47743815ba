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


def uniform(shape: tuple[int, ...], seed: int, *labels: str | int) -> NDArray[np.float64]:
    """Return uniform numbers in [0, 1) with 53 random bits."""
    bits = random_bits(int(np.prod(shape)), seed, *labels)
    # A float64 has 53 bits of precision: the upper 53 bits of a word, times 2^-53, are exact.
    return ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)
