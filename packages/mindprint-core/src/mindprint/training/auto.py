"""Settings that are `auto`: the batch sizes and gradient checkpointing that fit into the memory of this machine.

The rows of a step stay the same: a smaller micro-batch is made up for by more of them. So the memory decides the time
of a run, and not its numbers, up to rounding. The estimate of `memory.py` chooses, and one real step on the
heaviest rows tries the choice before the run begins. The run's folder holds the numbers, as if written by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mindprint.config import BackendConfig, Config, ConfigFile, StageConfig, merged
from mindprint.contract import STAGES, StageName


@dataclass(frozen=True)
class Choice:
    """Values for the settings that are `auto`. `recompute` is None where gradient checkpointing is not.

    Attributes:
        batch_sizes: The rows, or pairs, of a micro-batch, for each stage whose batch size is `auto`.
        recompute: Whether activations are computed again.
    """

    batch_sizes: Mapping[StageName, int]
    recompute: bool | None

    def applied(self, file: ConfigFile) -> ConfigFile:
        """Return the configuration with these values in place of `auto`."""
        return merged(file, self._changes(file.config))

    def smaller(self, config: Config, stage: StageName) -> Choice | None:
        """Return the choice with the next smaller batch for a stage, None if there is none."""
        sizes = [size for size in batch_sizes(config, stage) if size < self.batch_sizes.get(stage, 0)]
        return replace(self, batch_sizes={**self.batch_sizes, stage: sizes[0]}) if sizes else None

    def settings(self, file: ConfigFile) -> list[str]:
        """Return the settings as the command line takes them."""
        flat = []
        for section, values in self._changes(file.config).items():
            for name, value in values.items():
                inner = value.items() if isinstance(value, Mapping) else [(None, value)]
                for key, entry in inner:
                    path = f"{section}.{name}.{key}" if key else f"{section}.{name}"
                    flat.append(f"{path}={str(entry).lower()}")
        return flat

    def _changes(self, config: Config) -> dict[str, dict[str, Any]]:
        changes: dict[str, dict[str, Any]] = {}
        for stage, size in self.batch_sizes.items():
            count = rows_of_step(config, stage) // size
            changes[stage] = {"batch_size": size, "gradient_accumulation": count}
        if self.recompute is not None:
            recompute = {"gradient_checkpointing": self.recompute}
            if config.backend.gradient_checkpointing == "auto":
                changes["backend"] = recompute
            for stage in STAGES:
                section = _stage(config, stage).backend
                if section is not None and section.gradient_checkpointing == "auto":
                    changes.setdefault(stage, {})["backend"] = recompute
        return changes


def stages_with_auto(config: Config) -> tuple[StageName, ...]:
    """Return the stages whose batch size is `auto`."""
    return tuple(stage for stage in STAGES if _stage(config, stage).batch_size == "auto")


def recompute_is_auto(config: Config) -> bool:
    """Return whether gradient checkpointing is `auto`, for the run or for one of its stages."""
    sections = [config.backend, *(_stage(config, stage).backend for stage in STAGES)]
    return any(section is not None and section.gradient_checkpointing == "auto" for section in sections)


def has_auto(config: Config) -> bool:
    """Return whether a setting is left to the memory of the machine."""
    return bool(stages_with_auto(config)) or recompute_is_auto(config)


def rows_of_step(config: Config, stage: StageName) -> int:
    """Return the rows of an optimizer step whose batch size is `auto`: the default one times the accumulation."""
    section = _stage(config, stage)
    default: int = type(section).model_fields["batch_size"].default
    return default * section.gradient_accumulation


def batch_sizes(config: Config, stage: StageName) -> Sequence[int]:
    """Return the micro-batches that a step can be divided into, the largest first."""
    rows = rows_of_step(config, stage)
    return [size for size in range(rows, 0, -1) if rows % size == 0]


def with_most_memory(file: ConfigFile) -> ConfigFile:
    """Return the configuration with the largest batches and no gradient checkpointing in place of `auto`."""
    if not has_auto(file.config):
        return file
    return largest_choice(file.config).applied(file)


def largest_choice(config: Config, *, recompute: bool = False) -> Choice:
    """Return the largest batches, with or without gradient checkpointing where that is `auto`."""
    sizes = {stage: rows_of_step(config, stage) for stage in stages_with_auto(config)}
    return Choice(sizes, recompute if recompute_is_auto(config) else None)


def choice_of(file: ConfigFile, run: Config) -> Choice:
    """Return the choice that a run recorded in its configuration, for the settings that are `auto` in `file`."""
    sizes = {stage: _stage(run, stage).rows_at_once for stage in stages_with_auto(file.config)}
    recompute = any(section.recomputes for section in _auto_sections(file.config, run))
    return Choice(sizes, recompute if recompute_is_auto(file.config) else None)


def _auto_sections(config: Config, run: Config) -> list[BackendConfig]:
    pairs: list[tuple[BackendConfig | None, BackendConfig | None]] = [(config.backend, run.backend)]
    pairs += [(_stage(config, stage).backend, _stage(run, stage).backend) for stage in STAGES]
    return [there for here, there in pairs if here and there and here.gradient_checkpointing == "auto"]


def _stage(config: Config, stage: StageName) -> StageConfig:
    section: StageConfig = getattr(config, stage)
    return section
