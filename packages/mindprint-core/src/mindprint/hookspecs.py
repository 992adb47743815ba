"""The contract: every hook that a plugin can implement. Read this first.

A backend is a module that implements the hooks from `mindprint_backend_info` to `mindprint_restore`, all of them. It
states the hook API versions it supports as a module attribute, `MINDPRINT_HOOK_APIS = (1,)`, and imports its framework
inside the hooks, never at top level. Core decides everything that could differ by accident (tokens, masks, order,
initial adapter, learning rate, normalizers); a backend only computes. `contract.py` defines what crosses.

`model` below is `LoadedModel.handle`: whatever the backend made of it. No hook assumes a module that is changed in
place; a functional framework can keep its parameters in a handle of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

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
        Measure,
        ModelSpec,
        PreferenceBatch,
        Sampling,
        StepMetrics,
        TokenBatch,
        TrainingState,
        Update,
    )
    from mindprint.events import Event
    from mindprint.losses import PreferenceLoss

PROJECT = "mindprint"

HOOK_API = 1
"""Version of this module and of `contract.py` together. A backend states the versions that it supports."""

SUPPORTED_HOOK_APIS = (1,)
"""The versions that this core can drive."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# --- a backend -------------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def mindprint_backend_info() -> BackendInfo:  # type: ignore[empty-body]
    """Say which devices, dtypes and capabilities are usable here. Must not train, download or allocate a model."""


@hookspec(firstresult=True)
def mindprint_load_model(spec: ModelSpec) -> LoadedModel:  # type: ignore[empty-body]
    """Load a base for training and inference: frozen, no dropout of its own, weights in `spec.dtype`.

    Raises `mindprint.errors.ModelError` for a base that it cannot compute *exactly as transformers does*.
    """


@hookspec(firstresult=True)
def mindprint_release(model: Any) -> bool:  # type: ignore[empty-body]
    """Free the model's memory. The handle is not used again. Returns True."""


@hookspec(firstresult=True)
def mindprint_adapter_sites(model: Any) -> Sequence[AdapterSite]:  # type: ignore[empty-body]
    """List every place of the base that can take LoRA, in the model's order, under transformers' module names."""


@hookspec(firstresult=True)
def mindprint_base_digest(model: Any) -> str:  # type: ignore[empty-body]
    """Digest the base's weights as they are in memory; changes if any element does. Compared only with itself."""


@hookspec(firstresult=True)
def mindprint_inject_adapter(model: Any, adapter: AdapterState) -> AdapterFacts:  # type: ignore[empty-body]
    """Attach `adapter` to exactly `adapter.config.target_modules`, with its values, in float32, trainable.

    Raises `mindprint.errors.AdapterError` if the model has an adapter already, or a site does not exist or fit.
    """


@hookspec(firstresult=True)
def mindprint_sft_step(  # type: ignore[empty-body]
    model: Any, batches: Sequence[TokenBatch], update: Update
) -> StepMetrics:
    """Take one optimizer step on the completion loss: `-sum(log p) / update.tokens` over all micro-batches."""


@hookspec(firstresult=True)
def mindprint_dpo_step(  # type: ignore[empty-body]
    model: Any, batches: Sequence[PreferenceBatch], loss: PreferenceLoss, update: Update
) -> StepMetrics:
    """Take one optimizer step on `loss.total(...)`, which core defines, without dropout."""


@hookspec(firstresult=True)
def mindprint_log_probs(model: Any, batch: TokenBatch, adapter: bool) -> Float32:  # type: ignore[empty-body]
    """Per-token log-probs, float32 `[rows, T]`: `log p(tokens[t] | tokens[:t])` under the mask, 0 elsewhere.

    With `adapter` False, or no adapter injected, the base alone answers. Log-softmax is taken in float32.
    """


@hookspec(firstresult=True)
def mindprint_generate(  # type: ignore[empty-body]
    model: Any, prompts: Sequence[Int32], sampling: Sampling, adapter: bool
) -> Sequence[Generation]:
    """Continue each prompt (int32 `[P]`), in order. What a prompt gets does not depend on its neighbours."""


@hookspec(firstresult=True)
def mindprint_save(model: Any) -> TrainingState:  # type: ignore[empty-body]
    """Copy out everything training continues from. Core writes the files, so every backend's files are the same."""


@hookspec(firstresult=True)
def mindprint_restore(model: Any, state: TrainingState) -> bool:  # type: ignore[empty-body]
    """Take over a state that any backend saved: adapter values, moments, step count. Returns True.

    The adapter is injected already, with the same configuration; a state without moments starts the optimizer anew.
    Raises `mindprint.errors.AdapterError` without an adapter, or for a state of another configuration.
    """


# --- beside a backend ------------------------------------------------------------------------------------------------


@hookspec
def mindprint_event(event: Event) -> None:
    """Watch a run: called for every event of `mindprint.events`, in order, after core's own files are written.

    A tracker that the configuration names and that raises is named in a warning and sees no more of the run, which goes
    on. KeyboardInterrupt passes: it is the user's.
    """


@hookspec
def mindprint_scorers(settings: Mapping[str, object]) -> Sequence[Measure]:  # type: ignore[empty-body]
    """Provide measures of a voice, shown beside the score of core and never averaged into it.

    `settings` is what stands under the plugin's name in `voice.scorers`. Raises `mindprint.errors.ConfigError` for
    settings that it does not understand. Such a plugin stands in the entry-point group `mindprint.scorers`.
    """
