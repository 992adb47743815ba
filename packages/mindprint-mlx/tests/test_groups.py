"""A micro-batch read in groups on several cores gives the step that it gives as a whole."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import mlx_samples
import numpy as np
import pytest
from mlx_samples import linear_sites, lora, preference_batch, token_batch

from mindprint import layouts
from mindprint.contract import LoadedModel, PreferenceBatch, StepMetrics, TrainingState, Update
from mindprint.losses import PreferenceLoss
from mindprint_mlx import adapter, blas, division, groups, logprobs, points, state, steps

Make = Callable[..., LoadedModel]


@pytest.fixture(params=[1, 2, 3], ids=lambda count: f"{count}-cores")
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A number of cores, and every batch worth cutting."""
    monkeypatch.setattr(groups, "core_count", lambda _: request.param)
    monkeypatch.setattr(groups, "LEAST_TOKENS", 1)
    monkeypatch.setattr(groups, "LEAST_WORK", 1)
    monkeypatch.setattr(groups, "READ_TOKENS", 2)
    monkeypatch.setattr(groups, "READ_WORK", 1)
    monkeypatch.setattr(division, "GROUP_TOKENS", 20)
    return int(request.param)


def step(loaded: LoadedModel, stage: str, checkpointing: bool = False) -> tuple[StepMetrics, TrainingState]:
    """The first step of an adapter."""
    update = Update(1e-3, tokens=40, pairs=7, max_grad_norm=None, gradient_checkpointing=checkpointing)
    if stage == "sft":
        metrics = steps.sft_step(loaded.handle, [token_batch(rows=8), token_batch(rows=3, width=5)], update)
    else:
        batches = [preference_batch(pairs=5), preference_batch(pairs=2)]
        metrics = steps.dpo_step(loaded.handle, batches, PreferenceLoss(sft_weight=0.3), update)
    return metrics, state.save(loaded.handle)


def ready(make: Make, family: str = "qwen2", **config: object) -> LoadedModel:
    loaded = make(family)
    adapter.inject(loaded.handle, lora(linear_sites(loaded), **config))
    return loaded


