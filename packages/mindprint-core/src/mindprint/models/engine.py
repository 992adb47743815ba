"""One model in memory, on whichever backend the current stage asks for."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from mindprint.collection import collection_paused
from mindprint.config import BackendConfig
from mindprint.contract import (
    AdapterFacts,
    AdapterSite,
    AdapterState,
    DeviceInfo,
    Dtype,
    LoadedModel,
    LoraConfig,
    ModelSpec,
    StageName,
    TrainingState,
)
from mindprint.errors import BackendError, ContractError, GuardError, ModelError
from mindprint.models.folder import ModelFolder, quantization
from mindprint.models.token_ids import embedding_rows
from mindprint.plugins.answers import quoted
from mindprint.plugins.backend import Backend, load_backend
from mindprint.plugins.choosing import choose_backend
from mindprint.plugins.launched import launched

FLOAT32_BYTES = 8 * 2**30
"""A base whose float32 weights take no more than this, and no more than half of the memory, is measured in float32."""


@dataclass(frozen=True)
class Placement:
    """A backend section with every `auto` resolved on this machine."""

    backend: Backend
    device: str
    dtype: Dtype
    reason: str | None = None
    shard: bool = False
    devices: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, str]:
        return self.backend.name, self.device, self.dtype

    @property
    def where(self) -> str:
        """The device, or the devices, in words."""
        return " and ".join(self.devices) or self.device

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
        chosen = f"{self.backend.name} on {self.where}, {self.dtype}" + (", sharded" if self.shard else "")
        return f"{chosen} (chosen because {self.reason})" if self.reason else chosen


class Placements:
    """Resolves backend sections; loads each named backend once."""

    def __init__(self, observers: Iterable[object] = ()) -> None:
        self._observers = tuple(observers)
        self._backends: dict[str, Backend] = {}

    def resolve(self, section: BackendConfig) -> Placement:
        """Return the placement. Raises `BackendError` if it is not available here, or a launcher started several."""
        (rank, size), launcher = launched()
        if size > 1:
            raise BackendError(
                f"{launcher} started this command as rank {rank} of {size}: only `mindprint train` runs in several "
                "processes; run it without the launcher"
            )
        return self._resolve(section)

    def _resolve(self, section: BackendConfig) -> Placement:
        reason = None
        name = section.type
        if name == "auto":
            choice = choose_backend(self._load)
            name, reason = choice.name, choice.reason
        backend = self._load(name)
        devices = tuple(section.devices or ())
        device = _kind_of_devices(backend, devices) if devices else backend.device(section.device)
        return Placement(backend, device.name, backend.dtype(device, section.dtype), reason, devices=devices)

    def resolve_training(self, section: BackendConfig) -> Placement:
        """Return the placement of a stage. Raises `BackendError` also for a backend that does not train, or shard."""
        # Only training is sharded. A command that uses the adapter runs in one process, with the whole base.
        placement = replace(self._resolve(section), shard=section.shard)
        placement.backend.require_training()
        if section.shard and "shard" not in placement.backend.info.capabilities:
            raise BackendError(
                f"backend {placement.backend.name!r} does not divide a base among ranks (capability `shard`; "
                "docs/scaling.md says why): set backend.shard=false, or take another backend (backend.type=torch)"
            )
        self._require_launched(placement.backend)
        if placement.devices and not placement.backend.ranks.alone:
            raise BackendError(
                f"backend.devices is for one process, and {placement.backend.ranks.size} were started: start one, or "
                "remove it and set backend.shard=true"
            )
        return placement

    def _require_launched(self, backend: Backend) -> None:
        """Raise `BackendError` if a launcher started several processes, and the backend takes itself to be alone."""
        world, launcher = launched()
        if world != backend.ranks.world and launcher:
            rank, size = world
            raise BackendError(
                f"{launcher} started this process as rank {rank} of {size}, and backend {backend.name!r} runs as a "
                f"single process: take its own launcher (mindprint launch -n {size} does), or start one process"
            )

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
        self._injected: LoraConfig | None = None
        self._base_digest = ""
        self.compared_losses: set[StageName] = set()
        """Stages whose loss was compared with evaluation since this model was loaded. One step proves a backend."""

    @property
    def folder(self) -> ModelFolder:
        return self._folder

    @property
    def base_digest(self) -> str:
        """The digest of the base's weights, as they were loaded."""
        return self._base_digest

    @property
    def backend(self) -> Backend:
        assert self._placement is not None, "no stage has been placed yet"
        return self._placement.backend

    @property
    def model(self) -> LoadedModel:
        assert self._model is not None, "no model is loaded"
        return self._model

    @collection_paused()
    def load(self, placement: Placement) -> None:
        """Load the bare base at `placement`, after releasing the model in memory."""
        self.release()
        stated, quantize = quantization(self._folder.path), self._folder.quantize
        check_quantize(placement.backend, self._folder, stated)
        if placement.shard and (scheme := quantize or stated):
            raise ModelError(
                f"{self._folder.path}: a quantized base ({scheme}) is not sharded: set backend.shard=false"
            )
        spec = ModelSpec(
            str(self._folder.path),
            placement.device,
            placement.dtype,
            stated,
            quantize,
            shard=placement.shard,
            devices=placement.devices,
        )
        self._placement = placement
        self._model = placement.backend.load_model(spec)
        check_vocabulary(placement.backend.name, self._model, self._folder.path)
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

    @collection_paused()
    def inject(self, adapter: AdapterState) -> None:
        """Attach the adapter and check that it, and only it, will be trained."""
        check_injection(adapter, self.backend.inject_adapter(self.model, adapter))
        self._injected = adapter.config

    def save(self) -> TrainingState:
        """Copy out the training state, which must be of the adapter that was injected."""
        state = self.backend.save(self.model)
        if self._injected is not None and state.adapter.config != self._injected:
            raise ContractError(
                f"backend {self.backend.name!r}: mindprint_save returned an adapter of another configuration than the "
                f"injected one: {_difference(self._injected, state.adapter.config)}"
            )
        return state

    def restore(self, state: TrainingState) -> None:
        """Take over a saved state, and check that the backend saves what it was given to restore."""
        self.backend.restore(self.model, state)
        check_restored(self.backend.name, state, self.save())

    def start_stage(self, placement: Placement, state: TrainingState) -> None:
        """Have `state` in memory at `placement`, moving there if the model is elsewhere."""
        # Stages on one placement share the model in memory. Only a move releases and loads.
        held = self._placement
        if held is None or replace(held, reason=None) != replace(placement, reason=None):
            self.load(placement)
        if self._injected is None:
            self.inject(state.adapter)
        self.restore(state)

    def drops_out(self) -> bool:
        """Return whether dropout changes the loss of training: not as long as every B is 0, as it is at first."""
        if self._injected is None or not self._injected.dropout:
            return False
        return any(factors.b.any() for factors in self.save().adapter.tensors.values())

    def check_base(self) -> None:
        """Raise `GuardError` if the base's weights are no longer those that were loaded."""
        check_base(self._base_digest, self.backend.base_digest(self.model))

    def release(self) -> None:
        """Free the model, if one is loaded."""
        if self._model is not None:
            self.backend.release(self._model)
        self._model = self._placement = self._injected = None
        self.compared_losses = set()


