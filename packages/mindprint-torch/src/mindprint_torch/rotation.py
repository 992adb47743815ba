"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) of queries and keys, each in one piece.

transformers rotates in eight operations, most of which read arrays that are transposed in memory. Its attention layers
find the function `apply_rotary_pos_emb` in their own Python module. There it is replaced, for all models of that family
in this process. Whatever the kernels do not compute goes to the function that was there: other devices, other
arguments. Families that pair other elements of a head keep theirs, because the two are compared first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mindprint_torch.elementwise import rotate, triton_kernels

NAME = "apply_rotary_pos_emb"
"""The function in the Python modules of transformers' families."""

PROBE_TOKENS, PROBE_HEADS, PROBE_SIZE = 5, 2, 16

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class FusedRotation:
    """A function in the place of `original`, which rotates by `elementwise.rotate` where it can."""

    original: Callable[..., Pair]

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *arguments: Any, **options: Any) -> Pair:
        """Return queries and keys, `[rows, heads, tokens, size]`, rotated. The names are those of the original."""
        if arguments or options or triton_kernels(q.device) is None or not (_fits(q, cos) and _fits(k, cos)):
            return self.original(q, k, cos, sin, *arguments, **options)
        return _rotated(q, cos, sin), _rotated(k, cos, sin)


class Rotation(torch.autograd.Function):
    """`elementwise.rotate`, differentiable by the heads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return rotate(x, cosine, sine)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        return rotate(outer[0], *ctx.saved_tensors, back=True), None, None


def fuse_rotation(network: nn.Module) -> int:
    """Replace the function in the Python modules of a network's classes; return in how many it is replaced now."""
    fused = 0
    for name in {type(module).__module__ for module in network.modules()}:
        python_module = sys.modules.get(name)
        function = getattr(python_module, NAME, None)
        if isinstance(function, FusedRotation):
            fused += 1
        elif function is not None and _rotates_halves(function):
            setattr(python_module, NAME, FusedRotation(function))
            fused += 1
    return fused


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    output: Tensor = Rotation.apply(x, cosine, sine)  # type: ignore[no-untyped-call]
    return output


def _fits(x: Tensor, cosine: Tensor) -> bool:
    """Return whether heads and angles have the shapes and the one dtype that `rotate` takes."""
    if x.ndim != 4 or cosine.ndim != 3 or x.dtype != cosine.dtype:
        return False
    rows, _, tokens, size = x.shape
    return len(cosine) in (1, rows) and cosine.shape[1:] == (tokens, size) and size % 2 == 0


@torch.no_grad()
def _rotates_halves(function: Callable[..., Any]) -> bool:
    """Return whether a function turns the two halves of a head against each other, measured on a few numbers."""
    values = torch.linspace(-3, 3, PROBE_HEADS * PROBE_TOKENS * PROBE_SIZE).sin()
    x = values.view(1, PROBE_HEADS, PROBE_TOKENS, PROBE_SIZE)
    cosine, sine = (
        2 * values[: PROBE_TOKENS * PROBE_SIZE].view(1, PROBE_TOKENS, PROBE_SIZE) + shift for shift in (1, 2)
    )
    try:
        query, key = function(x, -x, cosine, sine)
    except Exception:  # noqa: BLE001  a function with other arguments may fail in any way
        return False
    expected = rotate(x, cosine, sine)
    return bool(torch.allclose(query, expected, atol=1e-5) and torch.allclose(key, -expected, atol=1e-5))