def assert_same(found: tuple[StepMetrics, TrainingState], wanted: tuple[StepMetrics, TrainingState]) -> None:
    assert found[0].loss == pytest.approx(wanted[0].loss, rel=2e-6)
    assert found[0].grad_norm == pytest.approx(wanted[0].grad_norm, rel=2e-5)
    for half in ("chosen_log_probs", "rejected_log_probs"):
        if getattr(wanted[0], half) is not None:
            np.testing.assert_allclose(getattr(found[0], half), getattr(wanted[0], half), rtol=0, atol=2e-5)
    for site, factors in found[1].first_moments.items():
        for mine, theirs in zip(factors, wanted[1].first_moments[site], strict=True):
            assert np.linalg.norm(mine - theirs) <= 2e-5 * np.linalg.norm(theirs), site


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_step_is_the_same(make: Make, family: str, stage: str, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradients, and the log-probs of each pair in its place."""
    found = step(ready(make, family), stage)
    monkeypatch.undo()
    monkeypatch.setattr(groups, "core_count", lambda _: 1)
    assert_same(found, step(ready(make, family), stage))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pair_that_two_cores_share_is_the_same(
    make: Make, cores: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each completion's gradient is multiplied by the loss's slope in its sum, after both are known."""
    rng = np.random.default_rng(3)
    parts = [
        part
        for width in (4, 30, 25)
        for part in (rng.integers(0, mlx_samples.VOCABULARY, (1, width)).astype(np.int32), np.array([width], np.int32))
    ]
    one = PreferenceBatch(*parts, *np.array([[-60.0], [-70.0]], np.float32))

    def pair_step() -> tuple[StepMetrics, TrainingState]:
        loaded = ready(make)
        update = Update(1e-3, tokens=30, pairs=1, max_grad_norm=None, gradient_checkpointing=checkpointing)
        completions = np.stack([one.chosen_lengths, one.rejected_lengths])
        apart.append(groups.pair_groups(loaded.handle, one.prompt_lengths, completions)[0].apart)
        return steps.dpo_step(loaded.handle, [one], PreferenceLoss(sft_weight=0.3), update), state.save(loaded.handle)

    apart: list[bool] = []
    found = pair_step()
    monkeypatch.setattr(groups, "core_count", lambda _: 1)
    assert_same(found, pair_step())
    assert apart == [cores > 1, False]


def test_a_pair_whose_loss_is_scaled_is_not_split(make: Make, cores: int) -> None:
    """In float16 small gradients vanish unless the loss that is differentiated is scaled."""
    loaded = make("qwen2", "float16")
    lengths = np.array([4], np.int32), np.array([[30], [25]], np.int32)
    assert [group.apart for group in groups.pair_groups(loaded.handle, *lengths)] == [False]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_gradient_checkpointing_is_the_same(make: Make, family: str, stage: str, cores: int) -> None:
    assert_same(step(ready(make, family), stage, checkpointing=True), step(ready(make, family), stage))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_same_step_twice_to_the_last_bit(make: Make, stage: str, cores: int) -> None:
    """Threads finish in any order; what they found is added in one."""
    first, second = step(ready(make), stage), step(ready(make), stage)
    assert (first[0].loss, first[0].grad_norm) == (second[0].loss, second[0].grad_norm)
    for site, factors in first[1].adapter.tensors.items():
        for mine, theirs in zip(factors, second[1].adapter.tensors[site], strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_graph_is_evaluated_from_point_to_point(
    make: Make, cores: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each adapted layer once on the way forward and once on the way back, and once more where it is computed again."""
    found: list[list[mx.array]] = []
    own = points.evaluate

    def evaluate(on_the_way: deque[mx.array]) -> None:
        found.append(list(on_the_way))
        own(on_the_way)
        assert not on_the_way

    monkeypatch.setattr(points, "evaluate", evaluate)
    loaded = ready(make)
    step(loaded, "sft", checkpointing)
    sites = len(linear_sites(loaded))
    # What query, key and value of the first layer read needs no gradient, unless the layer is computed again.
    on_the_way = 3 * sites if checkpointing else 2 * sites - 3
    assert {len(each) for each in found} == ({on_the_way} if cores > 1 else set())


def test_dropout_follows_from_the_seed(make: Make, cores: int) -> None:
    batch = token_batch(rows=8)

    def loss(seed: int, checkpointing: bool = False) -> float:
        update = Update(1e-3, batch.loss_tokens, seed=seed, gradient_checkpointing=checkpointing)
        return steps.sft_step(ready(make, dropout=0.3).handle, [batch], update).loss

    assert loss(1) == loss(1) == loss(1, checkpointing=True)
    assert loss(1) != loss(2)


def test_log_probs_are_the_same(make: Make, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = ready(make)
    for batch in (token_batch(rows=8), layouts.preference_sequences(preference_batch(pairs=5))):
        found = logprobs.log_probs(loaded.handle, batch, adapter=True)
        monkeypatch.setattr(groups, "core_count", lambda _: 1)
        whole = logprobs.log_probs(loaded.handle, replace(batch, shared=None), adapter=True)
        monkeypatch.setattr(groups, "core_count", lambda _: cores)
        np.testing.assert_allclose(found, whole, rtol=0, atol=2e-5)


def test_products_have_their_threads_back(make: Make, cores: int) -> None:
    before = blas.prepare().threads
    step(ready(make), "sft")
    assert blas.prepare().threads == before


def test_an_error_in_a_group_is_raised(make: Make, cores: int) -> None:
    device = make().handle.device

    def fail() -> mx.array:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        list(groups.side_by_side(device, [lambda: mx.array(1.0), fail, fail]))
    found = groups.side_by_side(device, [lambda: mx.array(1.0), lambda: mx.array(2.0)])
    assert [float(one) for one in found] == [1, 2]


def test_steps_compute_with_the_weights_as_they_are(make: Make, cores: int) -> None:
    """Nothing of the adapter or the base is kept from one step to the next but in the model."""
    loaded = ready(make)
    start = state.save(loaded.handle)
    first = step(loaded, "sft")[0].loss
    assert step(loaded, "sft")[0].loss != first, "the adapter has moved"
    state.restore(loaded.handle, start)
    assert step(loaded, "sft")[0].loss == first
    state.restore(loaded.handle, start)
    norm = loaded.handle.module.model.norm
    norm.weight = norm.weight * 1.5
    mx.eval(norm.weight)
    assert abs(step(loaded, "sft")[0].loss - first) > 1e-3, "the base has changed"


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_gradient_checkpointing_takes_less_memory(make: Make, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the activations of eight layers, those of one and what goes into each. On one core: timing plays no part."""
    monkeypatch.setattr(groups, "core_count", lambda _: 1)
    monkeypatch.setattr(mlx_samples, "LAYERS", 8)
    peaks = {}
    for checkpointing in (False, True):
        loaded = make("qwen2", num_hidden_layers=8)
        adapter.inject(loaded.handle, lora(linear_sites(loaded)))
        update = Update(1e-3, tokens=40, pairs=8, gradient_checkpointing=checkpointing)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        if stage == "sft":
            steps.sft_step(loaded.handle, [token_batch(rows=12, width=60)], update)
        else:
            steps.dpo_step(loaded.handle, [preference_batch(pairs=100)], PreferenceLoss(), update)
        peaks[checkpointing] = mx.get_peak_memory() - before
    assert peaks[True] < 0.5 * peaks[False]
