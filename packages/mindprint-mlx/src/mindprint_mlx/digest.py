"""A cheap digest of the base's weights as they are in memory."""

from __future__ import annotations

import hashlib

import mlx.core as mx
import numpy as np

from mindprint_mlx.arrays import parameters_of
from mindprint_mlx.model import Handle

WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}


def base_digest(handle: Handle) -> str:
    """Hex digest of every base parameter: name, shape, dtype and two weighted sums of its bits; one pass over each.

    Sums wrap at 2^32 and every weight is odd, so that a change of any one element always changes them.
    """
    digest = hashlib.sha256()
    with handle.in_use(adapter=False):
        for name, values in sorted(parameters_of(handle.module)):
            facts = (name, values.shape, str(values.dtype), _sums(values))
            digest.update(repr(facts).encode())
    return digest.hexdigest()


def _sums(values: mx.array) -> tuple[int, ...]:
    bits = values.reshape(-1).view(WORDS[values.dtype.size]).astype(mx.uint32)
    odd = 2 * mx.arange(bits.size, dtype=mx.uint32) + 1
    # The second weight is Knuth's multiplicative hash of the first: what cancels in one sum does not in the other.
    sums = mx.stack([mx.sum(bits * odd), mx.sum(bits * (odd * odd * 2654435761))])
    return tuple(np.array(sums).tolist())
