"""Saving and restoring: exact, whichever moment, and readable by another process."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mindprint.contract import LoadedModel, PreferenceBatch, TokenBatch, TrainingState, Update
from mindprint.losses import PreferenceLoss
from mindprint.plugins.backend import Backend

Load = Callable[..., LoadedModel]


def assert_equal(one: TrainingState, other: TrainingState) -> None:
    assert (one.optimizer_steps, one.loss_scale) == (other.optimizer_steps, other.loss_scale)
    for tensors, others in (
        (one.adapter.tensors, other.adapter.tensors),
        (one.first_moments, other.first_moments),
        (one.second_moments, other.second_moments),
    ):
        assert list(tensors) == list(others)
        for name in tensors:
            np.testing.assert_array_equal(tensors[name].a, others[name].a)
            np.testing.assert_array_equal(tensors[name].b, others[name].b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_resume_is_bit_for_bit_at_every_step(
    backend: Backend,
    train: Load,
    token_batch: Callable[..., TokenBatch],
    preference_batch: Callable[..., PreferenceBatch],
    dtype: str,
) -> None:
    """Two SFT and two DPO steps with dropout, then from each state in a model loaded anew to the same end."""
    batch, pairs = token_batch(), preference_batch()

    def step(model: LoadedModel, index: int) -> object:
        if index < 2:
            return backend.sft_step(model, [batch, batch], Update(1e-2, 2 * batch.loss_tokens, seed=index)).loss
        return backend.dpo_step(model, [pairs], PreferenceLoss(), Update(1e-2, 9, pairs.pairs, seed=index)).loss

    model = train("llama", dtype, dropout=0.3)
    states, losses = [backend.save(model)], []
    for index in range(4):
        losses.append(step(model, index))
        states.append(backend.save(model))
    for start in range(4):
        other = train("llama", dtype, dropout=0.3, seed=9)
        backend.restore(other, states[start])
        assert_equal(backend.save(other), states[start])
        assert [step(other, index) for index in range(start, 4)] == losses[start:]
        assert_equal(backend.save(other), states[4])


def test_restoring_does_not_write_into_the_state(
    backend: Backend, train: Load, token_batch: Callable[..., TokenBatch]
) -> None:
    model, batch = train("llama"), token_batch()
    backend.sft_step(model, [batch], Update(1e-2, batch.loss_tokens))
    state = backend.save(model)
    for factors in (*state.adapter.tensors.values(), *state.first_moments.values(), *state.second_moments.values()):
        factors.a.setflags(write=False)
        factors.b.setflags(write=False)
    backend.restore(model, state)
    backend.sft_step(model, [batch], Update(1e-2, batch.loss_tokens))
