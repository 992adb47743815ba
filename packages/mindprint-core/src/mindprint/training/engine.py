"""One model in memory, on whichever backend the current stage asks for."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from mindprint.backend import Backend, choose_backend, load_backend
from mindprint.config import BackendConfig
from mindprint.contract import AdapterState, Dtype, LoadedModel, ModelSpec, TrainingState
from mindprint.models import ModelFolder, quantization
from mindprint.training import guards


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
        """What bit-for-bit resume depends on."""
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
        """Raises `BackendError` before any training when the section cannot be had here."""
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
        """Bring the bare base up at `placement`, releasing what was there."""
        self.release()
        spec = ModelSpec(str(self._folder.path), placement.device, placement.dtype, quantization(self._folder.path))
        self._placement = placement
        self._model = placement.backend.load_model(spec)
        self._base_digest = placement.backend.base_digest(self._model)
        for note in self._model.notes:
            self._notice(note)

    def inject(self, adapter: AdapterState) -> None:
        """Attach the adapter and check that it, and only it, will be trained."""
        guards.check_injection(adapter, self.backend.inject_adapter(self.model, adapter))
        self._injected = True

    def start_stage(self, placement: Placement, state: TrainingState) -> None:
        """Have `state` in memory at `placement`, moving there if the model is elsewhere."""
        if self._placement is None or self._placement.key != placement.key:
            self.load(placement)
        if not self._injected:
            self.inject(state.adapter)
        self.backend.restore(self.model, state)

    def check_base(self) -> None:
        """Raise `GuardError` if the base's weights are no longer what was loaded."""
        guards.check_base(self._base_digest, self.backend.base_digest(self.model))

    def release(self) -> None:
        """Free the model, if one is loaded."""
        if self._model is not None:
            self.backend.release(self._model)
        self._model = self._placement = None
        self._injected = False
