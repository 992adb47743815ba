"""The contract: every hook that a plugin can implement. Read this first.

A backend is a module that implements every hook of `REQUIRED_HOOKS`. It states the hook API versions that it supports
as a module attribute, `MINDPRINT_HOOK_APIS = (2,)`, and imports its framework inside the hooks, never at top level.
Core decides everything that could differ by accident (tokens, masks, order, initial adapter, learning rate,
normalizers). A backend only computes. `contract.py` defines the values that cross, with shapes, units and dtypes.

In these hooks `model` is `LoadedModel.handle`, the backend's own object. No hook assumes a module that is changed in
place: a functional framework can keep its parameters in the handle.

A hook may raise the errors that it states, and any other `MindprintError`, whose message core shows as it is. Anything
else that a hook raises becomes a `BackendError` that names backend and hook. KeyboardInterrupt passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

# For annotations, which are never evaluated: plugins import this module at top level, so it must be quick to import.
if TYPE_CHECKING:
    from pathlib import Path

    from mindprint.contract import (
        AdapterFacts,
        AdapterSite,
        AdapterState,
        BackendInfo,
        Document,
        Float32,
        Generation,
        Int32,
        LoadedModel,
        Measure,
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
    from mindprint.events import Event
    from mindprint.losses import PreferenceLoss

PROJECT = "mindprint"

HOOK_API = 2
"""The version of everything that plugins import from core; docs/hook-api.md lists it. A backend states the versions
that it supports."""

SUPPORTED_HOOK_APIS = (1, 2)
"""The versions that this core can drive."""

REQUIRED_HOOKS = (
    "mindprint_backend_info",
    "mindprint_load_model",
    "mindprint_release",
    "mindprint_adapter_sites",
    "mindprint_base_digest",
    "mindprint_inject_adapter",
    "mindprint_sft_step",
    "mindprint_dpo_step",
    "mindprint_log_probs",
    "mindprint_generate",
    "mindprint_save",
    "mindprint_restore",
)
"""The hooks that every backend implements. A longer list is another version of the hook API."""

TRAINING_HOOKS = ("mindprint_sft_step", "mindprint_dpo_step", "mindprint_save", "mindprint_restore")
"""The required hooks that a backend may leave out if it states `training=False`."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# Each backend has a plugin manager to itself. `firstresult` gives its answer instead of a list with one answer. pluggy
# reads only the signature of a specification, so no body needs to return anything.
@hookspec(firstresult=True)
def mindprint_backend_info() -> BackendInfo:  # type: ignore[empty-body]
    """Say which devices, dtypes and capabilities are usable here.

    Called once for each backend in use, before any other hook. It must not train, download or allocate a model.

    Returns:
        The devices in the backend's order of preference, each with the reason if it cannot be used. The answer does not
        depend on when it is asked.
    """


@hookspec(firstresult=True)
def mindprint_load_model(spec: ModelSpec) -> LoadedModel:  # type: ignore[empty-body]
    """Load a base for training and inference: frozen, without dropout, weights in `spec.dtype`.

    Args:
        spec: The folder, and the device and dtype that this backend stated as usable.

    Returns:
        The handle, and facts that core records.

    Raises:
        ModelError: The backend cannot compute this base *exactly as transformers does*, or weights are missing.
    """


@hookspec(firstresult=True)
def mindprint_release(model: Any) -> bool:  # type: ignore[empty-body]
    """Free the model's memory. Core does not use the handle again.

    Args:
        model: The handle.

    Returns:
        True.
    """


@hookspec(firstresult=True)
def mindprint_adapter_sites(model: Any) -> Sequence[AdapterSite]:  # type: ignore[empty-body]
    """List every place of the base that can take LoRA, in the model's order.

    List the LM head where transformers' class has it as a linear layer (`linear`), and the token embedding
    (`embedding`) exactly if the backend claims the capability `embedding`. List stacks of experts (`experts`) only if
    it claims the capability `experts`. Core chooses among the sites: `all-linear` leaves out the LM head, embeddings,
    routers and stacks of experts, and users can name any site.

    Args:
        model: The handle, with or without an adapter.

    Returns:
        The sites under transformers' module names. An injected adapter changes neither the list nor the names.
    """


