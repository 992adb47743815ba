"""The MLX backend's hooks. Thin: each is one call into a module that is imported when the hook is.

No framework is imported at top level, so that naming the plugin costs nothing.
"""

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
        ModelSpec,
        PreferenceBatch,
        Sampling,
        StepMetrics,
        TokenBatch,
        TrainingState,
        Update,
    )
    from mindprint.losses import PreferenceLoss
    from mindprint_mlx.model import Handle

MINDPRINT_HOOK_APIS = (1,)

MINDPRINT_AUTO_RANK = 20 if sys.platform == "darwin" else 10
"""`backend: auto` asks this backend first on a Mac, where it has the GPU, and after PyTorch elsewhere."""


@hookimpl
def mindprint_backend_info() -> BackendInfo:
    from mindprint_mlx import devices

    return devices.info()


@hookimpl
def mindprint_load_model(spec: ModelSpec) -> LoadedModel:
    from mindprint_mlx import model

    return model.load(spec)


@hookimpl
def mindprint_release(model: Handle) -> bool:
    from mindprint_mlx.model import release

    return release(model)


@hookimpl
def mindprint_adapter_sites(model: Handle) -> Sequence[AdapterSite]:
    from mindprint_mlx import adapter

    return adapter.sites(model)


@hookimpl
def mindprint_base_digest(model: Handle) -> str:
    from mindprint_mlx import digest

    return digest.base_digest(model)


@hookimpl
def mindprint_inject_adapter(model: Handle, adapter: AdapterState) -> AdapterFacts:
    from mindprint_mlx.adapter import inject

    return inject(model, adapter)


@hookimpl
def mindprint_sft_step(model: Handle, batches: Sequence[TokenBatch], update: Update) -> StepMetrics:
    from mindprint_mlx import steps

    return steps.sft_step(model, batches, update)


@hookimpl
def mindprint_dpo_step(
    model: Handle, batches: Sequence[PreferenceBatch], loss: PreferenceLoss, update: Update
) -> StepMetrics:
    from mindprint_mlx import steps

    return steps.dpo_step(model, batches, loss, update)


@hookimpl
def mindprint_log_probs(model: Handle, batch: TokenBatch, adapter: bool) -> Float32:
    from mindprint_mlx.logprobs import log_probs

    return log_probs(model, batch, adapter=adapter)


@hookimpl
def mindprint_generate(
    model: Handle, prompts: Sequence[Int32], sampling: Sampling, adapter: bool
) -> Sequence[Generation]:
    from mindprint_mlx.generation import generate

    return generate(model, prompts, sampling, adapter=adapter)


@hookimpl
def mindprint_save(model: Handle) -> TrainingState:
    from mindprint_mlx import state

    return state.save(model)


@hookimpl
def mindprint_restore(model: Handle, state: TrainingState) -> bool:
    from mindprint_mlx.state import restore

    return restore(model, state)
