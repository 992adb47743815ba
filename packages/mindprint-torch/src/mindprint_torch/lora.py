"""LoRA on linear layers and on the embedding: the base product, and the low-rank one added in place.

The factors are a part of the layer that they adapt, which computes with them from then on. It stays what it was: its
class, its attributes, its frozen weight and the names of its weights. PEFT wraps it in another layer instead,
and computes in eight steps, most of which write an array of the output's size. Here the low-rank products go straight
into the base's. The input and its product with A, `[tokens, r]`, are all that is kept for the backward pass.

PEFT's package is not needed, and is not imported: where bitsandbytes is installed it also loads that and torch's
compiler, for 1.5 seconds of every command. `tests/test_lora.py` compares with PEFT's layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mindprint.adapter.initial import factor_shapes
from mindprint.contract import AdapterSite, LoraConfig
from mindprint_torch.packed import Weight, multiply, multiply_back
from mindprint_torch.packed_layers import PackedLinear, frozen_weight

NAME = "lora"
"""The name of the factors in the layer that they adapt."""

FUSED_DTYPES = (torch.float32, torch.bfloat16)
"""float16 takes the low-rank products in float32, as PEFT does: their gradients could overflow."""

NARROW_ROWS = 64
"""For fewer rows than this, it makes no difference which way round a narrow product is computed."""


class LoraLayer(nn.Module):
    """The factors of one site: `lora_A` `[r, in]` and `lora_B` `[out, r]`, float32.

    A stack of experts has one pair for each: `[experts, r, in]` and `[experts, out, r]`. `scale` multiplies their
    product. `dropout` acts on the input of A.
    """

    def __init__(self, site: AdapterSite, config: LoraConfig, device: torch.device) -> None:
        super().__init__()
        a, b = factor_shapes(site, config.rank(site.name))
        self.lora_A = nn.Parameter(torch.zeros(a, device=device))
        self.lora_B = nn.Parameter(torch.zeros(b, device=device))
        self.scale = config.scale(site.name)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.enabled = True
        # Dropout is on within a step alone.
        self.eval()

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B."""
        return self.lora_A, self.lora_B


def attach(module: nn.Module, site: AdapterSite, config: LoraConfig) -> LoraLayer:
    """Put factors of zero on a linear layer or an embedding, and let it compute with them."""
    weight: Any = module.weight
    layer = LoraLayer(site, config, weight.device)
    before = module.forward
    module.add_module(NAME, layer)
    if site.kind == "embedding":
        module.forward = partial(_embed, module, layer, before)
    elif is_fusible(module):
        module.forward = partial(_multiply, module, layer, before)
    else:
        module.forward = partial(_add_product, layer, before)
    return layer


def is_fusible(module: Any) -> bool:
    """Return whether this is a plain linear layer with LoRA, packed or not, that can be computed in one piece."""
    plain = type(module) in (nn.Linear, PackedLinear) and module.weight.dtype in FUSED_DTYPES
    return plain and isinstance(getattr(module, NAME, None), LoraLayer)


def _multiply(module: Any, layer: LoraLayer, before: Any, x: Tensor) -> Tensor:
    """Compute a linear layer in one piece."""
    if not layer.enabled:
        return before(x)  # type: ignore[no-any-return]
    # Dropout acts on the input of A alone, so that the base's product and A's no longer share it.
    if layer.dropout.training:
        return _add_product(layer, before, x)
    factors = (x, frozen_weight(module), module.bias, layer.lora_A, layer.lora_B, layer.scale)
    if not torch.is_grad_enabled():
        # The same sums without autograd's bookkeeping, which takes longer than the low-rank products of one token.
        return lora_product(*factors)[0]
    output: Tensor = LoraProduct.apply(*factors)  # type: ignore[no-untyped-call]
    return output


def _add_product(layer: LoraLayer, before: Any, x: Tensor) -> Tensor:
    """Compute any linear layer, transposed ones too, and add the low-rank product in float32."""
    output: Tensor = before(x)
    if not layer.enabled:
        return output
    low = functional.linear(layer.dropout(x.to(layer.lora_A.dtype)), layer.lora_A)
    return (output + functional.linear(low, layer.lora_B) * layer.scale).to(output.dtype)


def _embed(module: Any, layer: LoraLayer, before: Any, tokens: Tensor) -> Tensor:
    """Look tokens up in the table and in A, and add the product of the latter with B."""
    output: Tensor = before(tokens)
    if not layer.enabled:
        return output
    low = functional.embedding(tokens, layer.lora_A.T, module.padding_idx)
    change = (low @ layer.lora_B.T) * layer.scale
    # Gemma's table multiplies its rows after the lookup, and those of a merged table would be multiplied as well.
    factor = getattr(module, "embed_scale", None)
    if factor is not None:
        change = change * torch.as_tensor(factor, dtype=module.weight.dtype, device=change.device).to(change.dtype)
    return (output + change).to(output.dtype)


def narrow_product(rows: Tensor, factor: Tensor) -> Tensor:
    """Return `rows @ factor.T` `[n, r]`, for a factor `[r, width]` with a small r."""
    # A product with few columns takes a CPU's libraries up to four times as long as one with few rows, unless their
    # number is a multiple of 16.
    if rows.device.type == "cpu" and len(factor) % 16 and len(rows) >= NARROW_ROWS:
        return (factor @ rows.T).T
    return rows @ factor.T


def lora_product(
    x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `x W^T + bias + scale (x A^T) B^T`, and the two that its gradients need: `x` flat, and `x A^T`."""
    a, b = a.to(x.dtype), b.to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    low = narrow_product(rows, a)
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
        by_low = narrow_product(gradient, b.T).mul_(ctx.scale)
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = multiply_back(gradient, ctx.weight).addmm_(by_low, a).view(*outer[0].shape[:-1], -1)
        # Both as [r, ...]: a product with few rows is much faster than one with few columns.
        by_a = by_low.T @ rows
        by_b = (low.T @ gradient).mul_(ctx.scale).T
        return by_x, None, None, by_a.float(), by_b.float(), None
