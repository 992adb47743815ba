"""The fields of PEFT's `adapter_config.json` and their meaning. A field that Mindprint cannot hold is refused by name.

Every field of PEFT's `LoraConfig` is in one of the tables below: it is honoured (`HELD`), or must have the value that
means plain LoRA (`NEUTRAL`, `REFUSED`), or does not touch the computation with trained tensors (`WITHOUT_MEANING`). A
test compares the tables with the installed PEFT, and another computes with each harmless field in PEFT.
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
from mindprint.models.layer_names import is_embedding, is_lm_head

HELD = frozenset(
    {
        "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout",
        "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern",
        "base_model_name_or_path", "revision",
    }
)  # fmt: skip
"""Fields that are read."""

WITHOUT_MEANING = frozenset(
    {
        # how it was started and trained
        "inference_mode", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
        "runtime_config", "qalora_group_size",
        # how the base keeps a weight: PEFT sets it by the layer that it finds, whatever the file says
        "fan_in_fan_out",
        # who wrote the file, and which library would split its layers if `megatron_config` were there
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
"""Values for which a field means plain LoRA. Null and false mean nothing either."""

REFUSED: Mapping[str, str] = {
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
    "arrow_config": "a router between several adapters",
    "kasa_config": "KaSA, which takes singular values away from the base's weights",
    "megatron_config": "layers that are split over several processes",
    "monteclora_config": "MonteCLoRA, which draws its factors at random",
    "use_bdlora": "block-diagonal factors",
    "use_qalora": "QA-LoRA, which pools the inputs of a layer",
    "velora_config": "VeLoRA, a layer that differs in training",
}
"""Fields that are refused unless they are null or false, with their meaning in words."""

_EMPTY_IS_NOTHING = frozenset({"modules_to_save", "trainable_token_indices", "layer_replication"})
"""Refused fields for which PEFT takes an empty list for null. An empty object of settings turns a variant on."""


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
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: frozenset[int] | None = None
    layers_pattern: tuple[str, ...] = ()
    starts_at_zero: bool = True
    """Whether a module that is targeted and has no tensors is at B = 0 in PEFT, where it changes nothing."""

    def rank(self, site: str) -> int:
        return next((rank for key, rank in self.rank_pattern.items() if _matches(key, site)), self.r)

    def alpha_of(self, site: str) -> float:
        return next((alpha for key, alpha in self.alpha_pattern.items() if _matches(key, site)), self.alpha)

    def targets(self, module: str) -> bool:
        """Return whether `target_modules` names a module, as PEFT matches names."""
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == ALL_LINEAR:
                return not is_embedding(module) and not is_lm_head(module)
            return re.fullmatch(self.target_modules, module) is not None
        return any(end in self._target_names for end in name_ends(module))

    def left_out_by(self, module: str) -> str | None:
        """Return the field that keeps PEFT from adapting a targeted module, None if there is none.

        PEFT loads such an adapter with a warning about unexpected keys, and computes without these tensors.
        """
        if isinstance(self.exclude_modules, str):
            if re.fullmatch(self.exclude_modules, module):
                return "exclude_modules"
        elif any(is_named(module, name) for name in self.exclude_modules):
            return "exclude_modules"
        # A module that target_modules names in full is adapted in any layer: PEFT looks at the layers of endings only.
        if self.layers_to_transform is None or module in self._target_names:
            return None
        layer = self._layer(module)
        return None if layer in self.layers_to_transform else "layers_to_transform"

    def _layer(self, module: str) -> int | None:
        """Return the number of a module's layer, as PEFT finds it: the first number behind a name of the pattern."""
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next(filter(None, (re.match(pattern, module) for pattern in patterns)), None)
        return int(found[1]) if found else None

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
            target_modules=_module_names(values, "target_modules"),
            target_parameters=tuple(_names(values, "target_parameters")),
            base=str(values.get("base_model_name_or_path") or ""),
            exclude_modules=_module_names(values, "exclude_modules"),
            layers_to_transform=_layers(values),
            layers_pattern=_layer_patterns(values),
            starts_at_zero=values.get("init_lora_weights", True) in (True, "gaussian"),
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


def name_ends(module: str) -> Iterator[str]:
    """Yield a name and each of its ends after a dot."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


def _matches(key: str, site: str) -> bool:
    """Match as PEFT's `get_pattern_key` does: the key is a regular expression that ends where the name does."""
    return re.match(rf"(.*\.)?({key})$", site) is not None


def _refuse_other_than_lora(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name in HELD | WITHOUT_MEANING or value is None or value is False or value in NEUTRAL.get(name, ()):
            continue
        if not value and (name in _EMPTY_IS_NOTHING or name not in REFUSED):
            continue
        in_words = f": {REFUSED[name]}" if name in REFUSED else ""
        raise AdapterError(
            f"{name} = {shortened(json.dumps(value))} is not plain LoRA{in_words}; Mindprint cannot hold that"
        )
    # PEFT refuses these two itself: it applies both to the endings of names only.
    if isinstance(values.get("target_modules"), str) and values.get("layers_to_transform") is not None:
        raise AdapterError("layers_to_transform needs a list of names as target_modules, found a pattern")
    if values.get("layers_pattern") and values.get("layers_to_transform") is None:
        raise AdapterError("layers_pattern is there without layers_to_transform")


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
        # Compiling takes a third of a millisecond, and a large model has tens of thousands of names.
        if not _PLAIN.fullmatch(key):
            _compile(key, name)
    return pattern


def _module_names(values: Mapping[str, Any], name: str) -> str | tuple[str, ...]:
    names = values.get(name)
    if not isinstance(names, str):
        return tuple(_names(values, name))
    # An empty text is how a tool writes "none". As a pattern it would match nothing.
    if not names:
        return ()
    _compile(names, name)
    return names


def _layers(values: Mapping[str, Any]) -> frozenset[int] | None:
    layers = values.get("layers_to_transform")
    numbers = [layers] if isinstance(layers, int) and not isinstance(layers, bool) else layers
    # PEFT takes an empty list for null.
    if not numbers and not isinstance(numbers, int | dict | str):
        return None
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise AdapterError(_wrong(values, "layers_to_transform", "a number or a list of numbers"))
    return frozenset(numbers)


def _layer_patterns(values: Mapping[str, Any]) -> tuple[str, ...]:
    pattern = values.get("layers_pattern")
    patterns = ((pattern,) if pattern else ()) if isinstance(pattern, str) else tuple(_names(values, "layers_pattern"))
    for text in patterns:
        _compile(text, "layers_pattern")
    return patterns


def _compile(pattern: str, name: str) -> None:
    """Raise `AdapterError` for a text that is not a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(f"{name}: {shortened(repr(pattern))} is not a regular expression: {error}") from error


def _names(values: Mapping[str, Any], name: str) -> Sequence[str]:
    names = values.get(name) or []
    if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
        raise AdapterError(_wrong(values, name, "a list of names"))
    return names


def _wrong(values: Mapping[str, Any], name: str, expected: str) -> str:
    return (
        f"{name} must be {expected}, found {shortened(repr(values[name]))}" if name in values else f"{name} is missing"
    )
