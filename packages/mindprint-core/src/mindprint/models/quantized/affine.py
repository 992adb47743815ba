"""MLX's affine format: elements of 1 to 8 bits, and a scale and a bias for each group of consecutive elements.

A row is a stream of bits, lowest first, that ignores the borders of bytes and words: element i is in the bits from
`i * bits` on. Its value is `scale * q + bias` (mlx.core.dequantize), here always in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Float32
from mindprint.models.tensor_files import from_float32, to_float32

# Elements of 3, 5 and 6 bits cross bytes. After that number of bytes the pattern repeats.
_PERIODS = {3: 3, 5: 5, 6: 3}


def unpack(packed: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Return the elements `[..., n]` of packed rows of any integer dtype."""
    # The files are little-endian, as is every machine that MLX runs on, so bytes are in the order of the stream.
    content = np.ascontiguousarray(packed).view(np.uint8)
    lead = content.shape[:-1]
    if bits == 8:
        return content
    if bits not in _PERIODS:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        elements: NDArray[np.uint8] = (content[..., None] >> shifts) & np.uint8((1 << bits) - 1)
        return elements.reshape(*lead, -1)
    period = _PERIODS[bits]
    groups = content.reshape(*lead, -1, period)
    words = np.zeros(groups.shape[:-1], np.uint64)
    for at in range(period):
        words |= groups[..., at].astype(np.uint64) << np.uint64(8 * at)
    shifts = np.arange(0, 8 * period, bits, dtype=np.uint64)
    wide = (words[..., None] >> shifts) & np.uint64((1 << bits) - 1)
    return wide.astype(np.uint8).reshape(*lead, -1)


def pack(elements: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Return rows of elements `[..., n]` packed, 32 bits a word: the inverse of `unpack`."""
    single = np.unpackbits(elements[..., None], axis=-1, count=bits, bitorder="little")
    stream = np.packbits(single.reshape(*elements.shape[:-1], -1), axis=-1, bitorder="little")
    return stream.view("<u4")


def dequantize(packed: NDArray[Any], scales: Float32, biases: Float32, bits: int, group_size: int) -> Float32:
    """Return the values `[..., n]` of packed rows, float32.

    Args:
        packed: Rows of packed elements, `[..., n * bits / 32]` words or as many bytes.
        scales: `[..., n / group_size]`. Scales of a narrower dtype are to be cast first, which is exact.
        biases: Likewise.
        bits: Bits of an element.
        group_size: Elements that share a scale and a bias.
    """
    elements = unpack(packed, bits)
    values = elements.astype(np.float32).reshape(*elements.shape[:-1], -1, group_size)
    # Two roundings, as in MLX on a CPU. With scales of 16 bits the product is exact, so that a fused multiplication
    # and addition gives the same number.
    values *= scales[..., None]
    values += biases[..., None]
    return values.reshape(elements.shape)


def quantize(
    values: Float32, bits: int, group_size: int, dtype: str = "F32"
) -> tuple[NDArray[np.uint32], Float32, Float32]:
    """Return packed elements, scales and biases of rows of values, by the rule of `mlx.core.quantize`.

    One end of a group's range is hit exactly, the one of greater size, so that a group's greatest weight survives.
    Scales and biases are rounded to `dtype`, in which they are to be stored, before elements are chosen for them.
    """
    groups = values.reshape(*values.shape[:-1], -1, group_size)
    low, high = groups.min(-1), groups.max(-1)
    steps = np.float32((1 << bits) - 1)
    outer = np.abs(low) > np.abs(high)
    size = np.maximum((high - low) / steps, np.float32(1e-7))
    scales = np.where(outer, size, -size).astype(np.float32)
    edge = np.where(outer, low, high).astype(np.float32)
    # The scale is stretched until the edge is a whole number of steps from 0, so that 0 is on the grid as well.
    count = np.rint(edge / scales)
    whole = count != 0
    scales = np.where(whole, edge / np.where(whole, count, 1), scales).astype(np.float32)
    biases = np.where(whole, edge, 0).astype(np.float32)
    scales, biases = (to_float32(from_float32(part, dtype), dtype) for part in (scales, biases))
    elements = np.rint((groups - biases[..., None]) / scales[..., None]).clip(0, steps).astype(np.uint8)
    return pack(elements.reshape(values.shape), bits), scales, biases
