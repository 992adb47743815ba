"""One model in memory, on whichever backend the current stage asks for."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mindprint.config import BackendConfig
from mindprint.contract import AdapterFacts, AdapterSite, AdapterState, Dtype, LoadedModel, ModelSpec, TrainingState
from mindprint.errors import BackendError, GuardError
from mindprint.models.folder import ModelFolder, quantization
from mindprint.plugins.backend import Backend, load_backend
from mindprint.plugins.choosing import choose_backend

FLOAT32_BYTES = 8 * 2**30
"""A base whose float32 weights take no more than this, and no more than half of the memory, is measured in float32."""


@dataclass(frozen=True)
class Placement:
    """A backend section with every `auto` resolved on this machine."""

    backend: Backend
    device: str
    dtype: Dtype
    reason: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.backend.name, self.device, self.dtype

    def environment(self) -> dict[str, str]:
        """Return the facts that bit-for-bit resume depends on."""
        return {
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "numpy": np.__version__,
            "device": f"{self.device} {self.dtype}",
            **self.backend.info.libraries,
        }

    def __str__(self) -> str:
        chosen = f"{self.backend.name} on {self.device}, {self.dtype}"
        return f"{chosen} (chosen because {self.reason})" if self.reason else chosen


class Placements:
    """Resolves backend sections; loads each named backend once."""

    def __init__(self, observers: Iterable[object] = ()) -> None:
        self._observers = tuple(observers)
        self._backends: dict[str, Backend] = {}

    def resolve(self, section: BackendConfig) -> Placement:
        """Return the placement. Raises `BackendError` before any training if it is not available here."""
        reason = None
        name = section.type
        if name == "auto":
            choice = choose_backend(self._load)
            name, reason = choice.name, choice.reason
        backend = self._load(name)
        device = backend.device(section.device)
        return Placement(backend, device.name, backend.dtype(device, section.dtype), reason)

    def _load(self, name: str) -> Backend:
        if name not in self._backends:
            self._backends[name] = load_backend(name, self._observers)
        return self._backends[name]


class Engine:
    """The base model with its adapter, movable between backends: save, release, load, inject, restore."""

    def __init__(self, folder: ModelFolder, notice: Callable[[str], None] = lambda _: None) -> None:
        self._folder = folder
        self._notice = notice
        self._placement: Placement | None = None
        self._model: LoadedModel | None = None
        self._injected = False
        self._base_digest = ""

    @property
    def folder(self) -> ModelFolder:
        return self._folder

    @property
    def backend(self) -> Backend:
        assert self._placement is not None, "no stage has been placed yet"
        return self._placement.backend

    @property
    def model(self) -> LoadedModel:
        assert self._model is not None, "no model is loaded"
        return self._model

    def load(self, placement: Placement) -> None:
        """Load the bare base at `placement`, after releasing the model in memory."""
        self.release()
        spec = ModelSpec(str(self._folder.path), placement.device, placement.dtype, quantization(self._folder.path))
        self._placement = placement
        self._model = placement.backend.load_model(spec)
        self._base_digest = placement.backend.base_digest(self._model)
        for note in self._model.notes:
            self._notice(note)

    def load_everywhere(
        self, placements: Sequence[Placement], targets_of: Callable[[Sequence[AdapterSite]], Sequence[str]]
    ) -> Sequence[AdapterSite]:
        """Load the base at every placement, the first one last, so that what cannot be loaded is known before training.

        Returns the sites of the first. Raises `BackendError` when another placement lacks a targeted site of it, or
        has it with another shape.
        """
        sites_at: dict[Placement, Sequence[AdapterSite]] = {}
        for placement in reversed(dict.fromkeys(placements)):
            self.load(placement)
            sites_at[placement] = self.backend.adapter_sites(self.model)
        sites = sites_at[placements[0]]
        targets = set(targets_of(sites))
        for placement, others in sites_at.items():
            # Sites are compared whole, so that one of another shape is lacking as well.
            lacking = {site for site in sites if site.name in targets} - set(others)
            if lacking:
                names = ", ".join(sorted(site.name for site in lacking)[:3])
                raise BackendError(f"backend {placement.backend.name!r} cannot adapt {names} of this base as others do")
        return sites

    def inject(self, adapter: AdapterState) -> None:
        """Attach the adapter and check that it, and only it, will be trained."""
        check_injection(adapter, self.backend.inject_adapter(self.model, adapter))
        self._injected = True

    def start_stage(self, placement: Placement, state: TrainingState) -> None:
        """Have `state` in memory at `placement`, moving there if the model is elsewhere."""
        # Stages on one placement share the model in memory. Only a move releases and loads.
        if self._placement is None or self._placement.key != placement.key:
            self.load(placement)
        if not self._injected:
            self.inject(state.adapter)
        self.backend.restore(self.model, state)

    def check_base(self) -> None:
        """Raise `GuardError` if the base's weights are no longer those that were loaded."""
        check_base(self._base_digest, self.backend.base_digest(self.model))

    def release(self) -> None:
        """Free the model, if one is loaded."""
        if self._model is not None:
            self.backend.release(self._model)
        self._model = self._placement = None
        self._injected = False


def check_injection(adapter: AdapterState, facts: AdapterFacts) -> None:
    """Raise `GuardError` unless the adapter is where the configuration says and nothing else is trainable."""
    if set(facts.sites) != set(adapter.config.target_modules):
        wrong = sorted(set(facts.sites) ^ set(adapter.config.target_modules))
        raise GuardError(f"the backend adapted other modules than the configuration names: {', '.join(wrong[:5])}")
    # A backend that left the base trainable would pass every other check and train it in silence.
    if facts.trainable_elements != adapter.elements:
        raise GuardError(
            f"the backend would train {facts.trainable_elements:,} elements, the configuration implies "
            f"{adapter.elements:,}: something other than the adapter is trainable, or part of it is not"
        )


def check_base(before: str, after: str) -> None:
    """Raise `GuardError` if two digests of the base's weights differ."""
    if before != after:
        raise GuardError("the base model's weights changed during training; its adapter would not fit the real base")


def fits_in_float32(parameters: int) -> bool:
    """Return whether a model's weights in float32 are small compared with this machine's memory."""
    # Half of the memory: the model is not alone, and reading it fills the file cache as well.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 4 * parameters <= min(FLOAT32_BYTES, memory // 2)
