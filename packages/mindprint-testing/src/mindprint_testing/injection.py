"""Adapters: put where they belong, with the effect that they state, and none when they are off."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindprint.adapter.initial import initial_adapter
from mindprint.contract import AdapterSite, AdapterState, LoraConfig, LoraFactors
from mindprint.errors import AdapterError
from mindprint.models.folder import SINGLE_FILE
from mindprint_testing.bench import Bench
from mindprint_testing.claims import Claims

EXACT = 1e-4
"""Nats a token by which two float32 computations of one model may differ, at most."""


class Injection(Claims):
    """`mindprint_inject_adapter`, and the adapter's part in `mindprint_log_probs`."""

    def test_facts_of_an_injection(self, bench: Bench) -> None:
        """The sites adapted and the elements trained are exactly the adapter's.

        If it fails: the backend matched names by their ends, or weights other than the adapter are trainable. Look at
        the `AdapterFacts`: they must be counted on the model, not copied from the request.
        """
        model = bench.load()
        adapter = bench.adapter(bench.linear_sites(model)[:2])
        facts = bench.backend.inject_adapter(model, adapter)
        assert set(facts.sites) == set(adapter.config.target_modules)
        assert facts.trainable_elements == adapter.elements

    def test_a_fresh_adapter_changes_nothing(self, bench: Bench) -> None:
        """Core's initial adapter has B = 0: log-probs are the base's.

        If it fails: the backend draws initial values itself instead of taking those given. Look for the
        framework's own initialisation in `mindprint_inject_adapter`.
        """
        model, batch = bench.load(), bench.token_batch()
        base = bench.backend.log_probs(model, batch)
        sites = bench.linear_sites(model)
        lora = LoraConfig(4, 8.0, tuple(site.name for site in sites))
        bench.backend.inject_adapter(model, initial_adapter(sites, lora, seed=0))
        np.testing.assert_allclose(bench.backend.log_probs(model, batch), base, rtol=0, atol=EXACT)

    @pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
    def test_an_adapter_is_what_merging_it_would_be(self, bench: Bench, tmp_path: Path, rslora: bool) -> None:
        """A base whose weights are W + scale · B @ A gives the log-probs of the base W with the adapter (A, B).

        If it fails: the scale is wrong (alpha / r, or alpha / sqrt(r) for rsLoRA; ranks and alphas can differ by site:
        ask `LoraConfig.scale` and `.rank`), factors are transposed, or a site got another site's factors.
        """
        model, batch = bench.load(), bench.token_batch()
        sites = bench.linear_sites(model)
        # Another rank and another alpha at some sites: a backend that takes one scale for all is wrong there.
        pattern: dict[str, Any] = {
            "rank_pattern": {sites[0].name: 2},
            "alpha_pattern": {sites[0].name: 5.0, sites[-1].name: 1.5},
        }
        adapter = bench.adapter(sites, use_rslora=rslora, **pattern)
        check_merged(bench, tmp_path, adapter, {site.name: site for site in sites})
        assert np.abs(adapted(bench, adapter) - bench.backend.log_probs(model, batch)).max() > 10 * EXACT

    def test_each_site_alone_is_what_merging_it_would_be(self, bench: Bench, tmp_path: Path) -> None:
        """As above for one linear site of each name (`q_proj`, ...) by itself, the LM head among them.

        If it fails: the site of that name is another place of the model than the folder's tensor of that name, or its
        adapter has no effect.
        """
        model = bench.load()
        linear = [site for site in bench.backend.adapter_sites(model) if site.kind == "linear"]
        # One site for each last name component, because backends map names to modules by it.
        for site in {site.name.rpartition(".")[2]: site for site in linear}.values():
            check_merged(bench, tmp_path / site.name, bench.adapter([site]), {site.name: site})

    def test_an_embedding_is_what_merging_it_would_be(self, bench: Bench, tmp_path: Path) -> None:
        """As above for the embedding: its table `[in, out]` takes the transpose of scale · B @ A.

        If it fails: A and B of an embedding change places, or a tied head was adapted with it (PEFT leaves it alone).
        """
        self.needs("embedding")
        sites = [site for site in bench.backend.adapter_sites(bench.load()) if site.kind == "embedding"]
        assert sites, "embedding is claimed, but no site of this kind is listed"
        check_merged(bench, tmp_path, bench.adapter(sites), {site.name: site for site in sites})

    def test_adapter_off_is_the_base_bit_for_bit(self, bench: Bench) -> None:
        """With `adapter=False` the base answers, before and after training, and switching off leaves no trace.

        If it fails: the reference of DPO and every before-and-after comparison are wrong. Look at how
        `mindprint_log_probs` leaves the adapter out: not by subtracting it, and always put back, errors included.
        """
        model, batch = bench.load(), bench.token_batch()
        base = bench.backend.log_probs(model, batch)
        np.testing.assert_array_equal(bench.backend.log_probs(model, batch, adapter=False), base)
        bench.backend.inject_adapter(model, bench.adapter(bench.linear_sites(model)))
        # Twice, with a step in between: switching off must also work on a trained adapter.
        for _ in range(2):
            with_adapter = bench.backend.log_probs(model, batch)
            np.testing.assert_array_equal(bench.backend.log_probs(model, batch, adapter=False), base)
            np.testing.assert_array_equal(bench.backend.log_probs(model, batch), with_adapter)
            assert np.abs(with_adapter - base).max() > 10 * EXACT, "the adapter has no effect"
            if self.training:
                assert bench.sft_step(model, batch).grad_norm > 0, "after switching off and on it does not train"

    def test_the_values_given_are_those_saved(self, bench: Bench) -> None:
        """An adapter comes out of `mindprint_save` as it went into `mindprint_inject_adapter`, bit for bit.

        If it fails: factors are stored in another dtype than float32, in another layout, or under other names.
        """
        self.needs_training()
        model = bench.load()
        adapter = bench.adapter(bench.linear_sites(model))
        bench.backend.inject_adapter(model, adapter)
        saved = bench.backend.save(model).adapter
        assert saved.config == adapter.config
        assert set(saved.tensors) == set(adapter.tensors)
        for site, pair in adapter.tensors.items():
            np.testing.assert_array_equal(saved.tensors[site].a, pair.a)
            np.testing.assert_array_equal(saved.tensors[site].b, pair.b)

    def test_a_second_adapter_is_refused(self, bench: Bench) -> None:
        """Injecting into a model that has an adapter is an `AdapterError`.

        If it fails: adapters are stacked, or the first one is lost in silence.
        """
        model = bench.ready()
        with pytest.raises(AdapterError):
            bench.backend.inject_adapter(model, bench.adapter(bench.linear_sites(model)))

    @pytest.mark.parametrize("mistake", ["unknown site", "transposed factors", "no tensors"])
    def test_an_adapter_that_does_not_fit_is_refused(self, bench: Bench, mistake: str) -> None:
        """It is an `AdapterError`, and the model is as it was: the right adapter can still be injected.

        If it fails: a framework's own error reaches the user, or half an adapter stays in the model. Check the whole
        adapter against the sites before touching the model.
        """
        model = bench.load()
        adapter = bench.adapter(bench.linear_sites(model))
        with pytest.raises(AdapterError):
            bench.backend.inject_adapter(model, _spoiled(adapter, mistake))
        assert set(bench.backend.inject_adapter(model, adapter).sites) == set(adapter.config.target_modules)

    def test_dropout_that_is_not_claimed_is_refused(self, bench: Bench) -> None:
        """A backend without dropout raises `AdapterError` for an adapter that asks for it.

        If it fails: the setting is ignored in silence. Refuse it, or claim `dropout`.
        """
        # A backend that does not train computes without dropout whatever the adapter was trained with.
        if "dropout" in self.capabilities or not self.training:
            return
        model = bench.load()
        with pytest.raises(AdapterError):
            bench.backend.inject_adapter(model, bench.adapter(bench.linear_sites(model), dropout=0.1))

    @pytest.mark.parametrize("hook", ["sft_step", "dpo_step", "save", "restore"])
    def test_hooks_that_need_an_adapter_say_so(self, bench: Bench, hook: str) -> None:
        """Training, saving or restoring without an adapter is an `AdapterError`.

        If it fails: the user sees an error of the framework, or of Python, that names no remedy.
        """
        self.needs_training()
        model, state = bench.load(), bench.backend.save(bench.ready())
        calls: dict[str, Callable[[], object]] = {
            "sft_step": lambda: bench.sft_step(model, bench.token_batch()),
            "dpo_step": lambda: bench.dpo_step(model, bench.preference_batch()),
            "save": lambda: bench.backend.save(model),
            "restore": lambda: bench.backend.restore(model, state),
        }
        with pytest.raises(AdapterError):
            calls[hook]()


