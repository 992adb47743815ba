"""Layers that are not attention: gated delta networks, short convolutions and Mamba, on both backends.

What `test_architectures.py` compares for every family holds for these too. Here are the questions that only a state
raises: padding, long rows, generation of several prompts, old names of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from architectures import RECURRENT, RELATIVE, SMALL, distance, loaded, relative_distance, rewritten, saved
from mindprint.contract import Sampling, TokenBatch
from mindprint.errors import ModelError
from mindprint_mlx.delta_rule import gated_delta_rule
from parity_cases import open_model, token_batch

LONG = 300
"""More tokens than one chunk of any scan: 64 in the delta rule, 256 in mlx-lm's Mamba."""


@pytest.mark.parametrize("model_type", sorted(RECURRENT))
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_padding_changes_no_row(backend: str, model_type: str, tmp_path: Path) -> None:
    saved(tmp_path, model_type)
    opened = open_model(backend, tmp_path)
    batch = token_batch(3, (21, 5, 12), SMALL["vocab_size"])
    together = opened.backend.log_probs(opened.model, batch)
    for row, length in enumerate(batch.lengths):
        only = TokenBatch(
            batch.tokens[row : row + 1, :length], batch.lengths[row : row + 1], batch.loss_mask[row : row + 1, :length]
        )
        alone = opened.backend.log_probs(opened.model, only)
        np.testing.assert_allclose(together[row : row + 1, :length], alone, atol=1e-5)


@pytest.mark.parametrize("model_type", sorted(RECURRENT))
def test_rows_longer_than_a_chunk(model_type: str, tmp_path: Path) -> None:
    # Small weights forget quickly, and a state that was lost between chunks would hardly show.
    reference = saved(tmp_path, model_type, tokens=LONG, max_position_embeddings=2 * LONG)
    assert distance(reference) < RELATIVE


@pytest.mark.parametrize("model_type", sorted(RECURRENT))
def test_prompts_of_unlike_lengths_are_continued_alike(model_type: str, tmp_path: Path) -> None:
    saved(tmp_path, model_type)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, SMALL["vocab_size"], length).astype(np.int32) for length in (9, 3, 17)]
    sampling = Sampling(6, stop_token_ids=())
    answers = {}
    for backend in ("torch", "mlx"):
        opened = open_model(backend, tmp_path)
        together = opened.backend.generate(opened.model, prompts, sampling)
        alone = [opened.backend.generate(opened.model, [prompt], sampling)[0] for prompt in prompts]
        answers[backend] = [answer.tokens.tolist() for answer in together]
        assert answers[backend] == [answer.tokens.tolist() for answer in alone]
    assert answers["torch"] == answers["mlx"]


@pytest.mark.parametrize("same_keys", [False, True], ids=["random keys", "the same key everywhere"])
@pytest.mark.parametrize("tokens", [1, 7, 64, 150])
def test_the_delta_rule_is_that_of_transformers(tokens: int, same_keys: bool) -> None:
    """Outputs, last state and all gradients against transformers' recurrence, in float64 as far as it keeps that."""
    rng = np.random.default_rng(tokens)
    rows, key_heads, heads, key_dim, value_dim = 2, 2, 4, 16, 24
    q, k = (rng.normal(size=(rows, tokens, key_heads, key_dim)).astype(np.float32) for _ in range(2))
    if same_keys:
        k[:] = k[:, :1]
    v, weights = (rng.normal(size=(rows, tokens, heads, value_dim)).astype(np.float32) for _ in range(2))
    decay = (-0.05 * np.abs(rng.normal(size=(rows, tokens, heads)))).astype(np.float32)
    beta = (1 / (1 + np.exp(-2 - rng.normal(size=(rows, tokens, heads))))).astype(np.float32)
    state = rng.normal(size=(rows, heads, key_dim, value_dim)).astype(np.float32)
    inputs = (q, k, v, decay, beta, state)

    def ours(*arrays: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        out, last = gated_delta_rule(*arrays)
        return mx.sum(out * mx.array(weights)) + mx.sum(last), out, last

    (_, out, last), gradients = mx.value_and_grad(ours, argnums=tuple(range(6)))(*map(mx.array, inputs))
    leaves = [torch.tensor(values, requires_grad=True) for values in inputs]
    queries, keys = (leaf.repeat_interleave(heads // key_heads, 2) for leaf in leaves[:2])
    expected, expected_last = torch_recurrent_gated_delta_rule(
        queries,
        keys,
        leaves[2],
        g=leaves[3],
        beta=leaves[4],
        initial_state=leaves[5],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    ((expected * torch.tensor(weights)).sum() + expected_last.sum()).backward()
    assert relative_distance(np.array(out), expected.detach().numpy()) < 1e-5
    assert relative_distance(np.array(last), expected_last.detach().numpy()) < 1e-5
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert leaf.grad is not None
        assert relative_distance(np.array(gradient), leaf.grad.numpy()) < 1e-5


OLD: Mapping[str, tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "an interval of attention": ("qwen3_next", {}, {"full_attention_interval": 2}, ("layer_types",)),
    "no interval": (
        "qwen3_5_text",
        {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
        {},
        ("layer_types",),
    ),
    "indices of attention": (
        "lfm2",
        {},
        {"full_attn_idxs": [1], "block_ff_dim": 112, "intermediate_size": 7},
        ("layer_types",),
    ),
    "mamba and attention": (
        "granitemoehybrid",
        {},
        {"layer_types": ["mamba", "attention", "mamba", "mamba"]},
        ("time_step_limit",),
    ),
    "a dense Granite 4 without rotation": (
        "granitemoehybrid",
        {"num_local_experts": 0, "position_embedding_type": None},
        {"position_embedding_type": "nope"},
        (),
    ),
    "a pattern of letters": ("nemotron_h", {}, {"hybrid_override_pattern": "M*-E"}, ("layers_block_type",)),
}
"""By name, a family, changes of its model, and the fields that an old config.json has instead of others."""


@pytest.mark.parametrize("case", sorted(OLD))
def test_old_configurations(case: str, tmp_path: Path) -> None:
    model_type, changes, old, absent = OLD[case]
    reference = saved(tmp_path, model_type, **changes)
    rewritten(tmp_path, old, absent)
    assert distance(reference) < RELATIVE


def test_an_irregular_order_of_layers_is_refused(tmp_path: Path) -> None:
    kinds = ["linear_attention", "full_attention", "full_attention", "linear_attention"]
    saved(tmp_path, "qwen3_5_text", layer_types=kinds)
    with pytest.raises(ModelError, match="every n-th layer must be one of full_attention.*train it on torch"):
        loaded(tmp_path)


def test_layers_that_guess_several_tokens_are_left_out(tmp_path: Path) -> None:
    reference = saved(tmp_path, "qwen3_5_text")
    path = tmp_path / "model.safetensors"
    weights: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]  # of safetensors it is a mapping
    mx.save_safetensors(str(path), {**weights, "mtp.norm.weight": mx.zeros(4)})
    assert distance(reference) < RELATIVE
