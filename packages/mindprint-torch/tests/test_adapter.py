"""Sites, and injection: exactly where, exactly what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from mindprint.contract import AdapterSite, AdapterState, LoadedModel, LoraConfig, LoraFactors, TokenBatch, Update
from mindprint.errors import AdapterError
from mindprint.plugins.backend import Backend

Load = Callable[..., LoadedModel]
MakeAdapter = Callable[..., AdapterState]
MakeBatch = Callable[..., TokenBatch]


def own_log_probs(network: Any, batch: TokenBatch) -> np.ndarray:
    """Log-probs under the mask from full logits, one row at a time without padding: nothing of ours is in here."""
    answers = np.zeros(batch.tokens.shape, np.float32)
    for row, length in enumerate(batch.lengths):
        tokens = torch.from_numpy(batch.tokens[row : row + 1, :length]).long()
        with torch.no_grad():
            log_probs = torch.log_softmax(network(input_ids=tokens).logits[0].float(), dim=-1)
        for column in np.flatnonzero(batch.loss_mask[row]):
            answers[row, column] = log_probs[column - 1, tokens[0, column]]
    return answers


def test_sites_of_qwen2(backend: Backend, load: Load) -> None:
    sites = backend.adapter_sites(load("qwen2"))
    assert sites[0] == AdapterSite("model.embed_tokens", "embedding", 61, 32)
    assert sites[1:8] == (
        AdapterSite("model.layers.0.self_attn.q_proj", "linear", 32, 32),
        AdapterSite("model.layers.0.self_attn.k_proj", "linear", 32, 16),
        AdapterSite("model.layers.0.self_attn.v_proj", "linear", 32, 16),
        AdapterSite("model.layers.0.self_attn.o_proj", "linear", 32, 32),
        AdapterSite("model.layers.0.mlp.gate_proj", "linear", 32, 40),
        AdapterSite("model.layers.0.mlp.up_proj", "linear", 32, 40),
        AdapterSite("model.layers.0.mlp.down_proj", "linear", 40, 32),
    )
    assert sites[-1] == AdapterSite("lm_head", "linear", 32, 61)
    assert len(sites) == 16


def test_sites_of_gpt2_state_the_transposed_layers_as_linear(backend: Backend, load: Load) -> None:
    sites = {site.name: site for site in backend.adapter_sites(load("gpt2"))}
    assert sites["transformer.h.0.attn.c_attn"] == AdapterSite("transformer.h.0.attn.c_attn", "linear", 32, 96)
    assert "transformer.wpe" not in sites


def test_sites_are_the_same_after_injection(backend: Backend, load: Load, make_adapter: MakeAdapter) -> None:
    model = load("llama")
    before = backend.adapter_sites(model)
    backend.inject_adapter(model, make_adapter(model))
    assert backend.adapter_sites(model) == before


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "gpt2", "deepseek_v3"])
def test_injection_equals_adding_the_change_to_the_weights(
    backend: Backend,
    load: Load,
    make_adapter: MakeAdapter,
    token_batch: MakeBatch,
    folders: Callable[[str], Path],
    architecture: str,
) -> None:
    """Against base + scale * B @ A, added here, through transformers alone."""
    model = load(architecture)
    adapter = make_adapter(model)
    facts = backend.inject_adapter(model, adapter)
    assert facts.sites == adapter.config.target_modules
    assert facts.trainable_elements == adapter.elements
    merged = AutoModelForCausalLM.from_pretrained(folders(architecture), attn_implementation="eager")
    with torch.no_grad():
        for name, (a, b) in adapter.tensors.items():
            module: Any = merged.get_submodule(name)
            change = torch.from_numpy(adapter.config.scale(name) * b @ a)
            module.weight.add_(change.T if isinstance(module, Conv1D) else change)
    batch = token_batch()
    np.testing.assert_allclose(backend.log_probs(model, batch), own_log_probs(merged.eval(), batch), atol=1e-5)


def test_what_is_saved_gives_the_same_in_peft(
    backend: Backend,
    train: Load,
    token_batch: MakeBatch,
    folders: Callable[[str], Path],
) -> None:
    """The saved factors under PEFT's own names, in a model that PEFT wraps itself."""
    model, batch = train("qwen2"), token_batch()
    backend.sft_step(model, [batch], Update(1e-2, batch.loss_tokens))
    adapter = backend.save(model).adapter
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(adapter.config.target_modules))
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folders("qwen2")), config)
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": torch.from_numpy(values)
        for name, factors in adapter.tensors.items()
        for letter, values in zip("AB", factors, strict=True)
    }
    report: Any = peft.set_peft_model_state_dict(wrapped, tensors)
    assert not report.unexpected_keys
    np.testing.assert_allclose(backend.log_probs(model, batch), own_log_probs(wrapped.eval(), batch), atol=1e-5)


