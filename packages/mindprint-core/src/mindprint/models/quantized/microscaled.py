"""The microscaled formats `mxfp4`, `mxfp8` and `nvfp4`: small floats in groups that share a scale of 8 bits.

The elements and scales are those of the Open Compute Project (OCP Microscaling Formats, version 1.0, 2023): E2M1 and
E4M3 elements, E8M0 scales. `nvfp4` has E4M3 scales, and may have one more scale for the whole tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Float32
from mindprint.models.quantized.affine import unpack

Microscaled = Literal["mxfp4", "mxfp8", "nvfp4"]

GROUP_SIZES: Mapping[str, int] = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}

GLOBAL = 448.0 * 6.0
"""The greatest E4M3 scale times the greatest E2M1 element. MLX's `global_scale` is the greatest value of a tensor, so
that its elements are to be multiplied by the quotient of the two."""


def _e2m1() -> Float32:
    positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    return np.concatenate([positive, -positive])


def _e4m3() -> Float32:
    codes = np.arange(256)
    exponent, fraction = (codes >> 3) & 15, codes & 7
    # Exponent 0 has no leading one: 2^-6 times the fraction alone. The bias is 7, and the fraction has 3 bits.
    values = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * np.exp2(exponent - 10.0))
    values[(codes & 127) == 127] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)


def _e8m0() -> Float32:
    # An exponent alone, bias 127. The last code is NaN. 2^-127 is subnormal in float32, and exact.
    values: Float32 = np.exp2(np.minimum(np.arange(256), 254) - 127.0).astype(np.float32)
    values[255] = np.nan
    return values


E2M1, E4M3, E8M0 = _e2m1(), _e4m3(), _e8m0()
"""The values of all codes."""


def scales_of(scales: NDArray[np.uint8], method: Microscaled, global_scale: Float32 | None = None) -> Float32:
    """Return the scales as numbers. `global_scale` holds that of the whole tensor, and is multiplied into them."""
    table = E4M3 if method == "nvfp4" else E8M0
    values: Float32 = table[scales]
    if global_scale is not None:
        values *= global_scale / np.float32(GLOBAL)
    return values


def dequantize(packed: NDArray[Any], scales: Float32, method: Microscaled) -> Float32:
    """Return the values `[..., n]` of packed rows, float32, given `scales_of` their scales `[..., n / group]`."""
    elements = unpack(packed, 8) if method == "mxfp8" else unpack(packed, 4)
    values = (E4M3 if method == "mxfp8" else E2M1)[elements]
    grouped = values.reshape(*values.shape[:-1], -1, GROUP_SIZES[method])
    with np.errstate(over="ignore"):
        grouped *= scales[..., None]
    return grouped.reshape(values.shape)
