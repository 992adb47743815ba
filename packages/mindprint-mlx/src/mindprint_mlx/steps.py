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
from mindprint.errors import AdapterError
from mindprint.loss_scale import next_loss_scale
from mindprint.losses import PairLogProbs, PreferenceLoss
from mindprint_mlx import adapter as adapters
from mindprint_mlx import groups, optimizer
from mindprint_mlx.arrays import NAMESPACE, scalar, to_numpy
from mindprint_mlx.logprobs import answers, chosen_layout, row_sums
from mindprint_mlx.model import Adapter, Handle

Factors = Mapping[str, mx.array]


@dataclass(frozen=True)
class Piece:
    """A differentiable part of a micro-batch: its share of the loss, and the arrays that are reported beside it.

    `dropout` is the key of its dropout masks; None trains without dropout.
    """

    loss: Callable[[Factors], tuple[mx.array, tuple[mx.array, ...]]]
    dropout: mx.array | None = None


def sft_step(handle: Handle, batches: Sequence[TokenBatch], update: Update) -> StepMetrics:
    """One step on `-sum(log p) / update.tokens`, with dropout keyed by the step's seed and the micro-batch."""
    parts = [_sft_pieces(handle, batch, update, dropout_key(update.seed, at)) for at, batch in enumerate(batches)]
    return _step(handle, parts, update)[0]


def dpo_step(handle: Handle, batches: Sequence[PreferenceBatch], loss: PreferenceLoss, update: Update) -> StepMetrics:
    """One step on `loss.total`, without dropout; reports the policy's summed log-probs before the update."""
    rows = [groups.pair_groups(handle, batch) for batch in batches]
    parts = [
        [Piece(_dpo_loss(handle, layouts.pairs_of(batch, pairs), loss, update)) for pairs in each]
        for batch, each in zip(batches, rows, strict=True)
    ]
    metrics, reported = _step(handle, parts, update)
    # Pieces are of pairs in the order of their lengths.
    places = np.argsort(
        np.concatenate([pairs + start for each, start in zip(rows, _starts(batches), strict=True) for pairs in each])
    )
    chosen, rejected = (np.concatenate([sums[half] for sums in reported])[places] for half in (0, 1))
    return replace(metrics, chosen_log_probs=chosen, rejected_log_probs=rejected)


def _starts(batches: Sequence[PreferenceBatch]) -> Sequence[int]:
    """How many pairs come before each batch."""
    return [sum(batch.pairs for batch in batches[:at]) for at in range(len(batches))]


def dropout_key(seed: int, micro_batch: int) -> mx.array:
    """The key of a micro-batch's dropout masks: a function of (step seed, index) alone, so that resume is exact."""
    return mx.random.key(int(np.random.SeedSequence((seed, micro_batch)).generate_state(1, np.uint64)[0]))


def _sft_pieces(handle: Handle, batch: TokenBatch, update: Update, key: mx.array) -> list[Piece]:
    rows = groups.token_groups(handle, batch)
    keys = [key] if len(rows) == 1 else list(mx.random.split(key, len(rows)))
    mx.eval(keys)  # for other threads
    return [
        Piece(_sft_loss(handle, layouts.token_rows(batch, some), update), part)
        for some, part in zip(rows, keys, strict=True)
    ]


def _sft_loss(
    handle: Handle, batch: TokenBatch, update: Update
) -> Callable[[Factors], tuple[mx.array, tuple[mx.array, ...]]]:
    layout = layouts.sequences(batch)

    def loss(factors: Factors) -> tuple[mx.array, tuple[mx.array, ...]]:
        if not len(layout):
            return mx.array(0.0), ()
        values = answers(handle, layout, factors, gradient_checkpointing=update.gradient_checkpointing)
        return -mx.sum(values) / update.tokens, ()

    return loss


