"""Weights that stay packed: a few bits for each element, and the arithmetic that turns them into numbers.

Values are computed in float32 by the formulas of `mindprint.models.quantized`, bit for bit, and rounded once to the
dtype of the computation. Dense weights are made for a product and dropped after it: in the forward pass, and again in
the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import cast

import mlx.core as mx
import numpy as np

from mindprint.models.quantized import Scheme, bitsandbytes, microscaled

ELEMENTS_AT_ONCE = 1 << 24
"""Elements of a weight that are numbers at one time: 64 MiB in float32, more than any layer but a head usually has."""

Parts = Mapping[str, mx.array]
"""The tensors of a packed weight by role. Each has a row for each row of the weight, except `code` and
`global_scale`.

- `weight`: MLX's formats `uint32 [..., in * bits / 32]`; `nf4` and `fp4` `uint8 [out, in / 2]`; `int8` `[out, in]`.
- `scales`: `[..., groups]`, in the dtype of the files; float32 for bitsandbytes' formats.
- `biases`: of `affine`, as `scales`.
- `code`: the 16 values of `nf4` and `fp4`.
- `global_scale`: of some `nvfp4`.
"""

WITHOUT_ROWS = ("code", "global_scale")


@dataclass(frozen=True)
class Format:
    """A packed weight without its tensors: its scheme, its dense shape, and the dtype that it is computed in.

    `has_kernel` says that MLX multiplies packed weights on this device itself.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    dtype: mx.Dtype
    has_kernel: bool = False

    def values(self, parts: Parts) -> mx.array:
        """Return the numbers of all rows that `parts` have, float32 `[..., in]`."""
        method = self.scheme.method
        if method == "affine":
            return _affine(parts, self.scheme.bits, self.scheme.group_size)
        if method in ("nf4", "fp4"):
            # The first element of a byte is in its upper half.
            pairs = parts["code"][mx.array(_HALVES[:, [1, 0]])]
            return _scaled(_looked_up(pairs, parts["weight"]), parts["scales"])
        if method == "int8":
            # Two products in this order, as in core's definition.
            return parts["weight"].astype(mx.float32) * parts["scales"] * float(bitsandbytes.INT8_STEP)
        return self._microscaled(parts)

    def dense(self, parts: Parts) -> mx.array:
        """Return the same numbers, rounded to the dtype of the computation."""
        return self.values(parts).astype(self.dtype)

    def scales_are_finite(self, parts: Parts) -> bool:
        """Return whether no scale is NaN or infinite."""
        scales = parts["scales"]
        if scales.dtype == mx.uint8:
            scales = mx.take(_scale_table(self.scheme.method), scales)
        floats = [scales, *(parts[name] for name in ("biases", "code", "global_scale") if name in parts)]
        return all(bool(mx.all(mx.isfinite(values)).item()) for values in floats)

    def _microscaled(self, parts: Parts) -> mx.array:
        method = self.scheme.method
        scales = mx.take(_scale_table(method), parts["scales"])
        if (factor := parts.get("global_scale")) is not None:
            # One for each matrix of a stack, or for the whole weight.
            scales = scales * (factor.reshape(-1, *[1] * (scales.ndim - 1)) / microscaled.GLOBAL)
        content = parts["weight"].view(mx.uint8)
        if method == "mxfp8":
            return _scaled(mx.take(_table("e4m3"), content), scales)
        return _scaled(_looked_up(_table("e2m1"), content), scales)


def multiply(x: mx.array, packed: Format, parts: Parts) -> mx.array:
    """Return `x @ W.T` `[..., out]` for `x` `[..., in]`. Only `x` is differentiated."""
    if packed.has_kernel:
        return _kernel_product(x, packed, parts)

    # Differentiating a plain product would keep the dense weight of every layer until the backward pass.
    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        products: list[mx.array] = []
        for rows in _blocks(packed):
            block = packed.dense(_rows_of(parts, rows, after=products[-1] if products else x))
            products.append(x @ block.T)
        return products[0] if len(products) == 1 else mx.concatenate(products, axis=-1)

    @product.vjp
    def product_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        total: mx.array | None = None
        for rows in _blocks(packed):
            ahead = cotangent if rows is None else cotangent[..., rows]
            share = ahead @ packed.dense(_rows_of(parts, rows, after=cotangent if total is None else total))
            total = share if total is None else total + share
        return mx.zeros_like(x) if total is None else total

    return cast(mx.array, product(x))


def multiply_gathered(x: mx.array, packed: Format, parts: Parts, indices: mx.array, *, is_sorted: bool) -> mx.array:
    """Return products of rows with matrices of a stack `[experts, out, in]`, chosen by `indices`, as `mx.gather_mm`."""

    def gathered(x: mx.array) -> mx.array:
        dense = packed.dense(parts).swapaxes(-1, -2)
        return mx.gather_mm(x, dense, rhs_indices=indices, sorted_indices=is_sorted)

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return gathered(x)

    @product.vjp
    def product_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return mx.vjp(gathered, [x], [cotangent])[1][0]

    return cast(mx.array, product(x))