@hookspec(firstresult=True)
def mindprint_base_digest(model: Any) -> str:  # type: ignore[empty-body]
    """Digest the base's weights as they are in memory, without the adapter.

    Args:
        model: The handle.

    Returns:
        Any text that changes if any element does. Core compares it only with an earlier answer of the same backend.
    """


@hookspec(firstresult=True)
def mindprint_inject_adapter(model: Any, adapter: AdapterState) -> AdapterFacts:  # type: ignore[empty-body]
    """Attach `adapter` to exactly `adapter.config.target_modules`, with its values, in float32, trainable.

    Args:
        model: The handle.
        adapter: Factors `a` float32 `[r, in]` and `b` float32 `[out, r]` for each site, `[experts, r, in]` and
            `[experts, out, r]` for a stack of experts.

    Returns:
        The sites adapted and the number of elements that will be trained, counted on the model.

    Raises:
        AdapterError: The model has an adapter already, or a site does not exist, or a factor has another shape. The
            model is then as it was.
    """


@hookspec(firstresult=True)
def mindprint_sft_step(  # type: ignore[empty-body]
    model: Any, batches: Sequence[TokenBatch], update: Update
) -> StepMetrics:
    """Take one optimizer step on the completion loss: `-sum(log p) / update.tokens` over all micro-batches.

    With several ranks (`BackendInfo.world`), every rank calls this hook with its share of the micro-batches. Loss and
    gradient are summed over the ranks before clipping, so that every rank applies the same update.

    Args:
        model: The handle, with an adapter.
        batches: The micro-batches. Their numbers of rows and widths vary from step to step. With none, as on a rank
            that got none, loss and gradient are 0, and the update is applied.
        update: The step's settings and global normalizers.

    Returns:
        The loss before the update, and the gradient's norm before clipping.

    Raises:
        AdapterError: The model has no adapter.
    """


@hookspec(firstresult=True)
def mindprint_dpo_step(  # type: ignore[empty-body]
    model: Any, batches: Sequence[PreferenceBatch], loss: PreferenceLoss, update: Update
) -> StepMetrics:
    """Take one optimizer step on a preference loss, without dropout. Ranks sum loss and gradient as in an SFT step.

    Args:
        model: The handle, with an adapter.
        batches: The micro-batches. Their numbers of pairs and widths vary from step to step. With none, as on a rank
            that got none, loss and gradient are 0, there are no log-probs, and the update is applied.
        loss: The loss. Differentiate `loss.total(...)` and define no loss in the backend.
        update: The step's settings and global normalizers.

    Returns:
        In addition to the fields of an SFT step, the summed log-probs of both completions of each pair of `batches`.

    Raises:
        AdapterError: The model has no adapter.
    """


@hookspec(firstresult=True)
def mindprint_log_probs(model: Any, batch: TokenBatch, adapter: bool) -> Float32:  # type: ignore[empty-body]
    """Return per-token log-probs: `log p(tokens[t] | tokens[:t])` in nats under the mask, 0 elsewhere.

    Args:
        model: The handle.
        batch: The sequences.
        adapter: Whether the adapter takes part. With False, or no adapter injected, the base alone answers.

    Returns:
        float32 `[rows, T]`. Log-softmax is taken in float32 or better. A row's values do not depend on its neighbours.
    """


@hookspec(firstresult=True)
def mindprint_generate(  # type: ignore[empty-body]
    model: Any, prompts: Sequence[Int32], sampling: Sampling, adapter: bool, on_token: OnToken | None
) -> Sequence[Generation]:
    """Continue each prompt, in order.

    Version 1 of the hook API has no `on_token`. pluggy passes an argument only to implementations that name it, so a
    backend of version 1 is called as before.

    Args:
        model: The handle.
        prompts: Token ids, int32 `[P]` each, of unlike lengths.
        sampling: The limit, the stop tokens, and how a token is drawn.
        adapter: Whether the adapter takes part.
        on_token: Called with the row and the token's id for each token of an answer, in the answer's order, as soon as
            the token is known and from the thread of this call. If it returns False, the answer ends with this token
            and has the stop reason `stop`. None if nobody listens, and always for a backend without the capability
            `streaming`.

    Returns:
        An answer for each prompt. It depends neither on the prompt's neighbours nor on `on_token`, except that a row
        which `on_token` ended is shorter. Neighbours may change how sums are rounded: where two tokens are equally
        likely but for rounding, either may be taken.
    """


