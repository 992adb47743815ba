"""LoRA on stacks of experts: low-rank products of the tokens that each expert got, and no change of a weight.

PEFT's own way adds `scale * B @ A` of all experts to the stack in each forward pass, and autograd keeps that copy for
the backward pass: as much memory again as the experts have. Here each expert multiplies its own tokens with W, A and B,
as `LoraProduct` does for a linear layer. The input of a stack and its product with A, `[pairs, r]`, are kept.

transformers has several ways to compute the base (`experts_implementation`: one expert after the other, or grouped
products). They differ by rounding. A model without its adapter computes in the way that transformers chose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mindprint.adapter.targets import STACKED_FAMILIES, is_stack
from mindprint.contract import AdapterSite, LoraConfig
from mindprint_torch.lora import LoraLayer

PARAMETERS = ("gate_up_proj", "down_proj")
"""The stacks of a module of experts, in the order in which it computes."""

PROBE_TOKENS = 3


def stacked_sites(network: PreTrainedModel, name: str, module: Any) -> Iterator[AdapterSite]:
    """Yield the stacks in a module of experts, none for any other module."""
    if network.config.model_type not in STACKED_FAMILIES or not is_stack(f"{name}.{PARAMETERS[0]}"):
        return
    stacks: list[Any] = [getattr(module, parameter, None) for parameter in PARAMETERS]
    if not all(_is_plain_stack(stack) for stack in stacks) or not _computes_the_same(module):
        return
    for parameter, stack in zip(PARAMETERS, stacks, strict=True):
        experts, *sizes = stack.shape
        rows, columns = reversed(sizes) if module.is_transposed else sizes
        yield AdapterSite(f"{name}.{parameter}", "experts", columns, rows, experts)


def attach(network: PreTrainedModel, sites: Mapping[str, AdapterSite], config: LoraConfig) -> dict[str, LoraLayer]:
    """Put factors of zero on the stacks among the adapter's targets, and let their modules compute with them."""
    layers = {}
    for name in filter(is_stack, config.target_modules):
        host, _, parameter = name.rpartition(".")
        module: Any = network.get_submodule(host)
        layers[name] = LoraLayer(sites[name], config, getattr(module, parameter).device)
        module.add_module(_layer_name(parameter), layers[name])
        module.forward = partial(_forward, module)
    return layers


def _layer_name(parameter: str) -> str:
    return f"{parameter}_lora"


def _is_plain_stack(stack: Any) -> bool:
    # PEFT takes a stack of one expert for a linear layer, and a quantized one has no parameter of numbers.
    is_stack_of_numbers = type(stack) is nn.Parameter and stack.ndim == 3 and stack.is_floating_point()
    return is_stack_of_numbers and len(stack) > 1


@torch.no_grad()
def _computes_the_same(module: Any) -> bool:
    """Return whether the functions here compute the same as a module of experts, measured on a few tokens."""
    # A class may do more than its parameters say (a norm after the experts, another activation).
    first = module.gate_up_proj
    width = first.shape[1] if getattr(module, "is_transposed", False) else first.shape[2]
    tokens = torch.linspace(-3, 3, PROBE_TOKENS * width, device=first.device).sin().to(first.dtype)
    hidden = tokens.view(PROBE_TOKENS, width)
    index = torch.arange(2 * PROBE_TOKENS, device=first.device).view(PROBE_TOKENS, 2) % len(first)
    weights = torch.full_like(index, 0.5, dtype=first.dtype)
    try:
        expected, computed = module(hidden, index, weights), _experts(module, hidden, index, weights)
    except Exception:  # noqa: BLE001  a class that takes or has other things may fail in any way
        return False
    tolerance = 1e-4 if first.dtype == torch.float32 else 5e-2
    return bool((computed - expected).abs().max() <= tolerance * expected.abs().max())


def _forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    layers = [getattr(module, _layer_name(parameter), None) for parameter in PARAMETERS]
    if all(layer is None or not layer.enabled for layer in layers):
        return type(module).forward(module, hidden, index, weights)  # type: ignore[no-any-return]
    return _experts(module, hidden, index, weights)


