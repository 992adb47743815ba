"""A prompt read once for both of its completions gives the numbers of reading it twice; where it cannot, it is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mindprint.contract import LoadedModel, PreferenceBatch, TokenBatch, Update
from mindprint.layouts import Forked, Layout, forked, preference_sequences
from mindprint.losses import PreferenceLoss
from mindprint.plugins.backend import Backend
from mindprint_torch.forked_attention import find_places
from mindprint_torch.logprobs import batch_layouts
from mindprint_torch.prompts import UNLIMITED, attends_without_mask

Load = Callable[..., LoadedModel]
SHARING = ["llama", "qwen2", "cohere", "granite", "gpt2", "deepseek_v3", "qwen2_moe", "mistral"]


def pairs(prompt: int = 5, chosen: int = 7, rejected: int = 4, count: int = 3) -> PreferenceBatch:
    """Ragged pairs, the first as wide as asked for, some with completions of one token."""
    rng = np.random.default_rng(8)

    def part(width: int, *lengths: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.integers(3, 61, (count, width)).astype(np.int32), np.array([width, *lengths], np.int32)

    return PreferenceBatch(
        *part(prompt, 1, 3), *part(chosen, 1, 5), *part(rejected, 3, 1),
        *rng.normal(-12, 2, (2, count)).astype(np.float32),
    )  # fmt: skip


def layout(model: LoadedModel, batch: PreferenceBatch, **options: Any) -> Layout:
    return batch_layouts(model.handle, preference_sequences(batch), **options)[0]


@pytest.fixture(params=[True, False], ids=["masked", "plain rows"])
def masked(request: pytest.FixtureRequest) -> bool:
    """Both ways of attention in forked rows, the GPU's too."""
    return bool(request.param)


def reading(model: LoadedModel, *, masked: bool) -> LoadedModel:
    """Let a model read forked rows in one of the ways, if it can."""
    if not masked and not attends_without_mask(model.handle.head):
        pytest.skip("its attention does not take plain rows")
    model.handle.masks_forks = masked
    return model


@pytest.mark.parametrize("architecture", SHARING)
def test_log_probs_are_those_of_whole_rows(backend: Backend, train: Load, architecture: str, masked: bool) -> None:
    model, batch = reading(train(architecture), masked=masked), preference_sequences(pairs())
    assert isinstance(layout(model, pairs()), Forked)
    once, twice = backend.log_probs(model, batch), backend.log_probs(model, replace(batch, shared=None))
    np.testing.assert_allclose(once, twice, rtol=0, atol=2e-5)
    assert (once[~batch.loss_mask] == 0).all()


@pytest.mark.parametrize("architecture", SHARING)
def test_gradients_are_those_of_whole_rows(backend: Backend, train: Load, architecture: str, masked: bool) -> None:
    model, state = reading(train(architecture), masked=masked), None
    batches = [pairs(), pairs(4, 3, 6)]
    update = Update(1e-3, tokens=22, pairs=6, max_grad_norm=None)
    found = []
    for share_prompts in (True, False):
        state = state or backend.save(model)
        backend.restore(model, state)
        metrics = backend.dpo_step(
            model, batches, PreferenceLoss(sft_weight=0.3), replace(update, share_prompts=share_prompts)
        )
        found.append((metrics, backend.save(model).first_moments))
    (once, first), (twice, second) = found
    assert once.loss == pytest.approx(twice.loss, abs=1e-6 * (1 + twice.loss))
    assert once.grad_norm == pytest.approx(twice.grad_norm, rel=1e-5)
    for site, factors in first.items():
        for mine, theirs in zip(factors, second[site], strict=True):
            assert np.linalg.norm(mine - theirs) <= 1e-5 * np.linalg.norm(theirs) + 1e-9, site