@hookspec(firstresult=True)
def mindprint_save(model: Any) -> TrainingState:  # type: ignore[empty-body]
    """Copy out everything training continues from. Core writes the files, so every backend's files are the same.

    Args:
        model: The handle, with an adapter.

    Returns:
        NumPy arrays that later steps do not change.

    Raises:
        AdapterError: The model has no adapter.
    """


@hookspec(firstresult=True)
def mindprint_restore(model: Any, state: TrainingState) -> bool:  # type: ignore[empty-body]
    """Take over a state that any backend saved: adapter values, moments, step count.

    Args:
        model: The handle. An adapter of the same configuration is injected already.
        state: The state. Without moments the optimizer starts from scratch.

    Returns:
        True.

    Raises:
        AdapterError: The model has no adapter, or the state is of another configuration.
    """


@hookspec(firstresult=True)
def mindprint_memory(request: MemoryRequest) -> MemoryNeed:  # type: ignore[empty-body]
    """Estimate the most memory that a run needs, without loading or allocating anything. Optional.

    Core asks with the largest batches of the run, and takes the answer that is greatest. Without this hook it
    estimates for itself, which is rough: only the backend knows which arrays it keeps and how it divides a batch.

    Args:
        request: The base, the adapter, and a batch.

    Returns:
        The parts, in bytes. `benchmarks/plan.py` compares them with a measured run.
    """


@hookspec(firstresult=True)
def mindprint_largest_weight(model: Any) -> float | None:
    """Return the largest magnitude among the base's weights as they are in memory. Optional.

    Core asks before training. Where every weight is finite and of an ordinary size, it computes one short row to see
    that the base works, and all rows of the fingerprint's probe otherwise, and always for a backend without this hook.

    Args:
        model: The handle.

    Returns:
        The magnitude, NaN if a weight is NaN. None where no magnitude tells all: of packed weights, and of a base that
        is divided among ranks.
    """


@hookspec(firstresult=True)
def mindprint_gather(values: UInt8) -> UInt8:  # type: ignore[empty-body]
    """Exchange bytes between the ranks that train one adapter. Optional: the capability `ranks` needs it.

    Every rank calls it as often as the others, in the same order. Core calls it before a model is loaded, and never
    with a single rank. A connection is made at the first call of this hook or of a step.

    Args:
        values: uint8 `[n]`. `n` is the same on every rank.

    Returns:
        The arrays of all ranks, uint8 `[ranks, n]`, in the order of the ranks.

    Raises:
        RankError: Another rank has ended. It is noticed within seconds.
    """


@hookspec
def mindprint_event(event: Event) -> None:
    """Watch a run. Called for every event, in order, after core has written its own files.

    A tracker is a class in the entry-point group `mindprint.trackers` with this hook as a method. Core makes an
    instance for each run. A tracker that raises is named in a warning and sees no more of the run, which continues.
    KeyboardInterrupt passes.

    Args:
        event: An instance of one of the classes in `mindprint.events`.
    """


@hookspec
def mindprint_scorers(settings: Mapping[str, object]) -> Sequence[Measure]:  # type: ignore[empty-body]
    """Provide measures of a voice. Results show them next to core's score, which they do not change.

    A scorer is a module in the entry-point group `mindprint.scorers`.

    Args:
        settings: The settings under the scorer's name in `voice.scorers`.

    Returns:
        Measures with unlike names.

    Raises:
        ConfigError: The scorer does not understand the settings.
    """


@hookspec(firstresult=True)
def mindprint_read_documents(path: Path, head: bytes) -> Iterable[Document] | None:
    """Read what a person wrote from a file of a format that this reader knows, or from a folder that is a mailbox.

    A reader is a module in the entry-point group `mindprint.readers`. It imports the library that it needs inside the
    hook. Readers of other distributions are asked before core's.

    Args:
        path: A regular file, or a folder.
        head: The first 4096 bytes of the file. Empty for a folder.

    Returns:
        The documents, in the order of the file, read as they are asked for. None for a file that is not of its format.

    Raises:
        DataError: The file is of its format and cannot be read: broken, encrypted, without text.
    """
