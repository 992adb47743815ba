"""The hooks, one call each. No framework is imported before a hook is called, so that naming the plugin is cheap."""

from __future__ import annotations

import sys
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
        MemoryNeed,
        MemoryRequest,
        ModelSpec,
        OnToken,
        PreferenceBatch,
        Sampling,
        StepMetrics,
        TokenBatch,
        TrainingState,
        UInt8,
        Update,
    )
    from mindprint.losses import PreferenceLoss
    from mindprint_torch.model import TorchModel

MINDPRINT_HOOK_APIS = (2,)

MINDPRINT_AUTO_RANK = 10 if sys.platform == "darwin" else 20
"""`backend: auto` asks this backend after MLX on a Mac, where it would train on the CPU, and before it elsewhere."""


@hookimpl
def mindprint_backend_info() -> BackendInfo:
    from mindprint_torch.devices import backend_info

    return backend_info()


@hookimpl
def mindprint_load_model(spec: ModelSpec) -> LoadedModel:
    from mindprint_torch.model import load_model

    return load_model(spec)


@hookimpl
def mindprint_release(model: TorchModel) -> bool:
    from mindprint_torch.model import release

    release(model)
    return True


@hookimpl
def mindprint_adapter_sites(model: TorchModel) -> Sequence[AdapterSite]:
    return model.sites


@hookimpl
def mindprint_base_digest(model: TorchModel) -> str:
    from mindprint_torch.digest import base_digest

    return base_digest(model)


@hookimpl
def mindprint_largest_weight(model: TorchModel) -> float | None:
    from mindprint_torch.digest import largest_weight

    return largest_weight(model)


@hookimpl
def mindprint_inject_adapter(model: TorchModel, adapter: AdapterState) -> AdapterFacts:
    from mindprint_torch.adapter import inject

    return inject(model, adapter)


@hookimpl
def mindprint_sft_step(model: TorchModel, batches: Sequence[TokenBatch], update: Update) -> StepMetrics:
    from mindprint_torch.steps import sft_step

    return sft_step(model, batches, update)


@hookimpl
def mindprint_dpo_step(
    model: TorchModel, batches: Sequence[PreferenceBatch], loss: PreferenceLoss, update: Update
) -> StepMetrics:
    from mindprint_torch.steps import dpo_step

    return dpo_step(model, batches, loss, update)


@hookimpl
def mindprint_log_probs(model: TorchModel, batch: TokenBatch, adapter: bool) -> Float32:
    from mindprint_torch.logprobs import log_probs

    return log_probs(model, batch, adapter=adapter)


@hookimpl
def mindprint_generate(
    model: TorchModel, prompts: Sequence[Int32], sampling: Sampling, adapter: bool, on_token: OnToken | None
) -> Sequence[Generation]:
    from mindprint_torch.generation import generate

    return generate(model, prompts, sampling.of_each(len(prompts)), adapter=adapter, on_token=on_token)


@hookimpl
def mindprint_save(model: TorchModel) -> TrainingState:
    from mindprint_torch.state import save

    return save(model)


@hookimpl
def mindprint_restore(model: TorchModel, state: TrainingState) -> bool:
    from mindprint_torch.state import restore

    restore(model, state)
    return True


@hookimpl
def mindprint_gather(values: UInt8) -> UInt8:
    from mindprint_torch.ranks import gather

    return gather(values)


@hookimpl
def mindprint_memory(request: MemoryRequest) -> MemoryNeed:
    from mindprint_torch.estimate import memory_need

    return memory_need(request)
