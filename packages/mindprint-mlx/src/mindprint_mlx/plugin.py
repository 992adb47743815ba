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
    from mindprint_mlx.model import MlxModel

MINDPRINT_HOOK_APIS = (2,)

MINDPRINT_AUTO_RANK = 20 if sys.platform == "darwin" else 10
"""`backend: auto` asks this backend first on a Mac, where it has the GPU, and after PyTorch elsewhere."""


@hookimpl
def mindprint_backend_info() -> BackendInfo:
    from mindprint_mlx.devices import backend_info

    return backend_info()


@hookimpl
def mindprint_load_model(spec: ModelSpec) -> LoadedModel:
    from mindprint_mlx.model import load_model

    return load_model(spec)


@hookimpl
def mindprint_release(model: MlxModel) -> bool:
    from mindprint_mlx.model import release

    release(model)
    return True


@hookimpl
def mindprint_adapter_sites(model: MlxModel) -> Sequence[AdapterSite]:
    return model.sites


@hookimpl
def mindprint_base_digest(model: MlxModel) -> str:
    from mindprint_mlx.digest import base_digest

    return base_digest(model)


@hookimpl
def mindprint_largest_weight(model: MlxModel) -> float | None:
    from mindprint_mlx.digest import largest_weight

    return largest_weight(model)


@hookimpl
def mindprint_inject_adapter(model: MlxModel, adapter: AdapterState) -> AdapterFacts:
    from mindprint_mlx.adapter import inject

    return inject(model, adapter)


@hookimpl
def mindprint_sft_step(model: MlxModel, batches: Sequence[TokenBatch], update: Update) -> StepMetrics:
    from mindprint_mlx.steps import sft_step

    return sft_step(model, batches, update)


@hookimpl
def mindprint_dpo_step(
    model: MlxModel, batches: Sequence[PreferenceBatch], loss: PreferenceLoss, update: Update
) -> StepMetrics:
    from mindprint_mlx.steps import dpo_step

    return dpo_step(model, batches, loss, update)


@hookimpl
def mindprint_log_probs(model: MlxModel, batch: TokenBatch, adapter: bool) -> Float32:
    from mindprint_mlx.logprobs import log_probs

    return log_probs(model, batch, adapter=adapter)


@hookimpl
def mindprint_generate(
    model: MlxModel, prompts: Sequence[Int32], sampling: Sampling, adapter: bool, on_token: OnToken | None
) -> Sequence[Generation]:
    from mindprint_mlx.generation import generate

    return generate(model, prompts, sampling.of_each(len(prompts)), adapter=adapter, on_token=on_token)


@hookimpl
def mindprint_save(model: MlxModel) -> TrainingState:
    from mindprint_mlx.state import save

    return save(model)


@hookimpl
def mindprint_restore(model: MlxModel, state: TrainingState) -> bool:
    from mindprint_mlx.state import restore

    restore(model, state)
    return True


@hookimpl
def mindprint_gather(values: UInt8) -> UInt8:
    from mindprint_mlx.ranks import gather

    return gather(values)


@hookimpl
def mindprint_memory(request: MemoryRequest) -> MemoryNeed:
    from mindprint_mlx.estimate import memory_need

    return memory_need(request)
