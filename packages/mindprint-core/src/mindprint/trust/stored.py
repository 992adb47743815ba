"""Tensors of two files side by side, in blocks that fit in memory whatever their size."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from mindprint.contract import Float32
from mindprint.models.quantized import QuantizedWeight, StoredTensor, read_rows
from mindprint.models.tensor_files import FLOATS, TensorInfo, from_float32, to_float32

BLOCK_ELEMENTS = 2**22
BLOCK_BYTES = 2**24


def blocks(base: StoredTensor, found: StoredTensor) -> Iterator[tuple[int, Float32, Float32]]:
    """Yield row blocks of two tensors of one shape: first row, and values in both, `[rows, columns]`."""
    rows, columns = math.prod(found.shape[:-1]), found.shape[-1] if found.shape else 1
    # Blocks bound the memory, whatever the size of the model.
    step = max(1, BLOCK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        yield start, read_rows(base, start, stop), read_rows(found, start, stop)


def rounded(values: Float32, dtype: str) -> Float32:
    """Return values as they are after being written in `dtype`."""
    return to_float32(from_float32(values, dtype), dtype)


def same_values(found: StoredTensor, base: StoredTensor) -> bool:
    """Return whether two tensors hold the same values: bit for bit, or after rounding to the found one's dtype."""
    if found.shape != base.shape:
        return False
    if isinstance(found, QuantizedWeight):
        return isinstance(base, QuantizedWeight) and _same_parts(found, base)
    if isinstance(base, TensorInfo) and found.dtype == base.dtype:
        return _same_bytes(found, base)
    if found.dtype not in FLOATS or base.dtype not in FLOATS:
        return False
    return all(np.array_equal(rounded(weight, found.dtype), other) for _, weight, other in blocks(base, found))


def _same_parts(found: QuantizedWeight, base: QuantizedWeight) -> bool:
    """Return whether two weights have the same packed elements and scales."""
    if found.scheme != base.scheme or found.parts.keys() != base.parts.keys():
        return False
    return all(_same_bytes(info, base.parts[role]) for role, info in found.parts.items())


def _same_bytes(found: TensorInfo, base: TensorInfo) -> bool:
    size = found.end - found.start
    if size != base.end - base.start:
        return False
    with found.file.open("rb") as one, base.file.open("rb") as other:
        one.seek(found.start)
        other.seek(base.start)
        # Bytes in one dtype: no conversion, and NaN compares as well.
        lengths = (min(BLOCK_BYTES, size - at) for at in range(0, size, BLOCK_BYTES))
        return all(one.read(length) == other.read(length) for length in lengths)
