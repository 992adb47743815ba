"""One optimizer step: losses of micro-batches, their gradients added up, clipped, and AdamW.

The step's loss is a sum over micro-batches with global normalizers, so that accumulating equals the large batch. Each
micro-batch is evaluated before the next is built: memory is that of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import numpy as np

from mindprint import layouts
from mindprint.contract import PreferenceBatch, StepMetrics, TokenBatch, Update
from mindprint.loss_scale import next_loss_scale
from mindprint.losses import PairLogProbs, PreferenceLoss
from mindprint_mlx import adapter as adapters
from mindprint_mlx import groups, optimizer
from mindprint_mlx.arrays import MLX, scalar, to_numpy
from mindprint_mlx.logprobs import batch_layouts, layout_log_probs, row_sums
from mindprint_mlx.model import Adapter, MlxModel
from mindprint_mlx.ranks import sum_over_ranks

Factors = Mapping[str, mx.array]
Differentiable = Callable[[Factors], tuple[mx.array, tuple[mx.array, ...]]]
"""From factors to a share of the loss, and the arrays that are reported with it."""


@dataclass(frozen=True)
class Piece:
    """A part of a micro-batch that is differentiated by itself. Without a `dropout` key it trains without dropout."""

    loss: Differentiable
    dropout: mx.array | None = None


def sft_step(model: MlxModel, batches: Sequence[TokenBatch], update: Update) -> StepMetrics:
    """Take one step on `-sum(log p) / update.tokens` over all micro-batches, dropout keyed by seed and index."""
    parts = [
        _sft_pieces(model, batch, update, dropout_key(update.seed, update.micro_batch(place)))
        for place, batch in enumerate(batches)
    ]
    return _take_step(model, parts, update)[0]


def dpo_step(model: MlxModel, batches: Sequence[PreferenceBatch], loss: PreferenceLoss, update: Update) -> StepMetrics:
    """Take one step on core's preference loss, without dropout; return the policy's sums from before the update."""
    rows = [groups.pair_groups(model, batch) for batch in batches]
    parts = [
        [Piece(_dpo_loss(model, layouts.pairs_of(batch, pairs), loss, update)) for pairs in batch_groups]
        for batch, batch_groups in zip(batches, rows, strict=True)
    ]
    metrics, reported = _take_step(model, parts, update)
    # Groups hold pairs in the order of their lengths: `order` takes their sums back to the order of the batches.
    starts = np.cumsum([0, *(batch.pairs for batch in batches)])
    numbers = [start + pairs for start, batch_groups in zip(starts[:-1], rows, strict=True) for pairs in batch_groups]
    order = np.argsort(np.concatenate([np.zeros(0, np.intp), *numbers]))
    empty = np.zeros(0, np.float32)
    chosen, rejected = (np.concatenate([empty, *(sums[half] for sums in reported)])[order] for half in (0, 1))
    return replace(metrics, chosen_log_probs=chosen, rejected_log_probs=rejected)


def dropout_key(seed: int, micro_batch: int) -> mx.array:
    """Return the key of a micro-batch's dropout masks: a function of (step seed, index), so that resume is exact."""
    return mx.random.key(int(np.random.SeedSequence((seed, micro_batch)).generate_state(1, np.uint64)[0]))


def _sft_pieces(model: MlxModel, batch: TokenBatch, update: Update, key: mx.array) -> list[Piece]:
    row_groups = groups.token_groups(model, batch)
    keys = [key] if len(row_groups) == 1 else list(mx.random.split(key, len(row_groups)))
    mx.eval(keys)  # here, since other threads use them and an array belongs to the stream that computes it
    return [
        Piece(_sft_loss(model, layouts.token_rows(batch, rows), update), key)
        for rows, key in zip(row_groups, keys, strict=True)
    ]


def _sft_loss(model: MlxModel, batch: TokenBatch, update: Update) -> Differentiable:
    read = batch_layouts(model, batch)

    def loss(factors: Factors) -> tuple[mx.array, tuple[mx.array, ...]]:
        if not batch.loss_mask.any():
            return mx.array(0.0), ()
        parts = [
            layout_log_probs(model, layout, factors, gradient_checkpointing=update.gradient_checkpointing)
            for layout in read
        ]
        return -mx.sum(mx.concatenate(parts)) / update.tokens, ()

    return loss


