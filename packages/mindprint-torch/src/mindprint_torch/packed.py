"""Weights that stay packed: a few bits for each element, and the arithmetic that turns them into numbers.

A packed weight is never expanded as a whole if it is large. Its rows become numbers a block at a time, are used in a
product, and are dropped: in the forward pass, and again in the backward pass. Values are computed in float32 by the
formulas of `mindprint.models.quantized`, bit for bit, and rounded once to the dtype of the computation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mindprint.models.quantized import bitsandbytes, microscaled
from mindprint_torch.elementwise import triton_kernels

ELEMENTS_AT_ONCE = 1 << 22
"""Elements of a weight that are numbers at one time: 16 MiB in float32, which is much less than activations take."""

ELEMENTS_AT_ONCE_CUDA = 1 << 26
"""The same on a GPU, 128 MiB in bfloat16: products of fewer rows do not fill it."""

ELEMENTS_IN_CACHE = 1 << 18
"""Elements that go through all steps of the arithmetic together on a CPU: the steps then meet in its cache."""

NESTED_PARTS = ("nested_absmax", "nested_quant_map", "nested_offset")
"""The tensors that double quantization adds to a weight of bitsandbytes."""

Rows = slice | Tensor
"""Some rows of a matrix: those between two numbers, or those at int64 indices `[n]`."""


class PackedWeight(ABC):
    """A frozen matrix `[out, in]`. `parts` are its tensors under their names in files, such as `scales`."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, parts: Mapping[str, Tensor]) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.parts = dict(parts)

    @property
    def device(self) -> torch.device:
        return self.parts["weight"].device

    @abstractmethod
    def values(self, rows: Rows) -> Tensor:
        """Return some rows as numbers, float32 `[n, in]`. The memory is new, so that it may be overwritten."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows between two numbers, `[stop - start, in]`, in the dtype of the computation."""
        kernels = triton_kernels(self.device)
        unpacked = None if kernels is None else self._unpacked(kernels, start, stop)
        if unpacked is not None:
            return unpacked
        if self.device.type != "cpu":
            return self.values(slice(start, stop)).to(self.dtype)
        numbers = torch.empty((stop - start, self.shape[1]), dtype=self.dtype, device=self.device)
        together = max(ELEMENTS_IN_CACHE // self.shape[1], 1)
        for first in range(start, stop, together):
            last = min(first + together, stop)
            numbers[first - start : last - start] = self.values(slice(first, last))
        return numbers

    def rows_at(self, indices: Tensor) -> Tensor:
        """Return the rows at `indices` `[n]`, `[n, in]`, in the dtype of the computation."""
        return self.values(indices).to(self.dtype)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the matrix as numbers, a block of rows at a time, each with its place."""
        at_once = ELEMENTS_AT_ONCE_CUDA if self.device.type == "cuda" else ELEMENTS_AT_ONCE
        together = max(at_once // self.shape[1], 1)
        for start in range(0, self.shape[0], together):
            stop = min(start + together, self.shape[0])
            yield slice(start, stop), self.rows(start, stop)

    def scales_are_finite(self) -> bool:
        """Return whether no scale is NaN or infinite."""
        floats = (part for part in self.parts.values() if part.is_floating_point())
        return all(bool(part.isfinite().all()) for part in floats)

    def _unpacked(self, kernels: Any, start: int, stop: int) -> Tensor | None:  # noqa: ARG002  for formats that have one
        """Return the rows between two numbers by one of `triton_kernels`, None if it has none for this format."""
        return None

    def _part(self, name: str, rows: Rows) -> Tensor:
        part = self.parts[name]
        return part[rows] if isinstance(rows, slice) else part.index_select(0, rows)


class AffineWeight(PackedWeight):
    """MLX's affine format, `scale * level + bias` for the level of each element.

    Parts: `weight` int32 `[out, in * bits / 32]`, and `scales` and `biases` `[out, groups]` in any float dtype.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, parts: Mapping[str, Tensor], bits: int) -> None:
        super().__init__(shape, dtype, parts)
        self._bits = bits

    def values(self, rows: Rows) -> Tensor:
        """Return some rows as numbers."""
        scales, biases = (self._part(name, rows).float().unsqueeze(-1) for name in ("scales", "biases"))
        levels = _levels(self._part("weight", rows), self._bits)
        grouped = levels.view(*scales.shape[:2], -1)
        # Two roundings, as in core's definition. `addcmul` may fuse them into one.
        grouped.mul_(scales).add_(biases)
        return levels

    def _unpacked(self, kernels: Any, start: int, stop: int) -> Tensor:
        words, scales, biases = (self.parts[name][start:stop] for name in ("weight", "scales", "biases"))
        return kernels.unpack_affine(words, scales, biases, self._bits, self.dtype)  # type: ignore[no-any-return]


