"""AdamW and clipping, against NumPy in float64 on the backend's own gradients."""

from __future__ import annotations

import numpy as np
import pytest

from mindprint.contract import AdamW
from mindprint_testing import reference
from mindprint_testing.bench import Bench, sft_update

OTHER = AdamW(betas=(0.8, 0.95), eps=1e-3, weight_decay=0.5)


class Optimizer:
    """The update at the end of `mindprint_sft_step` and `mindprint_dpo_step`."""

    @pytest.mark.parametrize("options", [AdamW(), OTHER], ids=["default", "other"])
    def test_adamw_is_torchs(self, bench: Bench, options: AdamW) -> None:
        """Six steps, each compared with float64 on the gradient that follows from the first moment: values and moments.

        If it fails at step 1: bias correction, eps inside the root, or a decay that is not decoupled. If it fails
        later: the step count, a learning rate that is kept from the first step, or moments in another dtype.
        """
        model = bench.ready()
        beta1 = options.betas[0]
        values = reference.flat(bench.backend.save(model).adapter.tensors)
        first = {name: np.zeros_like(value) for name, value in values.items()}
        second = dict(first)
        for step in range(1, 7):
            # Another batch and another rate at every step: a backend that keeps either from the first step is wrong.
            batch, rate = bench.token_batch(seed=step), 1e-2 / step
            bench.sft_step(model, batch, learning_rate=rate, optimizer=options, max_grad_norm=None)
            state = bench.backend.save(model)
            assert state.optimizer_steps == step
            moments = reference.flat(state.first_moments)
            gradient = {name: (moments[name] - beta1 * first[name]) / (1 - beta1) for name in moments}
            expected, first, second = reference.adamw(values, gradient, first, second, rate, options, step)
            # Each step is compared from the backend's own state before it, so that rounding does not add up.
            values = reference.flat(state.adapter.tensors)
            for name, value in expected.items():
                # A gradient taken from float32 moments is exact to 1e-6 of the greatest; where it is smaller than that,
                # its sign, and so the direction of an update of `rate`, is not known.
                known = np.abs(gradient[name]) > 1e-4 * np.abs(gradient[name]).max()
                difference = np.abs(values[name] - value)[known]
                assert difference.max() < 1e-6 + 1e-3 * rate, f"{name}, step {step}"
            saved_second = reference.flat(state.second_moments)
            assert reference.distance(saved_second, second) < 1e-4, f"second moments, step {step}"
            first, second = moments, saved_second

    def test_gradients_are_clipped_by_their_global_norm(self, bench: Bench) -> None:
        """A limit of half the norm halves every gradient (`limit / (norm + 1e-6)`); a higher limit, or none, does not.

        If it fails: clipping is by value or by site, or small gradients are scaled up.
        """
        model, batch = bench.ready(), bench.token_batch()
        state = bench.backend.save(model)
        gradient = reference.gradients(
            bench.backend, model, lambda update: bench.backend.sft_step(model, [batch], update), sft_update(batch)
        )
        size = reference.norm(gradient)
        for limit, factor in ((size / 2, size / 2 / (size + 1e-6)), (2 * size, 1.0), (None, 1.0)):
            bench.backend.restore(model, state)
            bench.sft_step(model, batch, max_grad_norm=limit)
            clipped = {
                name: moment / 0.1 for name, moment in reference.flat(bench.backend.save(model).first_moments).items()
            }
            expected = {name: values * factor for name, values in gradient.items()}
            assert reference.distance(clipped, expected) < 1e-4, f"limit {limit}"

    def test_a_learning_rate_of_zero_changes_no_factor(self, bench: Bench) -> None:
        """The moments take the gradient in, the adapter stays as it was, bit for bit.

        If it fails: the update ignores `update.learning_rate`, as in the first step of a warm-up.
        """
        model, batch = bench.ready(), bench.token_batch()
        before = reference.flat(bench.backend.save(model).adapter.tensors)
        bench.sft_step(model, batch, learning_rate=0.0)
        state = bench.backend.save(model)
        for name, values in reference.flat(state.adapter.tensors).items():
            np.testing.assert_array_equal(values, before[name])
        assert reference.norm(reference.flat(state.first_moments)) > 0

    def test_the_optimizer_of_dpo_is_the_same(self, bench: Bench) -> None:
        """A preference step counts as one update, clips, and moves the adapter by about the learning rate.

        If it fails: each stage has another optimizer. Core restores one state at the start of each stage.
        """
        model, pairs = bench.ready(), bench.preference_batch()
        before = reference.flat(bench.backend.save(model).adapter.tensors)
        bench.dpo_step(model, pairs, learning_rate=1e-3)
        state = bench.backend.save(model)
        assert state.optimizer_steps == 1
        after = reference.flat(state.adapter.tensors)
        # At the first step AdamW moves every element by the rate, whatever its gradient: m / sqrt(v) is its sign.
        greatest = max(float(np.abs(after[name] - before[name]).max()) for name in before)
        assert greatest == pytest.approx(1e-3, rel=2e-2)