def _dpo_loss(model: MlxModel, batch: PreferenceBatch, preference: PreferenceLoss, update: Update) -> Differentiable:
    read = batch_layouts(model, layouts.preference_sequences(batch), share_prompts=update.share_prompts)

    def loss(factors: Factors) -> tuple[mx.array, tuple[mx.array, ...]]:
        parts = [
            row_sums(
                layout,
                layout_log_probs(model, layout, factors, gradient_checkpointing=update.gradient_checkpointing),
            )
            for layout in read
        ]
        sums = sum(parts[1:], start=parts[0])
        chosen, rejected = sums[: batch.pairs], sums[batch.pairs :]
        pairs = PairLogProbs(chosen, rejected, *_pair_constants(batch))
        total = preference.total(MLX, pairs, pair_count=update.pairs, chosen_token_count=update.tokens)
        return total, (chosen, rejected)

    return loss


def _pair_constants(batch: PreferenceBatch) -> tuple[mx.array | None, ...]:
    """Return the parts of a pair that do not depend on the model: reference log-probs and token counts, `[pairs]`."""
    values = (batch.reference_chosen, batch.reference_rejected, batch.chosen_lengths, batch.rejected_lengths)
    return tuple(None if value is None else mx.array(value.astype(np.float32)) for value in values)


def _take_step(
    model: MlxModel, parts: Sequence[Sequence[Piece]], update: Update
) -> tuple[StepMetrics, list[tuple[np.ndarray, ...]]]:
    """Accumulate, unscale, clip and update; return the metrics, and the arrays that each piece reports."""
    adapter = adapters.require_adapter(model)
    model.kept.forget()
    with model.in_use():
        scale = model.loss_scale
        loss, gradients, reported = _accumulate(model, adapter, parts, scale or 1.0)
        loss, gradients = sum_over_ranks(gradients, loss)
        if scale is not None:
            gradients = {name: gradient / scale for name, gradient in gradients.items()}
        norm = optimizer.global_norm(gradients)
        # Only scaled gradients are expected to overflow. Without a scale, core sees the norm and stops the run.
        skipped = scale is not None and not math.isfinite(scalar(norm))
        if not skipped:
            _apply(adapter, gradients, norm, update)
        if scale is not None:
            model.loss_scale = next_loss_scale(scale, adapter.moments.steps, skipped=skipped)
    return StepMetrics(loss, scalar(norm), skipped, scale), reported


def _accumulate(
    model: MlxModel, adapter: Adapter, parts: Sequence[Sequence[Piece]], scale: float
) -> tuple[float, Factors, list[tuple[np.ndarray, ...]]]:
    """Return the step's loss, its gradients times `scale`, and the arrays that each piece reports."""
    total, reported = 0.0, []
    gradients: Factors = {}
    try:
        for pieces in parts:
            tasks = [partial(_differentiate_piece, adapter, piece, scale) for piece in pieces]
            for loss, extra, fresh in groups.side_by_side(model.device, tasks):
                gradients = {name: gradients[name] + fresh[name] for name in fresh} if gradients else fresh
                # Evaluated now, so that no graph holds the activations of earlier pieces.
                mx.eval(gradients)
                total += scalar(loss)
                reported.append(tuple(to_numpy(values) for values in extra))
    finally:
        # Tracing a gradient leaves tracers in the layers.
        adapters.use_dropout(adapter, None)
        adapters.assign(adapter, adapter.factors)
    # A step without micro-batches has gradient 0: a rank that got none of them still takes part in the update.
    return total, gradients or {name: mx.zeros_like(values) for name, values in adapter.factors.items()}, reported


def _differentiate_piece(adapter: Adapter, piece: Piece, scale: float) -> tuple[mx.array, list[mx.array], Factors]:
    """Return a piece's loss, the arrays that it reports, and its gradients times `scale`."""

    def scaled(factors: Factors) -> tuple[mx.array, ...]:
        loss, extra = piece.loss(factors)
        return (loss * scale, loss, *extra)

    adapters.use_dropout(adapter, piece.dropout)
    differentiated: Callable[[Factors], tuple[tuple[mx.array, ...], Factors]] = mx.value_and_grad(scaled)
    (_, loss, *extra), gradients = differentiated(adapter.factors)
    return loss, extra, gradients


def _apply(adapter: Adapter, gradients: Factors, norm: mx.array, update: Update) -> None:
    limited = optimizer.clip_gradients(gradients, norm, update.max_grad_norm)
    factors, moments = optimizer.adamw(
        adapter.factors, limited, adapter.moments, update.learning_rate, update.optimizer
    )
    # Nothing else holds the old values when the new ones are computed, so that these take their places in memory.
    adapter.factors, adapter.moments = factors, moments
    adapters.assign(adapter, factors)
    mx.eval(factors, moments.first, moments.second)
