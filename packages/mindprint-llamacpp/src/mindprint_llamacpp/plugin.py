"""The hooks, one call each. This backend does not train, so that the hooks of steps and states are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mindprint.hookspecs import hookimpl

if TYPE_CHECKING:
    from mindprint.contract import (
        AdapterFacts,
        AdapterSite,
        AdapterState,
        BackendInfo,
        Float32,
        Generation,
        Int32,
        LoadedModel,
        ModelSpec,
        OnToken,
        Sampling,
        TokenBatch,
    )
    from mindprint_llamacpp.model import LlamaModel

MINDPRINT_HOOK_APIS = (2,)

MINDPRINT_AUTO_RANK = -10
"""`backend: auto` asks this backend after those that train."""


@hookimpl
def mindprint_backend_info() -> BackendInfo:
    from mindprint_llamacpp.devices import backend_info

    return backend_info()


@hookimpl
def mindprint_load_model(spec: ModelSpec) -> LoadedModel:
    from mindprint_llamacpp.model import load_model

    return load_model(spec)


@hookimpl
def mindprint_release(model: LlamaModel) -> bool:
    model.release()
    return True


@hookimpl
def mindprint_adapter_sites(model: LlamaModel) -> Sequence[AdapterSite]:
    return model.sites


@hookimpl
def mindprint_base_digest(model: LlamaModel) -> str:
    return model.digest


@hookimpl
def mindprint_inject_adapter(model: LlamaModel, adapter: AdapterState) -> AdapterFacts:
    from mindprint_llamacpp.adapter import inject

    return inject(model, adapter)


@hookimpl
def mindprint_log_probs(model: LlamaModel, batch: TokenBatch, adapter: bool) -> Float32:
    from mindprint_llamacpp.logprobs import log_probs

    return log_probs(model, batch, adapter=adapter)


@hookimpl
def mindprint_generate(
    model: LlamaModel, prompts: Sequence[Int32], sampling: Sampling, adapter: bool, on_token: OnToken | None
) -> Sequence[Generation]:
    from mindprint_llamacpp.generation import generate

    return generate(model, prompts, sampling.of_each(len(prompts)), adapter=adapter, on_token=on_token)
