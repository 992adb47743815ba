"""Facts of the base's weights on the device that holds them: a cheap digest, and the largest magnitude."""

from __future__ import annotations

import hashlib

import mlx.core as mx
import numpy as np

from mindprint_mlx.arrays import parameters_of, scalar
from mindprint_mlx.model import MlxModel

WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}

WORDS_AT_ONCE = 1 << 22
"""Words that are multiplied at once, which bounds temporary memory to some arrays of 16 MiB."""


def base_digest(model: MlxModel) -> str:
    """Return SHA-256 over each base parameter's name, shape, dtype and two weighted sums of its bits.

    Sums wrap at 2^32 and every weight is odd, so that a change of any one element always changes them.
    """
    digest = hashlib.sha256()
    with model.in_use(adapter=False):
        for name, values in sorted(parameters_of(model.module)):
            facts = (name, values.shape, str(values.dtype), _sums(values))
            digest.update(repr(facts).encode())
    return digest.hexdigest()


def largest_weight(model: MlxModel) -> float | None:
    """Return the largest magnitude among the base's weights, NaN if one is NaN, None if they are packed."""
    with model.in_use(adapter=False):
        weights = [values for _, values in parameters_of(model.module) if values.size]
        if not all(mx.issubdtype(values.dtype, mx.floating) for values in weights):
            return None
        # Both ends instead of `abs`, which would write an array of a weight's size. They pass NaN on.
        ends = [end.astype(mx.float32) for values in weights for end in (mx.max(values), mx.min(values))]
        return scalar(mx.max(mx.abs(mx.stack(ends))))


def _sums(values: mx.array) -> tuple[int, ...]:
    words = values.reshape(-1).view(WORDS[values.dtype.size])
    total = mx.zeros(2, mx.uint32)
    for start in range(0, words.size, WORDS_AT_ONCE):
        bits = words[start : start + WORDS_AT_ONCE].astype(mx.uint32)
        odd = 2 * mx.arange(start, start + bits.size, dtype=mx.uint32) + 1
        # MLX has no 64-bit products on every device, so that there are two sums of 32 bits. The second weight is
        # Knuth's multiplicative hash of the first: changes that cancel in one sum do not cancel in the other.
        total = total + mx.stack([mx.sum(bits * odd), mx.sum(bits * (odd * odd * 2654435761))])
        # Evaluated part by part: a large embedding would otherwise need several arrays of its size.
        mx.eval(total)
    return tuple(np.array(total).tolist())
