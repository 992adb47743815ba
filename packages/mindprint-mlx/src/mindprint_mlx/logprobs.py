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
from mindprint.layouts import Continued, Layout, continued, sequences, sequences_apart
from mindprint_mlx import adapter as adapters
from mindprint_mlx import cpu, groups, points
from mindprint_mlx.arrays import in_blocks, to_numpy
from mindprint_mlx.model import MlxModel
from mindprint_mlx.prompts import asked_states
from mindprint_mlx.recompute import recomputed

LOGITS_BYTES = 64 * 2**20
"""The most bytes of any float32 array of logits."""


def log_probs(model: MlxModel, batch: TokenBatch, *, adapter: bool) -> Float32:
    """Return log-probs under the mask, float32 `[rows, T]`, 0 elsewhere."""
    values = np.zeros(batch.tokens.shape, np.float32)
    read = [
        (rows, layout) for rows, group in groups.token_groups(model, batch) for layout in batch_layouts(model, group)
    ]
    with model.in_use(adapter=adapter):
        # Without the adapter the base is computed as it was before there was one, to the last bit.
        tasks = [partial(layout_log_probs, model, layout, {}, skip_unasked=adapter) for _, layout in read]
        for (rows, layout), answers in zip(read, groups.side_by_side(model.device, tasks), strict=True):
            row, column = np.divmod(layout.slots, layout.shape[1])
            values[rows[row], column] = to_numpy(answers)
    return values


def batch_layouts(
    model: MlxModel, batch: TokenBatch, *, share_prompts: bool = True
) -> tuple[Layout, ...] | tuple[Continued]:
    """Return how the batch is read: prompts once, if that is allowed and possible at this length, else whole rows.

    There are several layouts only where the model's rotary embedding tells rows apart by their length.
    """
    if share_prompts and batch.shared is not None:
        layout = continued(batch)
        if layout.prompts.shape[1] + layout.completions.shape[1] <= model.longest_shared:
            return (layout,)
    limit = model.head.rotary_limit
    return (sequences(batch),) if limit is None else sequences_apart(batch, limit)