def _kind_of_devices(backend: Backend, names: Sequence[str]) -> DeviceInfo:
    """Return the kind of several devices, each of which has its kind's name, or that and a number (`cuda:1`).

    Raises:
        BackendError: They are of several kinds, the backend takes one alone, or cannot use it here.
    """
    if "devices" not in backend.info.capabilities:
        raise BackendError(
            f"backend {backend.name!r} does not divide a base among devices (capability `devices`): set "
            "backend.device, or take another backend (backend.type=torch)"
        )
    kinds = dict.fromkeys(name.partition(":")[0] for name in names)
    if len(kinds) > 1:
        raise BackendError(f"backend.devices names several kinds of devices ({', '.join(kinds)}): name one kind")
    for name in names:
        kind, colon, number = name.partition(":")
        if colon and not (number.isascii() and number.isdigit()):
            raise BackendError(f"backend.devices names {name!r}: write a device and its number, such as {kind}:0")
    return backend.device(next(iter(kinds)))


def check_quantize(backend: Backend, folder: ModelFolder, stated: str | None) -> None:
    """Raise if a base cannot be quantized while it is loaded: one that already is, or a backend that does not do it."""
    if folder.quantize is None:
        return
    if stated is not None:
        raise ModelError(f"{folder.path}: is quantized already ({stated}): remove model.quantize ({folder.quantize})")
    if "quantize" not in backend.info.capabilities:
        raise BackendError(
            f"backend {backend.name!r} cannot quantize a base while loading it (model.quantize: {folder.quantize}): "
            "take a folder that is quantized, or another backend"
        )


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