def adapted(bench: Bench, adapter: AdapterState) -> np.ndarray:
    """Return the log-probs of a fresh base with this adapter."""
    model = bench.load()
    bench.backend.inject_adapter(model, adapter)
    return bench.backend.log_probs(model, bench.token_batch())


def check_merged(bench: Bench, folder: Path, adapter: AdapterState, sites: dict[str, AdapterSite]) -> None:
    """Require that the adapter computes what its base computes with the change added to the folder's weights."""
    merged = Path(shutil.copytree(bench.folder, folder / "merged"))
    weights = load_file(merged / SINGLE_FILE)
    for name, (a, b) in adapter.tensors.items():
        # In float64 and rounded once: the merged base is then as exact as float32 allows.
        change = adapter.config.scale(name) * (b.astype(np.float64) @ a)
        for stored, part in _stored(sites[name], change):
            weights[stored] = (weights[stored] + part).astype(np.float32)
    save_file(weights, merged / SINGLE_FILE, metadata={"format": "pt"})
    expected = bench.backend.log_probs(bench.load(folder=merged), bench.token_batch())
    np.testing.assert_allclose(adapted(bench, adapter), expected, rtol=0, atol=EXACT)


def _stored(site: AdapterSite, change: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the folder's tensors that a site's change goes to, each with its part."""
    if site.kind != "experts":
        # The contract has a linear weight as `[out, in]` and an embedding table as `[in, out]`.
        yield f"{site.name}.weight", change.T if site.kind == "embedding" else change
        return
    # The files of Mixtral call gate, down and up of an expert w1, w2 and w3, and the stack has gate before up.
    names = ("w1", "w3") if site.name.endswith("gate_up_proj") else ("w2",)
    host = site.name.rpartition(".")[0].replace(".mlp.", ".block_sparse_moe.")
    for expert, of_expert in enumerate(change):
        for name, part in zip(names, np.split(of_expert, len(names)), strict=True):
            yield f"{host}.{expert}.{name}.weight", part


def _spoiled(adapter: AdapterState, mistake: str) -> AdapterState:
    last = adapter.config.target_modules[-1]
    tensors = dict(adapter.tensors)
    if mistake == "unknown site":
        config = replace(adapter.config, target_modules=(*adapter.config.target_modules, "no.such.module"))
        return AdapterState(config, {**tensors, "no.such.module": tensors[last]})
    if mistake == "transposed factors":
        return replace(adapter, tensors={**tensors, last: LoraFactors(tensors[last].b, tensors[last].a)})
    del tensors[last]
    return replace(adapter, tensors=tensors)
