"""A config.json as transformers reads it: absent fields, other names, rotary embeddings and windows of every layer.

transformers' own configuration classes know, but importing them imports torch. `transformers_facts.json` holds their
facts about every family that mlx-lm has too, and `scripts/write_transformers_facts.py` writes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from mindprint.errors import ModelError

ROPE_FIELDS = frozenset(
    {
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "rope_local_base_freq",
        "rotary_emb_base",
        "partial_rotary_factor",
        "rotary_pct",
        "original_max_position_embeddings",
    }
)
"""The fields that `_rope_by_layer` reads, and nothing else."""

WINDOW_FIELDS = frozenset(
    {
        "layer_types",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "sliding_window_pattern",
        "_sliding_window_pattern",
        "full_attention_interval",
        "full_attn_idxs",
        "hybrid_override_pattern",
    }
)
"""The fields from which the kinds of layers and their windows follow, and nothing else."""

ALWAYS_MEANT = frozenset(
    {
        "model_type", "quantization", "quantization_config", "text_config", "vision_config", "per_layer_config",
        "tie_word_embeddings",
        "global_head_dim", "num_global_key_value_heads",
    }
)  # fmt: skip
"""Fields that have a meaning in any family, whether or not its class names them."""

VALUES_RENAMED = (("gemma", "hidden_act", "gelu", "gelu_pytorch_tanh"),)
"""Family, field, the value that old configurations state, and the value that transformers takes it for."""

OLD_NAMES: Mapping[str, Mapping[str, str]] = {
    "lfm2": {"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"},
    "nemotron_h": {
        "mamba_n_groups": "n_groups",
        "mamba_d_conv": "conv_kernel",
        "mamba_expand": "expand",
        "mamba_dt_min": "time_step_min",
        "mamba_dt_max": "time_step_max",
        "mamba_dt_limit": "time_step_limit",
        "mamba_dt_init_floor": "time_step_floor",
        "mamba_conv_bias": "use_conv_bias",
        "mamba_chunk_size": "chunk_size",
    },
}
"""By family, names that its class takes for a field, before the field itself."""

FULL, SLIDING = "full_attention", "sliding_attention"
LINEAR, CONVOLUTION, MIXTURE, MLP = "linear_attention", "conv", "moe", "mlp"
"""Kinds of layers. A linear attention is a recurrence: a gated delta network, or Mamba."""

OTHER_KINDS: Mapping[str, frozenset[str]] = {
    "granitemoehybrid": frozenset({LINEAR}),
    "lfm2": frozenset({CONVOLUTION}),
    "mamba2": frozenset({LINEAR}),
    "nemotron_h": frozenset({LINEAR, MIXTURE, MLP}),
    "qwen3_5_text": frozenset({LINEAR}),
    "qwen3_next": frozenset({LINEAR}),
}
"""Families with layers that are not attention, and their kinds."""

KINDS_RENAMED = {"mamba": LINEAR, "attention": FULL}
"""Kinds in old configurations, in any family."""

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """One family's entry of `transformers_facts.json`."""

    defaults: Fields = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    rope_theta: Any = None
    rope_parameters: Fields | None = None


