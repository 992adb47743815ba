"""Softmax, SwiGLU, RMS norm and attention for Linux CPUs: faster than MLX's own, and rounded no worse.

MLX's wheels for Linux are built for the oldest processors, where each `exp` is a row of calls into the C library: 22 ns
a number, against 4 ns for `pow`, and most of a step of a small model. So exponentials are powers here. The functions
are written out with their gradients, so that exponentials of the forward pass are not computed again.
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from mindprint_mlx.arrays import in_blocks
from mindprint_mlx.imports import mlx_lm_module

STEPS = 64.0
BASE = float(np.float32(math.exp(STEPS)))
"""exp(64) as float32: `BASE ** (x / 64)` is exp(x), and the rounding of the base counts a 64th in the exponent."""

HIDDEN = -3.4e38
"""The bias of the scores of tokens that are not seen."""


def replaces(device: mx.Device) -> bool:
    """Return whether these functions are faster than MLX's own on this device."""
    return device == mx.Device(mx.cpu) and platform.system() == "Linux" and platform.machine() == "x86_64"


MLX_RMS_NORM = mx.fast.rms_norm


@contextmanager
def in_place_of_mlx(module: nn.Module) -> Iterator[None]:
    """Make the code of a model's class call the functions here under mlx-lm's names, within this context."""
    replaced = [
        ("swiglu", mlx_lm_module("models.activations").swiglu, swiglu),
        ("scaled_dot_product_attention", mlx_lm_module("models.base").scaled_dot_product_attention, attention),
    ]
    # Only names that still mean mlx-lm's own function: a class may have imported another under the same name.
    places = [
        (code, name, own, ours) for code in _code_of(module) for name, own, ours in replaced if code.get(name) is own
    ]
    # Of this one, the classes use no name of their modules.
    places.append((vars(mx.fast), "rms_norm", MLX_RMS_NORM, rms_norm))
    try:
        for code, name, _, ours in places:
            code[name] = ours
        yield
    finally:
        for code, name, own, _ in places:
            code[name] = own


def _code_of(module: nn.Module) -> list[dict[str, Any]]:
    """Return the globals of mlx-lm's modules that the classes of a model come from."""
    kinds = {kind for _, part in module.named_modules() for kind in type(part).__mro__}
    names = sorted({kind.__module__ for kind in kinds if kind.__module__.startswith("mlx_lm.models.")})
    return [vars(sys.modules[name]) for name in names]


def exp(x: mx.array) -> mx.array:
    """Return `exp` of float32, with a relative error below 2e-7."""
    return mx.power(mx.array(BASE), x * (1 / STEPS))


def _first(outputs: Any) -> mx.array:
    # Custom functions return their result first, and then the arrays that they keep for their gradient.
    out: mx.array = outputs[0]
    return out


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """Return `silu(gate) * x` (Shazeer 2020, arXiv 2002.05202) in float32. Other dtypes are left to MLX."""
    if gate.dtype != mx.float32:
        plain: mx.array = nn.silu(gate) * x
        return plain
    return _first(_swiglu(gate, x))


@mx.custom_function
def _swiglu(gate: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    sigmoid = 1 / (1 + exp(-gate))
    return gate * sigmoid * x, sigmoid


@_swiglu.vjp
def _swiglu_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, mx.array]:
    # d silu(g) / dg = s (1 + g (1 - s)) with s = sigmoid(g).
    (gate, x), ahead, sigmoid = primals, cotangents[0], outputs[1]
    return ahead * x * (sigmoid * (1 + gate * (1 - sigmoid))), ahead * (gate * sigmoid)


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """Return `x / sqrt(mean(x^2) + eps) * weight` (Zhang & Sennrich 2019, arXiv 1910.07467) for float32.

    Other dtypes are left to MLX.
    """
    if x.dtype != mx.float32 or (weight is not None and weight.dtype != mx.float32):
        return MLX_RMS_NORM(x, weight, eps)
    return _first(_rms_norm(x, mx.array(1.0) if weight is None else weight, mx.array(eps)))


@mx.custom_function
def _rms_norm(x: mx.array, weight: mx.array, eps: mx.array) -> tuple[mx.array, mx.array]:
    # MLX adds the squares one after another. Each whole row is then too large or too small, in SmolLM2 by 2e-7 on
    # average and 6e-7 at most, where everything else in the norm rounds by 3e-8.
    squares = in_blocks((x * x).reshape(-1, x.shape[-1]), mx.sum).reshape(*x.shape[:-1], 1)
    scale = mx.rsqrt(squares / x.shape[-1] + eps)
    return x * scale * weight, scale


