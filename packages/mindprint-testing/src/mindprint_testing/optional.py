"""Dropout, reduced precision and several devices: the parts of the contract that a backend may leave out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mindprint.contract import Dtype, ModelSpec
from mindprint.loss_scale import initial_loss_scale, next_loss_scale
from mindprint_testing import reference
from mindprint_testing.bench import Bench
from mindprint_testing.claims import Claims

NEAR = {"bfloat16": 0.2, "float16": 0.03}
"""Nats a token by which a base in that dtype may differ from float32, on the tiny model."""


class Optional(Claims):
    """Capabilities `dropout`, `bfloat16`, `float16` and `devices`."""

    def test_several_devices_compute_what_one_computes(self, bench: Bench) -> None:
        """A base on the tested device, named twice, has the digest, the log-probs and the steps of a base on it.

        If it fails: weights are read otherwise, or an input of a layer is lost on its way. Look at `ModelSpec.devices`.
        """
        self.needs("devices")
        name = bench.device if ":" in bench.device or bench.device == "cpu" else f"{bench.device}:0"
        batch, outcomes = bench.token_batch(), []
        for devices in ((), (name, name)):
            model = bench.backend.load_model(ModelSpec(str(bench.folder), bench.device, "float32", devices=devices))
            digest = bench.backend.base_digest(model)
            bench.backend.inject_adapter(model, bench.adapter(bench.linear_sites(model)))
            log_probs = bench.backend.log_probs(model, batch)
            bench.sft_step(model, batch)
            outcomes.append((digest, log_probs, reference.flat(bench.backend.save(model).first_moments)))
        (digest, log_probs, moments), several = outcomes
        assert several[0] == digest
        np.testing.assert_allclose(several[1], log_probs, atol=1e-5)
        assert reference.distance(several[2], moments) < 1e-4

    def test_dropout_is_a_function_of_seed_and_micro_batch(self, bench: Bench) -> None:
        """The same seed gives the same loss, another seed another; two micro-batches have different masks.

        If it fails: masks are drawn from a generator that the process shares, and resume cannot be exact.
        """
        self.needs("dropout")
        batch = bench.token_batch()

        def loss(seed: int, copies: int = 1) -> float:
            return bench.sft_step(bench.ready(dropout=0.4), *[batch] * copies, seed=seed).loss

        assert loss(1) == loss(1)
        assert loss(1) != loss(2)
        assert loss(1) != loss(1, copies=2)

    def test_dropout_masks_survive_gradient_checkpointing(self, bench: Bench) -> None:
        """A step with dropout has the same gradient whether activations are kept or computed again.

        If it fails: the second computation draws other masks, and the gradient is that of no loss at all.
        """
        self.needs("dropout")
        batch, gradients = bench.token_batch(), []
        for checkpointing in (False, True):
            model = bench.ready(dropout=0.4)
            bench.sft_step(model, batch, seed=3, gradient_checkpointing=checkpointing)
            gradients.append(reference.flat(bench.backend.save(model).first_moments))
        assert reference.distance(gradients[1], gradients[0]) < 1e-4

    def test_dropout_is_off_outside_sft(self, bench: Bench) -> None:
        """Log-probs and preference steps are those of an adapter without dropout, before and after SFT steps.

        If it fails: the model was left in training mode, and the guard of DPO's first step stops the run.
        """
        self.needs("dropout")
        batch, pairs = bench.token_batch(), bench.preference_batch()
        plain, dropping = bench.ready(), bench.ready(dropout=0.5)
        np.testing.assert_array_equal(bench.backend.log_probs(plain, batch), bench.backend.log_probs(dropping, batch))
        assert bench.dpo_step(plain, pairs).loss == bench.dpo_step(dropping, pairs).loss
        bench.sft_step(dropping, batch)
        once = bench.backend.log_probs(dropping, batch)
        np.testing.assert_array_equal(bench.backend.log_probs(dropping, batch), once)

    def test_dropout_keeps_the_mean(self, bench: Bench) -> None:
        """The mean loss over forty seeds is near that without dropout, and the losses differ.

        If it fails: kept inputs are not divided by the share kept, or the rate is the share kept.
        """
        self.needs("dropout")
        batch, model = bench.token_batch(), bench.ready(dropout=0.1)
        plain = bench.sft_step(bench.ready(), batch).loss
        # A rate of 0 leaves the adapter alone, so that the forty losses differ by their masks only.
        losses = [bench.sft_step(model, batch, learning_rate=0.0, seed=seed).loss for seed in range(40)]
        assert np.std(losses) > 1e-3
        assert np.mean(losses) == pytest.approx(plain, abs=4 * np.std(losses) / np.sqrt(40) + 0.02 * plain)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_reduced_precision_trains_near_float32(self, bench: Bench, dtype: Dtype) -> None:
        """Log-probs are near float32's, the adapter and its moments are float32, and training lowers the loss.

        If it fails: the adapter was cast to the base's dtype, where small updates vanish; or log-softmax was not
        taken in float32.
        """
        self._needs_dtype(bench, dtype)
        exact, model, batch = bench.ready(), bench.ready(dtype), bench.token_batch()
        log_probs = bench.backend.log_probs(model, batch)
        np.testing.assert_allclose(log_probs, bench.backend.log_probs(exact, batch), rtol=0, atol=NEAR[dtype])
        before = reference.flat(bench.backend.save(model).adapter.tensors)
        # An update of 1e-5 is below half a unit in the last place of most bfloat16 factors: it would change nothing.
        losses = [bench.sft_step(model, batch, learning_rate=1e-5).loss]
        after = reference.flat(bench.backend.save(model).adapter.tensors)
        changed = np.mean([np.mean(after[name] != before[name]) for name in before])
        assert changed > 0.9, "updates of 1e-5 vanish: the adapter is not float32"
        losses += [bench.sft_step(model, batch).loss for _ in range(8)]
        assert losses[-1] < 0.9 * losses[0]

    def test_float16_overflow_is_skipped_and_seen(self, bench: Bench) -> None:
        """A loss scale far too high: the step says so, changes nothing, and the scale halves.

        If it fails: gradients of infinity reach the adapter, or the run makes no progress in silence.
        """
        self._needs_dtype(bench, "float16")
        model, batch = bench.ready("float16"), bench.token_batch()
        state = bench.backend.save(model)
        assert state.loss_scale == initial_loss_scale("float16")
        # 2^40 times a gradient of 1e-7 exceeds float16's greatest number, 65504.
        bench.backend.restore(model, replace(state, loss_scale=2.0**40))
        metrics = bench.sft_step(model, batch)
        assert metrics.skipped
        after = bench.backend.save(model)
        assert (after.optimizer_steps, after.loss_scale) == (0, next_loss_scale(2.0**40, 0, skipped=True))
        for site, pair in state.adapter.tensors.items():
            np.testing.assert_array_equal(after.adapter.tensors[site].b, pair.b)

    def _needs_dtype(self, bench: Bench, dtype: Dtype) -> None:
        self.needs(dtype)
        if dtype not in bench.backend.device(bench.device).dtypes:
            pytest.skip(f"{dtype}: claimed, but not on {bench.device}")