def take_rows(packed: Format, parts: Parts, rows: mx.array) -> mx.array:
    """Return the rows of a table at indices `[...]`, `[..., in]`, in the dtype of the computation."""
    return packed.dense({role: values if role in WITHOUT_ROWS else values[rows] for role, values in parts.items()})


def _kernel_product(x: mx.array, packed: Format, parts: Parts) -> mx.array:
    scheme = packed.scheme
    product = mx.quantized_matmul(
        x,
        parts["weight"],
        scales=parts["scales"],
        biases=parts.get("biases"),
        transpose=True,
        group_size=scheme.group_size,
        bits=scheme.bits,
        mode=scheme.method,
    )
    return product.astype(mx.result_type(x.dtype, packed.dtype))


def _blocks(packed: Format) -> Iterator[slice | None]:
    """Yield blocks of rows that become numbers together, None for all rows at once."""
    rows, columns = packed.shape
    together = max(ELEMENTS_AT_ONCE // columns, 1)
    if rows <= together:
        yield None
        return
    for start in range(0, rows, together):
        yield slice(start, min(start + together, rows))


def _rows_of(parts: Parts, rows: slice | None, after: mx.array) -> Parts:
    """Return the parts of some rows, which become numbers when the array `after` is computed, and not before."""
    chosen = {role: values if rows is None or role in WITHOUT_ROWS else values[rows] for role, values in parts.items()}
    # Packed tensors are there from the beginning: without an order, MLX may expand those of many layers first.
    return dict(zip(chosen, mx.depends(list(chosen.values()), [after]), strict=True))


def _affine(parts: Parts, bits: int, group_size: int) -> mx.array:
    # Scales of 16 bits would otherwise round each product, and then the sum.
    scales, biases = (parts[role].astype(mx.float32) for role in ("scales", "biases"))
    if bits == 4 and _known_to_mlx(group_size):
        return mx.dequantize(parts["weight"], scales, biases, group_size=group_size, bits=bits)
    # For other sizes MLX's own function takes two to five times as long on a CPU, or knows no group of that size.
    elements = _levels(parts["weight"], bits)
    grouped = mx.unflatten(elements, -1, (-1, group_size))
    return (grouped * scales[..., None] + biases[..., None]).reshape(elements.shape)


@cache
def _known_to_mlx(group_size: int) -> bool:
    try:
        content, scales = mx.zeros((1, group_size // 8), mx.uint32), mx.zeros((1, 1))
        mx.eval(mx.dequantize(content, scales, scales, group_size=group_size, bits=4))
    except (ValueError, RuntimeError):
        return False
    return True


def _scaled(elements: mx.array, scales: mx.array) -> mx.array:
    grouped = mx.unflatten(elements, -1, (scales.shape[-1], -1))
    return (grouped * scales[..., None]).reshape(elements.shape)


def _levels(packed: mx.array, bits: int) -> mx.array:
    """Return the unsigned levels of packed rows, float32 `[..., in]`.

    A row is one stream of bits, the lowest of each byte first. Two neighbouring levels are looked up at once: one
    gather of 8 bytes is faster than shifts, masks and conversions for each level.
    """
    content = packed.view(mx.uint8)
    if bits == 8:
        return content.astype(mx.float32)
    if bits == 4:
        return _looked_up(_level_pairs(bits), content)
    # The fewest bytes after which a pair begins with a byte again.
    width = 2 * bits
    period = width // int(np.gcd(width, 8))
    words = mx.unflatten(content, -1, (-1, period))
    indices = []
    for offset in range(0, 8 * period, width):
        first, shift = divmod(offset, 8)
        index = words[..., first].astype(mx.uint16)
        if shift + width > 8:
            index = index | words[..., first + 1].astype(mx.uint16) << 8
        indices.append((index >> shift) & ((1 << width) - 1))
    return _looked_up(_level_pairs(bits), mx.stack(indices, axis=-1).reshape(*packed.shape[:-1], -1))


def _looked_up(pairs: mx.array, indices: mx.array) -> mx.array:
    """Return both numbers of each pair `[n, 2]` at `indices` `[..., k]`, float32 `[..., 2 * k]`."""
    if mx.default_device() == mx.Device(mx.cpu):
        # A pair is copied as one number of 8 bytes, which takes two thirds of the time.
        return mx.take(pairs.reshape(-1).view(mx.complex64), indices).view(mx.float32)
    return mx.take(pairs, indices, axis=0).flatten(-2)


_HALVES = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=-1)
"""The lower and the upper half of each byte."""


@cache
def _level_pairs(bits: int) -> mx.array:
    indices = np.arange(1 << 2 * bits)
    return mx.array(np.stack([indices & ((1 << bits) - 1), indices >> bits], axis=-1).astype(np.float32))


_TABLES: Mapping[str, Callable[[], np.ndarray]] = {
    "e2m1": lambda: microscaled.E2M1[_HALVES],
    "e4m3": lambda: microscaled.E4M3,
    "e8m0": lambda: microscaled.E8M0,
}


@cache
def _table(name: str) -> mx.array:
    return mx.array(_TABLES[name]())


def _scale_table(method: str) -> mx.array:
    return _table("e4m3" if method == "nvfp4" else "e8m0")
