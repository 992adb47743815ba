"""State: saved, restored into another model, and continued from there as if nothing had happened."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mindprint.contract import AdamW, LoadedModel, StepMetrics, TrainingState
from mindprint.errors import AdapterError
from mindprint_testing import reference
from mindprint_testing.bench import Bench


class State:
    """`mindprint_save` and `mindprint_restore`."""

    def test_before_the_first_step_there_are_no_moments(self, bench: Bench) -> None:
        """A fresh adapter's state has no moments and no steps, and no loss scale in float32.

        If it fails: a new stage would start from moments of zero at another step count, or the other way round.
        """
        state = bench.backend.save(bench.ready())
        assert (dict(state.first_moments), dict(state.second_moments)) == ({}, {})
        assert (state.optimizer_steps, state.loss_scale) == (0, None)

    def test_moments_are_named_and_shaped_as_the_factors(self, bench: Bench) -> None:
        """Moments lie under the sites' names, float32, in the layout of A and B.

        If it fails: another backend cannot continue from this state.
        """
        model = bench.ready()
        bench.sft_step(model, bench.token_batch())
        state = bench.backend.save(model)
        for moments in (state.first_moments, state.second_moments):
            assert set(moments) == set(state.adapter.tensors)
            for site, pair in state.adapter.tensors.items():
                assert [part.shape for part in moments[site]] == [part.shape for part in pair]
                assert {part.dtype for part in moments[site]} == {np.dtype(np.float32)}
        assert all((part >= 0).all() for pair in state.second_moments.values() for part in pair)

    @pytest.mark.parametrize("stopped", range(4))
    def test_resume_is_bit_for_bit(self, bench: Bench, stopped: int) -> None:
        """Two SFT and two DPO steps; from the state before each, a newly loaded model comes to the same end.

        If it fails: training depends on something that is not in the state. Look for it in the handle: a generator, a
        schedule, a cache.
        """
        model = bench.ready()
        states, metrics = [bench.backend.save(model)], []
        for index in range(4):
            metrics.append(_step(bench, model, index))
            states.append(bench.backend.save(model))
        # Another adapter is overwritten: a backend that keeps anything of it ends somewhere else.
        other = bench.ready(seed=9)
        bench.backend.restore(other, states[stopped])
        _assert_same(bench.backend.save(other), states[stopped])
        for index in range(stopped, 4):
            again = _step(bench, other, index)
            assert (again.loss, again.grad_norm) == (metrics[index].loss, metrics[index].grad_norm), f"step {index}"
        _assert_same(bench.backend.save(other), states[4])

    def test_a_saved_state_is_a_copy(self, bench: Bench) -> None:
        """Training on changes no array of a state saved before; nor does restoring from it and training on.

        If it fails: a checkpoint that is being written changes under the writer. Copy in `mindprint_save`, and in
        `mindprint_restore`.
        """
        model, batch = bench.ready(), bench.token_batch()
        bench.sft_step(model, batch)
        state = bench.backend.save(model)
        kept = [values.copy() for values in _arrays(state)]
        bench.sft_step(model, batch)
        bench.backend.restore(model, state)
        bench.sft_step(model, batch)
        for values, copy in zip(_arrays(state), kept, strict=True):
            np.testing.assert_array_equal(values, copy)

    def test_restoring_takes_over_the_adapter_that_computes(self, bench: Bench) -> None:
        """After restoring, log-probs are those of the restored adapter.

        If it fails: the state went into the optimizer and not into the model, or into a copy.
        """
        one, other, batch = bench.ready(), bench.ready(seed=3), bench.token_batch()
        expected = bench.backend.log_probs(one, batch)
        # The two must differ at first, or the comparison below would prove nothing.
        assert np.abs(bench.backend.log_probs(other, batch) - expected).max() > 1e-3
        bench.backend.restore(other, bench.backend.save(one))
        np.testing.assert_array_equal(bench.backend.log_probs(other, batch), expected)

    def test_a_state_without_moments_starts_the_optimizer_from_scratch(self, bench: Bench) -> None:
        """As each stage begins: the next step equals the first step of a fresh adapter of the same values.

        If it fails: moments or the step count of the stage before leak into the next.
        """
        model, batch = bench.ready(), bench.token_batch()
        for _ in range(3):
            bench.sft_step(model, batch)
        start = bench.backend.save(model).without_optimizer()
        fresh = bench.ready(seed=9)
        for each in (model, fresh):
            bench.backend.restore(each, start)
            assert bench.backend.save(each).optimizer_steps == 0
            bench.sft_step(each, batch)
        _assert_same(bench.backend.save(model), bench.backend.save(fresh))

    def test_the_step_count_is_the_states(self, bench: Bench) -> None:
        """After restoring a count of 50, the next step corrects its moments' bias as the 51st.

        If it fails: the backend counts steps itself, so that a resumed run corrects as if it had just begun.
        """
        model, batch = bench.ready(), bench.token_batch()
        bench.sft_step(model, batch)
        # The second moment's bias correction is 0.05 at step 51 and 0.002 at step 2: the updates differ plainly.
        state = replace(bench.backend.save(model), optimizer_steps=50)
        bench.backend.restore(model, state)
        bench.sft_step(model, batch, max_grad_norm=None)
        after = bench.backend.save(model)
        assert after.optimizer_steps == 51
        parts = (state.adapter.tensors, state.first_moments, state.second_moments, after.first_moments)
        values, first, second, moments = map(reference.flat, parts)
        # AdamW's first moment m' = 0.9 m + 0.1 g, solved for the gradient g, which no hook returns.
        gradient = {name: (moments[name] - 0.9 * first[name]) / 0.1 for name in moments}
        expected, _, _ = reference.adamw(values, gradient, first, second, 1e-2, AdamW(), 51)
        change = {name: expected[name] - values[name] for name in values}
        moved = {name: new - values[name] for name, new in reference.flat(after.adapter.tensors).items()}
        # Changes are compared and not values: next to the values, a wrong bias correction would be lost.
        assert reference.distance(moved, change) < 1e-2

    def test_a_state_of_another_configuration_is_refused(self, bench: Bench) -> None:
        """Restoring a state whose adapter has another alpha is an `AdapterError`.

        If it fails: the adapter is applied with another strength than it was trained with.
        """
        model = bench.ready()
        state = bench.backend.save(model)
        config = replace(state.adapter.config, alpha=64.0)
        with pytest.raises(AdapterError):
            bench.backend.restore(model, replace(state, adapter=replace(state.adapter, config=config)))


def _step(bench: Bench, model: LoadedModel, index: int) -> StepMetrics:
    if index < 2:
        return bench.sft_step(model, bench.token_batch(seed=index), bench.token_batch(seed=index + 5), seed=index)
    return bench.dpo_step(model, bench.preference_batch(seed=index), seed=index)


def _arrays(state: TrainingState) -> list[np.ndarray]:
    parts = (state.adapter.tensors, state.first_moments, state.second_moments)
    return [values for tensors in parts for site in sorted(tensors) for values in tensors[site]]


def _assert_same(state: TrainingState, other: TrainingState) -> None:
    assert (state.optimizer_steps, state.loss_scale) == (other.optimizer_steps, other.loss_scale)
    for values, others in zip(_arrays(state), _arrays(other), strict=True):
        np.testing.assert_array_equal(values, others)
