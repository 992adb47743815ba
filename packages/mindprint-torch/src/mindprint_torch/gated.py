"""Gated feed-forward blocks with LoRA, `down(silu(gate(x)) * up(x))`, as one differentiable function.

Of autograd's chain of such a block five arrays `[tokens, inner]` stay in memory for the backward pass, and each of its
steps writes new ones. Here two stay, the products of gate and up. The rest is computed again from them, in place.
Injecting an adapter measures that a block computes this and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mindprint_torch.elementwise import launching_on, triton_kernels
from mindprint_torch.lora import is_fusible, narrow_product
from mindprint_torch.packed import Weight, add_multiplied_back, multiply, multiply_back
from mindprint_torch.packed_layers import frozen_weight

PROBE_TOKENS = 4


def fuse_gated(network: nn.Module) -> None:
    """Make every gated block whose three layers have plain LoRA compute in one piece."""
    for block in _candidates(network):
        with launching_on(block.gate_proj.weight.device):
            is_gated = _is_gated(block)
        if is_gated:
            block.forward = partial(_forward, block)


def _candidates(network: nn.Module) -> Iterator[Any]:
    for module in network.modules():
        layers: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if all(is_fusible(layer) and layer.bias is None for layer in layers):
            yield module


@torch.no_grad()
def _is_gated(block: Any) -> bool:
    # Names alone do not say which activation a block has, or what else it computes: so both ways are compared.
    weight = block.gate_proj.weight
    values = torch.linspace(-3, 3, PROBE_TOKENS * weight.shape[1], device=weight.device, dtype=weight.dtype)
    x = values.sin().view(1, PROBE_TOKENS, -1)
    try:
        expected = block(x)
    except Exception:  # noqa: BLE001  a block that takes more than hidden states may fail in any way
        return False
    if not isinstance(expected, Tensor) or expected.shape != x.shape:
        return False
    tolerance = 1e-4 if weight.dtype == torch.float32 else 5e-2
    return bool((_gated(block, x) - expected).abs().max() <= tolerance * expected.abs().max())


def _forward(block: Any, x: Tensor) -> Tensor:
    layers = (block.gate_proj.lora, block.up_proj.lora, block.down_proj.lora)
    if any(not layer.enabled or layer.dropout.training for layer in layers):
        return type(block).forward(block, x)  # type: ignore[no-any-return]
    return _gated(block, x)


def _gated(block: Any, x: Tensor) -> Tensor:
    modules = (block.gate_proj, block.up_proj, block.down_proj)
    weights = tuple(frozen_weight(module) for module in modules)
    factors = [factor for module in modules for factor in (module.lora.lora_A, module.lora.lora_B)]
    scales = tuple(module.lora.scale for module in modules)
    output: Tensor = GatedBlock.apply(x, scales, weights, *factors)  # type: ignore[no-untyped-call]
    return output


class GatedBlock(torch.autograd.Function):
    """`down(silu(gate(x)) * up(x))` for `x` `[..., in]`, and A and B of gate, up and down in turn.

    Their frozen weights, packed or not, come as a tuple.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scales: tuple[float, float, float],
        weights: tuple[Weight, Weight, Weight],
        *factors: Tensor,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        gate_w, up_w, down_w = weights
        gate_a, gate_b, up_a, up_b, down_a, down_b = (factor.to(x.dtype) for factor in factors)
        # Gate and up read the same input: one product with both of their A's behind one another.
        low = narrow_product(rows, torch.cat([gate_a, up_a]))
        gate_low, up_low = low.split([len(gate_a), len(up_a)], dim=1)
        gate, up = (x.new_empty(len(rows), weight.shape[0]) for weight in (gate_w, up_w))
        multiply(rows, gate_w, None, gate)
        gate.addmm_(gate_low, gate_b.T, alpha=scales[0])
        multiply(rows, up_w, None, up)
        up.addmm_(up_low, up_b.T, alpha=scales[1])
        inner = _inner_product(gate, up)
        down_low = narrow_product(inner, down_a)
        # Filled through a view, not returned as one: a model may change it in place (see `LoraProduct`).
        output = torch.empty_like(x, memory_format=torch.contiguous_format)
        flat = output.view(rows.shape)
        multiply(inner, down_w, None, flat)
        flat.addmm_(down_low, down_b.T, alpha=scales[2])
        ctx.save_for_backward(rows, low, gate, up, down_low, *factors)
        ctx.scales, ctx.weights = scales, weights
        return output

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        rows, low, gate, up, down_low, *factors = ctx.saved_tensors
        gate_w, up_w, down_w = ctx.weights
        gate_a, gate_b, up_a, up_b, down_a, down_b = (factor.to(rows.dtype) for factor in factors)
        gate_scale, up_scale, down_scale = ctx.scales
        gradient = outer[0].reshape(rows.shape)
        # Each of the three layers differentiates as in `LoraProduct`; `by_` names a gradient by the thing after it.
        by_down_low = narrow_product(gradient, down_b.T).mul_(down_scale)
        by_inner = multiply_back(gradient, down_w).addmm_(by_down_low, down_a)
        by_down_b = (down_low.T @ gradient).mul_(down_scale).T
        by_gate, by_up, by_down_a = _inner_gradients(gate, up, by_inner, by_down_low)
        del by_inner
        ranks = [len(gate_a), len(up_a)]
        by_gate_low = narrow_product(by_gate, gate_b.T).mul_(gate_scale)
        by_up_low = narrow_product(by_up, up_b.T).mul_(up_scale)
        by_low = torch.cat([by_gate_low, by_up_low], dim=1)
        both_a = torch.cat([gate_a, up_a])
        by_gate_a, by_up_a = (by_low.T @ rows).split(ranks)
        gate_low, up_low = low.split(ranks, dim=1)
        by_gate_b = (gate_low.T @ by_gate).mul_(gate_scale).T
        by_up_b = (up_low.T @ by_up).mul_(up_scale).T
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = multiply_back(by_gate, gate_w)
            add_multiplied_back(by_x, by_up, up_w)
            by_x = by_x.addmm_(by_low, both_a).view(outer[0].shape)
        by_factors = (by_gate_a, by_gate_b, by_up_a, by_up_b, by_down_a, by_down_b)
        return by_x, None, None, *(gradient.float() for gradient in by_factors)


def _inner_product(gate: Tensor, up: Tensor) -> Tensor:
    kernels = triton_kernels(gate.device)
    if kernels is not None:
        return kernels.gate_product(gate, up)  # type: ignore[no-any-return]
    return functional.silu(gate).mul_(up)


def _inner_gradients(gate: Tensor, up: Tensor, by_inner: Tensor, by_down_low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by gate, by up and by down's A. `by_inner` is overwritten."""
    # Arrays of the inner size are overwritten as soon as they have served: they are the largest.
    kernels = triton_kernels(gate.device)
    if kernels is not None:
        by_gate, by_up = kernels.gate_gradients(gate, up, by_inner)
        return by_gate, by_up, by_down_low.T @ by_inner
    activated = functional.silu(gate)
    by_down_a = by_down_low.T @ (activated * up)
    by_up = activated.mul_(by_inner)
    return torch.ops.aten.silu_backward(by_inner.mul_(up), gate), by_up, by_down_a
