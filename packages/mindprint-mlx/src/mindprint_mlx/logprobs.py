"""Log-probs of the tokens that count, and of no others.

The LM head is the largest product of a small model's step, and most positions of a batch are prompt or padding. So
hidden states are gathered first, and the head sees only those that predict a token that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mindprint.contract import Float32, TokenBatch
from mindprint.layouts import Continued, Layout, continued, sequences, token_rows
from mindprint_mlx import adapter as adapters
from mindprint_mlx import cpu, groups
from mindprint_mlx.arrays import in_blocks, to_numpy
from mindprint_mlx.model import Handle
from mindprint_mlx.prompts import hidden_states
from mindprint_mlx.recompute import checkpointed

LOGITS_BYTES = 64 * 2**20
"""No float32 array of logits is larger than this."""


def log_probs(handle: Handle, batch: TokenBatch, *, adapter: bool) -> Float32:
    """Log-probs under the mask, float32 `[rows, T]`, 0 elsewhere, of the base alone or with its adapter."""
    values = np.zeros(batch.tokens.shape, np.float32)
    rows = groups.token_groups(handle, batch)
    layouts = [chosen_layout(handle, token_rows(batch, some)) for some in rows]
    with handle.in_use(adapter=adapter):
        found = groups.side_by_side(handle.device, [partial(answers, handle, layout, {}) for layout in layouts])
        for some, layout, answered in zip(rows, layouts, found, strict=True):
            part = np.zeros(layout.shape, np.float32)
            part.reshape(-1)[layout.slots] = to_numpy(answered)
            values[some, : part.shape[1]] = part
    return values


def chosen_layout(handle: Handle, batch: TokenBatch, *, share_prompts: bool = True) -> Layout | Continued:
    """Prompts that the batch shares once, if that is allowed and possible at this length; else each row whole."""
    if share_prompts and batch.shared is not None:
        layout = continued(batch)
        if layout.prompts.shape[1] + layout.completions.shape[1] <= handle.longest_shared:
            return layout
    return sequences(batch)


def answers(
    handle: Handle,
    layout: Layout | Continued,
    factors: Mapping[str, mx.array],
    chunk: int | None = None,
    *,
    gradient_checkpointing: bool = False,
) -> mx.array:
    """The log-prob of every target of a layout, float32 `[n]`; differentiable in `factors`, if any are given.

    `chunk` is how many positions the head takes at once; by default as many as `LOGITS_BYTES` allows.
    """
    _assign(handle, factors)
    if not len(layout):
        return mx.zeros(0)
    with cpu.in_place_of_mlx(handle.module) if cpu.replaces(handle.device) else nullcontext():
        with checkpointed(handle, factors) if gradient_checkpointing else nullcontext():
            states = hidden_states(handle.head, len(handle.module.layers), layout)[mx.array(layout.sources)]
        targets = mx.array(layout.targets)
        chunk = chunk or max(1, LOGITS_BYTES // (4 * handle.head.vocab_size))
        starts = range(0, len(layout), chunk)
        scored = _scored(handle, adapters.outside_layers(factors), split=len(starts) > 1)
        return mx.concatenate([scored(states[at : at + chunk], targets[at : at + chunk]) for at in starts])


def _scored(handle: Handle, own: Mapping[str, mx.array], *, split: bool) -> Callable[[mx.array, mx.array], mx.array]:
    """From states `[n, hidden]` and targets `[n]` to log-probs `[n]`. `own` are factors that sit in the head itself."""
    if handle.head.body is not None and not own and handle.loss_scale is None:
        return _with_gradient(handle)

    def scores(states: mx.array, targets: mx.array) -> mx.array:
        part = partial(_head_log_probs, handle, targets)
        # Recomputed when gradients are taken: the logits of all chunks together would be what chunks are to avoid.
        return (mx.checkpoint(part) if split else part)(states, own)

    return scores


def _with_gradient(handle: Handle) -> Callable[[mx.array, mx.array], mx.array]:
    """Log-probs whose gradient by the states is taken at once, while the logits are there.

    A log-prob depends on one state only, so that whatever the loss makes of it multiplies that state's gradient by one
    number. Logits are then neither kept nor computed again. In float16 the loss scale comes too late for this.
    """

    def log_probs(states: mx.array, targets: mx.array) -> mx.array:
        return _log_softmax_at(handle.head.logits(states), targets, fast=cpu.replaces(handle.device))

    @mx.custom_function
    def scored(states: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        def total(states: mx.array) -> tuple[mx.array, mx.array]:
            values = log_probs(states, targets)
            return mx.sum(values), values

        (_, values), gradient = mx.value_and_grad(total)(states)
        return values, gradient

    @scored.vjp
    def scored_vjp(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, mx.array]:
        slopes = outputs[1] * cotangents[0][:, None]
        return slopes.astype(primals[0].dtype), mx.zeros_like(primals[1])

    def values(states: mx.array, targets: mx.array) -> mx.array:
        found: Any = scored(states, targets)
        return cast(mx.array, found[0])

    return values


def row_sums(layout: Layout | Continued, values: mx.array) -> mx.array:
    """Sums of answers `[n]` by row of the layout's shape, `[rows]`; by gathering, which is deterministic anywhere."""
    index = np.zeros(layout.shape, np.int32)
    index.reshape(-1)[layout.slots] = np.arange(len(layout))
    filled = np.zeros(layout.shape, np.bool_)
    filled.reshape(-1)[layout.slots] = True
    return mx.sum(mx.where(mx.array(filled), values[mx.array(index)], 0.0), axis=1)


def _head_log_probs(handle: Handle, targets: mx.array, states: mx.array, factors: Mapping[str, mx.array]) -> mx.array:
    """Log-probs of targets, `[n]`. `factors` are those that sit in the head itself."""
    _assign(handle, factors)
    return _log_softmax_at(handle.head.logits(states), targets, fast=cpu.replaces(handle.device))


def _log_softmax_at(logits: mx.array, targets: mx.array, *, fast: bool) -> mx.array:
    """Log-softmax in float32 at the targets, `[n]`.

    Each row is shifted by its target first: `logit - logsumexp(logits)` would round a log-prob near 0 to the spacing of
    float32 at the size of the logits, 8e-6 at 100, always upwards.
    """
    logits = logits.astype(mx.float32)
    if fast:
        return cpu.log_softmax_at(logits, targets)
    return -log_sum_exp(logits - mx.take_along_axis(logits, targets[:, None], axis=-1))


def log_sum_exp(values: mx.array) -> mx.array:
    """`log sum exp` over the last axis of `[n, vocabulary]`, `[n]`, in blocks and blocks of blocks.

    MLX's own adds one term after another on a CPU: of a confident model's thousands of small probabilities each is
    lost beside a sum near 1, which made log-probs too high by 7e-6 on average (3072 tokens; more with more).
    """
    return in_blocks(values, mx.logsumexp)


def _assign(handle: Handle, factors: Mapping[str, mx.array]) -> None:
    if handle.adapter is not None:
        adapters.assign(handle.adapter, factors)
