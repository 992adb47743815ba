"""LoRA layers in one piece: the base product, the low-rank one added in place, and a backward pass for nothing else.

PEFT's own layer computes the same in eight steps, most of which write an array of the output's size: the low-rank
product, its scaled copy, the sum, and their gradients. Here the low-rank products go straight into the base's. The
input and its product with A, `[tokens, r]`, are all that is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, TypeGuard

import torch
from peft.tuners import lora
from torch import Tensor, nn

from mindprint_torch.packed import Weight, multiply, multiply_back
from mindprint_torch.packed_layers import PackedLinear, frozen_weight

NAME = "default"
"""PEFT's name for the one adapter that a model has."""

FUSED_DTYPES = (torch.float32, torch.bfloat16)
"""float16 stays with PEFT, which takes the low-rank products in float32: their gradients could overflow."""


def fuse_lora(layers: Iterable[lora.LoraLayer]) -> None:
    """Make every plain linear layer with plain LoRA, packed or not, compute in one piece.

    Transposed layers, embeddings and other dtypes keep PEFT's own forward pass.
    """
    for layer in layers:
        if is_fusible(layer):
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]


def is_fusible(layer: Any) -> TypeGuard[lora.Linear]:
    """Return whether this is PEFT's layer around a plain linear layer, with plain LoRA."""
    if type(layer) is not lora.Linear:
        return False
    base = layer.get_base_layer()
    return (
        type(base) in (nn.Linear, PackedLinear) and base.weight.dtype in FUSED_DTYPES and NAME not in layer.lora_variant
    )


def _forward(layer: lora.Linear, x: Tensor) -> Tensor:
    base: Any = layer.base_layer
    if layer.disable_adapters:
        return base(x)  # type: ignore[no-any-return]
    # Dropout acts on the input of A alone, so that the base's product and A's no longer share it: PEFT's way then.
    if layer.lora_dropout[NAME].training:
        return type(layer).forward(layer, x)
    a: Any = layer.lora_A[NAME].weight
    b: Any = layer.lora_B[NAME].weight
    if not torch.is_grad_enabled():
        # The same sums without autograd's bookkeeping, which takes longer than the low-rank products of one token.
        return lora_product(x, frozen_weight(base), base.bias, a, b, layer.scaling[NAME])[0]
    output: Tensor = LoraProduct.apply(x, frozen_weight(base), base.bias, a, b, layer.scaling[NAME])  # type: ignore[no-untyped-call]
    return output


def lora_product(
    x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `x W^T + bias + scale (x A^T) B^T`, and the two that its gradients need: `x` flat, and `x A^T`."""
    a, b = a.to(x.dtype), b.to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    low = rows @ a.T
    # The output is allocated in its final shape and filled through a view. Were it returned as a view, autograd
    # would refuse models that change it in place, as OLMo does with `clip_qkv` and Gemma 3n with its keys.
    output = x.new_empty(*x.shape[:-1], weight.shape[0])
    flat = output.view(-1, weight.shape[0])
    multiply(rows, weight, bias, flat)
    flat.addmm_(low, b.T, alpha=scale)
    return output, rows, low


class LoraProduct(torch.autograd.Function):
    """`x W^T + bias + scale (x A^T) B^T` for `x` `[..., in]`, a frozen `W` `[out, in]`, A `[r, in]` and B `[out, r]`.

    All products are in the dtype of `x`. A, B and their gradients are float32. A packed W stays packed in between.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        output, rows, low = lora_product(x, weight, bias, a, b, scale)
        ctx.save_for_backward(rows, low, a, b)
        # Not through autograd, which saves tensors alone. The weight is frozen, and so nobody changes it in between.
        ctx.weight = weight
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        # With y = x W^T + s (x A^T) B^T and g = dL/dy: dL/dx = g W + s (g B) A, dL/dA = s (g B)^T x and
        # dL/dB = s g^T (x A^T). `by_low` is s (g B), which two of them share.
        rows, low, a, b = ctx.saved_tensors
        gradient = outer[0].reshape(-1, outer[0].shape[-1])
        by_low = (gradient @ b).mul_(ctx.scale)
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = multiply_back(gradient, ctx.weight).addmm_(by_low, a).view(*outer[0].shape[:-1], -1)
        # Both as [r, ...]: a product with few rows is much faster than one with few columns.
        by_a = by_low.T @ rows
        by_b = (low.T @ gradient).mul_(ctx.scale).T
        return by_x, None, None, by_a.float(), by_b.float(), None
