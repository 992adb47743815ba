"""Rows do not depend on their neighbours, nor on anything read before: rotary limits, and models that cannot pad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch_samples import COMMON
from transformers import AutoConfig, AutoModelForCausalLM

from mindprint.contract import LoadedModel, ModelSpec, PreferenceBatch, Sampling, TokenBatch, Update
from mindprint.layouts import RotaryLimit
from mindprint.losses import PreferenceLoss
from mindprint.plugins.backend import Backend

LIMIT = 16
ROPE: dict[str, dict[str, Any]] = {
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": LIMIT,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}
LENGTHS = (12, 30, 9, 16, 24, 17)


@pytest.fixture(params=["longrope", "dynamic"])
def rotary(request: pytest.FixtureRequest, backend: Backend, tmp_path: Any, make_adapter: Any) -> LoadedModel:
    """A Llama whose rotary embedding depends on the length above 16 tokens, with an adapter."""
    maximum = 64 if request.param == "longrope" else LIMIT
    settings = {**COMMON, "rope_parameters": ROPE[request.param], "max_position_embeddings": maximum}
    save_stirred(AutoConfig.for_model("llama", **settings), tmp_path)
    model = backend.load_model(ModelSpec(str(tmp_path), "cpu", "float32"))
    backend.inject_adapter(model, make_adapter(model))
    return model


def save_stirred(config: Any, folder: Any) -> None:
    """Save a random model whose weights are so large that every layer matters."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(folder)


def ragged(lengths: tuple[int, ...] = LENGTHS) -> TokenBatch:
    random, width = np.random.default_rng(4), max(lengths)
    columns, sizes = np.arange(width), np.array(lengths, np.int32)
    mask = (columns >= 3) & (columns < sizes[:, None])
    return TokenBatch(random.integers(3, 61, (len(lengths), width)).astype(np.int32), sizes, mask)


def row_of(batch: TokenBatch, row: int) -> TokenBatch:
    length = int(batch.lengths[row])
    return TokenBatch(batch.tokens[[row], :length], batch.lengths[[row]], batch.loss_mask[[row], :length])


def test_the_limit_is_read_from_the_model(rotary: LoadedModel, load: Callable[..., LoadedModel]) -> None:
    limit = rotary.handle.head.rotary_limit
    assert limit in (RotaryLimit(LIMIT), RotaryLimit(LIMIT, each_length=True))
    assert rotary.handle.longest_shared == LIMIT
    assert load("qwen2").handle.head.rotary_limit is None


def test_log_probs_do_not_depend_on_neighbours(rotary: LoadedModel, backend: Backend) -> None:
    """Each row alone is the truth; together the model itself would be off by 1e-2 and more (see below)."""
    batch = ragged()
    together = backend.log_probs(rotary, batch)
    for row, length in enumerate(batch.lengths):
        alone = backend.log_probs(rotary, row_of(batch, row))[0]
        np.testing.assert_allclose(together[row, :length], alone, rtol=0, atol=2e-5)


def test_the_frequencies_matter(rotary: LoadedModel) -> None:
    """transformers' own batch of all rows, which the tests above would not tell from ours if nothing changed."""
    network, batch = rotary.handle.network, ragged()
    with torch.no_grad():
        whole = network(torch.from_numpy(batch.tokens.astype(np.int64))).logits[0, :12]
        alone = network(torch.from_numpy(batch.tokens[:1, :12].astype(np.int64))).logits[0]
    assert (whole - alone).abs().max() > 1e-2


def test_log_probs_do_not_depend_on_what_was_read_before(rotary: LoadedModel, backend: Backend) -> None:
    batch = ragged((20,))
    first = backend.log_probs(rotary, batch)
    backend.log_probs(rotary, ragged((40,)))
    np.testing.assert_array_equal(backend.log_probs(rotary, batch), first)


def test_steps_do_not_depend_on_how_rows_meet(rotary: LoadedModel, backend: Backend) -> None:
    """SFT of all rows at once and one by one: the same loss and gradient norm."""
    batch = ragged()
    update = Update(0.0, tokens=batch.loss_tokens)
    together = backend.sft_step(rotary, [batch], update)
    apart = backend.sft_step(rotary, [row_of(batch, row) for row in range(len(batch.lengths))], update)
    assert together.loss == pytest.approx(apart.loss, abs=1e-5)
    assert together.grad_norm == pytest.approx(apart.grad_norm, rel=1e-4)


def test_pairs_on_either_side_of_the_limit(rotary: LoadedModel, backend: Backend) -> None:
    """A chosen completion that stays below the limit and a rejected one beyond it: as each alone."""
    random = np.random.default_rng(6)

    def part(*lengths: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = random.integers(3, 61, (len(lengths), max(lengths))).astype(np.int32)
        return tokens, np.array(lengths, np.int32)

    reference = (np.zeros(2, np.float32), np.zeros(2, np.float32))
    pairs = PreferenceBatch(*part(6, 8), *part(5, 20), *part(18, 4), *reference)
    update = Update(0.0, tokens=25, pairs=2)
    metrics = backend.dpo_step(rotary, [pairs], PreferenceLoss(), update)
    assert metrics.chosen_log_probs is not None and metrics.rejected_log_probs is not None
    for pair in range(2):
        for name, sums in (("chosen", metrics.chosen_log_probs), ("rejected", metrics.rejected_log_probs)):
            prompt = pairs.prompt[pair, : pairs.prompt_lengths[pair]]
            completion = getattr(pairs, name)[pair, : getattr(pairs, f"{name}_lengths")[pair]]
            tokens = np.concatenate([prompt, completion])[None]
            mask = np.arange(tokens.shape[1])[None] >= len(prompt)
            alone = backend.log_probs(rotary, TokenBatch(tokens, np.array([tokens.shape[1]], np.int32), mask))
            assert sums[pair] == pytest.approx(alone.sum(), abs=1e-4)


def test_generation_does_not_depend_on_neighbours(rotary: LoadedModel, backend: Backend) -> None:
    """Prompts that stay below the limit, start beyond it, or cross it on the way."""
    random = np.random.default_rng(8)
    prompts = [random.integers(3, 61, length).astype(np.int32) for length in (4, 12, 13, 20, 30, 9)]
    sampling = Sampling(max_new_tokens=7, temperature=0.0, top_p=1.0, seed=0, stop_token_ids=())
    together = backend.generate(rotary, prompts, sampling)
    for prompt, answer in zip(prompts, together, strict=True):
        (alone,) = backend.generate(rotary, [prompt], sampling)
        assert answer.tokens.tolist() == alone.tokens.tolist()


def test_a_model_that_cannot_pad_continues_prompts_one_by_one(backend: Backend, tmp_path: Any) -> None:
    """RWKV reads the filling before a short prompt as tokens, whatever the mask says."""
    config = AutoConfig.for_model("rwkv", vocab_size=61, hidden_size=32, num_hidden_layers=2, context_length=64)
    save_stirred(config, tmp_path)
    model = backend.load_model(ModelSpec(str(tmp_path), "cpu", "float32"))
    random = np.random.default_rng(8)
    prompts = [random.integers(3, 61, length).astype(np.int32) for length in (4, 12, 4, 7)]
    sampling = Sampling(max_new_tokens=8, temperature=0.0, top_p=1.0, seed=0, stop_token_ids=())
    together = backend.generate(model, prompts, sampling)
    assert model.handle.continues_rows is False
    for prompt, answer in zip(prompts, together, strict=True):
        assert answer.tokens.tolist() == backend.generate(model, [prompt], sampling)[0].tokens.tolist()