def _experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return the experts' weighted sum for hidden states `[tokens, width]`, routed by `index` `[tokens, top_k]`."""
    chosen = index.reshape(-1)
    # Sorted by expert, the pairs of a token and an expert are one slice for each expert.
    order = chosen.argsort(stable=True)
    counts = chosen.bincount(minlength=len(module.gate_up_proj)).tolist()
    rows = hidden[order // index.shape[-1]]
    inner = module._apply_gate(_stack_product(module, "gate_up_proj", rows, counts))
    outer = _stack_product(module, "down_proj", inner, counts)
    weighted = outer * weights.reshape(-1)[order, None]
    # Back to the order of the tokens, and added up in a fixed order: index_add_ on CUDA has none.
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return weighted[back].view(*index.shape, -1).sum(dim=1).to(hidden.dtype)


def _stack_product(module: Any, parameter: str, rows: Tensor, counts: list[int]) -> Tensor:
    weight = getattr(module, parameter)
    # As [experts, out, in] whichever way round it is stored: a view.
    weight = weight.transpose(1, 2) if module.is_transposed else weight
    bias = getattr(module, f"{parameter}_bias") if module.has_bias else None
    layer: LoraLayer | None = getattr(module, _layer_name(parameter), None)
    factors = (None, None, 0.0) if layer is None else (layer.lora_A, layer.lora_B, layer.scale)
    output: Tensor = StackProduct.apply(rows, counts, weight, bias, *factors)  # type: ignore[no-untyped-call]
    return output


class StackProduct(torch.autograd.Function):
    """`x W[e]^T + bias[e] + scale (x A[e]^T) B[e]^T`, for rows `x` `[pairs, in]` that are sorted by their expert e.

    `counts` has the number of rows of each expert. `W` is frozen, `[experts, out, in]`. A and B may be None. In float16
    the low-rank products are in float32, as in PEFT, because their gradients could overflow.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        counts: list[int],
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
    ) -> Tensor:
        output = rows.new_empty(len(rows), weight.shape[1])
        dtype = _low_dtype(rows)
        low = None if a is None else rows.new_empty(len(rows), a.shape[1], dtype=dtype)
        ctx.save_for_backward(None if a is None else rows, low, weight, a, b)
        a, b = (None if factor is None else factor.to(dtype) for factor in (a, b))
        for expert, part in _slices(counts):
            torch.mm(rows[part], weight[expert].T, out=output[part])
            if bias is not None:
                output[part] += bias[expert]
            if a is not None and b is not None and low is not None:
                torch.mm(rows[part].to(dtype), a[expert].T, out=low[part])
                output[part] += (low[part] @ b[expert].T).mul_(scale)
        ctx.counts, ctx.scale = counts, scale
        return output

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        # For each expert as in `LoraProduct`: dL/dx = g W + s (g B) A, dL/dA = s (g B)^T x, dL/dB = s g^T (x A^T).
        rows, low, weight, a, b = ctx.saved_tensors
        gradient = outer[0]
        by_rows = gradient.new_empty(len(gradient), weight.shape[2]) if ctx.needs_input_grad[0] else None
        # An expert that got no token has gradient 0.
        by_a, by_b = (None, None) if a is None else (torch.zeros_like(a), torch.zeros_like(b))
        dtype = _low_dtype(gradient)
        a, b = (None if factor is None else factor.to(dtype) for factor in (a, b))
        for expert, part in _slices(ctx.counts):
            if by_rows is not None:
                torch.mm(gradient[part], weight[expert], out=by_rows[part])
            if a is None or b is None or by_a is None or by_b is None:
                continue
            own = gradient[part].to(dtype)
            by_low = (own @ b[expert]).mul_(ctx.scale)
            by_a[expert] = by_low.T @ rows[part].to(dtype)
            by_b[expert] = (low[part].T @ own).mul_(ctx.scale).T
            if by_rows is not None:
                by_rows[part] += by_low @ a[expert]
        return by_rows, None, None, None, by_a, by_b, None


def _low_dtype(rows: Tensor) -> torch.dtype:
    return torch.float32 if rows.dtype == torch.float16 else rows.dtype


def _slices(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Yield each expert that got rows, and which they are."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count
