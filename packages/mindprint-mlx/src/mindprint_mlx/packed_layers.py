"""Linear layers, embeddings and stacks of experts over packed weights, in place of the layers of mlx-lm's classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import mlx.core as mx
from mlx import nn

from mindprint_mlx.imports import mlx_lm_module
from mindprint_mlx.packed import Format, multiply, multiply_gathered, take_rows

PACKED = "packed"
"""The attribute of a layer that holds the tensors of its weight by role, as parameters `<path>.packed.<role>`."""


class _PackedModule(nn.Module):
    packed: dict[str, mx.array]
    _format: Format

    @property
    def weight(self) -> mx.array:
        """Stand in for the weight: right in shape and dtype, NaN in value, and one element in memory.

        Code that asks a layer for its sizes gets them. Code that computes with it shall be noticed.
        """
        return mx.broadcast_to(mx.array(math.nan, self._format.dtype), self._format.shape)


class PackedLinear(_PackedModule, nn.Linear):  # type: ignore[override]  # its weight is read-only
    """`x W^T + bias` for a packed W, which is frozen."""

    def __call__(self, x: mx.array) -> mx.array:
        product = multiply(x, self._format, self.packed)
        return product + self["bias"] if "bias" in self else product


class PackedEmbedding(_PackedModule, nn.Embedding):  # type: ignore[override]  # its weight is read-only
    """A table of which only the rows that are asked for become numbers."""

    def __call__(self, x: mx.array) -> mx.array:
        return take_rows(self._format, self.packed, x)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the products with all rows, as the head of a tied model."""
        return multiply(x, self._format, self.packed)


def packed_layer(layer: nn.Module, packed: Format, parts: Mapping[str, mx.array]) -> nn.Module | None:
    """Return a layer over a packed weight in place of a dense one, None if there is none for its class."""
    kinds = {nn.Linear: PackedLinear, nn.Embedding: PackedEmbedding, _experts(): _packed_experts()}
    kind: Any = kinds.get(type(layer))
    if kind is None:
        return None
    # Its own initialisation would make a dense weight.
    made: Any = kind.__new__(kind)
    nn.Module.__init__(made)
    made._format = packed
    made.packed = dict(parts)
    if "bias" in layer:
        made.bias = layer.bias
    return made  # type: ignore[no-any-return]


def _experts() -> Any:
    return mlx_lm_module("models.switch_layers").SwitchLinear


@cache
def _packed_experts() -> Any:
    class PackedExperts(_PackedModule, _experts()):  # type: ignore[misc]
        """A matrix for each expert, of which each row of `x` is multiplied with the one that `indices` name."""

        def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
            product = multiply_gathered(x, self._format, self.packed, indices, is_sorted=sorted_indices)
            return product + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else product

    return PackedExperts
