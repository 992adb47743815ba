"""One chosen backend's hooks as typed methods, through which the rest of core calls it.

Each method calls its hook with keyword arguments and checks the answer, so that a backend that breaks the contract is
named together with the hook and the finding, before its answer reaches a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, cast

import numpy as np

from mindprint.collection import collection_paused
from mindprint.contract import (
    AdapterFacts,
    AdapterSite,
    AdapterState,
    BackendInfo,
    DeviceInfo,
    Dtype,
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
from mindprint.errors import BackendError, ContractError, DataError
from mindprint.losses import PreferenceLoss
from mindprint.plugins import answers
from mindprint.plugins.entries import Plugin
from mindprint.plugins.hooks import backend_hooks, missing_hooks
from mindprint.plugins.loading import call_plugin, failure, load_backend_plugin
from mindprint.plugins.ranks import Ranks
from mindprint.plugins.stated import check_info
from mindprint.plugins.streaming import TokenRelay, replay

T = TypeVar("T")

DEBUG_HINT = "MINDPRINT_DEBUG=1 shows where"


class Backend:
    """A backend in use. Obtain one with `load_backend`."""

    def __init__(self, plugin: Plugin, hook: Any) -> None:
        self.plugin = plugin
        self._hook = hook
        hook_name = "mindprint_backend_info"
        info = self._checked(hook_name, BackendInfo, self._call(hook_name))
        # The plugin's own classes may be behind this: reading them is guarded as calling it is.
        call_plugin(plugin, hook_name, lambda: check_info(plugin, info))
        self.info = info
        self.ranks = Ranks(*info.world, self._gather)
        """The processes that train together with this one, which is mostly alone."""
        if not self.ranks.alone and not ("ranks" in info.capabilities and hook.mindprint_gather.get_hookimpls()):
            raise failure(
                plugin,
                f" is one of {self.ranks.size} processes, and does not train in several (capability `ranks`)",
                "start one process, or take another backend",
            )

    def require_training(self) -> None:
        """Raise `BackendError` if this backend only evaluates and answers."""
        if not self.info.training:
            raise BackendError(
                f"backend {self.name!r} does not train, it only evaluates and answers: train with another backend "
                "(backend.type=torch or mlx), and name this one where an adapter is used (--backend)"
            )

    @property
    def name(self) -> str:
        return self.plugin.name

    def load_model(self, spec: ModelSpec) -> LoadedModel:
        """Load a base model. See `hookspecs.mindprint_load_model`."""
        hook = "mindprint_load_model"
        model = self._checked(hook, LoadedModel, self._call(hook, spec=spec))
        return self._guarded(hook, lambda answer: answers.check_model(answer, model, spec))

    def release(self, model: LoadedModel) -> None:
        """Free a model's memory."""
        self._call("mindprint_release", model=model.handle)

    def adapter_sites(self, model: LoadedModel) -> tuple[AdapterSite, ...]:
        """Return every place of the base that can take LoRA."""
        hook = "mindprint_adapter_sites"
        sites = self._sequence(hook, AdapterSite, model=model.handle)
        self._guarded(hook, lambda answer: answers.check_sites(answer, sites))
        return sites

    def base_digest(self, model: LoadedModel) -> str:
        """Return the digest of the base weights in memory."""
        return self._checked("mindprint_base_digest", str, self._call("mindprint_base_digest", model=model.handle))

    def largest_weight(self, model: LoadedModel) -> float | None:
        """Return the largest magnitude among the base weights in memory, None from a backend that does not know it."""
        hook = "mindprint_largest_weight"
        answer = self._call(hook, model=model.handle)
        return None if answer is None else self._checked(hook, float, answer)

    def inject_adapter(self, model: LoadedModel, adapter: AdapterState) -> AdapterFacts:
        """Attach an adapter, trainable."""
        hook = "mindprint_inject_adapter"
        facts = self._checked(hook, AdapterFacts, self._call(hook, model=model.handle, adapter=adapter))
        self._guarded(hook, lambda answer: answers.check_facts(answer, facts))
        return facts

    def sft_step(self, model: LoadedModel, batches: Sequence[TokenBatch], update: Update) -> StepMetrics:
        """Take one optimizer step on the completion loss."""
        hook = "mindprint_sft_step"
        self.require_training()
        _require_embedded(model, (batch.tokens for batch in batches))
        with self._inputs_kept(hook, batches):
            metrics = self._call(hook, model=model.handle, batches=batches, update=update)
        return self._checked_metrics(hook, model, metrics)

    def dpo_step(
        self, model: LoadedModel, batches: Sequence[PreferenceBatch], loss: PreferenceLoss, update: Update
    ) -> StepMetrics:
        """Take one optimizer step on a preference loss."""
        hook = "mindprint_dpo_step"
        self.require_training()
        _require_embedded(model, (ids for batch in batches for ids in (batch.prompt, batch.chosen, batch.rejected)))
        with self._inputs_kept(hook, batches):
            answer = self._call(hook, model=model.handle, batches=batches, loss=loss, update=update)
        metrics = self._checked_metrics(hook, model, answer)
        self._guarded(hook, lambda answer: answers.check_sums(answer, metrics, batches))
        return metrics

    def log_probs(self, model: LoadedModel, batch: TokenBatch, *, adapter: bool = True) -> Float32:
        """Return per-token log-probs, float32 `[rows, T]`, 0 outside the mask."""
        hook = "mindprint_log_probs"
        _require_embedded(model, [batch.tokens])
        with self._inputs_kept(hook, [batch]):
            values = cast(Float32, self._call(hook, model=model.handle, batch=batch, adapter=adapter))
        self._guarded(hook, lambda answer: answers.check_log_probs(answer, values, batch))
        return values

    @property
    def streams(self) -> bool:
        """Whether tokens are told while an answer is generated, and not when it is done."""
        return "streaming" in self.info.capabilities

    def generate(
        self,
        model: LoadedModel,
        prompts: Sequence[Int32],
        sampling: Sampling | Sequence[Sampling],
        *,
        adapter: bool = True,
        on_token: OnToken | None = None,
    ) -> tuple[Generation, ...]:
        """Continue each prompt, in order, all with the same settings or each with those at its place.

        `on_token` gets each token as `hookspecs.mindprint_generate` says. A backend without the capability `streaming`
        generates first: its tokens are told afterwards, and rows that `on_token` ends are cut. A backend without the
        capability `mixed` is called once for each of the settings.
        """
        if isinstance(sampling, Sampling):
            return self._generate_together(model, prompts, sampling, adapter=adapter, on_token=on_token)
        if len(sampling) != len(prompts):
            raise ValueError(f"{len(sampling)} settings for {len(prompts)} prompts")
        if "mixed" in self.info.capabilities and len(set(sampling)) > 1:
            each = Sampling(0, (), rows=tuple(sampling))
            return self._generate_together(model, prompts, each, adapter=adapter, on_token=on_token)
        by_row: dict[int, Generation] = {}
        for settings in dict.fromkeys(sampling):
            rows = [row for row, own in enumerate(sampling) if own == settings]
            tell = None if on_token is None else _for_rows(on_token, rows)
            chosen = [prompts[row] for row in rows]
            made = self._generate_together(model, chosen, settings, adapter=adapter, on_token=tell)
            by_row.update(zip(rows, made, strict=True))
        return tuple(by_row[row] for row in range(len(prompts)))

    def _generate_together(
        self,
        model: LoadedModel,
        prompts: Sequence[Int32],
        sampling: Sampling,
        *,
        adapter: bool,
        on_token: OnToken | None,
    ) -> tuple[Generation, ...]:
        """Continue each prompt in one call of the backend."""
        hook = "mindprint_generate"
        _require_embedded(model, prompts)
        if sampling.filters and "filters" not in self.info.capabilities:
            raise BackendError(
                f"backend {self.name!r} knows neither top_k nor min_p nor repetition_penalty: leave them out of "
                "generation, or take another backend"
            )
        relay = None if on_token is None or not self.streams else TokenRelay(on_token, len(prompts))
        arguments = {"prompts": prompts, "sampling": sampling, "adapter": adapter, "on_token": relay}
        generations = self._sequence(hook, Generation, model=model.handle, **arguments)
        if relay is not None and relay.error is not None:
            raise relay.error
        self._guarded(
            hook,
            lambda answer: answers.check_generations(
                answer, generations, sampling.of_each(len(prompts)), model.vocab_size
            ),
        )
        if relay is not None:
            self._guarded(hook, lambda answer: answers.check_told(answer, generations, relay.told, relay.ended))
        elif on_token is not None:
            return replay(generations, on_token)
        return generations

    def save(self, model: LoadedModel) -> TrainingState:
        """Copy out adapter, moments and step count."""
        hook = "mindprint_save"
        self.require_training()
        state = self._checked(hook, TrainingState, self._call(hook, model=model.handle))
        return self._guarded(hook, lambda answer: answers.check_state(answer, state, model.dtype))

    def restore(self, model: LoadedModel, state: TrainingState) -> None:
        """Take over a saved state. `models.engine.Engine.restore` looks whether it was."""
        self.require_training()
        self._call("mindprint_restore", model=model.handle, state=state)

    @collection_paused()
    def memory(self, request: MemoryRequest) -> MemoryNeed | None:
        """Return the memory that a run would need, None from a backend that does not estimate it."""
        hook = "mindprint_memory"
        answer = self._call(hook, request=request)
        return None if answer is None else self._checked(hook, MemoryNeed, answer)

    def _gather(self, values: UInt8) -> UInt8:
        """Return the arrays of all ranks, uint8 `[ranks, n]`."""
        hook = "mindprint_gather"
        rows = cast(UInt8, self._call(hook, values=values))
        shape = (self.ranks.size, len(values))
        self._guarded(hook, lambda answer: answer.array("the arrays", rows, shape, np.uint8))
        return rows

    def device(self, name: str) -> DeviceInfo:
        """Return the device called `name`, or for `auto` the first usable one that `auto` may choose.

        Raises:
            BackendError: It cannot be used here. The message holds the reason.
        """
        usable = [device for device in self.info.devices if device.usable]
        if name == "auto":
            for device in usable:
                if device.auto:
                    return device
            reasons = "; ".join(f"{device.name}: {device.reason or 'must be named'}" for device in self.info.devices)
            raise BackendError(f"backend {self.name!r} has no usable device here ({reasons or 'it states none'})")
        names = ", ".join(device.name for device in usable) or "none"
        named = self.info.device(name)
        if named is None:
            raise BackendError(f"backend {self.name!r} knows no device {name!r} (usable here: {names})")
        if not named.usable:
            raise BackendError(
                f"backend {self.name!r} cannot use device {name!r} here: {named.reason} (usable: {names})"
            )
        return named

    def dtype(self, device: DeviceInfo, name: Dtype | Literal["auto"]) -> Dtype:
        """Return the dtype called `name` on `device`, or its default for `auto`.

        Raises:
            BackendError: The device does not train in it.
        """
        if name == "auto":
            return device.default_dtype
        if name not in device.dtypes:
            raise BackendError(
                f"backend {self.name!r} does not train in {name} on {device.name} (it can: {', '.join(device.dtypes)})"
            )
        return name

    def _call(self, hook: str, convert: Callable[[Any], Any] = lambda answer: answer, **arguments: Any) -> Any:
        """Return a hook's answer. `convert` is applied where exceptions are still the plugin's."""
        kept = "the last checkpoint is kept, " if hook.endswith("_step") else ""
        return call_plugin(
            self.plugin, hook, lambda: convert(getattr(self._hook, hook)(**arguments)), kept + DEBUG_HINT
        )

    def _sequence(self, hook: str, item: type[T], **arguments: Any) -> tuple[T, ...]:
        """Return a hook's answer as a tuple of items of one type."""

        def as_tuple(answer: Any) -> Any:
            # A generator runs the plugin's code only when it is read.
            return tuple(answer) if isinstance(answer, Iterable) else answer

        answer = self._checked(hook, tuple, self._call(hook, as_tuple, **arguments))
        return tuple(self._checked(hook, item, each) for each in answer)

    @contextmanager
    def _inputs_kept(self, hook: str, batches: Sequence[TokenBatch | PreferenceBatch]) -> Iterator[None]:
        """Raise `ContractError` if the backend wrote into the arrays of these batches.

        Core uses its rows again in the next epoch, and NumPy cannot stop a framework that shares their memory.
        """
        given = [
            (batch, name, values) for batch in batches for name, values in vars(batch).items() if values is not None
        ]
        # Token ids are small next to activations, so copying all of them costs nothing that could be measured.
        copies = [values.copy() for _, _, values in given]
        yield
        # Not in a `finally`: if the hook raises, its own error is the one to show.
        for (batch, name, values), copy in zip(given, copies, strict=True):
            if not np.array_equal(values, copy):
                raise ContractError(
                    f"backend {self.name!r}: {hook} wrote into its input {type(batch).__name__}.{name}; "
                    "it must copy an array before changing it"
                )

    def _checked(self, hook: str, expected: type[T], value: object) -> T:
        self._guarded(hook, lambda answer: answer.instance(value, expected))
        return cast(T, value)

    def _checked_metrics(self, hook: str, model: LoadedModel, value: object) -> StepMetrics:
        metrics = self._checked(hook, StepMetrics, value)
        return self._guarded(hook, lambda answer: answers.check_metrics(answer, metrics, model.dtype))

    def _guarded(self, hook: str, check: Callable[[answers.Answer], T]) -> T:
        """Return `check(answer)`. Reading an answer can run code of the plugin's own classes, as calling it does."""
        return call_plugin(self.plugin, f"{hook}'s answer", lambda: check(answers.Answer(self.name, hook)), DEBUG_HINT)


