"""The gated delta rule over whole chunks of tokens, for training: Yang et al. 2024, arXiv 2412.06464.

mlx-lm reads one token after another, and its kernel for Metal has no gradient. Here the tokens of a chunk are read
together, in plain operations, so that the state is handed on once a chunk. With g the log of the decay, γ = exp(Σ g)
within the chunk and S the state at its start, the recurrence

    S_t = exp(g_t) S_{t-1} + k_t δ_tᵀ        δ_t = β_t (v_t - exp(g_t) S_{t-1}ᵀ k_t)

is solved for all δ of the chunk at once: (I + L) δ = β (v - γ Sᵀ k) with L_tj = β_t (γ_t / γ_j) (k_t · k_j) for j < t.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn

CHUNK = 64
"""As many tokens as transformers' reference takes at once."""

NORM_EPSILON = 1e-6
"""Added to the squared length of queries and keys, as in transformers."""


def gated_delta_layer(layer: Any, x: mx.array, cache: Any = None) -> mx.array:
    """Compute one of mlx-lm's gated delta networks on `x` `[rows, T, hidden]`, with the layers that it holds."""
    rows, tokens, _ = x.shape
    mixed, z, b, a = _projected(layer, x)
    kept = layer.conv_kernel_size - 1
    before = None if cache is None else cache[0]
    if before is None:
        before = mx.zeros((rows, kept, mixed.shape[-1]), mixed.dtype)
    # A causal convolution: each token sees itself and those before it, zeros where there are none.
    window = mx.concatenate([before, mixed], axis=1)
    convolved = nn.silu(layer.conv1d(window))
    q, k, v = mx.split(convolved, [layer.key_dim, 2 * layer.key_dim], axis=-1)
    q, k = (part.reshape(rows, tokens, layer.num_k_heads, layer.head_k_dim) for part in (q, k))
    v = v.reshape(rows, tokens, layer.num_v_heads, layer.head_v_dim)
    decay = -mx.exp(layer.A_log.astype(mx.float32)) * nn.softplus(a.astype(mx.float32) + layer.dt_bias)
    out, state = gated_delta_rule(q, k, v, decay, mx.sigmoid(b), None if cache is None else cache[1])
    if cache is not None:
        cache[0], cache[1] = mx.contiguous(window[:, -kept:]), state
        cache.advance(tokens)
    normed: mx.array = layer.norm(out.astype(x.dtype), z)
    projected: mx.array = layer.out_proj(normed.reshape(rows, tokens, -1))
    return projected


def _projected(layer: Any, x: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Return queries, keys and values in one array, the output's gate, and the inputs of β and of the decay."""
    rows, tokens, _ = x.shape
    if "in_proj_qkvz" in layer:
        q, k, v, z, b, a = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(x), layer.in_proj_ba(x))
        return mx.concatenate([part.reshape(rows, tokens, -1) for part in (q, k, v)], axis=-1), z, b, a
    z = layer.in_proj_z(x).reshape(rows, tokens, layer.num_v_heads, layer.head_v_dim)
    return layer.in_proj_qkv(x), z, layer.in_proj_b(x), layer.in_proj_a(x)


def gated_delta_rule(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Return the outputs `[rows, T, heads, value_dim]` and the state after them, `[rows, heads, key_dim, value_dim]`.

    Queries and keys are `[rows, T, key_heads, key_dim]`, values `[rows, T, heads, value_dim]`. `decay` is the log of
    the decay, at most 0, and `beta` is in 0 to 1, both `[rows, T, heads]`. Everything is computed in float32.
    """
    rows, tokens, heads, value_dim = v.shape
    shared = heads // q.shape[2]
    # Heads come before tokens, so that each product is of matrices of tokens.
    q, k, v = (part.astype(mx.float32).transpose(0, 2, 1, 3) for part in (q, k, v))
    q, k = (mx.repeat(_unit(part), shared, axis=1) for part in (q, k))
    q = q * k.shape[-1] ** -0.5
    decay, beta = (part.astype(mx.float32).transpose(0, 2, 1) for part in (decay, beta))
    if state is None:
        state = mx.zeros((rows, heads, k.shape[-1], value_dim))
    size = min(CHUNK, 1 << (tokens - 1).bit_length())
    # Padding behind the last token: it keeps the state, since its decay is 1 and its β and key are 0.
    padding = -tokens % size
    q, k, v, decay, beta = (
        mx.pad(part, [(0, 0), (0, 0), (0, padding), *[(0, 0)] * (part.ndim - 3)]) for part in (q, k, v, decay, beta)
    )
    q, k, v, decay, beta = (part.reshape(rows, heads, -1, size, *part.shape[3:]) for part in (q, k, v, decay, beta))
    total: mx.array = mx.cumsum(decay, axis=-1)
    order = mx.arange(size)
    up_to = order[:, None] >= order
    # exp(-inf) is 0 with a gradient of 0. Above the diagonal the exponent would be positive, and might overflow.
    since = mx.exp(mx.where(up_to, total[..., :, None] - total[..., None, :], -mx.inf))
    weighted: mx.array = k * beta[..., None]
    system = mx.where(order[:, None] > order, (weighted @ k.swapaxes(-1, -2)) * since, 0.0)
    solve: Any = _unit_lower_inverse(system)
    gamma = mx.exp(total)[..., None]
    new, old = solve @ (v * beta[..., None]), solve @ (weighted * gamma)
    scores = (q @ k.swapaxes(-1, -2)) * since
    reading, writing = q * gamma, k * mx.exp(total[..., -1:] - total)[..., None]
    outputs = []
    for chunk in range(q.shape[2]):
        delta = new[:, :, chunk] - old[:, :, chunk] @ state
        outputs.append(reading[:, :, chunk] @ state + scores[:, :, chunk] @ delta)
        state = state * gamma[:, :, chunk, -1:] + writing[:, :, chunk].swapaxes(-1, -2) @ delta
    out = mx.concatenate(outputs, axis=2)[:, :, :tokens]
    return out.transpose(0, 2, 1, 3), state


def _unit(x: mx.array) -> mx.array:
    return x * mx.rsqrt(mx.sum(x * x, axis=-1, keepdims=True) + NORM_EPSILON)


@mx.custom_function
def _unit_lower_inverse(lower: mx.array) -> mx.array:
    """Return `(I + lower)⁻¹` for strictly lower triangular matrices `[..., n, n]`, n a power of two."""
    # Blocks on the diagonal are inverted, two of them to one of twice the size, until one is left. This is as stable as
    # substitution. The product (I - L)(I + L²)(I + L⁴)... is not: of similar keys its powers reach 1e18.
    size = lower.shape[-1]
    batch = lower.shape[:-2]
    inverse = mx.ones((*batch, size, 1, 1), lower.dtype)
    width = 1
    while width < size:
        pairs = size // (2 * width)
        blocks = lower.reshape(*batch, pairs, 2, width, pairs, 2, width)[..., 1, :, :, 0, :]
        below = mx.moveaxis(mx.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -(second @ below @ first)
        upper = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
        inverse = mx.concatenate([upper, mx.concatenate([corner, second], axis=-1)], axis=-2)
        width *= 2
    return inverse[..., 0, :, :]


@_unit_lower_inverse.vjp
def _unit_lower_inverse_vjp(_: Any, cotangent: mx.array, output: mx.array) -> mx.array:
    # d (M⁻¹) = - M⁻¹ dM M⁻¹. Only entries below the diagonal are inputs: the caller's mask drops the others.
    transposed = output.swapaxes(-1, -2)
    return -(transposed @ cotangent @ transposed)