def layout_log_probs(
    model: MlxModel,
    layout: Layout | Continued,
    factors: Mapping[str, mx.array],
    chunk: int | None = None,
    *,
    gradient_checkpointing: bool = False,
    skip_unasked: bool = True,
) -> mx.array:
    """Return the log-prob of each of the layout's targets, float32 `[n]`, differentiable in `factors`, if any.

    `chunk` is how many positions the head takes at once, by default as many as `LOGITS_BYTES` allows. `skip_unasked`
    lets the last layer leave out places that no target needs (`asked.py`).
    """
    _assign(model, factors)
    if not len(layout):
        return mx.zeros(0)
    with cpu.in_place_of_mlx(model.module) if cpu.replaces(model.device) else nullcontext():
        with recomputed(model, factors) if gradient_checkpointing else nullcontext():
            work = groups.work_of(model)
            read = None if work is None else work.read
            states = asked_states(model.head, len(model.module.layers), layout, read, skip_unasked=skip_unasked)
        targets = mx.array(layout.targets)
        chunk = chunk or max(1, LOGITS_BYTES // (4 * model.head.vocabulary))
        starts = range(0, len(layout), chunk)
        score = _head_log_probs(model, adapters.outside_layers(factors), split=len(starts) > 1)
        parts = (score(states[at : at + chunk], targets[at : at + chunk]) for at in starts)
        # MLX begins all chunks of a graph at once, and would hold the logits of all. Without factors nothing is
        # differentiated, and each chunk can be computed before the next one is made.
        return mx.concatenate([part if factors else points.reached(part) for part in parts])


def _head_log_probs(
    model: MlxModel, head_factors: Mapping[str, mx.array], *, split: bool
) -> Callable[[mx.array, mx.array], mx.array]:
    """Return a function from states `[n, hidden]` and targets `[n]` to log-probs `[n]`.

    `head_factors` are the factors that are in the head itself.
    """
    if model.head.body is not None and not head_factors and model.loss_scale is None:
        return _frozen_head(model)

    def log_probs(states: mx.array, targets: mx.array) -> mx.array:
        part = partial(_chunk_log_probs, model, targets)
        # Recomputed when gradients are taken: else the logits of all chunks would be kept until then.
        return (mx.checkpoint(part) if split else part)(states, head_factors)

    return log_probs


def _frozen_head(model: MlxModel) -> Callable[[mx.array, mx.array], mx.array]:
    """Return log-probs through a head that is not trained, whose gradient is taken while the logits are there.

    A log-prob depends on one state only, so that whatever the loss makes of it multiplies that state's gradient by one
    number. Logits are then neither kept nor computed again. In float16 the loss scale comes too late for this.
    """

    def log_probs(states: mx.array, targets: mx.array) -> mx.array:
        return log_softmax_at(model.head.logits(states), targets, fast=cpu.replaces(model.device))

    @mx.custom_function
    def with_gradient(states: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        def total(states: mx.array) -> tuple[mx.array, mx.array]:
            values = log_probs(states, targets)
            return mx.sum(values), values

        (_, values), gradient = mx.value_and_grad(total)(states)
        return values, gradient

    @with_gradient.vjp
    def with_gradient_vjp(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, mx.array]:
        slopes = outputs[1] * cotangents[0][:, None]
        return slopes.astype(primals[0].dtype), mx.zeros_like(primals[1])

    def values(states: mx.array, targets: mx.array) -> mx.array:
        outputs: Any = with_gradient(states, targets)
        return cast(mx.array, outputs[0])

    return values


def row_sums(layout: Layout | Continued, values: mx.array) -> mx.array:
    """Return sums of log-probs `[n]` by row of the layout's shape, `[rows]`."""
    # By gathering, which is deterministic on every device: scattered additions are not on GPUs.
    if not len(layout):
        return mx.zeros(layout.shape[0])
    index = np.zeros(layout.shape, np.int32)
    index.reshape(-1)[layout.slots] = np.arange(len(layout))
    filled = np.zeros(layout.shape, np.bool_)
    filled.reshape(-1)[layout.slots] = True
    return mx.sum(mx.where(mx.array(filled), values[mx.array(index)], 0.0), axis=1)


def _chunk_log_probs(model: MlxModel, targets: mx.array, states: mx.array, factors: Mapping[str, mx.array]) -> mx.array:
    _assign(model, factors)
    return log_softmax_at(model.head.logits(states), targets, fast=cpu.replaces(model.device))


def log_softmax_at(logits: mx.array, targets: mx.array, *, fast: bool) -> mx.array:
    """Return the log-softmax of logits `[n, vocabulary]` at the targets `[n]`, in float32, `[n]`."""
    logits = logits.astype(mx.float32)
    if fast:
        return cpu.log_softmax_at(logits, targets)
    # Each row is shifted by its target first: `logit - logsumexp(logits)` would round a log-prob near 0 to the spacing
    # of float32 at the size of the logits, 8e-6 at 100, always upwards.
    return -log_sum_exp(logits - mx.take_along_axis(logits, targets[:, None], axis=-1))


def log_sum_exp(values: mx.array) -> mx.array:
    """Return `log sum exp` over the last axis of `[n, vocabulary]`, `[n]`, in blocks and blocks of blocks."""
    # MLX's own adds one term after another on a CPU. Of a confident model's thousands of small probabilities each is
    # lost next to a sum near 1, which made log-probs too high by 7e-6 on average (3072 tokens; more with larger ones).
    return in_blocks(values, mx.logsumexp)


def _assign(model: MlxModel, factors: Mapping[str, mx.array]) -> None:
    if model.adapter is not None:
        adapters.assign(model.adapter, factors)
