"""Preference steps: core's losses on the policy's own log-probs."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from mindprint.contract import PreferenceBatch, StepMetrics
from mindprint.losses import PreferenceLoss, PreferenceLossName
from mindprint_testing import reference
from mindprint_testing.bench import Bench, dpo_update, pairs_of
from mindprint_testing.training import LOSS, SLOPE

CONSTANTS: dict[PreferenceLossName, dict[str, float]] = {
    "robust": {"label_smoothing": 0.2},
    "sigmoid_norm": {"beta": 2.0},
    "orpo": {"beta": 0.2, "sft_weight": 1.0},
    "simpo": {"beta": 2.0},
}
"""Constants under which a loss can be told from the others. The other losses have their defaults."""

LOSSES = [
    PreferenceLoss("sigmoid", label_smoothing=0.1, sft_weight=0.3),
    *(PreferenceLoss(name, **CONSTANTS.get(name, {})) for name in get_args(PreferenceLossName)),
]
"""Every loss that core defines, so that a new one is tested without a change here."""

SUMS = 2e-4
"""Nats by which the summed log-probs of a sequence may differ between training and evaluation."""


def loss_id(loss: PreferenceLoss) -> str:
    return f"{loss.name}-{loss.sft_weight}"


class Preference:
    """`mindprint_dpo_step`."""

    @pytest.mark.parametrize("loss", LOSSES, ids=loss_id)
    def test_preference_losses_are_cores(self, bench: Bench, loss: PreferenceLoss) -> None:
        """Loss and summed log-probs are those of `mindprint_log_probs` on prompt + answer, laid out by hand.

        If it fails for all: prompt tokens count, or padding does. For some: the loss was written again instead of
        calling `loss.total` with `update.pairs` and `update.tokens`, or the reference is ignored.
        """
        model, batch = bench.ready(), bench.preference_batch(reference=not loss.reference_free)
        expected, chosen, rejected = reference.preference(bench.backend, model, batch, loss, dpo_update(batch))
        # The reference is computed first: the step changes the adapter.
        metrics = bench.dpo_step(model, batch, loss=loss)
        assert metrics.loss == pytest.approx(expected, abs=5 * LOSS * (1 + abs(expected)))
        np.testing.assert_allclose(_sums(metrics), np.stack([chosen, rejected]), rtol=0, atol=SUMS)

    @pytest.mark.parametrize("loss", LOSSES, ids=loss_id)
    def test_preference_gradients_by_finite_differences(self, bench: Bench, loss: PreferenceLoss) -> None:
        """Along its gradient the loss changes by the gradient's square.

        If it fails: the gradient is not that of the loss: its sign, the slope of one of the two answers, or the SFT
        term.
        """
        model, batch = bench.ready(), bench.preference_batch(reference=not loss.reference_free)
        update = dpo_update(batch)
        gradient = reference.gradients(
            bench.backend, model, lambda update: bench.backend.dpo_step(model, [batch], loss, update), update
        )
        slope = reference.slope(
            bench.backend,
            model,
            lambda: reference.preference(bench.backend, model, batch, loss, update)[0],
            gradient,
            size=1e-2,
        )
        assert slope == pytest.approx(reference.norm(gradient) ** 2, rel=SLOPE)

    def test_training_prefers_the_chosen_answer(self, bench: Bench) -> None:
        """Six steps raise log p(chosen) − log p(rejected).

        If it fails: a sign is turned; a published description of this loss carries one minus too many.
        """
        model, batch = bench.ready(), bench.preference_batch()
        margins = []
        for _ in range(6):
            chosen, rejected = _sums(bench.dpo_step(model, batch))
            margins.append(float((chosen - rejected).mean()))
        # 0.3 nats is far above rounding, and a turned sign moves the margin the other way.
        assert margins[-1] > margins[0] + 0.3

    def test_a_policy_that_is_its_reference_has_the_loss_at_zero(self, bench: Bench) -> None:
        """With the policy's own log-probs as reference, the sigmoid loss is ln 2.

        If it fails: the reference is not subtracted, or is taken at the wrong places. A run stops at this.
        """
        model, batch = bench.ready(), bench.preference_batch()
        _, chosen, rejected = reference.preference(bench.backend, model, batch, PreferenceLoss(), dpo_update(batch))
        # float32, because the contract hands the reference over in it.
        own = replace(batch, reference_chosen=chosen.astype(np.float32), reference_rejected=rejected.astype(np.float32))
        assert bench.dpo_step(model, own).loss == pytest.approx(np.log(2), abs=SUMS)

    def test_pairs_one_by_one_are_pairs_together(self, bench: Bench) -> None:
        """Micro-batches of one pair: the same loss and gradient, and log-probs in the order of the pairs.

        If it fails: the loss is averaged within a micro-batch, or the reported log-probs are in another order, so that
        rewards belong to other pairs.
        """
        batch, loss = bench.preference_batch(pairs=4), PreferenceLoss(sft_weight=0.3)
        together = bench.dpo_step(bench.ready(), batch, loss=loss)
        apart = bench.dpo_step(bench.ready(), *pairs_of(batch), loss=loss)
        assert apart.loss == pytest.approx(together.loss, abs=LOSS * (1 + abs(together.loss)))
        assert apart.grad_norm == pytest.approx(together.grad_norm, rel=1e-4)
        np.testing.assert_allclose(_sums(apart), _sums(together), rtol=0, atol=SUMS)

    def test_the_padding_of_pairs_changes_nothing(self, bench: Bench) -> None:
        """Wider parts with other ids behind their lengths: the same loss and log-probs.

        If it fails: a length is ignored for the width of its array.
        """
        batch = bench.preference_batch()
        plain, padded = bench.dpo_step(bench.ready(), batch), bench.dpo_step(bench.ready(), _with_other_padding(batch))
        assert padded.loss == pytest.approx(plain.loss, abs=LOSS * (1 + plain.loss))
        assert padded.grad_norm == pytest.approx(plain.grad_norm, rel=1e-4)
        np.testing.assert_allclose(_sums(padded), _sums(plain), rtol=0, atol=SUMS)


def _sums(metrics: StepMetrics) -> NDArray[np.float64]:
    """Return the summed log-probs of chosen, then of rejected completions, `[2, pairs]`."""
    return np.array([metrics.chosen_log_probs, metrics.rejected_log_probs], np.float64)


def _with_other_padding(batch: PreferenceBatch) -> PreferenceBatch:
    changed = {}
    for part in ("prompt", "chosen", "rejected"):
        tokens = np.pad(getattr(batch, part), ((0, 0), (0, 3)))
        tokens[np.arange(tokens.shape[1]) >= getattr(batch, f"{part}_lengths")[:, None]] = 5
        changed[part] = tokens
    return replace(batch, **changed)
