"""Random draws as pure functions of a seed and of what the draw is for.

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
    """`count` uniform 64-bit words for one purpose, which `labels` name."""
    key = hashlib.blake2b(json.dumps([seed, *labels]).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)


def permutation(count: int, seed: int, *labels: str | int) -> NDArray[np.int64]:
    """A uniform permutation of `range(count)`."""
    return np.argsort(random_bits(count, seed, *labels), kind="stable")


def uniform(shape: tuple[int, ...], seed: int, *labels: str | int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 random bits."""
    bits = random_bits(int(np.prod(shape)), seed, *labels)
    return ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)
