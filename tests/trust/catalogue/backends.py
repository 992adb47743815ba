"""Backends that compute something else than they were asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from artefacts import edit_json

from catalogue.entry import fault
from mindprint.contract import AdapterFacts, AdapterState, Float32, LoadedModel, LoraFactors, ModelSpec, TokenBatch
from mindprint.plugins.backend import Backend


class Wrapped(Backend):
    """A backend that does everything as another does, but for what a subclass overrides."""

    def __init__(self, inner: Backend) -> None:
        self.__dict__.update(vars(inner))


@fault(
    "backend",
    "vllm-project/vllm#34186, turboderp-org/exllamav2#169: the adapter is accepted and not applied",
    "no_effect",
)
def the_adapter_is_not_applied(backend: Backend) -> Backend:
    class NotApplied(Wrapped):
        def log_probs(self, model: LoadedModel, batch: TokenBatch, *, adapter: bool = True) -> Float32:
            return super().log_probs(model, batch, adapter=False)

    return NotApplied(backend)


@fault("backend", "hao-ai-lab/FastVideo#870: the scale is left out when the adapter is applied", "scale")
def the_scale_is_left_out(backend: Backend) -> Backend:
    return inject_changed(backend, lambda adapter: replace(adapter, config=replace(adapter.config, alpha=4.0)))


@fault("backend", "vllm-project/vllm#55545: rank-stabilised scaling forgotten, the effect too weak", "scale")
def the_adapter_is_a_tenth_too_weak(backend: Backend) -> Backend:
    return inject_changed(backend, lambda adapter: replace(adapter, config=replace(adapter.config, alpha=7.2)))


@fault("backend", "ml-explore/mlx-lm#1119, mlx-examples#1328: only the last layers are adapted", "partly_applied")
def only_the_last_layer_is_adapted(backend: Backend) -> Backend:
    def silenced(adapter: AdapterState) -> AdapterState:
        tensors = {
            site: pair if ".layers.2." in site else LoraFactors(pair.a, np.zeros_like(pair.b))
            for site, pair in adapter.tensors.items()
        }
        return replace(adapter, tensors=tensors)

    return inject_changed(backend, silenced)


@fault(
    "backend", "ml-explore/mlx-lm 0.32.2 ignores rope_parameters (26 of 27 architectures, DESIGN.md)", "backend_differs"
)
def rope_parameters_are_ignored(backend: Backend) -> Backend:
    class OtherRope(Wrapped):
        def load_model(self, spec: ModelSpec) -> LoadedModel:
            copy = Path(spec.path).with_name("as-loaded")
            shutil.copytree(spec.path, copy, dirs_exist_ok=True)
            edit_json(copy / "config.json", {}, ("rope_parameters",))
            return super().load_model(replace(spec, path=str(copy)))

    return OtherRope(backend)


@fault("backend", "huggingface/peft#2438: dropout is left on", "backend_differs")
def log_probs_are_noisy(backend: Backend) -> Backend:
    class Noisy(Wrapped):
        def log_probs(self, model: LoadedModel, batch: TokenBatch, *, adapter: bool = True) -> Float32:
            values = super().log_probs(model, batch, adapter=adapter)
            noise = np.random.default_rng(0).normal(0, 0.02, values.shape)
            return np.where(batch.loss_mask, values + noise, 0).astype(np.float32)

    return Noisy(backend)


@fault("backend", "huggingface/peft#1355: merged in place, so that the base is no longer the base", "backend_differs")
def the_base_alone_has_the_adapter(backend: Backend) -> Backend:
    class AlwaysOn(Wrapped):
        def log_probs(self, model: LoadedModel, batch: TokenBatch, *, adapter: bool = True) -> Float32:
            values = super().log_probs(model, batch, adapter=True)
            return values if adapter else (values - 0.1 * batch.loss_mask).astype(np.float32)

    return AlwaysOn(backend)


def inject_changed(backend: Backend, change: Callable[[AdapterState], AdapterState]) -> Backend:
    """The backend, with another adapter put in than the one given."""

    class Changed(Wrapped):
        def inject_adapter(self, model: LoadedModel, adapter: AdapterState) -> AdapterFacts:
            return super().inject_adapter(model, change(adapter))

    return Changed(backend)
