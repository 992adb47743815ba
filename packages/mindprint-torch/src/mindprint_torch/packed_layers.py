"""Linear layers and embeddings over packed weights, under the classes that transformers looks for."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mindprint_torch.packed import PackedWeight, Weight, multiply, multiply_back


class _PackedModule(nn.Module):
    """A layer whose weight is packed. It has no parameter `weight`, so that nothing dense is ever made for it."""

    packed: PackedWeight | None

    @property
    def weight(self) -> Tensor:
        """Return a substitute for the weight, of its shape, dtype and device. It is NaN, and one element in memory.

        `lora.py` and transformers ask a layer's weight where it is and of which dtype. A product with this one is NaN.
        """
        shape = self._weight_shape()
        packed = self.packed
        if packed is None:
            standin = torch.empty(shape, device="meta")
        else:
            standin = torch.full((), math.nan, dtype=packed.dtype, device=packed.device).expand(shape)
        # transformers draws random numbers for weights that it did not load. Nobody may draw into this one.
        standin._is_hf_initialized = True  # type: ignore[attr-defined]
        return standin

    def _weight_shape(self) -> tuple[int, int]:
        raise NotImplementedError


class PackedLinear(_PackedModule, nn.Linear):  # type: ignore[override]  # its weight is read-only
    """`x W^T + bias` for a packed W, which is frozen."""

    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """Return the product, `[..., out]`."""
        output: Tensor = _Product.apply(x, self.packed, self.bias)  # type: ignore[no-untyped-call]
        return output


class PackedEmbedding(_PackedModule, nn.Embedding):  # type: ignore[override]  # its weight is read-only
    """A table of which only the rows that are asked for become numbers."""

    def _weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the rows of token ids, `[..., width]`."""
        assert self.packed is not None, "filled when the base is loaded"
        return self.packed.rows_at(tokens.flatten()).view(*tokens.shape, self.embedding_dim)


class _Product(torch.autograd.Function):
    """`x W^T + bias` of which nothing is kept for the backward pass but W, packed. W and the bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        rows = x.reshape(-1, x.shape[-1])
        output = x.new_empty(*x.shape[:-1], weight.shape[0])
        multiply(rows, weight, bias, output.view(-1, weight.shape[0]))
        return output

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        gradient = outer[0].reshape(-1, outer[0].shape[-1])
        return multiply_back(gradient, ctx.weight).view(*outer[0].shape[:-1], -1), None, None


def frozen_weight(layer: Any) -> Weight:
    """Return a base layer's weight, packed if it is."""
    packed: PackedWeight | None = getattr(layer, "packed", None)
    weight: Weight = layer.weight if packed is None else packed
    return weight


def can_pack(layer: nn.Module) -> bool:
    """Return whether a layer computes nothing but a product or a lookup, which the classes here do as well."""
    # An embedding may scale its rows afterwards (Gemma 3). Its own `forward` then calls the one of `PackedEmbedding`.
    return type(layer) is nn.Linear or isinstance(layer, nn.Embedding)


def prepare_packed(layer: Any) -> None:
    """Turn a layer into one over a packed weight, to be given as `packed`. Its dense weight is dropped."""
    del layer._parameters["weight"]
    layer.packed = None
    layer.__class__ = _packed_class(type(layer))  # type: ignore[arg-type]  # a class is hashable


@cache
def _packed_class(kind: Any) -> type[nn.Module]:
    if kind is nn.Linear:
        return PackedLinear
    if kind is nn.Embedding:
        return PackedEmbedding
    # The class's own `forward` comes first and finds the lookup behind itself.
    return type(f"Packed{kind.__name__}", (kind, PackedEmbedding), {"__module__": kind.__module__})