@_rms_norm.vjp
def _rms_norm_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, mx.array, mx.array]:
    # With s = 1 / sqrt(mean(x^2) + eps): d (x s) / dx = s - x (s^3 / n) x^T.
    (x, weight, eps), ahead, scale = primals, cotangents[0], outputs[1]
    slopes = ahead * weight
    along = mx.sum(slopes * x, axis=-1, keepdims=True)
    shared = mx.sum((ahead * x * scale).reshape(-1, x.shape[-1]), axis=0)
    own = shared if weight.ndim else mx.sum(shared)
    return scale * (slopes - x * (scale * scale * along / x.shape[-1])), own, mx.zeros_like(eps)


CAUSAL_ROWS = 256
"""Queries that are answered together under a causal mask: no key is multiplied that the last of them does not see."""


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any, sinks: Any = None
) -> mx.array:
    """Compute mlx-lm's `scaled_dot_product_attention`: queries `[B, heads, L, D]`, keys, values `[B, groups, K, D]`."""
    if sinks is not None or hasattr(cache, "bits") or queries.dtype != mx.float32:
        original: Callable[..., mx.array] = mlx_lm_module("models.base").scaled_dot_product_attention
        return original(queries, keys, values, cache, scale, mask, sinks)
    batch, heads, length, width = queries.shape
    groups, seen = keys.shape[1], keys.shape[2]
    if isinstance(mask, str) and length > CAUSAL_ROWS:
        parts = []
        for start in range(0, length, CAUSAL_ROWS):
            end = min(start + CAUSAL_ROWS, length)
            last = seen - length + end
            rows = queries[:, :, start:end]
            parts.append(attention(rows, keys[:, :, :last], values[:, :, :last], cache, scale, mask))
        return mx.concatenate(parts, axis=2)
    # The heads that share keys become rows of one product, instead of copies of the keys.
    rows = (queries * scale).reshape(batch, groups, heads // groups * length, width)
    out = _first(_attention(rows, keys, values, _bias(mask, length, seen)))
    return out.reshape(batch, heads, length, values.shape[-1])


def _bias(mask: Any, length: int, seen: int) -> mx.array:
    """Return the bias of scores `[B, groups, heads / groups, L, K]` for a mask."""
    if mask is None:
        return mx.array(0.0)
    if isinstance(mask, str):
        mask = mx.arange(seen - length, seen)[:, None] >= mx.arange(seen)
    if mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, HIDDEN)
    return mx.expand_dims(mask, -3) if mask.ndim > 2 else mask


@mx.custom_function
def _attention(
    queries: mx.array, keys: mx.array, values: mx.array, bias: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the output and, for the gradient, the exponentials and the sum that divides each row of them."""
    batch, groups, rows, _ = queries.shape
    length = bias.shape[-2] if bias.ndim > 1 else rows
    scores = (queries @ keys.swapaxes(-1, -2)).reshape(batch, groups, rows // length, length, -1) + bias
    scores = scores.reshape(batch, groups, rows, -1)
    exponentials = exp(scores - mx.max(scores, axis=-1, keepdims=True))
    total = mx.sum(exponentials, axis=-1, keepdims=True)
    return (exponentials @ values) / total, exponentials, total


@_attention.vjp
def _attention_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    # With p = softmax(scores) and o = p V: d scores = p * (do V^T - sum(do * o)), as in FlashAttention (Dao et al.
    # 2022, arXiv 2205.14135, appendix B.2). `ahead` is do divided by the row's sum, which makes p of the exponentials.
    (queries, keys, values, bias), (out, exponentials, total) = primals, outputs
    ahead = cotangents[0] / total
    along = mx.sum(ahead * out, axis=-1, keepdims=True)
    scores = exponentials * (ahead @ values.swapaxes(-1, -2) - along)
    return scores @ keys, scores.swapaxes(-1, -2) @ queries, exponentials.swapaxes(-1, -2) @ ahead, mx.zeros_like(bias)


def log_softmax_at(logits: mx.array, targets: mx.array) -> mx.array:
    """Return the log-softmax of float32 logits `[n, vocabulary]` at the targets `[n]`, `[n]`.

    Rows are shifted by their target first, as in `logprobs`.
    """
    return _first(_log_softmax_at(logits, targets[:, None]))


@mx.custom_function
def _log_softmax_at(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return the log-probs and, for the gradient, the exponentials and the sum that divides each row of them."""
    shifted = logits - mx.take_along_axis(logits, targets, axis=-1)
    greatest = mx.max(shifted, axis=-1, keepdims=True)
    exponentials = exp(shifted - greatest)
    total = in_blocks(exponentials, mx.sum)[:, None]
    return -(greatest + mx.log(total))[:, 0], exponentials, total


@_log_softmax_at.vjp
def _log_softmax_at_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, mx.array]:
    # d log p(target) / d logits = one-hot(target) - softmax.
    ahead, targets = cotangents[0][:, None], primals[1]
    _, exponentials, total = outputs
    slopes = exponentials * (-ahead / total)
    at_targets = ahead + mx.take_along_axis(slopes, targets, axis=-1)
    return mx.put_along_axis(slopes, targets, at_targets, axis=-1), mx.zeros_like(targets)
