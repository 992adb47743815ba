"""SFT steps: the loss, its gradient, accumulation, and everything a step must leave alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mindprint.contract import LoadedModel, TokenBatch
from mindprint.losses import sft_loss
from mindprint_testing import reference
from mindprint_testing.bench import Bench, rows_of, sft_update

LOSS = 1e-5
"""Relative to 1 + loss, float32: the tolerance of Mindprint's parity tests."""

SLOPE = 2e-2
"""Relative, of a finite difference of a float32 loss."""


class Sft:
    """`mindprint_sft_step`."""

    def test_the_sft_loss_is_cores(self, bench: Bench) -> None:
        """`-sum(log p) / update.tokens` over completion tokens, of the adapter as it is before the update.

        If it fails: the loss is a mean over rows or over all tokens, prompt tokens count, or the loss was taken after
        the update.
        """
        model, batch = bench.ready(), bench.token_batch()
        expected = sft_loss(bench.backend.log_probs(model, batch).astype(np.float64), batch.loss_mask)
        assert bench.sft_step(model, batch).loss == pytest.approx(expected, abs=LOSS * (1 + expected))

    def test_the_normalizer_is_the_updates(self, bench: Bench) -> None:
        """With twice the tokens in `update.tokens` (the other rank has the rest), loss and gradient are half.

        If it fails: the backend divides by its own count, and several ranks or micro-batches do not add up.
        """
        model, batch = bench.ready(), bench.token_batch()
        state = bench.backend.save(model)
        whole = bench.sft_step(model, batch)
        bench.backend.restore(model, state)
        half = bench.sft_step(model, batch, tokens=2 * batch.loss_tokens)
        assert half.loss == pytest.approx(whole.loss / 2, rel=1e-5)
        assert half.grad_norm == pytest.approx(whole.grad_norm / 2, rel=1e-4)

    def test_sft_gradients_by_finite_differences(self, bench: Bench) -> None:
        """For each factor of each site, the loss changes along its gradient by the gradient's square.

        If it fails: the gradient is not that of the loss. If only A or only B of some sites fails, they are cut off
        from the loss; if all fail by one factor, look at the scale or at the normalizer.
        """
        model, batch = bench.ready(), bench.token_batch()
        gradient = reference.gradients(
            bench.backend, model, lambda update: bench.backend.sft_step(model, [batch], update), sft_update(batch)
        )
        for name, values in gradient.items():
            # Along one factor alone: a gradient that is wrong in one small factor would be lost in the sum of all.
            along = {name: values}
            slope = reference.slope(bench.backend, model, lambda: _evaluated(bench, model, batch), along, size=1e-2)
            # The slope of a factor with almost no gradient is rounding alone: hence the absolute part.
            assert slope == pytest.approx(reference.norm(along) ** 2, rel=SLOPE, abs=1e-5), name

    def test_the_stated_norm_is_that_of_the_gradient(self, bench: Bench) -> None:
        """`grad_norm` is the 2-norm of all factors' gradients together, before clipping.

        If it fails: it is a sum of norms, taken after clipping, or of one site only. Users then read another number
        than clipping compares.
        """
        model, batch = bench.ready(), bench.token_batch()
        gradient = reference.gradients(
            bench.backend, model, lambda update: bench.backend.sft_step(model, [batch], update), sft_update(batch)
        )
        # A limit that clips: a norm taken after clipping would be the limit.
        limit = reference.norm(gradient) / 3
        stated = bench.sft_step(model, batch, max_grad_norm=limit).grad_norm
        assert stated == pytest.approx(reference.norm(gradient), rel=1e-4)

    def test_eight_micro_batches_are_one_batch_of_eight(self, bench: Bench) -> None:
        """Rows of different lengths, at once and one by one: the same loss, norm and gradient.

        If it fails: micro-batches are averaged with equal weight, or their gradients overwrite each other, or the
        optimizer steps more than once.
        """
        batch, whole, divided = bench.token_batch(rows=8), bench.ready(), bench.ready()
        together = bench.sft_step(whole, batch)
        apart = bench.sft_step(divided, *rows_of(batch))
        assert apart.loss == pytest.approx(together.loss, abs=LOSS * (1 + together.loss))
        assert apart.grad_norm == pytest.approx(together.grad_norm, rel=1e-4)
        states = [bench.backend.save(model) for model in (whole, divided)]
        assert [state.optimizer_steps for state in states] == [1, 1]
        # After one step the first moment is the gradient times 1 - beta1. No hook returns the gradient itself.
        moments = [reference.flat(state.first_moments) for state in states]
        assert reference.distance(moments[1], moments[0]) < 1e-4

    def test_rows_that_ask_nothing_add_nothing(self, bench: Bench) -> None:
        """A micro-batch with an empty mask changes neither loss nor gradient; a step of nothing else is 0, not NaN.

        If it fails: an average over no tokens was taken. Divide by `update.tokens` alone, and by no less than 1.
        """
        batch = bench.token_batch()
        # A mean over the tokens of such a batch divides by zero, and NaN would spread to the whole step.
        empty = replace(bench.token_batch(seed=5), loss_mask=np.zeros_like(batch.loss_mask))
        plain, more = bench.sft_step(bench.ready(), batch), bench.sft_step(bench.ready(), batch, empty)
        assert more.loss == pytest.approx(plain.loss, rel=1e-6)
        assert more.grad_norm == pytest.approx(plain.grad_norm, rel=1e-5)
        nothing = bench.sft_step(bench.ready(), empty)
        assert (nothing.loss, nothing.grad_norm) == (0.0, 0.0)

    def test_a_step_without_micro_batches_is_an_update_without_gradient(self, bench: Bench) -> None:
        """Where a rank got no micro-batch: loss and gradient 0, no log-probs, and AdamW's update all the same.

        If it fails: the sum over no micro-batches is an error, or the update is left out, so that one rank's step count
        and moments differ from the others'. Moments decay by beta1 and beta2.
        """
        for preference in (False, True):
            model = bench.ready()
            bench.sft_step(model, bench.token_batch())
            before = reference.flat(bench.backend.save(model).first_moments)
            metrics = bench.dpo_step(model) if preference else bench.sft_step(model)
            assert (metrics.loss, metrics.grad_norm, metrics.skipped) == (0.0, 0.0, False)
            if preference:
                assert metrics.chosen_log_probs is not None
                assert metrics.rejected_log_probs is not None
                assert metrics.chosen_log_probs.size == metrics.rejected_log_probs.size == 0
            state = bench.backend.save(model)
            assert state.optimizer_steps == 2
            for name, values in reference.flat(state.first_moments).items():
                np.testing.assert_allclose(values, 0.9 * before[name], rtol=1e-5, atol=1e-12)

    def test_training_lowers_the_loss_and_leaves_the_base_alone(self, bench: Bench) -> None:
        """Twelve steps on one batch: the loss falls by a tenth and more, and without the adapter nothing changed.

        If it fails: gradients have the wrong sign, updates do not reach the adapter that computes, or the base is
        trained with it.
        """
        model, batch = bench.ready(), bench.token_batch()
        base = bench.backend.log_probs(model, batch, adapter=False)
        # A rate far above that of real training, so that twelve steps show a clear fall.
        losses = [bench.sft_step(model, batch, learning_rate=3e-2).loss for _ in range(12)]
        assert losses[-1] < 0.9 * losses[0]
        np.testing.assert_array_equal(bench.backend.log_probs(model, batch, adapter=False), base)

    def test_every_step_sees_the_adapter_as_it_is_now(self, bench: Bench) -> None:
        """At every step, training reports the loss that evaluation computes.

        If it fails at the second step: a compiled step keeps the adapter it was compiled with, or evaluation does.
        """
        model, batch = bench.ready(), bench.token_batch()
        for _ in range(4):
            # Evaluated before the step, because the step reports the loss before its update.
            expected = _evaluated(bench, model, batch)
            assert bench.sft_step(model, batch).loss == pytest.approx(expected, abs=LOSS * (1 + expected))

    def test_gradient_checkpointing_changes_no_numbers(self, bench: Bench) -> None:
        """With and without `update.gradient_checkpointing`, SFT and preference steps have the same loss and gradient.

        If it fails: the second computation of a layer differs from the first (other dropout masks, another adapter), or
        gradients of the factors inside it are lost.
        """
        batch, pairs = bench.token_batch(), bench.preference_batch()
        results = []
        for checkpointing in (False, True):
            sft, dpo = bench.ready(), bench.ready()
            metrics = [
                bench.sft_step(sft, batch, gradient_checkpointing=checkpointing),
                bench.dpo_step(dpo, pairs, gradient_checkpointing=checkpointing),
            ]
            moments = [reference.flat(bench.backend.save(model).first_moments) for model in (sft, dpo)]
            results.append(list(zip(metrics, moments, strict=True)))
        for (plain, kept), (again, recomputed) in zip(*results, strict=True):
            assert again.loss == pytest.approx(plain.loss, abs=LOSS * (1 + plain.loss))
            assert reference.distance(recomputed, kept) < 1e-4

    def test_inputs_are_not_written_to(self, bench: Bench) -> None:
        """After every hook, the arrays that core handed over are unchanged.

        If it fails: core's rows, cached reference or checkpoints change behind its back. Copy before writing in place.
        """
        batch, pairs, model = bench.token_batch(), bench.preference_batch(), bench.load()
        adapter = bench.adapter(bench.linear_sites(model))
        handed = [*vars(batch).values(), *vars(pairs).values(), *(f for pair in adapter.tensors.values() for f in pair)]
        given = [values for values in handed if values is not None]
        before = [values.copy() for values in given]
        bench.backend.inject_adapter(model, adapter)
        bench.backend.log_probs(model, batch)
        bench.sft_step(model, batch)
        bench.dpo_step(model, pairs)
        for values, copy in zip(given, before, strict=True):
            np.testing.assert_array_equal(values, copy)

    def test_numpys_own_generator_plays_no_part(self, bench: Bench) -> None:
        """A step is the same whatever state NumPy's global generator is in, and leaves it there.

        If it fails: something is drawn from the process's generator, so that resume cannot be exact. Key every draw
        with `update.seed`, or with `sampling.seed`.
        """
        batch, metrics = bench.token_batch(), []
        for seed in (0, 1):
            model = bench.ready()
            np.random.seed(seed)  # noqa: NPY002 (this test is about the global generator)
            # The next draw of the generator. A step that drew anything from it would leave another one.
            expected = np.random.random()  # noqa: NPY002
            np.random.seed(seed)  # noqa: NPY002
            metrics.append(bench.sft_step(model, batch))
            assert np.random.random() == expected  # noqa: NPY002
        assert metrics[0] == metrics[1]

    def test_two_models_side_by_side_do_not_meet(self, bench: Bench) -> None:
        """Two models trained in turns, one with a rate ten times higher: each is as if it had been trained alone.

        If it fails: the adapter, the optimizer or a compiled function lives in the backend's module instead of in the
        model's handle.
        """
        batch = bench.token_batch()
        # The same start for the first and the one trained alone, so that they must end bit for bit alike.
        first, second, alone = bench.ready(), bench.ready(seed=5), bench.ready()
        for _ in range(3):
            bench.sft_step(first, batch)
            bench.sft_step(second, batch, learning_rate=1e-1)
        for _ in range(3):
            bench.sft_step(alone, batch)
        np.testing.assert_array_equal(bench.backend.log_probs(first, batch), bench.backend.log_probs(alone, batch))
        assert np.abs(bench.backend.log_probs(first, batch) - bench.backend.log_probs(second, batch)).max() > 1e-2


def _evaluated(bench: Bench, model: LoadedModel, batch: TokenBatch) -> float:
    return sft_loss(bench.backend.log_probs(model, batch).astype(np.float64), batch.loss_mask)
