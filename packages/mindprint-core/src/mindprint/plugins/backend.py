"""One chosen backend's hooks as typed methods: what the rest of core calls.

Each method calls its hook with keyword arguments and checks what came back, so that a backend that breaks the contract
is named together with the hook and the finding, before its answer reaches a file.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import numpy as np

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
    LoraFactors,
    ModelSpec,
    PreferenceBatch,
    Sampling,
    StepMetrics,
    TokenBatch,
    TrainingState,
    Update,
)
from mindprint.errors import BackendError, ContractError, MindprintError, NotFiniteError
from mindprint.losses import PreferenceLoss
from mindprint.plugins.loading import (
    BACKENDS,
    Plugin,
    canonical_name,
    installed,
    load_backend_plugin,
    plugin_manager,
)

ACCELERATORS = ("cuda", "metal")
"""Devices that make `auto` prefer a backend. MPS is not one: PyTorch on MPS corrupts adapters; it must be named."""

T = TypeVar("T")


class Backend:
    """A backend in use. Obtain one with `load_backend`."""

    def __init__(self, plugin: Plugin, hook: Any) -> None:
        self.plugin = plugin
        self._hook = hook
        self.info = self._checked("mindprint_backend_info", BackendInfo, self._call("mindprint_backend_info"))

    @property
    def name(self) -> str:
        return self.plugin.name

    def load_model(self, spec: ModelSpec) -> LoadedModel:
        """Load a base model; see `hookspecs.mindprint_load_model`."""
        return self._checked("mindprint_load_model", LoadedModel, self._call("mindprint_load_model", spec=spec))

    def release(self, model: LoadedModel) -> None:
        """Free a model's memory."""
        self._call("mindprint_release", model=model.handle)

    def adapter_sites(self, model: LoadedModel) -> tuple[AdapterSite, ...]:
        """Every place of the base that can take LoRA."""
        sites = tuple(self._call("mindprint_adapter_sites", model=model.handle))
        for site in sites:
            self._checked("mindprint_adapter_sites", AdapterSite, site)
        return sites

    def base_digest(self, model: LoadedModel) -> str:
        """Digest of the base weights in memory."""
        return self._checked("mindprint_base_digest", str, self._call("mindprint_base_digest", model=model.handle))

    def inject_adapter(self, model: LoadedModel, adapter: AdapterState) -> AdapterFacts:
        """Attach an adapter, trainable."""
        facts = self._call("mindprint_inject_adapter", model=model.handle, adapter=adapter)
        return self._checked("mindprint_inject_adapter", AdapterFacts, facts)

    def sft_step(self, model: LoadedModel, batches: Sequence[TokenBatch], update: Update) -> StepMetrics:
        """One optimizer step on the completion loss."""
        with self._inputs_kept("mindprint_sft_step", batches):
            metrics = self._call("mindprint_sft_step", model=model.handle, batches=batches, update=update)
        return self._checked("mindprint_sft_step", StepMetrics, metrics)

    def dpo_step(
        self, model: LoadedModel, batches: Sequence[PreferenceBatch], loss: PreferenceLoss, update: Update
    ) -> StepMetrics:
        """One optimizer step on a preference loss."""
        hook = "mindprint_dpo_step"
        with self._inputs_kept(hook, batches):
            metrics = self._call(hook, model=model.handle, batches=batches, loss=loss, update=update)
        metrics = self._checked(hook, StepMetrics, metrics)
        pairs = sum(batch.pairs for batch in batches)
        for field in ("chosen_log_probs", "rejected_log_probs"):
            values = getattr(metrics, field)
            self._check_array(hook, field, values, (pairs,), np.float32)
            if is_finite(metrics) and not metrics.skipped:
                self._check_finite(hook, field, values)
        return metrics

    def log_probs(self, model: LoadedModel, batch: TokenBatch, *, adapter: bool = True) -> Float32:
        """Per-token log-probs, float32 `[rows, T]`, 0 outside the mask."""
        hook = "mindprint_log_probs"
        with self._inputs_kept(hook, [batch]):
            values = self._call(hook, model=model.handle, batch=batch, adapter=adapter)
        self._check_array(hook, "log-probs", values, batch.tokens.shape, np.float32)
        self._check_finite(hook, "log-probs", cast(Float32, values))
        return cast(Float32, values)

    def generate(
        self, model: LoadedModel, prompts: Sequence[Int32], sampling: Sampling, *, adapter: bool = True
    ) -> tuple[Generation, ...]:
        """Continue each prompt, in order."""
        hook = "mindprint_generate"
        answers = tuple(
            self._call("mindprint_generate", model=model.handle, prompts=prompts, sampling=sampling, adapter=adapter)
        )
        if len(answers) != len(prompts):
            raise ContractError(f"backend {self.name!r}: {hook} answered {len(answers)} of {len(prompts)} prompts")
        for answer in answers:
            tokens = self._checked(hook, Generation, answer).tokens
            self._check_array(hook, "tokens", tokens, (np.size(tokens),), np.int32)
        return answers

    def save(self, model: LoadedModel) -> TrainingState:
        """Copy out adapter, moments and step count."""
        state = self._checked("mindprint_save", TrainingState, self._call("mindprint_save", model=model.handle))
        for site, factors in state.adapter.tensors.items():
            rank = state.adapter.config.rank(site)
            shapes = (rank, np.shape(factors.a)[-1]), (np.shape(factors.b)[0], rank)
            self._check_factors(site, factors, shapes)
            for what, moments in (("first", state.first_moments), ("second", state.second_moments)):
                if moments:
                    self._check_factors(f"{what} moment of {site}", moments[site], shapes)
        return state

    def restore(self, model: LoadedModel, state: TrainingState) -> None:
        """Take over a saved state."""
        self._call("mindprint_restore", model=model.handle, state=state)

    def device(self, name: str) -> DeviceInfo:
        """The device called `name`, or the best usable one for `auto`.

        Raises `BackendError` with the reason if it cannot be used here.
        """
        if name == "auto":
            usable = [device for device in self.info.devices if device.usable and device.name != "mps"]
            if usable:
                return usable[0]
            reasons = "; ".join(f"{device.name}: {device.reason}" for device in self.info.devices)
            raise BackendError(f"backend {self.name!r} has no usable device here ({reasons})")
        found = self.info.device(name)
        have = ", ".join(device.name for device in self.info.devices if device.usable) or "none"
        if found is None:
            raise BackendError(f"backend {self.name!r} knows no device {name!r} (usable here: {have})")
        if not found.usable:
            raise BackendError(
                f"backend {self.name!r} cannot use device {name!r} here: {found.reason} (usable: {have})"
            )
        return found

    def dtype(self, device: DeviceInfo, name: Dtype | Literal["auto"]) -> Dtype:
        """The dtype called `name` on `device`, or its default for `auto`. Raises `BackendError` if unsupported."""
        if name == "auto":
            return device.default_dtype
        if name not in device.dtypes:
            raise BackendError(
                f"backend {self.name!r} does not train in {name} on {device.name} (it can: {', '.join(device.dtypes)})"
            )
        return name

    def _call(self, hook: str, **arguments: Any) -> Any:
        """Call a hook; what it raises beside a `MindprintError` becomes one that names backend, hook and cause."""
        try:
            return getattr(self._hook, hook)(**arguments)
        except MindprintError:
            raise
        except Exception as error:
            name, version = self.plugin.distribution, self.plugin.version
            stands = "; the last checkpoint stands" if hook.endswith("_step") else ""
            raise BackendError(
                f"backend {self.name!r} ({name} {version}): {hook} raised {type(error).__name__}: {error}{stands} "
                "(MINDPRINT_DEBUG=1 shows where)"
            ) from error

    @contextmanager
    def _inputs_kept(self, hook: str, batches: Sequence[TokenBatch | PreferenceBatch]) -> Iterator[None]:
        """Raise `ContractError` if the backend wrote into the arrays of these batches: they are core's."""
        given = [
            (batch, name, values) for batch in batches for name, values in vars(batch).items() if values is not None
        ]
        copies = [values.copy() for _, _, values in given]
        yield
        for (batch, name, values), copy in zip(given, copies, strict=True):
            if not np.array_equal(values, copy):
                raise ContractError(
                    f"backend {self.name!r}: {hook} wrote into its input {type(batch).__name__}.{name}; "
                    "it must copy what it changes"
                )

    def _check_finite(self, hook: str, what: str, values: np.ndarray) -> None:
        if not np.isfinite(values).all():
            raise NotFiniteError(f"backend {self.name!r}: {hook} returned {what} that are not finite")

    def _check_factors(self, what: str, pair: LoraFactors, shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
        for letter, values, shape in zip("AB", pair, shapes, strict=True):
            self._check_array("mindprint_save", f"{what}.{letter}", values, shape, np.float32)
            self._check_finite("mindprint_save", f"values of {what}.{letter}", values)

    def _checked(self, hook: str, kind: type[T], value: object) -> T:
        if not isinstance(value, kind):
            raise ContractError(
                f"backend {self.name!r}: {hook} returned {type(value).__name__}, the contract asks for {kind.__name__}"
            )
        return value

    def _check_array(self, hook: str, what: str, value: object, shape: tuple[int, ...], dtype: type) -> None:
        if not isinstance(value, np.ndarray) or value.dtype != dtype or value.shape != shape:
            found = (
                f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
            )
            raise ContractError(
                f"backend {self.name!r}: {hook} returned {what} as {found}, "
                f"the contract asks for {np.dtype(dtype)}{list(shape)}"
            )


def load_backend(name: str, observers: Iterable[object] = ()) -> Backend:
    """Load the installed backend called `name`. Raises `BackendError` if it is missing, broken or does not fit."""
    plugin, module = load_backend_plugin(canonical_name(name))
    return Backend(plugin, plugin_manager(plugin, module, observers).hook)


@dataclass(frozen=True)
class Choice:
    """What auto-selection chose, and why, in words for the user."""

    name: str
    reason: str


def choose_backend(load: Callable[[str], Backend] = load_backend) -> Choice:
    """The best installed backend for this hardware: the first with an accelerator, else the first that works at all.

    Candidates are asked in the platform's order, so that on a Mac MLX is found before PyTorch is imported, and
    elsewhere the reverse. Raises `BackendError` when nothing is installed or nothing is usable.
    """
    names = [plugin.name for plugin in installed(BACKENDS)]
    if not names:
        raise BackendError('no backend is installed; pip install "mindprint-core[torch]" or "mindprint-core[mlx]"')
    if len(names) == 1:
        return Choice(names[0], "the only backend installed")
    on_mac = platform.system() == "Darwin"
    preferred = ("mlx", "torch") if on_mac else ("torch", "mlx")
    ordered = sorted(names, key=lambda name: (preferred.index(name) if name in preferred else len(preferred), name))
    failures: list[str] = []
    working: list[str] = []
    for name in ordered:
        try:
            device = load(name).device("auto")
        except BackendError as error:
            failures.append(str(error))
            continue
        if device.name in ACCELERATORS:
            return Choice(name, f"it can use {device.detail or device.name} here")
        working.append(name)
    if not working:
        raise BackendError("no installed backend works here: " + "; ".join(failures))
    left_out = f" (left out: {'; '.join(failures)})" if failures else ""
    return Choice(working[0], f"no accelerator is usable here, and it is the fastest on this CPU{left_out}")


def is_finite(metrics: StepMetrics) -> bool:
    """Whether loss and gradient norm of a step are finite numbers."""
    return math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)