def check_vocabulary(backend: str, model: LoadedModel, folder: Path) -> None:
    """Raise `ContractError` if a backend states another number of tokens than the base's embedding table has rows.

    Every token id is compared with this number: too large, and a backend may read memory behind the table.
    """
    rows = embedding_rows(folder)
    if rows is not None and rows != model.vocab_size:
        raise ContractError(
            f"backend {backend!r}: mindprint_load_model returned vocab_size = {model.vocab_size}, "
            f"the embedding table of {folder} has {rows} rows"
        )


def check_restored(backend: str, given: TrainingState, saved: TrainingState) -> None:
    """Raise `ContractError` if a backend does not save, bit for bit, the state that it was given to restore.

    A state that is lost in part continues the training from something else, and every number after it looks plausible.
    """
    parts = (
        ("", given.adapter.tensors, saved.adapter.tensors),
        ("first moment of ", given.first_moments, saved.first_moments),
        ("second moment of ", given.second_moments, saved.second_moments),
    )
    returned = f"backend {backend!r}: mindprint_save after mindprint_restore returned"
    for kind, expected, actual in parts:
        if set(expected) != set(actual):
            name = min(set(expected) ^ set(actual))
            raise ContractError(f"{returned} {'no ' if name in expected else 'a '}{kind or 'factors of '}{name}")
        for site, pair in expected.items():
            for letter, values, others in zip("AB", pair, actual[site], strict=True):
                if not np.array_equal(values, others):
                    apart = float(np.abs(values - others).max()) if values.shape == others.shape else math.nan
                    raise ContractError(
                        f"{returned} another {kind}{site}.{letter} than was restored (greatest difference {apart:.3g})"
                    )
    # Without moments the optimizer starts from scratch, whatever the count says.
    steps = given.optimizer_steps if given.first_moments else 0
    if saved.optimizer_steps != steps:
        raise ContractError(f"{returned} optimizer_steps = {saved.optimizer_steps}, {steps} were restored")
    # A state may come from a base of another dtype, which has no loss scale.
    if None not in (given.loss_scale, saved.loss_scale) and given.loss_scale != saved.loss_scale:
        raise ContractError(f"{returned} loss_scale = {saved.loss_scale}, {given.loss_scale} was restored")


def check_base(before: str, after: str) -> None:
    """Raise `GuardError` if two digests of the base's weights differ."""
    if before != after:
        raise GuardError("the base model's weights changed during training; its adapter would not fit the real base")


def _difference(expected: LoraConfig, actual: LoraConfig) -> str:
    """Name the first field in which two configurations differ."""
    name = next(
        field.name for field in fields(LoraConfig) if getattr(expected, field.name) != getattr(actual, field.name)
    )
    return f"{name} = {quoted(getattr(actual, name))}, not {quoted(getattr(expected, name))}"


def fits_in_float32(parameters: int) -> bool:
    """Return whether a model's weights in float32 are small compared with this machine's memory."""
    # Half of the memory: the model is not alone, and reading it fills the file cache as well.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 4 * parameters <= min(FLOAT32_BYTES, memory // 2)