def _dpo_loss(
    handle: Handle, batch: PreferenceBatch, preference: PreferenceLoss, update: Update
) -> Callable[[Factors], tuple[mx.array, tuple[mx.array, ...]]]:
    joined = layouts.preference_sequences(batch)
    layout = chosen_layout(handle, joined, share_prompts=update.share_prompts)

    def loss(factors: Factors) -> tuple[mx.array, tuple[mx.array, ...]]:
        values = answers(handle, layout, factors, gradient_checkpointing=update.gradient_checkpointing)
        sums = row_sums(layout, values)
        chosen, rejected = sums[: batch.pairs], sums[batch.pairs :]
        pairs = PairLogProbs(chosen, rejected, *_constants(batch))
        total = preference.total(NAMESPACE, pairs, pair_count=update.pairs, chosen_token_count=update.tokens)
        return total, (chosen, rejected)

    return loss


def _constants(batch: PreferenceBatch) -> tuple[mx.array | None, ...]:
    """What of a pair is no function of the model: reference log-probs and token counts, float32 `[pairs]`."""
    values = (batch.reference_chosen, batch.reference_rejected, batch.chosen_lengths, batch.rejected_lengths)
    return tuple(None if value is None else mx.array(value.astype(np.float32)) for value in values)


def _step(
    handle: Handle, parts: Sequence[Sequence[Piece]], update: Update
) -> tuple[StepMetrics, list[tuple[np.ndarray, ...]]]:
    """Accumulate, unscale, clip, update; with each micro-batch's reported arrays."""
    adapter = handle.adapter
    if adapter is None:
        raise AdapterError("the model has no adapter to train; inject one first")
    with handle.in_use():
        scale = handle.loss_scale
        loss, gradients, reported = _accumulated(handle, adapter, parts, scale or 1.0)
        if scale is not None:
            gradients = {name: gradient / scale for name, gradient in gradients.items()}
        norm = optimizer.global_norm(gradients)
        skipped = scale is not None and not math.isfinite(scalar(norm))
        if not skipped:
            _apply(adapter, gradients, norm, update)
        if scale is not None:
            handle.loss_scale = next_loss_scale(scale, adapter.moments.steps, skipped=skipped)
    return StepMetrics(loss, scalar(norm), skipped, scale), reported


def _accumulated(
    handle: Handle, adapter: Adapter, parts: Sequence[Sequence[Piece]], scale: float
) -> tuple[float, Factors, list[tuple[np.ndarray, ...]]]:
    """The step's loss, its gradients times `scale`, and what each piece reports."""
    total, reported = 0.0, []
    gradients: Factors = {}
    try:
        for pieces in parts:
            tasks = [partial(_piece_done, adapter, piece, scale) for piece in pieces]
            for loss, extra, fresh in groups.side_by_side(handle.device, tasks):
                gradients = {name: gradients[name] + fresh[name] for name in fresh} if gradients else fresh
                mx.eval(gradients)
                total += scalar(loss)
                reported.append(tuple(to_numpy(values) for values in extra))
    finally:
        adapters.use_dropout(adapter, None)
        adapters.assign(adapter, adapter.factors)
    return total, gradients, reported


def _piece_done(adapter: Adapter, piece: Piece, scale: float) -> tuple[mx.array, list[mx.array], Factors]:
    """A piece's loss, what it reports, and its gradients times `scale`."""
    adapters.use_dropout(adapter, piece.dropout)
    (_, loss, *extra), gradients = _differentiated(piece, scale)(adapter.factors)
    return loss, extra, gradients


def _differentiated(piece: Piece, scale: float) -> Callable[[Factors], tuple[tuple[mx.array, ...], Factors]]:
    def scaled(factors: Factors) -> tuple[mx.array, ...]:
        loss, extra = piece.loss(factors)
        return (loss * scale, loss, *extra)

    differentiated: Callable[[Factors], tuple[tuple[mx.array, ...], Factors]] = mx.value_and_grad(scaled)
    return differentiated


def _apply(adapter: Adapter, gradients: Factors, norm: mx.array, update: Update) -> None:
    limited = optimizer.clipped(gradients, norm, update.max_grad_norm)
    factors, moments = optimizer.adamw(
        adapter.factors, limited, adapter.moments, update.learning_rate, update.optimizer
    )
    # Nothing else holds the old values when the new ones are computed, so that these take their places in memory.
    adapter.factors, adapter.moments = factors, moments
    adapters.assign(adapter, factors)
    mx.eval(factors, moments.first, moments.second)