def _for_rows(on_token: OnToken, rows: Sequence[int]) -> OnToken:
    """Return a callback for a call with some of the rows only, which tells their places among all."""
    return lambda row, token: on_token(rows[row], token)


def _require_embedded(model: LoadedModel, arrays: Iterable[Int32]) -> None:
    """Raise `DataError` for a token id that the model has no embedding for.

    Data, prompts and probes are checked where they come from, which their errors name. This holds for everything else
    that calls a backend: MLX would read foreign memory for such an id, and say nothing.
    """
    for ids in arrays:
        outside = ids[(ids < 0) | (ids >= model.vocab_size)]
        if outside.size:
            # The first one is enough: a wrong tokenizer makes thousands of them.
            raise DataError(f"token {int(outside[0])} is not one of the model's {model.vocab_size} tokens")


@collection_paused()
def load_backend(name: str, observers: Iterable[object] = ()) -> Backend:
    """Load the installed backend called `name`.

    Args:
        name: The entry point's name, or an alias of it.
        observers: Objects with hooks that watch the backend's calls.

    Raises:
        BackendError: The backend is missing, broken, or does not fit the contract.
    """
    plugin, module = load_backend_plugin(name)
    return make_backend(plugin, module, observers)


def make_backend(plugin: Plugin, module: object, observers: Iterable[object] = ()) -> Backend:
    """Make a backend of a plugin's module, and ask it what it can do.

    Raises:
        BackendError: A hook is missing that it needs, or does not fit the contract.
    """
    hooks = backend_hooks(plugin, module, observers)
    backend = Backend(plugin, hooks)
    # A backend that does not mention it trains, and then none of the required hooks may be missing.
    if backend.info.training and (missing := missing_hooks(hooks)):
        raise failure(plugin, f" does not implement {', '.join(missing)}")
    return backend


def is_finite(metrics: StepMetrics) -> bool:
    """Return whether loss and gradient norm of a step are finite numbers."""
    return math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)
