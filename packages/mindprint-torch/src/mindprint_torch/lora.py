"""LoRA layers in one piece: the base product, the low-rank one added in place, and a backward pass for nothing else.

PEFT's own layer computes the same in eight steps, most of which write an array of the output's size: the low-rank
product, its scaled copy, the sum, and their gradients. Here the low-rank products go straight into the base's, and what
is kept for the backward pass is the input and its product with A, `[tokens, r]`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, TypeGuard

import torch
from peft.tuners import lora
from torch import Tensor, nn

NAME = "default"
FUSED_DTYPES = (torch.float32, torch.bfloat16)
"""float16 stays with PEFT, which takes the low-rank products in float32: their gradients could overflow."""


def fuse(layers: Iterable[lora.LoraLayer]) -> None:
    """Have every layer that is a plain linear layer with plain LoRA answer in one piece.

    Transposed layers, embeddings and other dtypes keep PEFT's own way.
    """
    for layer in layers:
        if is_fusible(layer):
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]


def is_fusible(layer: Any) -> TypeGuard[lora.Linear]:
    """Whether this is PEFT's layer around a plain linear layer, with plain LoRA."""
    if type(layer) is not lora.Linear:
        return False
    base = layer.get_base_layer()
    return type(base) is nn.Linear and base.weight.dtype in FUSED_DTYPES and NAME not in layer.lora_variant


def _forward(layer: lora.Linear, x: Tensor) -> Tensor:
    base: Any = layer.base_layer
    if layer.disable_adapters:
        return base(x)  # type: ignore[no-any-return]
    if layer.lora_dropout[NAME].training:
        return type(layer).forward(layer, x)
    a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    answer: Tensor = LoraProduct.apply(x, base.weight, base.bias, a, b, layer.scaling[NAME])  # type: ignore[no-untyped-call]
    return answer


class LoraProduct(torch.autograd.Function):
    """`x W^T + bias + scale (x A^T) B^T` for `x` `[..., in]`, a frozen `W` `[out, in]`, A `[r, in]` and B `[out, r]`.

    All products are in the dtype of `x`; A, B and their gradients are float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a, b = a.to(x.dtype), b.to(x.dtype)
        low = rows @ a.T
        answer = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        answer.addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scale = scale
        return answer.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, weight, a, b = ctx.saved_tensors
        gradient = outer[0].reshape(-1, outer[0].shape[-1])
        by_low = (gradient @ b).mul_(ctx.scale)
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = (gradient @ weight).addmm_(by_low, a).view(*outer[0].shape[:-1], -1)
        # Both as [r, ...]: a product with few rows is much faster than one with few columns.
        by_a = by_low.T @ rows
        by_b = (low.T @ gradient).mul_(ctx.scale).T
        return by_x, None, None, by_a.float(), by_b.float(), None
