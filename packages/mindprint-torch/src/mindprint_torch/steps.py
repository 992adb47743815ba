"""One optimizer step: SFT and preference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mindprint.contract import Float32, PreferenceBatch, StepMetrics, TokenBatch, Update
from mindprint.layouts import preference_sequences, sequences
from mindprint.losses import PairLogProbs, PreferenceLoss
from mindprint_torch.adapter import Adapter, dropout, require_adapter
from mindprint_torch.arrays import TORCH
from mindprint_torch.logprobs import chosen_layout, layout_log_probs, placed_log_probs
from mindprint_torch.model import TorchModel


def sft_step(model: TorchModel, batches: Sequence[TokenBatch], update: Update) -> StepMetrics:
    """One step on `-sum(log p) / update.tokens` over all micro-batches; dropout, if any, keyed by seed and index."""
    adapter = require_adapter(model)
    losses = []
    for index, batch in enumerate(batches):
        with dropout(model, seed=update.seed, micro_batch=index):
            log_probs = layout_log_probs(model, sequences(batch))
        losses.append(_backward(adapter, -log_probs.sum() / max(update.tokens, 1)))
    return _finish(adapter, losses, update)


def dpo_step(
    model: TorchModel, batches: Sequence[PreferenceBatch], loss: PreferenceLoss, update: Update
) -> StepMetrics:
    """One step on core's preference loss, without dropout; returns the policy's sums from before the update."""
    adapter = require_adapter(model)
    losses, chosen, rejected = [], [], []
    for batch in batches:
        pairs = pair_log_probs(model, batch, share_prompts=update.share_prompts)
        total = loss.total(TORCH, pairs, pair_count=update.pairs, chosen_token_count=update.tokens)
        losses.append(_backward(adapter, total))
        chosen.append(pairs.policy_chosen.detach())
        rejected.append(pairs.policy_rejected.detach())
    return _finish(adapter, losses, update, torch.cat(chosen), torch.cat(rejected))


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
    chosen: Tensor | None = None,
    rejected: Tensor | None = None,
) -> StepMetrics:
    loss_scale = adapter.optimizer.loss_scale
    applied = adapter.optimizer.step(update)
    return StepMetrics(
        loss=float(torch.stack(list(losses)).sum()),
        grad_norm=applied.grad_norm,
        skipped=applied.skipped,
        loss_scale=loss_scale,
        chosen_log_probs=None if chosen is None else chosen.cpu().numpy(),
        rejected_log_probs=None if rejected is None else rejected.cpu().numpy(),
    )
