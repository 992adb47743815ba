"""One optimizer step: losses of micro-batches, their gradients added up, clipped, and AdamW.

The step's loss is a sum over micro-batches with global normalizers, so that accumulating equals the large batch. Each
micro-batch is evaluated before the next is built: memory is that of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import mlx.core as mx
import numpy as np

from mindprint import layouts
from mindprint.contract import PreferenceBatch, StepMetrics, TokenBatch, Update
from mindprint.loss_scale import next_loss_scale
from mindprint.losses import PairLogProbs, PreferenceLoss
from mindprint_mlx import adapter as adapters
from mindprint_mlx import groups, optimizer
from mindprint_mlx.arrays import MLX, scalar, to_numpy
from mindprint_mlx.division import PairGroup
from mindprint_mlx.logprobs import batch_layouts, layout_log_probs, row_sums
from mindprint_mlx.model import Adapter, MlxModel
from mindprint_mlx.ranks import sum_over_ranks

Factors = Mapping[str, mx.array]
Differentiable = Callable[[Factors], tuple[mx.array, tuple[mx.array, ...]]]
"""From factors to a share of the loss, and the arrays that are reported with it."""

Result = tuple[mx.array, list[mx.array], Factors]
"""A share of the loss, the arrays that are reported with it, and its gradients."""


@dataclass(frozen=True)
class Piece:
    """A part of a micro-batch that is differentiated by itself. Without a `dropout` key it trains without dropout."""

    loss: Differentiable
    dropout: mx.array | None = None

    @property
    def parts(self) -> tuple[Differentiable, ...]:
        return (self.loss,)

    def joined(self, results: Sequence[Result]) -> Result:
        """Return the loss, the reported arrays and the gradients, from those of each part."""
        return results[0]


@dataclass(frozen=True)
class SplitPair:
    """A pair whose completions are differentiated apart, each its sum of log-probs, so that two cores can share it.

    The loss depends on a sum's factors through that sum alone: its gradient is the sum's, times one number.
    """

    parts: tuple[Differentiable, Differentiable]
    loss: Callable[[mx.array, mx.array], mx.array]
    dropout: mx.array | None = None

    def joined(self, results: Sequence[Result]) -> Result:
        """Return the loss, both sums and the gradients, from the sums and their gradients."""
        (chosen, _, of_chosen), (rejected, _, of_rejected) = results
        loss, slopes = mx.value_and_grad(self.loss, argnums=(0, 1))(chosen, rejected)
        gradients = {name: slopes[0] * values + slopes[1] * of_rejected[name] for name, values in of_chosen.items()}
        return loss, [chosen[None], rejected[None]], gradients


def sft_step(model: MlxModel, batches: Sequence[TokenBatch], update: Update) -> StepMetrics:
    """Take one step on `-sum(log p) / update.tokens` over all micro-batches, dropout keyed by seed and index."""
    parts = [
        _sft_pieces(model, batch, update, dropout_key(update.seed, update.micro_batch(place)))
        for place, batch in enumerate(batches)
    ]
    return _take_step(model, parts, update)[0]


def dpo_step(model: MlxModel, batches: Sequence[PreferenceBatch], loss: PreferenceLoss, update: Update) -> StepMetrics:
    """Take one step on core's preference loss, without dropout; return the policy's sums from before the update."""
    divided = [_pair_groups(model, batch, update) for batch in batches]
    parts = [
        [_pair_piece(model, batch, group, loss, update) for group in batch_groups]
        for batch, batch_groups in zip(batches, divided, strict=True)
    ]
    metrics, reported = _take_step(model, parts, update)
    # Groups hold pairs in the order of their costs: `order` takes their sums back to the order of the batches.
    starts = np.cumsum([0, *(batch.pairs for batch in batches)])
    numbers = [start + group.pairs for start, groups_ in zip(starts[:-1], divided, strict=True) for group in groups_]
    order = np.argsort(np.concatenate([np.zeros(0, np.intp), *numbers]))
    empty = np.zeros(0, np.float32)
    chosen, rejected = (np.concatenate([empty, *(sums[half] for sums in reported)])[order] for half in (0, 1))
    return replace(metrics, chosen_log_probs=chosen, rejected_log_probs=rejected)


def dropout_key(seed: int, micro_batch: int) -> mx.array:
    """Return the key of a micro-batch's dropout masks: a function of (step seed, index), so that resume is exact."""
    return mx.random.key(int(np.random.SeedSequence((seed, micro_batch)).generate_state(1, np.uint64)[0]))


