"""One optimizer step: SFT and preference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mindprint.contract import Float32, Int32, PreferenceBatch, StepMetrics, TokenBatch, Update
from mindprint.layouts import groups_of_like_length, pairs_of, preference_sequences, sequences, token_rows
from mindprint.losses import PairLogProbs, PreferenceLoss
from mindprint_torch.adapter import dropout, require_adapter
from mindprint_torch.arrays import TORCH, on_device
from mindprint_torch.logprobs import chosen_layout, layout_log_probs, placed_log_probs
from mindprint_torch.model import Adapter, TorchModel
from mindprint_torch.recompute import recomputed

TOKENS_AT_ONCE = 1280
"""On a CPU, more tokens than this are read in parts: products are as fast, and what lies between them is nearer."""

GROUP_OVERHEAD = 128
"""What a further part of a micro-batch costs on a CPU, as tokens: every weight is read once more."""


def sft_step(model: TorchModel, batches: Sequence[TokenBatch], update: Update) -> StepMetrics:
    """One step on `-sum(log p) / update.tokens` over all micro-batches; dropout, if any, keyed by seed and index."""
    adapter = require_adapter(model)
    losses = []
    for index, batch in enumerate(batches):
        with (
            recomputed(model.network, enabled=update.gradient_checkpointing),
            dropout(model, seed=update.seed, micro_batch=index),
        ):
            for rows in _groups(model, batch.lengths):
                log_probs = layout_log_probs(model, sequences(token_rows(batch, rows)))
                losses.append(_backward(adapter, -log_probs.sum() / max(update.tokens, 1)))
    return _finish(adapter, losses, update)


def dpo_step(
    model: TorchModel, batches: Sequence[PreferenceBatch], loss: PreferenceLoss, update: Update
) -> StepMetrics:
    """One step on core's preference loss, without dropout; returns the policy's sums from before the update."""
    adapter = require_adapter(model)
    losses, sums = [], []
    for batch in batches:
        of_batch = torch.empty((2, batch.pairs), device=model.device)
        for rows in _groups(model, batch.prompt_lengths + batch.chosen_lengths + batch.rejected_lengths):
            with recomputed(model.network, enabled=update.gradient_checkpointing):
                pairs = pair_log_probs(model, pairs_of(batch, rows), share_prompts=update.share_prompts)
                total = loss.total(TORCH, pairs, pair_count=update.pairs, chosen_token_count=update.tokens)
                losses.append(_backward(adapter, total))
            policy = torch.stack([pairs.policy_chosen, pairs.policy_rejected])
            of_batch[:, on_device(model.device, rows)] = policy.detach()
        sums.append(of_batch)
    return _finish(adapter, losses, update, torch.cat(sums, dim=1))


def _groups(model: TorchModel, lengths: Int32) -> tuple[Int32, ...]:
    """How the rows of a micro-batch are read: all at once, or on a CPU, where it saves padding and memory, in parts."""
    if model.device.type != "cpu":
        return (np.arange(len(lengths), dtype=np.int32),)
    return groups_of_like_length(lengths, TOKENS_AT_ONCE, GROUP_OVERHEAD)


def pair_log_probs(model: TorchModel, batch: PreferenceBatch, *, share_prompts: bool = True) -> PairLogProbs:
    """The policy's summed log-probs beside the reference's, each float32 `[pairs]` on the model's device."""
    layout = chosen_layout(model, preference_sequences(batch), share_prompts=share_prompts)
    sums = placed_log_probs(model, layout).sum(dim=1)
    return PairLogProbs(
        policy_chosen=sums[: batch.pairs],
        policy_rejected=sums[batch.pairs :],
        reference_chosen=_floats(model, batch.reference_chosen),
        reference_rejected=_floats(model, batch.reference_rejected),
        chosen_tokens=_floats(model, batch.chosen_lengths),
        rejected_tokens=_floats(model, batch.rejected_lengths),
    )


def _floats(model: TorchModel, values: Float32 | np.ndarray | None) -> Tensor | None:
    return None if values is None else torch.tensor(np.asarray(values, np.float32), device=model.device)


def _backward(adapter: Adapter, loss: Tensor) -> Tensor:
    """Add the gradient of one micro-batch. A micro-batch that asks nothing has none."""
    if loss.requires_grad:
        adapter.optimizer.scaled(loss).backward()
    return loss.detach()


def _finish(
    adapter: Adapter,
    losses: Sequence[Tensor],
    update: Update,
    sums: Tensor | None = None,
) -> StepMetrics:
    """Apply the update. `sums`: the policy's log-probs of chosen and rejected answers, `[2, pairs]`."""
    loss_scale = adapter.optimizer.loss_scale
    applied = adapter.optimizer.step(update)
    chosen, rejected = (None, None) if sums is None else sums.cpu().numpy()
    return StepMetrics(
        loss=float(torch.stack(list(losses)).sum()),
        grad_norm=applied.grad_norm,
        skipped=applied.skipped,
        loss_scale=loss_scale,
        chosen_log_probs=chosen,
        rejected_log_probs=rejected,
    )
