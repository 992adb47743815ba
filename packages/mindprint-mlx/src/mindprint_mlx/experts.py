"""LoRA on stacks of experts, under the names and in the layout of transformers' parameters.

transformers has gate and up of all experts in one parameter, `gate_up_proj`, and mlx-lm has two layers. Both read one
A, and each has its rows of B: the first and the second half, or in GPT-OSS every other row. Each token is multiplied
with the factors of the experts that it got, so that no change of a weight is ever formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn

from mindprint.adapter.module_names import FAMILIES
from mindprint.adapter.targets import STACKED_FAMILIES
from mindprint.contract import AdapterSite
from mindprint_mlx.imports import mlx_lm_module

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


@dataclass(frozen=True)
class StackPlace:
    """A stack of experts in the MLX module tree: the attributes of mlx-lm's experts that transformers has as one.

    `rows` are the rows of B that belong to each attribute.
    """

    site: str
    parent: Any
    attributes: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    rows: tuple[slice, ...]

    def put(self, layer: nn.Module) -> None:
        """Let mlx-lm's layers add the products with the factors of a `StackLora`."""
        for attribute, base, rows in zip(self.attributes, self.layers, self.rows, strict=True):
            self.parent[attribute] = _AdaptedExperts(base, layer, rows)

    def put_base(self) -> None:
        """Put the base layers back."""
        for attribute, base in zip(self.attributes, self.layers, strict=True):
            self.parent[attribute] = base

    @property
    def adapter_site(self) -> AdapterSite:
        experts, rows, columns = self.layers[0].weight.shape
        return AdapterSite(self.site, "experts", columns, rows * len(self.layers), experts)


class StackLora(nn.Module):
    """The factors of one stack: `lora_a` `[experts, in, r]` and `lora_b` `[experts, r, out]`, float32."""

    lora_a: mx.array
    lora_b: mx.array

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        # PEFT has no dropout on parameters, and core does not ask for it. Every adapted layer has the attribute.
        self.dropout: Any = None


class _AdaptedExperts(nn.Module):
    """mlx-lm's layer of all experts, with the low-rank products added."""

    def __init__(self, base: nn.Module, stack: nn.Module, rows: slice) -> None:
        super().__init__()
        self.linear = base
        # As a module in the tree, so that gradient checkpointing finds the factors of a layer.
        self.stack = stack
        self._rows = rows

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        base: mx.array = self.linear(x, indices, sorted_indices=sorted_indices)
        # `product` multiplies each row with the matrix of the expert that it goes to.
        product = partial(mx.gather_mm, rhs_indices=indices, sorted_indices=sorted_indices)
        low = self.stack.scale * product(x.astype(mx.float32), self.stack.lora_a)
        change = product(low, self.stack.lora_b[..., self._rows])
        return base + change.astype(base.dtype)


def stack_places(model_type: str, module: nn.Module) -> Iterator[StackPlace]:
    """Yield the stacks of experts of a model, layer by layer."""
    if model_type not in STACKED_FAMILIES:
        return
    layers = mlx_lm_module("models.switch_layers")
    for path, experts in module.named_modules():
        if not isinstance(experts, layers.SwitchGLU):
            continue
        # PEFT takes a stack of one expert for a linear layer, and a packed weight has another shape than its matrix.
        parts = (experts.gate_proj, experts.up_proj, experts.down_proj)
        if all(type(part) is layers.SwitchLinear and part.weight.shape[0] > 1 for part in parts):
            yield from _stacks_of(model_type, _site(model_type, path), experts)


def _stacks_of(model_type: str, host: str, experts: Any) -> Iterator[StackPlace]:
    inner = experts.gate_proj.weight.shape[1]
    halves = (slice(0, inner), slice(inner, 2 * inner))
    # GPT-OSS takes its gate from the even columns of the product and up from the odd ones.
    rows = (slice(0, None, 2), slice(1, None, 2)) if model_type == "gpt_oss" else halves
    yield StackPlace(f"{host}.gate_up_proj", experts, (GATE, UP), (experts.gate_proj, experts.up_proj), rows)
    yield StackPlace(f"{host}.down_proj", experts, (DOWN,), (experts.down_proj,), (slice(None),))


def _site(model_type: str, path: str) -> str:
    """Return transformers' name of mlx-lm's module of experts."""
    family = FAMILIES.get(model_type)
    if family is None or family.experts is None:
        return path
    return path.removesuffix(family.experts.mlx_lm) + family.experts.module
