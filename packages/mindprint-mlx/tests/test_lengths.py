"""Rows do not depend on their neighbours where the rotary embedding depends on the length of the input."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from mlx_samples import VOCABULARY, linear_sites, lora, rows_of

from mindprint.contract import LoadedModel, PreferenceBatch, TokenBatch, Update
from mindprint.layouts import RotaryLimit
from mindprint.losses import PreferenceLoss
from mindprint_mlx import adapter, logprobs, steps

Make = Callable[..., LoadedModel]
LIMIT = 16
ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": LIMIT,
}


@pytest.fixture
def rotary(make: Make) -> LoadedModel:
    """A Llama with LongRoPE beyond 16 tokens, and an adapter."""
    loaded = make("llama", rope_parameters=ROPE)
    adapter.inject(loaded.handle, lora(linear_sites(loaded)))
    return loaded


def ragged(lengths: tuple[int, ...] = (12, 30, 9, 16, 24, 17)) -> TokenBatch:
    random, width = np.random.default_rng(4), max(lengths)
    columns, sizes = np.arange(width), np.array(lengths, np.int32)
    mask = (columns >= 3) & (columns < sizes[:, None])
    return TokenBatch(random.integers(3, VOCABULARY, (len(lengths), width)).astype(np.int32), sizes, mask)


def test_the_limit_is_read_from_the_model(rotary: LoadedModel, make: Make) -> None:
    assert rotary.handle.head.rotary_limit == RotaryLimit(LIMIT)
    assert make("qwen2").handle.head.rotary_limit is None


def test_log_probs_do_not_depend_on_neighbours(rotary: LoadedModel) -> None:
    batch = ragged()
    together = logprobs.log_probs(rotary.handle, batch, adapter=True)
    for row, alone in enumerate(rows_of(batch)):
        values = logprobs.log_probs(rotary.handle, alone, adapter=True)[0]
        np.testing.assert_allclose(together[row, : len(values)], values, rtol=0, atol=2e-5)


def test_the_frequencies_matter(rotary: LoadedModel) -> None:
    """A short row's first tokens, read as part of a long row: other log-probs."""
    batch = ragged((30,))
    long = logprobs.log_probs(rotary.handle, batch, adapter=True)[0, :12]
    start = TokenBatch(batch.tokens[:, :12], np.array([12], np.int32), batch.loss_mask[:, :12])
    assert np.abs(long - logprobs.log_probs(rotary.handle, start, adapter=True)[0]).max() > 1e-2


def test_steps_do_not_depend_on_how_rows_meet(rotary: LoadedModel) -> None:
    batch = ragged()
    update = Update(0.0, tokens=batch.loss_tokens)
    together = steps.sft_step(rotary.handle, [batch], update)
    apart = steps.sft_step(rotary.handle, rows_of(batch), update)
    assert together.loss == pytest.approx(apart.loss, abs=1e-5)
    assert together.grad_norm == pytest.approx(apart.grad_norm, rel=1e-4)


def test_pairs_on_either_side_of_the_limit(rotary: LoadedModel) -> None:
    """A chosen completion that stays below the limit and a rejected one beyond it: as each alone."""
    random = np.random.default_rng(6)

    def part(*lengths: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = random.integers(3, VOCABULARY, (len(lengths), max(lengths))).astype(np.int32)
        return tokens, np.array(lengths, np.int32)

    reference = (np.zeros(2, np.float32), np.zeros(2, np.float32))
    pairs = PreferenceBatch(*part(6, 8), *part(5, 20), *part(18, 4), *reference)
    metrics = steps.dpo_step(rotary.handle, [pairs], PreferenceLoss(), Update(0.0, tokens=25, pairs=2))
    assert metrics.chosen_log_probs is not None
    assert metrics.rejected_log_probs is not None
    for pair in range(2):
        for name, sums in (("chosen", metrics.chosen_log_probs), ("rejected", metrics.rejected_log_probs)):
            prompt = pairs.prompt[pair, : pairs.prompt_lengths[pair]]
            completion = getattr(pairs, name)[pair, : getattr(pairs, f"{name}_lengths")[pair]]
            tokens = np.concatenate([prompt, completion])[None]
            mask = np.arange(tokens.shape[1])[None] >= len(prompt)
            alone = TokenBatch(tokens, np.array([tokens.shape[1]], np.int32), mask)
            expected = logprobs.log_probs(rotary.handle, alone, adapter=True).sum()
            assert sums[pair] == pytest.approx(expected, abs=1e-4)
