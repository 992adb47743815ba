"""Log-probs of the tokens that count, and of no others.

The LM head is the largest product of a small model's step, and most positions of a batch are prompt or padding. So
hidden states are gathered first, and the head sees only those that predict a token that counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import mlx.core as mx
import numpy as np

from mindprint.contract import Float32, TokenBatch
from mindprint.layouts import Continued, Layout, continued, sequences
from mindprint_mlx import adapter as adapters
from mindprint_mlx.arrays import to_numpy
from mindprint_mlx.model import Handle
from mindprint_mlx.prompts import hidden_states

LOGITS_BYTES = 256 * 2**20
"""No float32 array of logits is larger than this."""

BLOCK = 64
"""How many terms `log_sum_exp` adds one after another."""


def log_probs(handle: Handle, batch: TokenBatch, *, adapter: bool) -> Float32:
    """Log-probs under the mask, float32 `[rows, T]`, 0 elsewhere, of the base alone or with its adapter."""
    layout = chosen_layout(handle, batch)
    values = np.zeros(layout.shape, np.float32)
    if len(layout):
        with handle.in_use(adapter=adapter):
            values.reshape(-1)[layout.slots] = to_numpy(answers(handle, layout, {}))
    return values


def chosen_layout(handle: Handle, batch: TokenBatch, *, share_prompts: bool = True) -> Layout | Continued:
    """Prompts that the batch shares once, if that is allowed and possible at this length; else each row whole."""
    if share_prompts and batch.shared is not None:
        layout = continued(batch)
        if layout.prompts.shape[1] + layout.completions.shape[1] <= handle.longest_shared:
            return layout
    return sequences(batch)


def answers(
    handle: Handle, layout: Layout | Continued, factors: Mapping[str, mx.array], chunk: int | None = None
) -> mx.array:
    """The log-prob of every target of a layout, float32 `[n]`; differentiable in `factors`, if any are given.

    `chunk` is how many positions the head takes at once; by default as many as `LOGITS_BYTES` allows.
    """
    _assign(handle, factors)
    states = hidden_states(handle.head, len(handle.module.layers), layout)[mx.array(layout.sources)]
    targets = mx.array(layout.targets)
    chunk = chunk or max(1, LOGITS_BYTES // (4 * handle.head.vocab_size))
    if len(layout) <= chunk:
        return _head_log_probs(handle, targets, states, {})
    own = adapters.outside_layers(factors)
    starts = range(0, len(layout), chunk)
    # Recomputed when gradients are taken: the logits of all chunks together would be what chunks are to avoid.
    heads = [mx.checkpoint(partial(_head_log_probs, handle, targets[at : at + chunk])) for at in starts]
    return mx.concatenate([head(states[at : at + chunk], own) for at, head in zip(starts, heads, strict=True)])


def row_sums(layout: Layout | Continued, values: mx.array) -> mx.array:
    """Sums of answers `[n]` by row of the layout's shape, `[rows]`; by gathering, which is deterministic anywhere."""
    index = np.zeros(layout.shape, np.int32)
    index.reshape(-1)[layout.slots] = np.arange(len(layout))
    filled = np.zeros(layout.shape, np.bool_)
    filled.reshape(-1)[layout.slots] = True
    return mx.sum(mx.where(mx.array(filled), values[mx.array(index)], 0.0), axis=1)


def _head_log_probs(handle: Handle, targets: mx.array, states: mx.array, factors: Mapping[str, mx.array]) -> mx.array:
    """Log-softmax in float32 at the targets, `[n]`. `factors` are those that sit in the head itself.

    Each row is shifted by its target first: `logit - logsumexp(logits)` would round a log-prob near 0 to the spacing of
    float32 at the size of the logits, 8e-6 at 100, always upwards.
    """
    _assign(handle, factors)
    logits = handle.head.logits(states).astype(mx.float32)
    return -log_sum_exp(logits - mx.take_along_axis(logits, targets[:, None], axis=-1))


def log_sum_exp(values: mx.array) -> mx.array:
    """`log sum exp` over the last axis of `[n, vocabulary]`, `[n]`, in blocks and blocks of blocks.

    MLX's own adds one term after another on a CPU: of a confident model's thousands of small probabilities each is
    lost beside a sum near 1, which made log-probs too high by 7e-6 on average (3072 tokens; more with more).
    """
    while (width := values.shape[-1]) > BLOCK:
        whole = width - width % BLOCK
        sums = mx.logsumexp(values[:, :whole].reshape(len(values), -1, BLOCK), axis=-1)
        values = sums if whole == width else mx.concatenate([sums, values[:, whole:]], axis=-1)
    return mx.logsumexp(values, axis=-1)


def _assign(handle: Handle, factors: Mapping[str, mx.array]) -> None:
    if handle.adapter is not None:
        adapters.assign(handle.adapter, factors)