class MicroscaledWeight(PackedWeight):
    """`mxfp4`, `mxfp8` and `nvfp4`: small floats in groups that share a scale.

    Parts: `weight` int32, `scales` uint8 `[out, groups]`, and for some `nvfp4` a float32 `global_scale`.
    """

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, parts: Mapping[str, Tensor], method: microscaled.Microscaled
    ) -> None:
        super().__init__(shape, dtype, parts)
        self._method = method
        device = self.device
        self._scales = torch.from_numpy(microscaled.E4M3 if method == "nvfp4" else microscaled.E8M0).to(device)
        self._bytes = _byte_table(method, device)
        factor = self.parts.get("global_scale")
        self._factor = None if factor is None else factor.reshape(()) / microscaled.GLOBAL

    def values(self, rows: Rows) -> Tensor:
        """Return some rows as numbers."""
        codes = self._part("scales", rows)
        scales = self._scales[codes.int()]
        if self._factor is not None:
            scales *= self._factor
        elements = _looked_up(self._bytes, self._part("weight", rows).view(torch.uint8)).view(len(codes), -1)
        elements.view(*scales.shape, -1).mul_(scales.unsqueeze(-1))
        return elements

    def scales_are_finite(self) -> bool:
        """Return whether no scale is NaN or infinite."""
        return bool(self._scales[self.parts["scales"].int()].isfinite().all())


