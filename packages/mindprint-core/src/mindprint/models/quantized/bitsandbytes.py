"""bitsandbytes' formats: NF4 and FP4 (Dettmers et al. 2023, arXiv 2305.14314) and LLM.int8 (arXiv 2208.07339).

The 4-bit formats see a weight as one long row. Two elements are in a byte, the first in the upper half. An element is
the number of an entry in a table of 16, and a block of 64 elements shares a scale, which may be quantized itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Float32

INT8_STEP = np.float32(7.874015718698502e-3)
"""1 / 127 as bitsandbytes writes it."""

NF4: Float32 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
"""NF4's values: the quantiles of a normal distribution, scaled to [-1, 1]. Files have the table as well."""

FP4: Float32 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(
    12
)
"""FP4's values: a sign, two bits of exponent and one of fraction, scaled to [-1, 1]."""


def block_scales(
    absmax: NDArray[np.uint8], nested_absmax: Float32, nested_code: Float32, offset: float, nested_size: int, first: int
) -> Float32:
    """Return the scales of blocks under double quantization, float32.

    Args:
        absmax: The quantized scales of consecutive blocks.
        nested_absmax: The scales of the scales, of the whole weight.
        nested_code: The table of 256 values that quantized scales are numbers in.
        offset: The mean that was taken away before the scales were quantized.
        nested_size: Scales that share one scale.
        first: The number of the first block.
    """
    scales = nested_code[absmax] * nested_absmax[(first + np.arange(len(absmax))) // nested_size]
    scales += np.float32(offset)
    return scales


def dequantize_4bit(packed: NDArray[np.uint8], code: Float32, scales: Float32, group_size: int, skip: int) -> Float32:
    """Return the values of consecutive elements, float32 and flat.

    Args:
        packed: Bytes of whole blocks, or of the beginning of one.
        code: The table of 16 values.
        scales: The scale of each block in `packed`.
        group_size: Elements of a block.
        skip: Elements of the first byte's block that come before `packed`: 0 if it starts with a block.
    """
    pairs = np.empty((packed.size, 2), np.uint8)
    np.right_shift(packed.reshape(-1), 4, out=pairs[:, 0])
    np.bitwise_and(packed.reshape(-1), 15, out=pairs[:, 1])
    values: Float32 = code[pairs.reshape(-1)]
    if skip == 0 and values.size == scales.size * group_size:
        whole = values.reshape(-1, group_size)
        whole *= scales[:, None]
        return whole.reshape(-1)
    values *= scales[(skip + np.arange(values.size)) // group_size]
    return values


def dequantize_int8(elements: NDArray[Any], row_scales: Float32) -> Float32:
    """Return the values `[rows, columns]` of int8 elements and the greatest size `[rows]` of each row (`SCB`)."""
    # In this order of roundings, as in bitsandbytes.
    values = elements.astype(np.float32)
    values *= row_scales[:, None]
    values *= INT8_STEP
    return values