def test_dense_layers_of_a_mixture_of_experts_are_adapted_as_named(
    backend: Backend, load: Load, make_adapter: MakeAdapter
) -> None:
    """PEFT 0.21 would take these names for old names of stacked experts."""
    model = load("deepseek_v3")
    adapter = make_adapter(model)
    assert "model.layers.0.mlp.gate_proj" in adapter.config.target_modules
    assert "model.layers.1.mlp.shared_experts.up_proj" in adapter.config.target_modules
    assert backend.inject_adapter(model, adapter).sites == adapter.config.target_modules


def test_embedding_site(backend: Backend, load: Load, token_batch: MakeBatch, folders: Callable[[str], Path]) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 61), (32, 4)))
    name = "model.embed_tokens"
    model, batch = load("llama"), token_batch()
    backend.inject_adapter(model, AdapterState(LoraConfig(4, 2.0, (name,)), {name: LoraFactors(a, b)}))
    merged = AutoModelForCausalLM.from_pretrained(folders("llama")).eval()
    with torch.no_grad():
        merged.get_submodule(name).weight.add_(torch.from_numpy(0.5 * (b @ a).T))
    np.testing.assert_allclose(backend.log_probs(model, batch), own_log_probs(merged, batch), atol=1e-5)
    before = backend.save(model).adapter.tensors[name]
    backend.sft_step(model, [batch], Update(1e-2, batch.loss_tokens))
    after = backend.save(model).adapter.tensors[name]
    used = np.unique(np.concatenate([row[: n - 1] for row, n in zip(batch.tokens, batch.lengths, strict=True)]))
    assert set(np.flatnonzero(np.any(before.a != after.a, axis=0))) == set(used)


def test_output_layer_as_a_site(backend: Backend, load: Load, token_batch: MakeBatch) -> None:
    """Not taken by `all-linear`, but who names it gets gradients through the head too."""
    rng = np.random.default_rng(0)
    factors = LoraFactors(rng.normal(size=(4, 32)).astype(np.float32), np.zeros((61, 4), np.float32))
    model, batch = load("llama"), token_batch()
    backend.inject_adapter(model, AdapterState(LoraConfig(4, 8.0, ("lm_head",)), {"lm_head": factors}))
    first = backend.sft_step(model, [batch], Update(1e-2, batch.loss_tokens))
    second = backend.sft_step(model, [batch], Update(1e-2, batch.loss_tokens))
    assert first.grad_norm > 0.01
    assert second.loss < first.loss - 0.01


def test_patterns_apply_to_the_named_site_only(backend: Backend, load: Load, make_adapter: MakeAdapter) -> None:
    model = load("llama")
    name = "model.layers.1.mlp.up_proj"
    adapter = make_adapter(model, rank_pattern={name: 2}, alpha_pattern={name: 5.0}, use_rslora=True)
    backend.inject_adapter(model, adapter)
    layers = model.handle.adapter.layers
    assert layers[name].lora_A.shape == (2, 32)
    assert layers[name].scale == pytest.approx(5 / np.sqrt(2))
    assert {len(layer.lora_A) for site, layer in layers.items() if site != name} == {4}
    assert {layer.scale for site, layer in layers.items() if site != name} == {4.0}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_are_float32_whatever_the_base(
    backend: Backend, load: Load, make_adapter: MakeAdapter, dtype: str
) -> None:
    model = load("llama", dtype)
    adapter = make_adapter(model)
    backend.inject_adapter(model, adapter)
    trained = [parameter for parameter in model.handle.network.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    for name, factors in backend.save(model).adapter.tensors.items():
        np.testing.assert_array_equal(factors.a, adapter.tensors[name].a)
        np.testing.assert_array_equal(factors.b, adapter.tensors[name].b)


def test_injection_leaves_the_random_numbers_alone(backend: Backend, load: Load, make_adapter: MakeAdapter) -> None:
    model = load("llama")
    before = torch.get_rng_state()
    backend.inject_adapter(model, make_adapter(model))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_site_that_does_not_exist_is_refused(backend: Backend, load: Load) -> None:
    factors = LoraFactors(np.zeros((4, 32), np.float32), np.zeros((32, 4), np.float32))
    adapter = AdapterState(LoraConfig(4, 8.0, ("model.layers.9.q_proj",)), {"model.layers.9.q_proj": factors})
    with pytest.raises(AdapterError, match=r"no module 'model\.layers\.9\.q_proj'"):
        backend.inject_adapter(load("llama"), adapter)