class BlockWeight(PackedWeight):
    """bitsandbytes' NF4 and FP4: numbers of entries in a table, in blocks of consecutive elements that share a scale.

    Parts: `weight` uint8, `absmax`, `quant_map` `[16]`, and under double quantization `nested_absmax`,
    `nested_quant_map` `[256]` and `nested_offset`. Blocks do not know rows.
    """

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, parts: Mapping[str, Tensor], size: int, nested_size: int
    ) -> None:
        super().__init__(shape, dtype, parts)
        self._size, self._nested_size = size, nested_size
        # The first element of a byte is in its upper half.
        codes = torch.arange(256, device=self.device)
        self._bytes = self.parts["quant_map"][torch.stack([codes >> 4, codes & 15], dim=1)].contiguous()

    def values(self, rows: Rows) -> Tensor:
        """Return some rows as numbers."""
        columns = self.shape[1]
        if columns % self._size:
            return self._values_across_blocks(rows)
        packed = self.parts["weight"].view(self.shape[0], columns // 2)
        packed = packed[rows] if isinstance(rows, slice) else packed.index_select(0, rows)
        elements = _looked_up(self._bytes, packed).view(len(packed), columns)
        scales = self._block_scales(_places(rows, columns // self._size, self.device))
        elements.view(*scales.shape, -1).mul_(scales.unsqueeze(-1))
        return elements

    def _unpacked(self, kernels: Any, start: int, stop: int) -> Tensor:
        parts, width = self.parts, self.shape[1]
        nested = tuple(parts[name] for name in NESTED_PARTS) if self._nested_size else None
        return kernels.unpack_blocks(  # type: ignore[no-any-return]
            parts["weight"], parts["quant_map"], parts["absmax"], nested, start * width, (stop - start, width),
            (self._size, self._nested_size), self.dtype,
        )  # fmt: skip

    def _values_across_blocks(self, rows: Rows) -> Tensor:
        """Compute as `values` where a block may begin within a row: element by element, which takes longer."""
        places = _places(rows, self.shape[1], self.device)
        codes = self.parts["weight"].view(-1)[places // 2]
        codes = torch.where(places % 2 == 0, codes >> 4, codes & 15)
        return self.parts["quant_map"][codes.int()] * self._block_scales(places // self._size)

    def _block_scales(self, blocks: Tensor) -> Tensor:
        """Return the scales of blocks by their numbers, float32 in the shape of the numbers."""
        scales = self.parts["absmax"][blocks]
        if not self._nested_size:
            return scales.float()
        outer = self.parts["nested_absmax"][blocks // self._nested_size]
        return (self.parts["nested_quant_map"][scales.int()] * outer).add_(self.parts["nested_offset"])


class Int8Weight(PackedWeight):
    """bitsandbytes' int8 weights, with a scale for each row.

    Activations are not rounded to int8, as LLM.int8 does: the weight is what its elements and scales say.
    Parts: `weight` int8 `[out, in]`, `SCB` float32 `[out]`.
    """

    def values(self, rows: Rows) -> Tensor:
        """Return some rows as numbers."""
        elements = self._part("weight", rows).float()
        return elements.mul_(self._part("SCB", rows).unsqueeze(-1)).mul_(float(bitsandbytes.INT8_STEP))


Weight = Tensor | PackedWeight
"""A frozen weight `[out, in]`, packed or not."""


def multiply(rows: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    """Write `rows @ weight.T + bias` into `out` `[n, out]`, for rows `[n, in]`."""
    if isinstance(weight, PackedWeight):
        for place, block in weight.blocks():
            multiply(rows, block, None if bias is None else bias[place], out[:, place])
    elif bias is None:
        torch.mm(rows, weight.T, out=out)
    else:
        torch.addmm(bias, rows, weight.T, out=out)


def multiply_back(gradient: Tensor, weight: Weight) -> Tensor:
    """Return `gradient @ weight` `[n, in]`, for a gradient `[n, out]`."""
    if isinstance(weight, Tensor):
        return gradient @ weight
    product = gradient.new_zeros(len(gradient), weight.shape[1])
    add_multiplied_back(product, gradient, weight)
    return product


def add_multiplied_back(total: Tensor, gradient: Tensor, weight: Weight) -> None:
    """Add `gradient @ weight` to `total` `[n, in]`, for a gradient `[n, out]`."""
    if isinstance(weight, Tensor):
        total.addmm_(gradient, weight)
        return
    for place, block in weight.blocks():
        total.addmm_(gradient[:, place], block)


def _places(rows: Rows, width: int, device: torch.device) -> Tensor:
    """Return the numbers of things of which each row has `width`, int64 `[rows, width]`."""
    if isinstance(rows, slice):
        return torch.arange(rows.start * width, rows.stop * width, device=device).view(-1, width)
    return rows.unsqueeze(-1) * width + torch.arange(width, device=device)


_LOOKUPS: Mapping[int, tuple[int, int, int]] = {
    1: (4, 1, 4), 2: (4, 1, 8), 3: (4, 3, 12), 4: (2, 1, 8), 5: (2, 5, 10), 6: (2, 3, 12), 8: (1, 1, 8)
}  # fmt: skip
"""By the bits of a level: how many are looked up at once, the bytes after which places repeat, and the index's bits."""


def _levels(packed: Tensor, bits: int) -> Tensor:
    """Return the unsigned levels of packed rows, float32 `[rows, in]`.

    A row is one stream of bits, the lowest of each byte first. Several neighbouring levels are looked up at once: one
    gather of 8 or 16 bytes is faster than a shift, a mask, a conversion and a strided write for each level.
    """
    data = packed.view(torch.uint8)
    together, size, width = _LOOKUPS[bits]
    if bits == 8:
        return data.float()
    table = _level_table(bits, together, packed.device)
    if width == 8:
        return _looked_up(table, data).view(len(packed), -1)
    words = data.view(len(packed), -1, size)
    indices = torch.empty((*words.shape[:2], 8 * size // width), dtype=torch.int32, device=packed.device)
    for index in range(indices.shape[2]):
        byte, offset = divmod(index * width, 8)
        pair = words[..., byte].int()
        if offset + width > 8:
            pair = pair | words[..., byte + 1].int() << 8
        indices[..., index] = pair >> offset & (1 << width) - 1
    return _looked_up(table, indices).view(len(packed), -1)


@cache
def _level_table(bits: int, together: int, device: torch.device) -> Tensor:
    """Return the levels that each index holds, float32 `[2 ^ (bits * together), together]`."""
    indices = torch.arange(1 << bits * together, dtype=torch.int32)
    levels = [indices >> bits * place & (1 << bits) - 1 for place in range(together)]
    return torch.stack(levels, dim=1).float().to(device)


@cache
def _byte_table(method: microscaled.Microscaled, device: torch.device) -> Tensor:
    """Return the elements in each byte of a microscaled format, float32 `[256, elements of a byte]`."""
    codes = torch.arange(256)
    if method == "mxfp8":
        return torch.from_numpy(microscaled.E4M3).view(256, 1).to(device)
    return torch.from_numpy(microscaled.E2M1)[torch.stack([codes & 15, codes >> 4], dim=1)].contiguous().to(device)


def _looked_up(table: Tensor, indices: Tensor) -> Tensor:
    """Return `table[indices]`, float32 `[n, columns]`, for a table of 1, 2 or 4 columns."""
    # A row of 8 or 16 bytes is copied as one number of that size. Row by row, the gather takes three times as long.
    whole = table.view({1: torch.float32, 2: torch.float64, 4: torch.complex128}[table.shape[1]]).view(-1)
    return whole.index_select(0, indices.reshape(-1).int()).view(torch.float32).view(-1, table.shape[1])
