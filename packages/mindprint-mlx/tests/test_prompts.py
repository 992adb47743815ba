"""A prompt read once for both of its completions gives the numbers of reading it twice; where it cannot, it is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_samples import VOCABULARY, linear_sites, lora

from mindprint.contract import LoadedModel, PreferenceBatch, Update
from mindprint.layouts import Continued, Layout, preference_sequences
from mindprint.losses import PreferenceLoss
from mindprint_mlx import adapter, logprobs, prompts, state, steps
from mindprint_mlx.head import read_head
from mindprint_mlx.imports import mlx_lm_module

Make = Callable[..., LoadedModel]
SLIDING = {"use_sliding_window": True, "max_window_layers": 1}


def ready(make: Make, family: str, dtype: str = "float32", **changes: object) -> LoadedModel:
    loaded = make(family, dtype, **changes)
    adapter.inject(loaded.handle, lora(linear_sites(loaded)))
    return loaded


def pairs(prompt: int = 5, chosen: int = 7, rejected: int = 4, count: int = 3) -> PreferenceBatch:
    """Ragged pairs, the first as wide as asked for, some with completions of one token."""
    rng = np.random.default_rng(8)

    def part(width: int, *lengths: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.integers(0, VOCABULARY, (count, width)).astype(np.int32), np.array([width, *lengths], np.int32)

    return PreferenceBatch(
        *part(prompt, 1, 3), *part(chosen, 1, 5), *part(rejected, 3, 1),
        *rng.normal(-12, 2, (2, count)).astype(np.float32),
    )  # fmt: skip


def layout(loaded: LoadedModel, batch: PreferenceBatch, **options: Any) -> Layout | Continued:
    return logprobs.batch_layouts(loaded.handle, preference_sequences(batch), **options)[0]


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen2", {}), ("llama", {}), ("qwen2", {**SLIDING, "sliding_window": 32})],
    ids=["qwen2", "llama", "within-window"],
)
class TestSame:
    def test_log_probs_are_those_of_whole_rows(self, make: Make, family: str, changes: dict[str, Any]) -> None:
        loaded, batch = ready(make, family, **changes), preference_sequences(pairs())
        assert isinstance(layout(loaded, pairs()), Continued)
        once = logprobs.log_probs(loaded.handle, batch, adapter=True)
        twice = logprobs.log_probs(loaded.handle, replace(batch, shared=None), adapter=True)
        np.testing.assert_allclose(once, twice, rtol=0, atol=5e-5)
        assert np.abs(once - twice).mean() < 5e-6
        assert (once[~batch.loss_mask] == 0).all()

    def test_gradients_are_those_of_whole_rows(self, make: Make, family: str, changes: dict[str, Any]) -> None:
        loaded = ready(make, family, **changes)
        start, batches = state.save(loaded.handle), [pairs(), pairs(4, 3, 6)]
        update = Update(1e-3, tokens=22, pairs=6, max_grad_norm=None)
        found = []
        for share_prompts in (True, False):
            state.restore(loaded.handle, start)
            options = replace(update, share_prompts=share_prompts)
            metrics = steps.dpo_step(loaded.handle, batches, PreferenceLoss(sft_weight=0.3), options)
            found.append((metrics, state.save(loaded.handle).first_moments))
        (once, first), (twice, second) = found
        assert once.loss == pytest.approx(twice.loss, abs=2e-6 * (1 + twice.loss))
        assert once.grad_norm == pytest.approx(twice.grad_norm, rel=2e-5)
        for site, factors in first.items():
            for mine, theirs in zip(factors, second[site], strict=True):
                assert np.linalg.norm(mine - theirs) <= 2e-5 * np.linalg.norm(theirs), site


def test_the_option_is_obeyed(make: Make) -> None:
    loaded = make("qwen2")
    assert loaded.handle.longest_shared == prompts.UNLIMITED
    assert isinstance(layout(loaded, pairs()), Continued)
    assert not isinstance(layout(loaded, pairs(), share_prompts=False), Continued)


def test_a_window_shorter_than_the_sequence_reads_whole_rows(make: Make) -> None:
    """The longest prompt and what is read of the longest completion, 10 + 6 tokens, fit a window of 16."""
    loaded = ready(make, "qwen2", **SLIDING, sliding_window=16)
    assert isinstance(layout(loaded, pairs(prompt=10)), Continued)
    longer = pairs(prompt=11)
    assert not isinstance(layout(loaded, longer), Continued)
    batch = preference_sequences(longer)
    once = logprobs.log_probs(loaded.handle, batch, adapter=True)
    np.testing.assert_array_equal(once, logprobs.log_probs(loaded.handle, replace(batch, shared=None), adapter=True))


def test_positions_that_change_with_the_length_cannot_share(make: Make) -> None:
    """LongRoPE chooses its frequencies by the length of the whole sequence, which the prompt alone does not know."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 64,
    }
    assert make("llama", rope_parameters=rope).handle.longest_shared == 0


class Averages(nn.Module):
    """A model whose state is recurrent: each token sees the mean of all that were read before, whoever they are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(8, 8)]
        self.embedding = nn.Embedding(VOCABULARY, 8)

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        seen = self.embedding(tokens)
        means = mx.cumsum(seen, axis=1) / mx.arange(1, tokens.shape[1] + 1)[:, None]
        return self.embedding.as_linear(self.layers[0](means) + seen)


def test_what_cannot_share_is_found_out() -> None:
    """It takes the cache, and makes nothing of it: only its numbers tell."""
    head = read_head(Averages())
    assert prompts.longest_shared(head, [mlx_lm_module("models.cache").KVCache()], None) == 0


def test_a_class_that_takes_no_mask_of_its_cache_reads_whole_rows(make: Make) -> None:
    """mlx-lm's Gemma 2 has a dimension more in its scores than such a mask."""
    loaded = ready(make, "gemma2", sliding_window=64)
    assert loaded.handle.longest_shared == 0
    batch = preference_sequences(pairs())
    once = logprobs.log_probs(loaded.handle, batch, adapter=True)
    np.testing.assert_array_equal(once, logprobs.log_probs(loaded.handle, replace(batch, shared=None), adapter=True))


def test_a_class_with_another_cache_is_not_asked(make: Make) -> None:
    loaded = make("qwen2")
    other = mlx_lm_module("models.cache").RotatingKVCache(max_size=8)
    assert prompts.longest_shared(loaded.handle.head, [other, other], None) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_precision_shares(make: Make, dtype: str) -> None:
    loaded, batch = ready(make, "qwen2", dtype), preference_sequences(pairs())
    assert loaded.handle.longest_shared == prompts.UNLIMITED
    once = logprobs.log_probs(loaded.handle, batch, adapter=True)
    twice = logprobs.log_probs(loaded.handle, replace(batch, shared=None), adapter=True)
    assert np.abs(once - twice)[batch.loss_mask].mean() < (0.1 if dtype == "bfloat16" else 0.02)
