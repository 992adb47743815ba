"""One optimizer step: SFT and preference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mindprint.contract import Float32, Int32, PreferenceBatch, StepMetrics, TokenBatch, Update
from mindprint.layouts import groups_of_like_length, pair_lengths, pairs_of, preference_sequences, token_rows
from mindprint.losses import PairLogProbs, PreferenceLoss
from mindprint_torch.adapter import dropout, require_adapter
from mindprint_torch.arrays import TORCH, floats_on_device, on_device
from mindprint_torch.logprobs import batch_layouts, layout_log_probs, placed_log_probs
from mindprint_torch.model import Adapter, TorchModel
from mindprint_torch.ranks import sum_over_ranks
from mindprint_torch.recompute import recomputed

TOKENS_AT_ONCE = 1280
"""On a CPU, more tokens than this are read in parts: products are as fast, and the arrays between them stay nearer."""

GROUP_OVERHEAD = 128
"""The cost of one more part of a micro-batch on a CPU, as tokens: every weight is read once more."""


def sft_step(model: TorchModel, batches: Sequence[TokenBatch], update: Update) -> StepMetrics:
    """Take one step on `-sum(log p) / update.tokens` over all micro-batches, dropout keyed by seed and index."""
    adapter = require_adapter(model)
    model.kept.forget()
    losses = []
    for index, batch in enumerate(batches):
        with (
            recomputed(model.network, enabled=update.gradient_checkpointing),
            dropout(model, seed=update.seed, micro_batch=update.micro_batch(index)),
        ):
            for rows in _row_groups(model, batch.lengths):
                layouts = batch_layouts(model, token_rows(batch, rows))
                log_probs = torch.cat([layout_log_probs(model, layout) for layout in layouts])
                losses.append(_add_gradient(adapter, -log_probs.sum() / max(update.tokens, 1)))
    return _finish_step(adapter, losses, update)


def dpo_step(
    model: TorchModel, batches: Sequence[PreferenceBatch], loss: PreferenceLoss, update: Update
) -> StepMetrics:
    """Take one step on core's preference loss, without dropout; return the policy's sums from before the update."""
    adapter = require_adapter(model)
    model.kept.forget()
    losses, sums = [], [torch.empty((2, 0), device=model.device)]
    for batch in batches:
        batch_sums = torch.empty((2, batch.pairs), device=model.device)
        for rows in _row_groups(model, pair_lengths(batch)):
            with recomputed(model.network, enabled=update.gradient_checkpointing):
                pairs = pair_log_probs(model, pairs_of(batch, rows), share_prompts=update.share_prompts)
                total = loss.total(TORCH, pairs, pair_count=update.pairs, chosen_token_count=update.tokens)
                losses.append(_add_gradient(adapter, total))
            policy = torch.stack([pairs.policy_chosen, pairs.policy_rejected])
            batch_sums[:, on_device(model.device, rows)] = policy.detach()
        sums.append(batch_sums)
    return _finish_step(adapter, losses, update, torch.cat(sums, dim=1))


def _row_groups(model: TorchModel, lengths: Int32) -> tuple[Int32, ...]:
    """Return which rows of a micro-batch are read together: on a CPU, parts that save padding and memory."""
    if model.device.type != "cpu":
        # A GPU is faster with all rows at once, and its kernels skip padding less than they gain by width.
        return (np.arange(len(lengths), dtype=np.int32),)
    return groups_of_like_length(lengths, TOKENS_AT_ONCE, GROUP_OVERHEAD)


def pair_log_probs(model: TorchModel, batch: PreferenceBatch, *, share_prompts: bool = True) -> PairLogProbs:
    """Return summed log-probs of the policy and of the reference, each float32 `[pairs]` on the model's device."""
    layouts = batch_layouts(model, preference_sequences(batch), share_prompts=share_prompts)
    sums = placed_log_probs(model, layouts).sum(dim=1)
    return PairLogProbs(
        policy_chosen=sums[: batch.pairs],
        policy_rejected=sums[batch.pairs :],
        reference_chosen=_float_tensor(model, batch.reference_chosen),
        reference_rejected=_float_tensor(model, batch.reference_rejected),
        chosen_tokens=_float_tensor(model, batch.chosen_lengths),
        rejected_tokens=_float_tensor(model, batch.rejected_lengths),
    )


def _float_tensor(model: TorchModel, values: Float32 | np.ndarray | None) -> Tensor | None:
    return None if values is None else floats_on_device(model.device, np.asarray(values))


def _add_gradient(adapter: Adapter, loss: Tensor) -> Tensor:
    """Add the gradient of one micro-batch to the adapter's; return the loss. Rows without targets have no gradient."""
    if loss.requires_grad:
        adapter.optimizer.scaled(loss).backward()
    return loss.detach()


def _finish_step(
    adapter: Adapter,
    losses: Sequence[Tensor],
    update: Update,
    sums: Tensor | None = None,
) -> StepMetrics:
    """Apply the update. `sums` are the policy's log-probs of chosen and rejected completions, `[2, pairs]`."""
    loss_scale = adapter.optimizer.loss_scale
    # A step without micro-batches has loss 0: a rank that got none of them still takes part in the update.
    loss = torch.stack(list(losses)).sum() if losses else torch.zeros(())
    loss = sum_over_ranks(adapter.optimizer.gradients, loss)
    applied = adapter.optimizer.step(update)
    chosen, rejected = (None, None) if sums is None else sums.cpu().numpy()
    return StepMetrics(
        loss=float(loss),
        grad_norm=applied.grad_norm,
        skipped=applied.skipped,
        loss_scale=loss_scale,
        chosen_log_probs=chosen,
        rejected_log_probs=rejected,
    )
