"""Normalisations by the root mean square as one differentiable function, `x / rms(x) * weight`.

transformers computes them in six operations, and autograd keeps the input in float32 for the backward pass. Here the
input is kept as it is, which the residual stream holds anyway. The weight is frozen. Loading a model measures which of
the families' variants a normalisation is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mindprint_torch.elementwise import launching_on, normalise, normalise_back

EPSILONS = ("variance_epsilon", "eps")
"""Classes' names for the number that they add to the mean square."""

PROBE_TOKENS = 4


class Variant(NamedTuple):
    """How a class multiplies by its weight: with 1 added or not, and after rounding to the input's dtype or before."""

    plus_one: bool
    rounds_first: bool


VARIANTS = (Variant(False, True), Variant(True, False), Variant(False, False))
"""Llama's and most others', Gemma's, and OLMo 2's."""


def fuse_norms(network: nn.Module) -> int:
    """Make every normalisation that computes one of the variants compute in one piece; return their number."""
    fused = 0
    for norm, epsilon in _candidates(network):
        with launching_on(norm.weight.device):
            variant = _variant(norm, epsilon)
        if variant is not None:
            norm.forward = partial(_forward, norm, epsilon, variant)
            fused += 1
    return fused


class Normalisation(torch.autograd.Function):
    """`elementwise.normalise`, differentiable by its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, variant: Variant) -> Tensor:
        output, inverse = normalise(x, weight, epsilon, **variant._asdict())
        ctx.save_for_backward(x, weight, inverse)
        ctx.variant = variant
        return output

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        return normalise_back(outer[0], x, weight, inverse, **ctx.variant._asdict()), None, None, None


def _forward(norm: Any, epsilon: float, variant: Variant, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return normalise(x, norm.weight, epsilon, **variant._asdict())[0]
    output: Tensor = Normalisation.apply(x, norm.weight, epsilon, variant)  # type: ignore[no-untyped-call]
    return output


def _candidates(network: nn.Module) -> Iterator[tuple[Any, float]]:
    for module in network.modules():
        weight: Any = getattr(module, "weight", None)
        epsilon = next((value for name in EPSILONS if isinstance(value := getattr(module, name, None), float)), None)
        is_vector = isinstance(weight, nn.Parameter) and weight.ndim == 1
        if type(module).__name__.endswith("RMSNorm") and is_vector and epsilon is not None:
            yield module, epsilon


@torch.no_grad()
def _variant(norm: Any, epsilon: float) -> Variant | None:
    """Return the variant that comes nearest to a normalisation, if any is near enough."""
    weight = norm.weight
    values = torch.linspace(-3, 3, PROBE_TOKENS * len(weight), device=weight.device).sin().to(weight.dtype)
    x = values.view(1, PROBE_TOKENS, -1)
    try:
        expected = norm(x)
    except Exception:  # noqa: BLE001  a class that takes more than hidden states may fail in any way
        return None
    if not isinstance(expected, Tensor) or expected.shape != x.shape or expected.dtype != x.dtype:
        return None
    tolerance = 1e-4 if weight.dtype == torch.float32 else 5e-2

    def difference(variant: Variant) -> float:
        computed, _ = normalise(x, weight, epsilon, **variant._asdict())
        return float((computed - expected).abs().max())

    nearest = min(VARIANTS, key=difference)
    return nearest if difference(nearest) <= tolerance * float(expected.abs().max()) else None
