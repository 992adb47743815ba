"""Stacks of experts: the part of the contract that only mixtures need, on a tiny Mixtral."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mindprint.contract import AdapterSite
from mindprint.errors import AdapterError
from mindprint_testing import reference
from mindprint_testing.bench import Bench, sft_update
from mindprint_testing.claims import Claims
from mindprint_testing.injection import EXACT, adapted, check_merged
from mindprint_testing.tiny import EXPERTS, HIDDEN, INNER, LAYERS, write_tiny_mixture
from mindprint_testing.training import SLOPE


class Experts(Claims):
    """Capability `experts`."""

    @pytest.fixture
    def mixture(self, bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
        """Return the backend on a tiny Mixtral. Skips where `experts` is not claimed."""
        self.needs("experts")
        folder = tmp_path_factory.getbasetemp() / "mindprint-tiny-mixture"
        return replace(bench, folder=folder if folder.exists() else write_tiny_mixture(folder))

    def test_stacks_of_experts_are_listed(self, mixture: Bench) -> None:
        """Each layer has `gate_up_proj` with gate and up in one, and `down_proj`, under transformers' names.

        If it fails: adapters are written under names, or in shapes, that PEFT does not find.
        """
        expected = {
            AdapterSite(f"model.layers.{layer}.mlp.experts.{name}", "experts", columns, rows, EXPERTS)
            for layer in range(LAYERS)
            for name, rows, columns in (("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER))
        }
        assert set(_stacks(mixture)) == expected

    def test_a_stack_of_experts_is_what_merging_it_would_be(self, mixture: Bench, tmp_path: Path) -> None:
        """A base whose experts are W[e] + scale · B[e] @ A[e] gives the log-probs of the base W with the adapter.

        If it fails: experts got each other's factors, gate and up changed places, or the scale of the site is not
        `LoraConfig.scale`.
        """
        stacks = _stacks(mixture)
        adapter = mixture.adapter(stacks, rank_pattern={stacks[0].name: 2}, alpha_pattern={stacks[1].name: 1.5})
        check_merged(mixture, tmp_path / "all", adapter, {site.name: site for site in stacks})
        for site in stacks[:2]:
            check_merged(mixture, tmp_path / site.name, mixture.adapter([site]), {site.name: site})
        base = mixture.backend.log_probs(mixture.load(), mixture.token_batch())
        assert np.abs(adapted(mixture, adapter) - base).max() > 10 * EXACT

    def test_gradients_of_stacks_by_finite_differences(self, mixture: Bench) -> None:
        """For each factor of a stack, the loss changes along its gradient by the gradient's square.

        If it fails: the gradient is not that of the loss. Look at the experts that got no token: theirs is 0.
        """
        # The last layer's: a change in an earlier one can send tokens to other experts, where the loss jumps.
        last = [site for site in _stacks(mixture) if f".{LAYERS - 1}." in site.name]
        model, batch = mixture.load(), mixture.token_batch()
        mixture.backend.inject_adapter(model, mixture.adapter(last))
        gradient = reference.gradients(
            mixture.backend, model, lambda update: mixture.backend.sft_step(model, [batch], update), sft_update(batch)
        )
        for name, values in gradient.items():
            along = {name: values}

            def loss() -> float:
                return -float(mixture.backend.log_probs(model, batch).astype(np.float64).sum()) / batch.loss_tokens

            slope = reference.slope(mixture.backend, model, loss, along, size=1e-2)
            assert slope == pytest.approx(reference.norm(along) ** 2, rel=SLOPE, abs=1e-5), name

    def test_stacks_are_saved_and_restored_exactly(self, mixture: Bench) -> None:
        """A restored state of stacks and linear sites is the saved one, and `adapter=False` is the base bit for bit.

        If it fails: factors or moments of a stack are stored in another layout, or its change stays in the base.
        """
        model, batch = mixture.load(), mixture.token_batch()
        base = mixture.backend.log_probs(model, batch)
        sites = (*mixture.linear_sites(model)[:1], *_stacks(mixture))
        facts = mixture.backend.inject_adapter(model, mixture.adapter(sites))
        assert facts.trainable_elements == mixture.adapter(sites).elements
        mixture.sft_step(model, batch)
        state = mixture.backend.save(model)
        np.testing.assert_array_equal(mixture.backend.log_probs(model, batch, adapter=False), base)
        other = mixture.load()
        mixture.backend.inject_adapter(other, state.adapter)
        mixture.backend.restore(other, state)
        again = mixture.backend.save(other)
        for saved, restored in (
            (state.adapter.tensors, again.adapter.tensors),
            (state.first_moments, again.first_moments),
            (state.second_moments, again.second_moments),
        ):
            for site in saved:
                for values, others in zip(saved[site], restored[site], strict=True):
                    np.testing.assert_array_equal(values, others)

    def test_dropout_on_a_stack_is_refused(self, mixture: Bench) -> None:
        """PEFT has no dropout on parameters: an adapter that asks for it is an `AdapterError`.

        If it fails: the setting is ignored in silence, or the backend trains something that PEFT cannot hold.
        """
        with pytest.raises(AdapterError):
            mixture.backend.inject_adapter(mixture.load(), mixture.adapter(_stacks(mixture), dropout=0.1))


def _stacks(bench: Bench) -> list[AdapterSite]:
    return [site for site in bench.backend.adapter_sites(bench.load()) if site.kind == "experts"]
