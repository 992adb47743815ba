"""Checks that stop a run before it corrupts its result in silence. They are cheap, and on by default.

Each failure is a `GuardError` that names the observation, its meaning, and where to look.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mindprint.contract import AdapterState, Dtype, PreferenceBatch, StepMetrics, Update
from mindprint.errors import GuardError
from mindprint.losses import NUMPY, PairLogProbs, PreferenceLoss
from mindprint.plugins.backend import is_finite
from mindprint.tolerances import LOG_PROB_NOISE, LOSS_TOLERANCE, SFT_EVALUATION_TOLERANCE


def check_step(metrics: StepMetrics, rows: Sequence[object]) -> None:
    """Raise `GuardError` if loss or gradient are not finite. `rows` says where the step's data came from."""
    if metrics.skipped or is_finite(metrics):
        return
    # A few are enough to find the row, and a step can have hundreds.
    named = ", ".join(str(row) for row in rows[:8])
    raise GuardError(
        f"loss {metrics.loss} and gradient norm {metrics.grad_norm} are not finite; the batch was {named}. "
        "The last checkpoint is kept; lower the learning rate, or look at these rows"
    )


ZERO_GRADIENT = 1e-8
"""Gradient norm below which a preference stage learns nothing: pairs that differ have a norm near beta."""


def check_preference_gradient(metrics: StepMetrics) -> None:
    """Raise `GuardError` if the first gradient of a preference stage is zero: its loss would never change."""
    if metrics.grad_norm < ZERO_GRADIENT:
        raise GuardError(
            f"the first gradient of the preference stage is zero (norm {metrics.grad_norm:.2g}), and the loss would "
            f"stay at {metrics.loss:.4f}: the chosen and rejected answers are the same to the model; write pairs that "
            "differ, or set dpo.enabled=false"
        )


def check_first_update(before: AdapterState, after: AdapterState, metrics: StepMetrics) -> None:
    """Raise `GuardError` if the first update with a learning rate above 0 had no gradient or changed nothing."""
    if metrics.grad_norm == 0.0:
        raise GuardError("the first gradient is exactly zero: the loss does not depend on the adapter")
    # AdamW's first step moves every element that has a gradient by about the learning rate.
    unchanged = all(
        np.array_equal(pair.a, after.tensors[site].a) and np.array_equal(pair.b, after.tensors[site].b)
        for site, pair in before.tensors.items()
    )
    if unchanged:
        raise GuardError("the first update left the adapter as it was, though its gradient is not zero")


def check_evaluated_loss(backend: str, loss: float, expected: float, dtype: Dtype) -> None:
    """Raise `GuardError` if a step's loss is not the one that the log-probs of its rows give.

    A loss with another factor or mask falls as plausibly as the right one, and trains something else.
    """
    allowed = SFT_EVALUATION_TOLERANCE[dtype] * (1 + abs(expected))
    # Negated, so that NaN fails as well.
    if not abs(loss - expected) <= allowed:
        raise GuardError(
            f"backend {backend!r}: mindprint_sft_step returned a loss of {loss:.6f}, but its own log-probs of "
            f"the same rows give {expected:.6f} (allowed in {dtype}: {allowed:.2g}): it trains another objective than "
            "the configuration names, or another model than it evaluates"
        )


def check_first_preference_step(
    batches: Sequence[PreferenceBatch], metrics: StepMetrics, loss: PreferenceLoss, dtype: Dtype
) -> None:
    """Raise `GuardError` if the reference is not the adapter that this stage started from.

    At the first step policy and reference are one model, so that every log-ratio is 0 within the noise of the dtype.
    """
    if loss.reference_free:
        return
    pairs = pair_log_probs(batches, metrics)
    for policy, reference, tokens in (
        (pairs.policy_chosen, pairs.reference_chosen, pairs.chosen_tokens),
        (pairs.policy_rejected, pairs.reference_rejected, pairs.rejected_tokens),
    ):
        # Noise adds up over the tokens of an answer, so the bound is per token.
        excess = np.abs(policy - reference) / tokens
        if excess.max() > LOG_PROB_NOISE[dtype]:
            raise GuardError(
                f"at the first preference step policy and reference differ by {excess.max():.2g} nats a token "
                f"(noise in {dtype}: {LOG_PROB_NOISE[dtype]:g}): "
                "the reference is not the adapter this stage starts from"
            )


def check_preference_loss(
    batches: Sequence[PreferenceBatch], metrics: StepMetrics, loss: PreferenceLoss, update: Update
) -> None:
    """Raise `GuardError` if the backend's loss is not core's loss of the backend's own log-probs."""
    pairs = pair_log_probs(batches, metrics)
    expected = float(loss.total(NUMPY, pairs, pair_count=update.pairs, chosen_token_count=update.tokens))
    # Negated, so that NaN fails as well.
    if not abs(metrics.loss - expected) <= LOSS_TOLERANCE * (1 + abs(expected)):
        raise GuardError(
            f"the backend's {loss.name} loss is {metrics.loss:.6f}, its own log-probs give {expected:.6f}: "
            "it trains another objective than the configuration names"
        )


def pair_log_probs(batches: Sequence[PreferenceBatch], metrics: StepMetrics) -> PairLogProbs:
    """Collect a preference step's log-probs and reference as float64 arrays `[pairs]`. Absent references are 0."""
    chosen = np.asarray(metrics.chosen_log_probs, np.float64)
    rejected = np.asarray(metrics.rejected_log_probs, np.float64)
    return PairLogProbs(
        chosen,
        rejected,
        np.concatenate([_or_zeros(batch.reference_chosen, batch.pairs) for batch in batches]),
        np.concatenate([_or_zeros(batch.reference_rejected, batch.pairs) for batch in batches]),
        np.concatenate([batch.chosen_lengths for batch in batches]),
        np.concatenate([batch.rejected_lengths for batch in batches]),
    )


def _or_zeros(values: np.ndarray | None, pairs: int) -> np.ndarray:
    return np.zeros(pairs) if values is None else values.astype(np.float64)
