"""Where LoRA goes, under which names, and what it changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_samples import HIDDEN, INNER, LAYERS, VOCABULARY, linear_sites, lora, token_batch

from mindprint.contract import AdapterSite, LoadedModel
from mindprint.errors import AdapterError
from mindprint_mlx import adapter, digest, logprobs


def test_sites_are_named_and_sized_as_in_transformers(make: Callable[..., LoadedModel]) -> None:
    sites = {site.name: site for site in make("llama").handle.sites}
    assert len(sites) == 2 + 7 * LAYERS
    assert sites["model.layers.1.mlp.down_proj"] == AdapterSite("model.layers.1.mlp.down_proj", "linear", INNER, HIDDEN)
    assert sites["model.layers.0.self_attn.k_proj"].out_features == 16
    assert sites["lm_head"] == AdapterSite("lm_head", "linear", HIDDEN, VOCABULARY)
    assert sites["model.embed_tokens"] == AdapterSite("model.embed_tokens", "embedding", VOCABULARY, HIDDEN)


def test_a_tied_head_is_no_site(make: Callable[..., LoadedModel]) -> None:
    assert "lm_head" not in {site.name for site in make("qwen2").handle.sites}


def test_sites_are_the_same_with_an_adapter(make: Callable[..., LoadedModel]) -> None:
    loaded = make()
    before = loaded.handle.sites
    adapter.inject(loaded.handle, lora(linear_sites(loaded)))
    assert loaded.handle.sites == before


def test_facts_of_an_injection(make: Callable[..., LoadedModel]) -> None:
    loaded = make()
    state = lora(linear_sites(loaded)[:3], r=4)
    facts = adapter.inject(loaded.handle, state)
    assert facts.sites == state.config.target_modules
    # q, k and v of one layer: r * (in + out) each
    assert facts.trainable_elements == 4 * (32 + 32) + 2 * 4 * (32 + 16)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_adapter_is_what_merging_it_would_be(make: Callable[..., LoadedModel], family: str, rslora: bool) -> None:
    """W + scale * B @ A in every site gives the same log-probs as the adapter beside W."""
    loaded = make(family)
    sites = linear_sites(loaded)
    pattern = {sites[0].name: 2, sites[-1].name: 6}
    alphas = {sites[1].name: 3.0}
    state = lora(sites, use_rslora=rslora, rank_pattern=pattern, alpha_pattern=alphas)
    batch = token_batch()
    adapter.inject(loaded.handle, state)
    beside = logprobs.log_probs(loaded.handle, batch, adapter=True)

    merged = make(family).handle
    for place in merged.places:
        if place.site in state.tensors:
            a, b = state.tensors[place.site]
            place.layer.weight = place.layer.weight + mx.array(state.config.scale(place.site) * (b @ a))
    np.testing.assert_allclose(beside, logprobs.log_probs(merged, batch, adapter=False), rtol=0, atol=2e-5)


def test_an_embedding_is_adapted_in_the_lookup_and_not_in_a_tied_head(make: Callable[..., LoadedModel]) -> None:
    """As PEFT does: an output embedding that is tied keeps the base's weights."""
    loaded = make("qwen2")
    (site,) = (site for site in loaded.handle.sites if site.kind == "embedding")
    state = lora((site,))
    batch = token_batch()
    adapter.inject(loaded.handle, state)
    found = logprobs.log_probs(loaded.handle, batch, adapter=True)

    reference = make("qwen2").handle
    a, b = state.tensors[site.name]
    table = reference.module.model.embed_tokens
    changed = table.weight + mx.array(state.config.scale(site.name) * (a.T @ b.T))
    reference.module.model.embed_tokens = _Lookup(changed, table)
    np.testing.assert_allclose(found, logprobs.log_probs(reference, batch, adapter=False), rtol=0, atol=2e-5)


class _Lookup:
    """An embedding whose lookup is another table than its head."""

    def __init__(self, table: mx.array, head: object) -> None:
        self.table, self.as_linear = table, head.as_linear  # type: ignore[attr-defined]

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.table[tokens]