def _sft_pieces(model: MlxModel, batch: TokenBatch, update: Update, key: mx.array) -> list[Piece]:
    parts = groups.token_groups(model, batch)
    keys = [key] if len(parts) == 1 else list(mx.random.split(key, len(parts)))
    mx.eval(keys)  # here, since other threads use them and an array belongs to the stream that computes it
    return [Piece(_sft_loss(model, part, update), key) for (_, part), key in zip(parts, keys, strict=True)]


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


def _pair_groups(model: MlxModel, batch: PreferenceBatch, update: Update) -> list[PairGroup]:
    completions = np.stack([batch.chosen_lengths, batch.rejected_lengths])
    return groups.pair_groups(model, batch.prompt_lengths, completions, share_prompts=update.share_prompts)


def _pair_piece(
    model: MlxModel, batch: PreferenceBatch, group: PairGroup, preference: PreferenceLoss, update: Update
) -> Piece | SplitPair:
    pairs = layouts.pairs_of(batch, group.pairs)
    sequences = layouts.preference_sequences(pairs)

    def loss(chosen: mx.array, rejected: mx.array) -> mx.array:
        values = PairLogProbs(chosen, rejected, *_pair_constants(pairs))
        total: mx.array = preference.total(MLX, values, pair_count=update.pairs, chosen_token_count=update.tokens)
        return total

    if group.apart:
        rows = [layouts.token_rows(replace(sequences, shared=None), np.array([half])) for half in (0, 1)]
        chosen, rejected = (_row_sum(model, row, update) for row in rows)
        return SplitPair((chosen, rejected), lambda chosen, rejected: loss(chosen[None], rejected[None]))

    sums = _sums(model, sequences, update)

    def piece(factors: Factors) -> tuple[mx.array, tuple[mx.array, ...]]:
        rows = sums(factors)
        halves = rows[: pairs.pairs], rows[pairs.pairs :]
        return loss(*halves), halves

    return Piece(piece)


def _row_sum(model: MlxModel, row: TokenBatch, update: Update) -> Differentiable:
    """Return a function from factors to the sum of one row's log-probs."""
    sums = _sums(model, row, update)
    return lambda factors: (sums(factors)[0], ())


def _sums(model: MlxModel, batch: TokenBatch, update: Update) -> Callable[[Factors], mx.array]:
    """Return a function from factors to the sum of each row's log-probs, `[rows]`."""
    read = batch_layouts(model, batch, share_prompts=update.share_prompts)

    def sums(factors: Factors) -> mx.array:
        parts = [
            row_sums(
                layout,
                layout_log_probs(model, layout, factors, gradient_checkpointing=update.gradient_checkpointing),
            )
            for layout in read
        ]
        return sum(parts[1:], start=parts[0])

    return sums


def _pair_constants(batch: PreferenceBatch) -> tuple[mx.array | None, ...]:
    """Return the parts of a pair that do not depend on the model: reference log-probs and token counts, `[pairs]`."""
    values = (batch.reference_chosen, batch.reference_rejected, batch.chosen_lengths, batch.rejected_lengths)
    return tuple(None if value is None else mx.array(value.astype(np.float32)) for value in values)


def _take_step(
    model: MlxModel, parts: Sequence[Sequence[Piece | SplitPair]], update: Update
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
    model: MlxModel, adapter: Adapter, parts: Sequence[Sequence[Piece | SplitPair]], scale: float
) -> tuple[float, Factors, list[tuple[np.ndarray, ...]]]:
    """Return the step's loss, its gradients times `scale`, and the arrays that each piece reports."""
    total, reported = 0.0, []
    gradients: Factors = {}
    try:
        for pieces in parts:
            tasks = [
                partial(_differentiate, adapter, part, piece.dropout, scale) for piece in pieces for part in piece.parts
            ]
            for loss, extra, fresh in _joined(pieces, groups.side_by_side(model.device, tasks)):
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


def _joined(pieces: Sequence[Piece | SplitPair], results: Iterator[Result]) -> Iterator[Result]:
    """Yield the result of each piece, from those of all parts in order."""
    for piece in pieces:
        yield piece.joined(list(islice(results, len(piece.parts))))
    # To its very end: there the threads that computed are waited for.
    next(results, None)


def _differentiate(adapter: Adapter, part: Differentiable, dropout: mx.array | None, scale: float) -> Result:
    """Return a part's loss, the arrays that it reports, and its gradients times `scale`."""

    def scaled(factors: Factors) -> tuple[mx.array, ...]:
        loss, extra = part(factors)
        return (loss * scale, loss, *extra)

    adapters.use_dropout(adapter, dropout)
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
