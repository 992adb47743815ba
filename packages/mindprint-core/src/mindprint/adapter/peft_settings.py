"""The fields of PEFT's `adapter_config.json` and their meaning. A field that Mindprint cannot hold is refused by name.

Every field is accounted for: it is read here; or it says only where the adapter goes, which the tensors themselves say;
or it concerns how the adapter was trained and not its computation; or its value is the one that means nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mindprint.adapter.targets import ALL_LINEAR, STACKED_PARAMETERS
from mindprint.errors import AdapterError
from mindprint.input_files import read_object, shortened
from mindprint.limits import LimitError, limited

HELD = frozenset(
    {
        "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
        "target_parameters", "base_model_name_or_path", "revision",
    }
)  # fmt: skip
"""Fields that are read."""

WITHOUT_MEANING = frozenset(
    {
        # where the adapter goes, of which the tensors' names are the truth
        "exclude_modules", "layers_to_transform", "layers_pattern",
        # how it was started and trained
        "inference_mode", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
        "runtime_config", "qalora_group_size",
        # how the base keeps a weight: PEFT sets it by the layer that it finds, whatever the file says
        "fan_in_fan_out",
        # who wrote the file
        "auto_mapping", "peft_version", "megatron_core", "unsloth_version", "unsloth_fixed",
    }
)  # fmt: skip
"""Fields that change nothing about the computation with an adapter's tensors."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    # The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's weights before training.
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica"),
}
"""Values for which a field means plain LoRA; a field that is null, false or empty means nothing either."""

WORDS: Mapping[str, str] = {
    "use_dora": "DoRA, whose magnitudes have no place in LoRA",
    "modules_to_save": "whole modules in addition to LoRA",
    "bias": "trained biases in addition to LoRA",
    "lora_bias": "a bias in B",
    "init_lora_weights": "an initialisation that changes the base's weights (PEFT can convert such an adapter: "
    "save_pretrained with path_initial_model_for_weight_conversion)",
    "trainable_token_indices": "trained tokens in addition to LoRA",
    "layer_replication": "layers that the base has not",
    "alora_invocation_tokens": "activated LoRA, which is on for some tokens only",
    "ensure_weight_tying": "one adapter for embedding and LM head",
}
"""The meaning of refused fields, in words."""


MATCHING_SECONDS = 4.0
"""The longest that an adapter's patterns may take to read, and to match: real ones take a hundredth of a second."""

_PLAIN = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class PeftSettings:
    """A readable adapter_config.json. Patterns have PEFT's keys: regular expressions on the ends of names."""

    r: int
    alpha: float
    dropout: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]
    target_parameters: tuple[str, ...]
    base: str

    def rank(self, site: str) -> int:
        return next((rank for key, rank in self.rank_pattern.items() if _matches(key, site)), self.r)

    def alpha_of(self, site: str) -> float:
        return next((alpha for key, alpha in self.alpha_pattern.items() if _matches(key, site)), self.alpha)

    def targets(self, module: str) -> bool:
        """Return whether `target_modules` names a module, as PEFT matches names."""
        if isinstance(self.target_modules, str):
            shorthand = self.target_modules.lower() == ALL_LINEAR
            return shorthand or re.fullmatch(self.target_modules, module) is not None
        return any(end in self._target_names for end in _ends(module))

    @cached_property
    def _target_names(self) -> frozenset[str]:
        # A set: files that name every module of a large model have tens of thousands.
        return frozenset(self.target_modules)

    def parameters(self, module: str) -> tuple[str, ...]:
        """Return the parameters of a module that `target_parameters` names, in the order of their declaration."""
        known = STACKED_PARAMETERS if is_named(module, "experts") else ("weight",)
        return tuple(
            name for name in known if any(is_named(f"{module}.{name}", target) for target in self.target_parameters)
        )


def read_settings(file: Path) -> PeftSettings:
    """Read an adapter_config.json. Raises `AdapterError` naming the field that is missing, wrong, or cannot be held."""
    values = read_config(file)
    try:
        _refuse_other_than_lora(values)
        with limited(MATCHING_SECONDS):
            ranks, alphas = _pattern(values, "rank_pattern"), _pattern(values, "alpha_pattern")
        return PeftSettings(
            r=_rank(values, "r"),
            alpha=_number(values, "lora_alpha"),
            dropout=_number(values, "lora_dropout", 0.0),
            use_rslora=bool(values.get("use_rslora")),
            rank_pattern={key: _rank(ranks, key) for key in ranks},
            alpha_pattern={key: _number(alphas, key) for key in alphas},
            target_modules=_target_modules(values),
            target_parameters=tuple(_names(values, "target_parameters")),
            base=str(values.get("base_model_name_or_path") or ""),
        )
    except LimitError as error:
        raise AdapterError(f"{file}: reading its patterns {error}: write plain names") from error
    except AdapterError as error:
        raise AdapterError(f"{file}: {error}") from error


def read_config(file: Path) -> dict[str, Any]:
    """Return the JSON object of an adapter's configuration file. Raises `AdapterError` if there is none."""
    missing = f"{file}: no such file; an adapter is a folder with it and its tensors"
    return read_object(file, AdapterError, missing=missing)


def is_named(site: str, target: str) -> bool:
    """Return whether a target is a name or the end of one, as PEFT matches."""
    return site == target or site.endswith(f".{target}")


def _ends(module: str) -> Iterator[str]:
    """Give a name and each of its ends after a dot."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


def _matches(key: str, site: str) -> bool:
    """Match as PEFT's `get_pattern_key` does: the key is a regular expression that ends where the name does."""
    return re.match(rf"(.*\.)?({key})$", site) is not None


def _refuse_other_than_lora(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name in HELD | WITHOUT_MEANING or not value or value in NEUTRAL.get(name, ()):
            continue
        in_words = f": {WORDS[name]}" if name in WORDS else ""
        raise AdapterError(
            f"{name} = {shortened(json.dumps(value))} is not plain LoRA{in_words}; Mindprint cannot hold that"
        )


def _rank(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise AdapterError(_wrong(values, name, "a positive whole number"))
    return value


def _number(values: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise AdapterError(_wrong(values, name, "a number"))
    return float(value)


def _pattern(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    pattern = values.get(name) or {}
    if not isinstance(pattern, dict):
        raise AdapterError(_wrong(values, name, "an object of names and numbers"))
    for key in pattern:
        if _PLAIN.fullmatch(key):
            continue  # compiling takes a third of a millisecond, and a large model has tens of thousands of names
        try:
            re.compile(key)
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterError(f"{name}: {shortened(repr(key))} is not a regular expression: {error}") from error
    return pattern


def _target_modules(values: Mapping[str, Any]) -> str | tuple[str, ...]:
    targets = values.get("target_modules")
    if not isinstance(targets, str):
        return tuple(_names(values, "target_modules"))
    try:
        re.compile(targets)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(
            f"target_modules: {shortened(repr(targets))} is not a regular expression: {error}"
        ) from error
    return targets


def _names(values: Mapping[str, Any], name: str) -> Sequence[str]:
    names = values.get(name) or []
    if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
        raise AdapterError(_wrong(values, name, "a list of names"))
    return names


def _wrong(values: Mapping[str, Any], name: str, expected: str) -> str:
    return (
        f"{name} must be {expected}, found {shortened(repr(values[name]))}" if name in values else f"{name} is missing"
    )
