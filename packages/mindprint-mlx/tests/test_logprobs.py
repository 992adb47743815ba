"""Log-probs against the plain definition over full logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_samples import linear_sites, lora, rows_of, token_batch

from mindprint import layouts
from mindprint.contract import LoadedModel, TokenBatch
from mindprint_mlx import adapter, logprobs
from mindprint_mlx.head import Head, read_head


def plain(loaded: LoadedModel, batch: TokenBatch) -> np.ndarray:
    """Log-softmax of the model's own full logits, in NumPy's float64."""
    with loaded.handle.in_use():
        logits = np.array(loaded.handle.module(mx.array(batch.tokens)).astype(mx.float32), np.float64)[:, :-1]
    logits -= logits.max(-1, keepdims=True)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    values = np.zeros(batch.tokens.shape)
    values[:, 1:] = np.take_along_axis(scores, batch.tokens[:, 1:, None], -1)[..., 0]
    return np.where(batch.loss_mask, values, 0.0)


@pytest.mark.parametrize("adapted", [False, True])
def test_they_are_the_log_softmax_of_the_full_logits(
    make: Callable[..., LoadedModel], family: str, adapted: bool
) -> None:
    loaded, batch = make(family), token_batch()
    if adapted:
        adapter.inject(loaded.handle, lora(linear_sites(loaded)))
    found = logprobs.log_probs(loaded.handle, batch, adapter=True)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, plain(loaded, batch), rtol=0, atol=2e-5)


def test_the_head_is_split_off_in_every_family_here(make: Callable[..., LoadedModel], family: str) -> None:
    assert make(family).handle.head.body == "model"


def test_a_head_that_does_not_split_falls_back_to_full_logits(make: Callable[..., LoadedModel]) -> None:
    """Decided by trying: a class that uses the hidden states twice gives other logits in halves."""
    loaded, batch = make("llama"), token_batch()
    expected = logprobs.log_probs(loaded.handle, batch, adapter=True)
    module = loaded.handle.module
    body, kind = module.model, type(module)

    def twice(self: object, tokens: mx.array, cache: object = None) -> mx.array:
        return kind.__call__(self, tokens, cache) + body(tokens[:, ::-1], cache).sum()

    module.__class__ = type("Twice", (kind,), {"__call__": twice})
    assert read_head(module).body is None
    module.__class__ = kind
    loaded.handle.head = Head(module, loaded.vocab_size)
    np.testing.assert_allclose(logprobs.log_probs(loaded.handle, batch, adapter=True), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_chunks_change_nothing(make: Callable[..., LoadedModel], family: str, chunk: int) -> None:
    loaded, batch = make(family), token_batch()
    layout = layouts.sequences(batch)
    with loaded.handle.in_use():
        whole = logprobs.layout_log_probs(loaded.handle, layout, {})
        parts = logprobs.layout_log_probs(loaded.handle, layout, {}, chunk)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)


def test_no_array_of_logits_is_larger_than_stated(
    make: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, batch = make("llama"), token_batch(rows=8, width=40)
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 4 * 61 * 10)
    seen: list[int] = []
    kind = type(loaded.handle.module)

    def watched(self: object, *given: object) -> mx.array:
        out: mx.array = kind.__call__(self, *given)
        seen.append(out.size * 4)
        return out

    loaded.handle.module.__class__ = type("Watched", (kind,), {"__call__": watched})
    logprobs.log_probs(loaded.handle, batch, adapter=True)
    assert max(seen) <= 4 * 61 * 10
    assert sum(seen) == 4 * 61 * batch.loss_tokens


def test_a_row_alone_and_in_a_padded_batch(make: Callable[..., LoadedModel], family: str) -> None:
    loaded, batch = make(family), token_batch()
    together = logprobs.log_probs(loaded.handle, batch, adapter=True)
    for row, alone in enumerate(rows_of(batch)):
        found = logprobs.log_probs(loaded.handle, alone, adapter=True)[0]
        np.testing.assert_allclose(together[row, : len(found)], found, rtol=0, atol=2e-5)


def test_what_the_padding_holds_does_not_matter(make: Callable[..., LoadedModel], family: str) -> None:
    loaded, batch = make(family), token_batch()
    padding = np.arange(batch.tokens.shape[1])[None, :] >= batch.lengths[:, None]
    other = replace(batch, tokens=np.where(padding, 0, batch.tokens).astype(np.int32))
    np.testing.assert_array_equal(
        logprobs.log_probs(loaded.handle, batch, adapter=True), logprobs.log_probs(loaded.handle, other, adapter=True)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.15), ("float16", 0.02)])
def test_reduced_precision_is_near_float32(make: Callable[..., LoadedModel], dtype: str, tolerance: float) -> None:
    batch = token_batch()
    exact = logprobs.log_probs(make().handle, batch, adapter=True)
    found = logprobs.log_probs(make(dtype=dtype).handle, batch, adapter=True)
    np.testing.assert_allclose(found, exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("width", [40, 64, 3072, 3101])
def test_small_probabilities_are_not_lost_beside_large_ones(width: int) -> None:
    """Against float64: one token near certainty, thousands at 1e-8. Added one by one they vanish: an error of 4e-6.

    What is left is rounding: float32 is spaced by up to 2e-6 at the results' sizes.
    """
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, (64, width)).astype(np.float32)
    logits[:, 0] += rng.uniform(0, 25, 64).astype(np.float32)
    shifted = logits - logits[:, :1]
    greatest = shifted.max(axis=1, keepdims=True).astype(np.float64)
    truth = np.log(np.exp(shifted - greatest).sum(axis=1)) + greatest[:, 0]
    found = np.array(logprobs.log_sum_exp(mx.array(shifted)))
    assert np.abs(found - truth).mean() < 1e-6


@pytest.mark.parametrize("fast", [False, True])
def test_a_large_vocabulary_has_no_bias(fast: bool) -> None:
    """262,144 tokens as Gemma 3 has: added one after another, small terms are lost next to the sum so far."""
    random = np.random.default_rng(0)
    logits = (3 * random.standard_normal((16, 262_144))).astype(np.float32)
    targets = random.integers(0, 262_144, 16)
    exact = logits.astype(np.float64)
    expected = exact[np.arange(16), targets] - np.log(np.exp(exact).sum(axis=1))
    with mx.stream(mx.cpu):
        values = np.array(logprobs.log_softmax_at(mx.array(logits), mx.array(targets.astype(np.int32)), fast=fast))
    assert abs((values - expected).mean()) < 1e-6
    assert np.abs(values - expected).max() < 5e-6