def test_places_in_plain_rows() -> None:
    """By hand: prompt of 2, completions of 2 and 1 tokens read; prompt of 1, completions of 1 and 2."""
    batch = TokenBatch(
        tokens=np.arange(20, dtype=np.int32).reshape(4, 5),
        lengths=np.array([5, 3, 4, 4], np.int32),
        loss_mask=np.arange(5) >= np.array([[2], [1], [2], [1]]),
        shared=np.array([2, 1], np.int32),
    )
    batch = replace(batch, loss_mask=batch.loss_mask & (np.arange(5) < batch.lengths[:, None]))
    shared = forked(batch)
    assert shared.parts.tolist() == [[0, 0, 1, 1, 2], [0, 1, 2, 2, 3]]
    places = find_places(shared, torch.device("cpu"))
    assert (places.pairs, places.width) == (2, 4)
    # Plain rows: 0 1 2 3, and of the second pair 5 6; then 0 1 4, and 5 7 8. The rest holds its row's first token.
    assert places.tokens.tolist() == [0, 1, 2, 3, 5, 6, 5, 5, 0, 1, 4, 0, 5, 7, 8, 5]
    assert places.places.tolist() == [0, 1, 2, 3, 10, 4, 5, 13, 14, 4]
    assert (places.prompts.tolist(), places.prompt_copies.tolist()) == ([0, 1, 5], [8, 9, 12])
    assert (places.padding.tolist(), places.unused.tolist()) == ([9], [6, 7, 8, 9, 11, 12, 15])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_recomputed_layers_attend_to_the_same_places(backend: Backend, train: Load, architecture: str) -> None:
    model = reading(train(architecture), masked=False)
    state, norms = backend.save(model), []
    for checkpointing in (False, True):
        backend.restore(model, state)
        update = Update(1e-3, tokens=22, pairs=3, gradient_checkpointing=checkpointing)
        norms.append(backend.dpo_step(model, [pairs()], PreferenceLoss(), update).grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_attention_that_copies_its_mask_keeps_the_mask(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose attention does not get our object would see all tokens: the probe notices."""
    model = load("llama")
    assert attends_without_mask(model.handle.head)
    monkeypatch.setattr("mindprint_torch.forked_attention.MARK", "elsewhere")
    monkeypatch.setattr("mindprint_torch.prompts.unmasked", lambda *_: torch.zeros(1))
    assert not attends_without_mask(model.handle.head)


def test_the_option_is_obeyed(train: Load) -> None:
    model = train("qwen2")
    assert model.handle.longest_shared == UNLIMITED
    assert isinstance(layout(model, pairs()), Forked)
    assert not isinstance(layout(model, pairs(), share_prompts=False), Forked)


@pytest.mark.parametrize("architecture", ["bloom", "lfm2", "mamba"])
def test_what_cannot_share_reads_whole_rows(backend: Backend, load: Load, architecture: str) -> None:
    """Positions of its own (ALiBi), convolutions, a recurrent state: a mask means nothing to them."""
    model = load(architecture)
    assert model.handle.longest_shared == 0
    assert not isinstance(layout(model, pairs()), Forked)
    batch = preference_sequences(pairs())
    once, twice = backend.log_probs(model, batch), backend.log_probs(model, replace(batch, shared=None))
    np.testing.assert_array_equal(once, twice)


def test_a_window_shorter_than_the_sequence_reads_whole_rows(backend: Backend, train: Load) -> None:
    """16 tokens fit the window of 16; of 17, the last does not see the first."""
    model = train("mistral")
    assert isinstance(layout(model, pairs(prompt=9)), Forked)
    longer = pairs(prompt=10)
    assert not isinstance(layout(model, longer), Forked)
    batch = preference_sequences(longer)
    once, twice = backend.log_probs(model, batch), backend.log_probs(model, replace(batch, shared=None))
    np.testing.assert_array_equal(once, twice)


def test_a_window_shorter_than_the_probe_never_shares(load: Load) -> None:
    assert load("gemma2").handle.longest_shared == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_precision_shares(backend: Backend, train: Load, dtype: str) -> None:
    model, batch = train("qwen2", dtype), preference_sequences(pairs())
    assert model.handle.longest_shared == UNLIMITED
    once, twice = backend.log_probs(model, batch), backend.log_probs(model, replace(batch, shared=None))
    assert np.abs(once - twice).mean() < (0.05 if dtype == "bfloat16" else 0.01)