@dataclass(frozen=True)
class Configuration:
    """A config.json as transformers reads it, with defaults filled in, and fields under the class's own names.

    `rope`, `windows` and `layer_types` have an entry a layer: the parameters of its rotary embedding, if it has one,
    how many tokens it looks back, None for all, and its kind. `aliases` are other names that the class accepts, and the
    fields that they mean.
    """

    model_type: str
    fields: Fields
    rope: tuple[Fields | None, ...]
    windows: tuple[int | None, ...]
    layer_types: tuple[str, ...]
    aliases: Mapping[str, str]

    def value(self, name: str) -> Any:
        """Return the field that most families call `name`, whatever this one calls it."""
        return self.fields.get(self.aliases.get(name, name))

    def rotated_head(self, layer: int) -> int:
        """Return how many dimensions of a head a layer's rotary embedding could rotate."""
        named = ROTATED_HEADS.get(self.model_type, {}).get(self.layer_types[layer])
        stated = self.fields.get(named or "") or self.fields.get("head_dim")
        return int(stated or self.value("hidden_size") // self.value("num_attention_heads"))


def interpret(config: Fields) -> Configuration:
    """Read a config.json as transformers does.

    Raises:
        ModelError: If it lacks a field, or has one whose effect is not known here.
    """
    model_type = str(config["model_type"])
    facts = _all_facts().get(model_type, Facts())
    config = {name: _decoded(value) for name, value in config.items()}
    old = OLD_NAMES.get(model_type, {})
    config |= {old[name]: config.pop(name) for name in old if name in config}
    fields = _completed(model_type, config, facts)
    layers = fields.get(facts.aliases.get("num_hidden_layers", "num_hidden_layers"))
    if not isinstance(layers, int):
        raise ModelError(f"{model_type}: config.json does not say num_hidden_layers")
    types = _layer_types(model_type, fields, layers)
    windows = tuple(fields["sliding_window"] if kind == SLIDING else None for kind in types)
    rope = _rope_by_layer(model_type, config, fields, types, facts)
    return Configuration(model_type, fields, rope, windows, types, facts.aliases)


@cache
def _all_facts() -> Mapping[str, Facts]:
    return {name: Facts(**entry) for name, entry in _facts_file()["families"].items()}


@cache
def _facts_file() -> dict[str, Any]:
    text = files("mindprint_mlx").joinpath("transformers_facts.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def _decoded(value: Any) -> Any:
    """Return a value with the numbers in it that JSON does not have, which transformers writes as objects."""
    if isinstance(value, list):
        return [_decoded(part) for part in value]
    if isinstance(value, Mapping) and value.keys() == {"__float__"}:
        return float(value["__float__"])
    return value


def _completed(model_type: str, config: Fields, facts: Facts) -> dict[str, Any]:
    """Return the stated fields, and defaults for the rest, each under its class's own name.

    Fields that transformers ignores are left out.
    """
    stated = {name: value for name, value in config.items() if not _is_ignored(name, config, facts)}
    stated = {name: value for name, value in stated.items() if name not in facts.aliases}
    stated |= {facts.aliases[name]: value for name, value in config.items() if name in facts.aliases}
    defaults = {facts.aliases.get(name, name): value for name, value in facts.defaults.items()}
    fields = defaults | {name: _current(model_type, name, value) for name, value in stated.items()}
    if model_type in DERIVED:
        fields |= DERIVED[model_type](fields)
    hidden, heads = (fields.get(facts.aliases.get(name, name)) for name in ("hidden_size", "num_attention_heads"))
    # Configurations older than grouped-query attention do not have the field: each head has its keys.
    if fields.get("num_key_value_heads") is None and heads:
        fields["num_key_value_heads"] = heads
    # Where a family has no such field, its code divides the hidden dimensions among the heads.
    if fields.get("head_dim") is None and hidden and heads:
        fields["head_dim"] = hidden // heads
    return fields


def _latent_head(fields: Fields) -> Fields:
    """Return the head of a latent attention, of which a part alone is rotated."""
    return {"head_dim": fields["qk_rope_head_dim"]}


def _gemma4_heads(fields: Fields) -> Fields:
    """Return Gemma 4's heads of full attention, which transformers 5 writes for each layer."""
    by_layer = fields.get("per_layer_config") or {}
    stated = {json.dumps(heads, sort_keys=True) for heads in by_layer.values()}
    types = fields.get("layer_types") or ()
    full = {layer for layer, kind in enumerate(types) if kind == FULL}
    # Keys are padded with zeros where there are ten layers or more: "05".
    if len(stated) > 1 or (by_layer and {int(layer) for layer in by_layer} != full):
        raise ModelError(f"gemma4_text: per_layer_config = {by_layer} is not supported on MLX: it must be one for all")
    heads = json.loads(next(iter(stated), "{}"))
    if odd := sorted(heads.keys() - {"head_dim", "num_key_value_heads"}):
        raise ModelError(f"gemma4_text: per_layer_config states {odd[0]}, which is not supported on MLX")
    return {
        "per_layer_config": None,
        "global_head_dim": heads.get("head_dim") or fields.get("global_head_dim") or 512,
        "num_global_key_value_heads": heads.get("num_key_value_heads") or fields.get("num_global_key_value_heads"),
        # transformers makes the last layer one of full attention, whatever the file says.
        **({"layer_types": [*types[:-1], FULL]} if types else {}),
    }


def _attention_at_intervals(fields: Fields) -> Fields:
    """Return the kinds of layers of Qwen's hybrids."""
    period = fields.get("full_attention_interval") or 4
    kinds = [FULL if (layer + 1) % period == 0 else LINEAR for layer in range(fields["num_hidden_layers"])]
    return {"layer_types": fields.get("layer_types") or kinds, "mlp_only_layers": fields.get("mlp_only_layers") or []}


def _lfm2_kinds(fields: Fields) -> Fields:
    """Return the kinds of LFM2's layers."""
    layers = range(fields["num_hidden_layers"])
    attending = layers if fields.get("full_attn_idxs") is None else fields["full_attn_idxs"]
    kinds = [FULL if layer in attending else CONVOLUTION for layer in layers]
    return {"layer_types": fields.get("layer_types") or kinds}


def _granite_hybrid_fields(fields: Fields) -> Fields:
    """Return the kinds of Granite 4's layers, and the size of its Mamba heads."""
    heads = fields["mamba_d_head"]
    if heads == "auto":
        heads = fields["mamba_expand"] * fields["hidden_size"] // fields["mamba_n_heads"]
    return {
        "layer_types": fields.get("layer_types") or [LINEAR] * fields["num_hidden_layers"],
        "mamba_d_head": heads,
    }


NEMOTRON_PATTERN = {"M": LINEAR, "*": FULL, "-": MLP, "E": MIXTURE}
"""The letters of `hybrid_override_pattern`."""


def _nemotron_fields(fields: Fields) -> Fields:
    """Return the kinds of Nemotron-H's layers, whose number decides how many there are."""
    kinds = fields.get("layers_block_type")
    if fields.get("hybrid_override_pattern"):
        kinds = kinds or [NEMOTRON_PATTERN.get(letter, letter) for letter in fields["hybrid_override_pattern"]]
    kinds = kinds or [LINEAR, MIXTURE, FULL, MLP]
    return {"layer_types": kinds, "num_hidden_layers": len(kinds)}


DERIVED: Mapping[str, Callable[[Fields], Fields]] = {
    "deepseek_v2": _latent_head,
    "deepseek_v3": _latent_head,
    "gemma4_text": _gemma4_heads,
    "granitemoehybrid": _granite_hybrid_fields,
    "lfm2": _lfm2_kinds,
    "mamba2": lambda fields: {"layer_types": [LINEAR] * fields["num_hidden_layers"]},
    "nemotron_h": _nemotron_fields,
    "qwen3_5_text": _attention_at_intervals,
    "qwen3_next": _attention_at_intervals,
}
"""Fields that a family's transformers class computes from others."""

ROTATED_HEADS = {"gemma4_text": {FULL: "global_head_dim"}}
"""The field of a head's dimensions, by kind of layer, in families where it is not `head_dim`."""


def _current(model_type: str, name: str, value: Any) -> Any:
    """Return the value that transformers takes a stated one for."""
    for meant_in, field_name, old, new in VALUES_RENAMED:
        if (model_type, name, value) == (meant_in, field_name, old):
            return new
    return value


def _is_ignored(name: str, config: Fields, facts: Facts) -> bool:
    """Return whether transformers does nothing with a field: neither its class nor the family's code knows it."""
    if not facts.defaults or name in facts.defaults.keys() | facts.aliases.keys() | set(facts.aliases.values()):
        return False
    if name in facts.optional or name in ROPE_FIELDS | WINDOW_FIELDS or name in ALWAYS_MEANT:
        return False
    # A newer transformers than the one that the facts are from may know more fields.
    written_by = re.match(r"(\d+)\.(\d+)", str(config.get("transformers_version", "")))
    known = re.match(r"(\d+)\.(\d+)", _facts_file()["transformers"])
    assert known is not None
    return written_by is not None and tuple(map(int, written_by.groups())) <= tuple(map(int, known.groups()))


def _everywhere(fields: Fields, _: int) -> bool:
    return bool(fields.get("sliding_window"))


def _if_used(fields: Fields, _: int) -> bool:
    return bool(fields.get("use_sliding_window") and fields.get("sliding_window"))


def _upper_layers(fields: Fields, layer: int) -> bool:
    return _if_used(fields, layer) and layer >= fields["max_window_layers"]


def _lower_alternating(fields: Fields, layer: int) -> bool:
    return _if_used(fields, layer) and (layer + 1) % 2 != 0 and layer < fields["max_window_layers"]


def _all_but_each(period: int) -> Callable[[Fields, int], bool]:
    def rule(fields: Fields, layer: int) -> bool:
        stated = fields.get("_sliding_window_pattern") or fields.get("sliding_window_pattern")
        return (layer + 1) % (stated if isinstance(stated, int) else period) != 0

    return rule


def _without_rope(fields: Fields, layer: int) -> bool:
    return _if_used(fields, layer) and not _smollm3_rope(fields, layer)


SLIDING_LAYERS: Mapping[str, Callable[[Fields, int], bool]] = {
    "mistral": _everywhere,
    "mixtral": _everywhere,
    "phi3": _everywhere,
    "starcoder2": _everywhere,
    "qwen2": _upper_layers,
    "qwen2_5_vl_text": _upper_layers,
    "qwen3": _upper_layers,
    "qwen2_moe": _lower_alternating,
    "qwen3_moe": _if_used,
    "dots1": lambda fields, layer: bool(fields.get("sliding_window")) and layer >= fields["max_window_layers"],
    "gemma2": _all_but_each(2),
    "gemma3_text": _all_but_each(6),
    "exaone4": _all_but_each(4),
    "cohere2": _all_but_each(4),
    "olmo3": _all_but_each(4),
    "smollm3": _without_rope,
    "ministral3": _everywhere,
    "phimoe": _everywhere,
    "gpt_oss": _all_but_each(2),
    "gemma3n_text": _all_but_each(5),
    "gemma4_text": _all_but_each(6),
}
"""Rules for layers that slide where a configuration has no `layer_types`, from each class's `__post_init__`."""

LAYER_TYPES_IGNORED = ("mistral", "mixtral", "phi3", "starcoder2", "qwen3_moe", "llama", "ministral3", "phimoe")
"""Families whose transformers class does not read `layer_types`."""


def _layer_types(model_type: str, fields: Fields, layers: int) -> tuple[str, ...]:
    stated = fields.get("layer_types")
    if stated and model_type not in LAYER_TYPES_IGNORED:
        return _stated_layer_types(model_type, fields, layers)
    rule = SLIDING_LAYERS.get(model_type)
    if rule is not None:
        return tuple(SLIDING if rule(fields, layer) else FULL for layer in range(layers))
    if model_type != "llama" and fields.get("sliding_window") and fields.get("use_sliding_window") is not False:
        raise ModelError(f"{model_type}: sliding_window is {fields['sliding_window']}, but not in which layers")
    return (FULL,) * layers


def _stated_layer_types(model_type: str, fields: Fields, layers: int) -> tuple[str, ...]:
    types = tuple(KINDS_RENAMED.get(kind, kind) for kind in fields["layer_types"])
    if odd := sorted(set(types) - {FULL, SLIDING} - OTHER_KINDS.get(model_type, frozenset())):
        raise ModelError(f"{model_type}: layers of type {odd[0]} are not supported on MLX")
    if len(types) != layers:
        raise ModelError(f"{model_type}: layer_types names {len(types)} of {layers} layers")
    # Qwen writes `layer_types` also where windows are off.
    if fields.get("use_sliding_window") is False:
        return (FULL,) * layers
    if SLIDING in types and not fields.get("sliding_window"):
        raise ModelError(f"{model_type}: layers slide, but config.json does not say sliding_window")
    return types


def _smollm3_rope(fields: Fields, layer: int) -> bool:
    stated = fields.get("no_rope_layers")
    return bool(stated[layer] if stated else (layer + 1) % fields["no_rope_layer_interval"] != 0)


ROPE_LAYERS: Mapping[str, Callable[[Fields, int, str], bool]] = {
    "smollm3": lambda fields, layer, _: _smollm3_rope(fields, layer),
    "exaone4": lambda fields, _, kind: fields.get("sliding_window") is None or kind == SLIDING,
    "cohere2": lambda _fields, _layer, kind: kind == SLIDING,
    "granitemoehybrid": lambda fields, _layer, _kind: fields["position_embedding_type"] == "rope",
}
"""Rules for layers that have a rotary embedding, in families where some have none."""

ROPE_NAMES: Mapping[str, Mapping[str, str]] = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
}
"""Other names of rope fields in old configurations."""

ROPE_TYPES_RENAMED = {
    "phi3": {"su": "longrope", "yarn": "longrope"},
    "qwen2_5_vl_text": {"mrope": "default"},
    "qwen3_vl_text": {"mrope": "default"},
    "hunyuan_v1_dense": {"dynamic": "ntk_alpha"},
}
"""The `rope_type` that transformers takes a stated one for."""

LOCAL_BASE = {"gemma3_text": "rope_local_base_freq", "gemma3n_text": "rope_local_base_freq"}
"""The field of old configurations that holds the base of sliding layers."""


def _rope_by_layer(
    model_type: str, config: Fields, fields: Fields, types: tuple[str, ...], facts: Facts
) -> tuple[Fields | None, ...]:
    by_type = _rope_by_type(model_type, config, fields, facts)
    rotates = ROPE_LAYERS.get(model_type, lambda *_: True)
    return tuple(
        by_type.get(kind, by_type.get("")) if kind in (FULL, SLIDING) and rotates(fields, layer, kind) else None
        for layer, kind in enumerate(types)
    )


def _rope_by_type(model_type: str, config: Fields, fields: Fields, facts: Facts) -> dict[str, Fields]:
    """Return complete parameters by layer type, or under "" for all. A family without rotary embedding has none."""
    names = ROPE_NAMES.get(model_type, {})
    # transformers 4 wrote `rope_scaling` with the base at the top, transformers 5 writes `rope_parameters` with it
    # inside.
    stated = config.get("rope_scaling") or config.get("rope_parameters") or _default_scaling(facts)
    theta = config.get(names.get("rope_theta", "rope_theta"))
    partial = config.get(names.get("partial_rotary_factor", "partial_rotary_factor"))
    if not stated and theta is None and facts.rope_parameters is None:
        return {}
    nested = {kind: dict(value or {}) for kind, value in stated.items() if kind in (FULL, SLIDING)}
    # Gemma 3 of transformers 4: one scaling, which is of the full layers, and two bases.
    if not nested and isinstance(facts.rope_theta, dict):
        nested = {FULL: dict(stated), SLIDING: {}}
    thetas = _default_thetas(model_type, config, theta, facts)
    default = facts.rope_parameters or {}
    result = {}
    for kind, parameters in (nested or {"": dict(stated)}).items():
        fallback = default.get(kind) or default
        parameters.setdefault("rope_theta", thetas[kind])
        parameters.setdefault(
            "partial_rotary_factor", fallback.get("partial_rotary_factor") if partial is None else partial
        )
        result[kind] = _standardized(model_type, parameters, fields)
    return result


def _default_scaling(facts: Facts) -> Fields:
    """Return the scaling of a family that scales where its configuration states none. A `rope_theta` keeps it."""
    default = facts.rope_parameters or {}
    nested: list[Fields] = [value for value in default.values() if isinstance(value, dict)]
    return default if any(each.get("rope_type", "default") != "default" for each in nested or [default]) else {}


def _default_thetas(model_type: str, config: Fields, theta: Any, facts: Facts) -> dict[str, Any]:
    """Return the base to use where the rope parameters state none, by layer type."""
    default = facts.rope_theta
    by_name = default if isinstance(default, dict) else {"global": default, "local": default}
    local = config.get(LOCAL_BASE[model_type]) if model_type in LOCAL_BASE else theta
    everywhere = by_name["global"] if theta is None else theta
    return {"": everywhere, FULL: everywhere, SLIDING: by_name["local"] if local is None else local}


def _standardized(model_type: str, parameters: dict[str, Any], fields: Fields) -> Fields:
    """Return parameters with one `rope_type`, and with the length that long-context types scale from."""
    kind = parameters.pop("rope_type", None) or parameters.get("type") or "default"
    parameters.pop("type", None)
    kind = ROPE_TYPES_RENAMED.get(model_type, {}).get(kind, kind)
    if kind in ("llama3", "yarn", "longrope"):
        length = fields.get("original_max_position_embeddings")
        if length is None:
            length = parameters.get("original_max_position_embeddings") or fields.get("max_position_embeddings")
        parameters["original_max_position_embeddings"] = length
    if parameters["partial_rotary_factor"] is None:
        parameters["partial_rotary_factor"] = 1.0
    return {"rope_type": kind, **parameters}