def test_without_the_adapter_the_base_answers_bit_for_bit(make: Callable[..., LoadedModel], family: str) -> None:
    loaded, batch = make(family), token_batch()
    base = logprobs.log_probs(loaded.handle, batch, adapter=True)
    adapter.inject(loaded.handle, lora(linear_sites(loaded)))
    adapted = logprobs.log_probs(loaded.handle, batch, adapter=True)
    np.testing.assert_array_equal(logprobs.log_probs(loaded.handle, batch, adapter=False), base)
    np.testing.assert_array_equal(logprobs.log_probs(loaded.handle, batch, adapter=True), adapted)
    assert np.abs(adapted - base).max() > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_stay_float32(make: Callable[..., LoadedModel], dtype: str) -> None:
    loaded = make(dtype=dtype)
    adapter.inject(loaded.handle, lora(linear_sites(loaded)))
    assert {values.dtype for values in loaded.handle.adapter.factors.values()} == {mx.float32}


def test_unknown_and_missing_places_are_refused(make: Callable[..., LoadedModel]) -> None:
    loaded = make()
    state = lora(linear_sites(loaded))
    config = replace(state.config, target_modules=(*state.config.target_modules, "model.layers.9.mlp.up_proj"))
    with pytest.raises(AdapterError, match=r"no place called 'model\.layers\.9\.mlp\.up_proj'"):
        adapter.inject(loaded.handle, replace(state, config=config))
    with pytest.raises(AdapterError, match="disagree about"):
        adapter.inject(loaded.handle, replace(state, config=replace(config, target_modules=config.target_modules[:1])))
    with pytest.raises(AdapterError, match="names no target modules"):
        adapter.inject(loaded.handle, replace(state, config=replace(config, target_modules=())))
    assert loaded.handle.adapter is None


def test_transposed_factors_are_refused(make: Callable[..., LoadedModel]) -> None:
    loaded = make()
    sites = linear_sites(loaded)
    state = lora(sites)
    a, b = state.tensors[sites[0].name]
    turned = {**state.tensors, sites[0].name: state.tensors[sites[0].name]._replace(a=b, b=a)}
    with pytest.raises(AdapterError, match=r"A is \[32, 4\] and B \[4, 32\]; the model and rank 4 need"):
        adapter.inject(loaded.handle, replace(state, tensors=turned))


class TestBaseDigest:
    def test_any_changed_element_changes_it(self, make: Callable[..., LoadedModel]) -> None:
        handle = make("llama").handle
        before = digest.base_digest(handle)
        rng = np.random.default_rng(0)
        for place in handle.places[:: max(1, len(handle.places) // 5)]:
            weight = place.layer.weight
            row, column = (int(rng.integers(size)) for size in weight.shape)
            for change in (1e-7, -1.0):
                original = weight[row, column].item()
                place.layer.weight[row, column] = original + change * max(abs(original), 1e-3)
                assert digest.base_digest(handle) != before, (place.site, change)
                place.layer.weight[row, column] = original
                assert digest.base_digest(handle) == before

    def test_swapped_elements_change_it(self, make: Callable[..., LoadedModel]) -> None:
        handle = make().handle
        before = digest.base_digest(handle)
        weight = handle.places[1].layer.weight
        weight[mx.array([0, 1])] = weight[mx.array([1, 0])]
        assert digest.base_digest(handle) != before

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_it_is_of_the_base_alone_and_the_same_in_another_load(
        self, make: Callable[..., LoadedModel], dtype: str
    ) -> None:
        loaded = make(dtype=dtype)
        before = digest.base_digest(loaded.handle)
        adapter.inject(loaded.handle, lora(linear_sites(loaded)))
        assert digest.base_digest(loaded.handle) == before == digest.base_digest(make(dtype=dtype).handle)
        assert before != digest.base_digest(make(dtype=dtype, seed=5).handle)
