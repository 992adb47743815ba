"""From the `training_pipeline.yaml` of a single-repository pipeline to this configuration: a table and its reader.

A setting with a counterpart is translated. Every other one is named, never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mindprint.errors import ConfigError

# The old pipelines used the names of several trainers, hence several keys for the same setting.
_STAGE = {
    "enabled": "enabled",
    "learning_rate": "learning_rate",
    "lr": "learning_rate",
    "batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "epochs": "epochs_per_topic",
    "num_epochs": "epochs_per_topic",
    "num_train_epochs": "epochs_per_topic",
    "epochs_per_topic": "epochs_per_topic",
    "steps": "steps_per_topic",
    "max_steps": "steps_per_topic",
    "steps_per_topic": "steps_per_topic",
    "gradient_accumulation": "gradient_accumulation",
    "gradient_accumulation_steps": "gradient_accumulation",
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "lr_scheduler_type": "schedule",
    "schedule": "schedule",
}
_SHARED = {
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.target_modules",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
}
"""Settings that the old file has per stage and this one has once. The two stages must agree."""

_DPO = {"beta": "dpo.beta", "loss_type": "dpo.loss", "loss": "dpo.loss", "label_smoothing": "dpo.label_smoothing"}

TABLE: Mapping[str, Mapping[str, str]] = {
    "backend": {"type": "backend.type", "device": "backend.device", "dtype": "backend.dtype"},
    "sft": {**{old: f"sft.{new}" for old, new in _STAGE.items()}, **_SHARED},
    "dpo": {**{old: f"dpo.{new}" for old, new in _STAGE.items()}, **_SHARED, **_DPO},
    "thresholds": {
        "preference_accuracy": "evaluation.topic.reward_accuracy",
        "concept_coverage": "evaluation.topic.concept_coverage",
        "copy_rate": "evaluation.topic.copy_rate",
    },
    "pipeline": {"seed": "seed", "save_every": "checkpoints.every", "checkpoint_every": "checkpoints.every"},
    "paths": {
        "model": "model.name",
        "base_model": "model.name",
        "data": "data.path",
        "data_dir": "data.path",
        "sft_data": "data.sft",
        "dpo_data": "data.preferences",
        "preferences": "data.preferences",
        "heldout": "data.heldout",
    },
}
"""Old section and key → new setting. Thresholds on a voice have none: the old score lies on another scale."""

VALUES: Mapping[str, Mapping[object, object]] = {
    "backend.type": {"pytorch": "torch", None: "auto"},
    "backend.device": {None: "auto"},
    "backend.dtype": {None: "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"},
}
FLOATS = ("learning_rate", "weight_decay", "max_grad_norm", "beta", "label_smoothing", "alpha", "dropout")
"""Settings whose values YAML reads as text when they are written `3e-4`."""


@dataclass(frozen=True)
class Migration:
    """`values` for `make_config`, and every old key, dotted, that has no counterpart."""

    values: Mapping[str, Any]
    without_counterpart: tuple[str, ...]


def migrate(old: Mapping[str, Any]) -> Migration:
    """Translate the old file's values. Raises `ConfigError` where two old keys say different things of one setting."""
    found: dict[str, tuple[str, object]] = {}
    left: list[str] = []
    for section, key, value in _entries(old):
        name = f"{section}.{key}" if key else section
        new = TABLE.get(section, {}).get(key)
        if new is None:
            left.append(name)
            continue
        translated = _translated(new, value)
        before = found.setdefault(new, (name, translated))
        if before[1] != translated:
            raise ConfigError(f"{before[0]} is {before[1]!r} and {name} is {translated!r}: {new} can have one value")
    return Migration(_nested({new: value for new, (_, value) in found.items()}), tuple(left))


def _entries(old: Mapping[str, Any]) -> Iterator[tuple[str, str, object]]:
    for section, values in old.items():
        if section == "backend" and not isinstance(values, Mapping):
            yield section, "type", values
        elif isinstance(values, Mapping):
            yield from ((section, str(key), value) for key, value in values.items())
        elif values is not None:
            yield section, "", values


def _translated(setting: str, value: object) -> object:
    known = VALUES.get(setting, {})
    if value is None or isinstance(value, str):
        value = known.get(value, value)
    if setting.rpartition(".")[2] in FLOATS and isinstance(value, str | int):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _nested(settings: Mapping[str, object]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, key = name.split(".")
        inner = result
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    return result
