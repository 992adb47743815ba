"""Log-probs against full logits of transformers, through every kind of head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mindprint.contract import LoadedModel, TokenBatch
from mindprint.errors import ModelError
from mindprint.plugins.backend import Backend
from mindprint_torch import logprobs
from mindprint_torch.head import Head, read_head

Load = Callable[..., LoadedModel]
MakeBatch = Callable[..., TokenBatch]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def full_logits_log_probs(network: Any, batch: TokenBatch) -> np.ndarray:
    """The definition: log-softmax of all logits in float32, a row at a time, without padding."""
    answers = np.zeros(batch.tokens.shape, np.float32)
    for row, length in enumerate(batch.lengths):
        tokens = torch.from_numpy(batch.tokens[row : row + 1, :length]).long()
        with torch.no_grad():
            log_probs = torch.log_softmax(network(input_ids=tokens).logits[0].float(), dim=-1)
        for column in np.flatnonzero(batch.loss_mask[row]):
            answers[row, column] = log_probs[column - 1, tokens[0, column]]
    return answers


def random_questions(head: Head, count: int = 23) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn((count, 32), generator=generator, dtype=next(head.layer.parameters()).dtype)
    return hidden.requires_grad_(), torch.randint(0, 61, (count,), generator=generator)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "cohere", "granite", "gpt2"])
def test_equal_to_full_logits(
    backend: Backend, load: Load, folders: Callable[[str], Path], token_batch: MakeBatch, architecture: str
) -> None:
    batch = token_batch()
    reference = AutoModelForCausalLM.from_pretrained(folders(architecture), attn_implementation="eager").eval()
    expected = full_logits_log_probs(reference, batch)
    answers = backend.log_probs(load(architecture), batch)
    np.testing.assert_allclose(answers, expected, rtol=0, atol=1e-5)
    assert np.all(answers[~batch.loss_mask] == 0)


@pytest.mark.parametrize(
    ("architecture", "plain"),
    [("llama", True), ("qwen2", True), ("gpt2", True), ("gemma2", False), ("cohere", False), ("granite", False)],
)
def test_heads_that_do_more_than_the_output_layer_are_seen(load: Load, architecture: str, plain: bool) -> None:
    assert load(architecture).handle.head.plain is plain


def test_a_cap_is_seen_where_ordinary_logits_pass_it_unchanged(load: Load) -> None:
    """In bfloat16, 1024 * tanh(x / 1024) is x for the logits of this model, but not for those of every one."""
    network = load("gemma2", "bfloat16").handle.network
    network.config.final_logit_softcapping = 1024.0
    assert not read_head(network).plain


def test_a_token_that_sees_those_behind_it_is_refused(load: Load) -> None:
    network = load("llama").handle.network
    network.model.layers[1].self_attn.is_causal = False
    with pytest.raises(ModelError, match="LlamaForCausalLM lets tokens see what follows them; only causal"):
        read_head(network)


def test_logits_that_the_last_hidden_states_do_not_decide_are_refused(load: Load) -> None:
    network = load("llama").handle.network
    forward = network.forward

    def with_token_ids(input_ids: torch.Tensor, **shape: object) -> object:
        output = forward(input_ids=input_ids, **shape)
        output.logits = output.logits + input_ids[..., None]
        return output

    network.forward = with_token_ids
    with pytest.raises(ModelError, match="LlamaForCausalLM is not a body followed by an output layer"):
        read_head(network)


def test_capped_attention_is_computed_eagerly_and_said(load: Load) -> None:
    model = load("gemma2")
    assert model.handle.network.config._attn_implementation == "eager"
    assert "SDPA cannot cap" in model.notes[0]
    assert load("llama").handle.network.config._attn_implementation == "sdpa"


def test_bfloat16_takes_log_softmax_in_float32(
    backend: Backend, load: Load, folders: Callable[[str], Path], token_batch: MakeBatch
) -> None:
    batch = token_batch()
    reference = AutoModelForCausalLM.from_pretrained(folders("llama"), dtype=torch.bfloat16).eval()
    answers = backend.log_probs(load("llama", "bfloat16"), batch)
    np.testing.assert_allclose(answers, full_logits_log_probs(reference, batch), atol=0.05)
    # Values on the grid of bfloat16 would survive this rounding.
    rounded = torch.from_numpy(answers).bfloat16().float().numpy()
    assert np.abs(rounded - answers).max() > 1e-3


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
def test_gradients_equal_autograd_through_full_logits(
    load: Load, monkeypatch: pytest.MonkeyPatch, architecture: str, chunk_rows: int
) -> None:
    head = load(architecture).handle.head
    hidden, targets = random_questions(head)
    weights = torch.linspace(-2, 2, len(targets))
    answers = torch.log_softmax(head(hidden).float(), dim=-1)[torch.arange(len(targets)), targets]
    (expected,) = torch.autograd.grad((weights * answers).sum(), hidden)
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", chunk_rows * 4 * head.vocabulary)
    found = logprobs.head_log_probs(head, hidden, targets)
    (gradient,) = torch.autograd.grad((weights * found).sum(), hidden)
    torch.testing.assert_close(found, answers, rtol=0, atol=2e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_no_chunk_of_logits_is_larger_than_stated(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    head = load("llama").handle.head
    seen: list[int] = []

    def watched(self: Head, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return original(self, hidden)

    original = Head.__call__
    monkeypatch.setattr(Head, "__call__", watched)
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 10 * 4 * head.vocabulary + 3)
    logprobs.head_log_probs(head, *random_questions(head, 23))
    assert seen == [10, 10, 3]


def test_the_head_sees_only_positions_that_count(
    backend: Backend, load: Load, token_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = load("llama"), token_batch()
    seen: list[tuple[int, ...]] = []
    model.handle.head.layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    backend.log_probs(model, batch)
    assert seen == [(1, batch.loss_tokens, 32)]


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "deepseek_v3"])
def test_what_stands_in_the_padding_changes_nothing(
    backend: Backend, load: Load, token_batch: MakeBatch, architecture: str
) -> None:
    model, batch = load(architecture), token_batch()
    other = batch.tokens.copy()
    other[np.arange(other.shape[1]) >= batch.lengths[:, None]] = 7
    changed = backend.log_probs(model, TokenBatch(other, batch.lengths, batch.loss_mask))
    np.testing.assert_array_equal(changed, backend.log_probs(model, batch))


def test_more_padding_and_another_row_order_change_nothing(
    backend: Backend, load: Load, token_batch: MakeBatch
) -> None:
    model, batch = load("qwen2"), token_batch()
    answers = backend.log_probs(model, batch)
    wide = TokenBatch(np.pad(batch.tokens, ((0, 0), (0, 9))), batch.lengths, np.pad(batch.loss_mask, ((0, 0), (0, 9))))
    np.testing.assert_array_equal(backend.log_probs(model, wide)[:, :12], answers)
    order = [2, 0, 1]
    turned = TokenBatch(batch.tokens[order], batch.lengths[order], batch.loss_mask[order])
    np.testing.assert_allclose(backend.log_probs(model, turned), answers[order], atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_trls_fused_head_gives_the_same_numbers(load: Load, architecture: str) -> None:
    """Its tiles are folded by torch operations here; on CUDA the same function runs as Triton kernels."""
    head = load(architecture).handle.head
    hidden, targets = random_questions(head)
    found = logprobs.fused_log_probs(head.layer, hidden, targets)
    expected = logprobs.head_log_probs(head, hidden, targets)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
    weights = torch.linspace(-2, 2, len(targets))
    torch.testing.assert_close(
        torch.autograd.grad((weights * found).sum(), hidden)[0],
        torch.autograd.grad((weights * expected).sum(), hidden)[0],
        rtol=1e-4,
        atol=1e-6,
    )


def test_the_fused_head_is_for_plain_heads_on_triton_devices(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not logprobs.fused_head_usable(torch.device("cpu"))
    taken: list[int] = []

    def fused(layer: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        taken.append(len(targets))
        return hidden[:, 0]

    monkeypatch.setattr(logprobs, "fused_head_usable", lambda device: True)
    monkeypatch.setattr(logprobs, "fused_log_probs", fused)
    for architecture in ("llama", "gemma2", "cohere"):
        head = load(architecture).handle.head
        logprobs.head_log_probs(head, *random_questions(head, 4))
    assert taken == [4]


def test_a_large_vocabulary_has_no_bias() -> None:
    """262,144 tokens as Gemma 3 has: with `torch.log_softmax` log-probs are 2.8e-5 too high on average."""
    random = np.random.default_rng(0)
    logits = (3 * random.standard_normal((16, 262_144))).astype(np.float32)
    targets = random.integers(0, 262_144, 16)
    exact = logits.astype(np.float64)
    expected = exact[np.arange(16), targets] - np.log(np.exp(exact).sum(axis=1))
    in_torch, at = torch.from_numpy(logits.copy()), torch.from_numpy(targets)
    plain = torch.log_softmax(in_torch, -1).gather(1, at[:, None])[:, 0].numpy()
    print(f"mean error of torch.log_softmax: {(plain - expected).mean():+.1e} nats")
    evaluated = logprobs.log_softmax_at(in_torch, at).numpy()
    trained = torch.empty(16)
    logprobs._replace_by_gradient(in_torch, at, trained)
    for values in (evaluated, trained.numpy()):
        print(f"mean error here: {(values - expected).mean():+.1e} nats")
        assert abs((values - expected).mean()) < 1e-6
        assert np.abs(values - expected).max() < 5e-6
