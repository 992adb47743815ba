"""Tensors of two files side by side, in blocks that fit in memory whatever their size."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from mindprint.contract import Float32
from mindprint.models.tensor_files import FLOATS, TensorInfo, from_float32, to_float32

BLOCK_ELEMENTS = 2**22
BLOCK_BYTES = 2**24


def blocks(base: TensorInfo, found: TensorInfo) -> Iterator[tuple[int, Float32, Float32]]:
    """Yield row blocks of two tensors of one shape: first row, and values in both, `[rows, columns]`."""
    rows, columns = found.shape[0], math.prod(found.shape[1:])
    # Blocks bound the memory, whatever the size of the model.
    step = max(1, BLOCK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        yield start, _rows(base, start, stop, columns), _rows(found, start, stop, columns)


def rounded(values: Float32, dtype: str) -> Float32:
    """Return values as they are after being written in `dtype`."""
    return to_float32(from_float32(values, dtype), dtype)


def same_values(found: TensorInfo, base: TensorInfo) -> bool:
    """Return whether two tensors hold the same values: bit for bit, or after rounding to the found one's dtype."""
    if found.shape != base.shape:
        return False
    if found.dtype == base.dtype:
        return _same_bytes(found, base)
    if found.dtype not in FLOATS or base.dtype not in FLOATS:
        return False
    flat = [info._replace(shape=(math.prod(info.shape), 1)) for info in (base, found)]
    return all(np.array_equal(rounded(weight, found.dtype), other) for _, weight, other in blocks(*flat))


def _rows(info: TensorInfo, start: int, stop: int, columns: int) -> Float32:
    bits = FLOATS[info.dtype]
    with info.file.open("rb") as file:
        file.seek(info.start + start * columns * bits.itemsize)
        values = np.fromfile(file, bits, (stop - start) * columns)
    return to_float32(values, info.dtype).reshape(stop - start, columns)


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
