"""Facts about single families: each difference between mlx-lm's class and transformers', and how it is dealt with.

A family that is not here needs nothing but the rules of `architectures.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx import nn

from mindprint_mlx.calls import replace_method, wrap_call
from mindprint_mlx.configuration import FULL, SLIDING, Configuration
from mindprint_mlx.latent_attention import use_latent_attention
from mindprint_mlx.recurrent import (
    attention_interval,
    granite_hybrid_arguments,
    granite_hybrid_layers,
    lfm2_arguments,
    mamba2_arguments,
    mamba2_norms,
    nemotron_arguments,
    use_chunked_delta_rule,
)
from mindprint_mlx.rope import LENGTH_SCALES
from mindprint_mlx.routing import use_grouped_routing

Change = Callable[[nn.Module, Configuration], None]


class _Anything:
    """A set of values that has every value."""

    def __contains__(self, _: object) -> bool:
        return True


ANYTHING = _Anything()


@dataclass(frozen=True)
class Family:
    """Facts about one family.

    `module` is the name of our own class, where mlx-lm's cannot be used. `classes` are the names of the module's model
    and of its arguments. `constants` are parameters of the class that
    the configuration has no field for, `arguments` those that are computed from it. `harmless` are fields that the
    class does not read, and the values for which that changes nothing. `activation` is what the class computes, where
    its source calls several functions. `rope_parameters` are parameters that only this family has. `fixed_rope` says
    that transformers reads no rope field, as the class. `own_windows` says that the class applies the configuration's
    windows. `prepare` changes the built model before its weights are read, and `repair` afterwards. `stored_name` is
    the transformers name of a parameter whose tensor the class changes when it loads.
    """

    module: str | None = None
    classes: tuple[str, str] = ("Model", "ModelArgs")
    constants: Mapping[str, Any] = field(default_factory=dict)
    arguments: Callable[[Configuration], Mapping[str, Any]] | None = None
    harmless: Mapping[str, Any] = field(default_factory=dict)
    activation: str | None = None
    rope_parameters: frozenset[str] = frozenset()
    fixed_rope: bool = False
    own_windows: bool = False
    prepare: Change | None = None
    repair: Change | None = None
    stored_name: Callable[[str], str] | None = None


def family(model_type: str) -> Family:
    """Return the facts about a family."""
    return _FAMILIES.get(model_type, Family())


def _unrounded_embedding_scale(module: nn.Module, configuration: Configuration) -> None:
    """Undo the rounding of the factor of Gemma 3's embedding."""
    # It is sqrt(hidden), which mlx-lm rounds to bfloat16 even in a float32 model.
    scale = configuration.fields["hidden_size"] ** 0.5
    rounded = mx.array(scale, mx.bfloat16).item()
    layer = module.layers[0]
    if module.model.embed_tokens.weight.dtype == mx.float32 and rounded != scale:
        wrap_call(layer, lambda call, x, *rest, **named: call(x * (scale / rounded), *rest, **named))


def _rotate_some_layers(module: nn.Module, configuration: Configuration) -> None:
    """Tell Cohere 2's layers whether they rotate, which the class takes for the same as sliding."""
    for layer, rope in zip(module.layers, configuration.rope, strict=True):
        layer.self_attn.use_sliding_window = rope is not None


def _rotating_pattern(configuration: Configuration) -> dict[str, Any]:
    """Return EXAONE 4's pattern."""
    # It also decides which layers rotate: those that it calls local, or all without a pattern.
    if all(rope is not None for rope in configuration.rope):
        return {"sliding_window_pattern": None}
    return {"sliding_window_pattern": "".join("G" if rope is None else "L" for rope in configuration.rope)}


def _both_kinds(configuration: Configuration) -> dict[str, Any]:
    """Return kinds of layers for classes that look for the first of each. Their masks are the same without windows."""
    return {"layer_types": [SLIDING] + [FULL] * (len(configuration.layer_types) - 1)}


def _scaled_queries(configuration: Configuration) -> dict[str, Any]:
    """Return Ministral 3's parameters of queries, which grow with their position. Rotations are set later."""
    rope = configuration.rope[0] or {}
    return {
        "layer_types": [FULL] * len(configuration.layer_types),
        "rope_parameters": {
            "rope_theta": 10000.0,
            "rope_type": "default",
            "llama_4_scaling_beta": rope.get("llama_4_scaling_beta") or 0.0,
            "original_max_position_embeddings": rope.get("original_max_position_embeddings") or 1,
        },
    }


def _own_windows(configuration: Configuration) -> dict[str, Any]:
    """Return kinds of layers and window for classes that mask as transformers does."""
    plain = {"rope_theta": 10000.0, "rope_type": "default"}
    return {
        "layer_types": list(configuration.layer_types),
        "sliding_window": configuration.fields["sliding_window"],
        "rope_parameters": {FULL: plain, SLIDING: plain},
    }


def _plain_linears(module: nn.Module, _: Configuration) -> None:
    """Give BitNet linear layers with unpacked weights, which a full-precision checkpoint holds."""
    for block in module.layers:
        for part, names in (
            (block.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj")),
            (block.mlp, ("gate_proj", "up_proj", "down_proj")),
        ):
            for name in names:
                packed = part[name]
                part[name] = nn.Linear(packed.in_features, packed.out_features, bias="bias" in packed)


def _gpt_names(module: nn.Module, _: Configuration) -> None:
    """Read checkpoints of the bare body as well, which have no prefix `transformer.`, as transformers does."""
    sanitize: Any = getattr(type(module), "sanitize", None)

    def renamed(self: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        bare = {name.removeprefix("transformer."): values for name, values in weights.items()}
        # The class has no layer for a head that is the embedding. The check of dropped weights refuses any other.
        bare.pop("lm_head.weight", None)
        return sanitize(self, bare) if sanitize else {f"transformer.{name}": values for name, values in bare.items()}

    replace_method(module, "sanitize", renamed)


def _gpt2(module: nn.Module, configuration: Configuration) -> None:
    _gpt_names(module, configuration)
    width = configuration.fields["n_inner"] or 4 * configuration.fields["n_embd"]
    for block in module.layers:
        block.mlp.c_fc = nn.Linear(configuration.fields["n_embd"], width)
        block.mlp.c_proj = nn.Linear(width, configuration.fields["n_embd"])


def _unpacked_experts(module: nn.Module, _: Configuration) -> None:
    """Read GPT-OSS's experts where they are not quantized, whose names and axes the class does not know."""
    sanitize: Any = getattr(type(module), "sanitize", None)

    def unpacked(self: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        renamed = {}
        for name, values in weights.items():
            prefix, packed, kind = name.partition("gate_up_proj")
            if packed:
                # Columns of gate and up take turns. Matrices are `[experts, in, out]`, biases `[experts, out]`.
                suffix = "bias" if kind else "weight"
                axes = values if kind else values.swapaxes(1, 2)
                renamed[f"{prefix}gate_proj.{suffix}"] = mx.contiguous(axes[:, ::2])
                renamed[f"{prefix}up_proj.{suffix}"] = mx.contiguous(axes[:, 1::2])
            elif name.endswith("experts.down_proj"):
                renamed[f"{name}.weight"] = mx.contiguous(values.swapaxes(1, 2))
            elif name.endswith("experts.down_proj_bias"):
                renamed[name.removesuffix("_bias") + ".bias"] = values
            else:
                renamed[name] = values
        return dict(sanitize(self, renamed))

    replace_method(module, "sanitize", unpacked)


def _biases_of_configuration(module: nn.Module, configuration: Configuration) -> None:
    """Leave PhiMoE's layers without the biases that the configuration does not have. The class has all."""
    attentions = [layer.self_attn for layer in module.layers]
    layers = [attention[name] for attention in attentions for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    for linear in [] if configuration.fields["attention_bias"] else layers:
        del linear.bias
    if not configuration.fields["lm_head_bias"]:
        del module.lm_head.bias


def _latent_grouped(module: nn.Module, configuration: Configuration) -> None:
    use_latent_attention(module, configuration)
    use_grouped_routing(module, configuration)


MIXTURE = {"norm_topk_prob": (False,), "num_local_experts": ANYTHING, "num_experts": ANYTHING}
LATENT = {
    # Part of the shapes, which the attention here has from other fields.
    "qk_head_dim": ANYTHING,
    "v_head_dim": ANYTHING,
    "rope_interleave": ANYTHING,
    "mlp_bias": (False,),
    "aux_loss_alpha": ANYTHING,
    "seq_aux": ANYTHING,
    "ep_size": (None, 1),
    "num_nextn_predict_layers": ANYTHING,
    "num_mtp_layers": ANYTHING,
    "norm_topk_prob": ANYTHING,
    "scoring_func": ("softmax",),
    "moe_layer_freq": (1,),
}

MULTIPLE_POSITIONS = frozenset({"mrope_section", "mrope_interleaved"})

_FAMILIES: Mapping[str, Family] = {
    "apertus": Family(constants={"mlp_bias": False, "post_norm": False, "qk_norm": True}),
    "bitnet": Family(prepare=_plain_linears, constants={"mlp_bias": False}),
    "cohere2": Family(arguments=lambda _: {"sliding_window_pattern": 1}, repair=_rotate_some_layers),
    "deepseek_v2": Family(
        harmless=LATENT,
        constants={"moe_layer_freq": 1, "rope_scaling": {"factor": 1.0}},
        prepare=use_latent_attention,
    ),
    "deepseek_v3": Family(
        harmless=LATENT | {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
        constants={"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
        prepare=_latent_grouped,
    ),
    "dots1": Family(constants={"scoring_func": "sigmoid", "mlp_bias": False}, repair=use_grouped_routing),
    "exaone4": Family(arguments=_rotating_pattern),
    # Every layer global: none slides by the class's pattern, and `complete` gives those that slide their windows.
    "gemma3_text": Family(arguments=lambda _: {"sliding_window_pattern": 1}, repair=_unrounded_embedding_scale),
    "gemma3n_text": Family(
        module="gemma3n_text", own_windows=True, arguments=_own_windows, harmless={"altup_coef_clip": ANYTHING}
    ),
    "gemma4_text": Family(
        own_windows=True,
        arguments=_own_windows,
        activation="gelu_tanh",
        harmless={"per_layer_config": (None,)},
        constants={"sliding_window_pattern": 6, "global_partial_rotary_factor": 0.25},
    ),
    "glm4_moe": Family(
        harmless={"num_nextn_predict_layers": ANYTHING, "num_mtp_layers": ANYTHING},
        constants={"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        repair=use_grouped_routing,
    ),
    "gpt2": Family(
        constants={"n_ctx": None},
        harmless={"n_inner": ANYTHING},
        prepare=_gpt2,
        stored_name=lambda name: "transformer." + name.removeprefix("model."),
    ),
    "gpt_bigcode": Family(
        constants={"attention_bias": True, "mlp_bias": True},
        harmless={"attention_softmax_in_fp32": ANYTHING, "scale_attention_softmax_in_fp32": ANYTHING},
        prepare=_gpt_names,
        stored_name=lambda name: name,
    ),
    "gpt_oss": Family(
        arguments=_both_kinds,
        prepare=_unpacked_experts,
        # The class computes the clipped gate of the family, with these constants, and never the activation.
        activation="silu",
        harmless={"swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
    ),
    "gptj": Family(fixed_rope=True, harmless={"n_inner": ANYTHING}),
    "granitemoehybrid": Family(
        arguments=granite_hybrid_arguments,
        constants={"mlp_bias": False},
        harmless={"mamba_chunk_size": ANYTHING, "mamba_expand": ANYTHING},
        prepare=granite_hybrid_layers,
    ),
    "hunyuan_v1_dense": Family(constants={"use_qk_norm": True}),
    "lfm2": Family(arguments=lfm2_arguments),
    "mamba2": Family(
        arguments=mamba2_arguments,
        # Chunks are how it is computed. The rest is for initialisation, or for residuals of reduced precision.
        harmless={
            "chunk_size": ANYTHING,
            "expand": ANYTHING,
            "rescale_prenorm_residual": ANYTHING,
            "residual_in_fp32": ANYTHING,
            "time_step_floor": ANYTHING,
            "time_step_max": ANYTHING,
            "time_step_min": ANYTHING,
            "time_step_rank": ANYTHING,
        },
        prepare=mamba2_norms,
    ),
    "ministral3": Family(
        arguments=_scaled_queries, rope_parameters=frozenset({"llama_4_scaling_beta", "max_position_embeddings"})
    ),
    "mistral": Family(constants={"attention_bias": False, "mlp_bias": False}),
    "nanochat": Family(harmless={"final_logit_softcapping": (15.0,)}),
    "nemotron_h": Family(
        arguments=nemotron_arguments,
        harmless={
            "chunk_size": ANYTHING,
            "expand": ANYTHING,
            "rescale_prenorm_residual": ANYTHING,
            "residual_in_fp32": (False,),
            "use_mamba_kernels": ANYTHING,
            "mamba_ssm_cache_dtype": ANYTHING,
            "mamba_hidden_act": ("silu",),
            "num_logits_to_keep": ANYTHING,
            "num_nextn_predict_layers": ANYTHING,
            "mtp_layers_block_type": ANYTHING,
            "moe_shared_expert_overlap": ANYTHING,
            "time_step_floor": ANYTHING,
            "time_step_max": ANYTHING,
            "time_step_min": ANYTHING,
            "layers_block_type": ANYTHING,
        },
        activation="relu2",
        stored_name=lambda name: re.sub("^backbone[.]", "model.", name),
    ),
    "olmo": Family(module="olmo"),
    "olmo2": Family(constants={"mlp_bias": False}),
    "olmo3": Family(arguments=_both_kinds),
    "olmoe": Family(constants={"mlp_bias": False}),
    "phi3": Family(constants={"rope_scaling": None}),
    # Of text, the three positions of a token are the same, so that it is rotated as by one of them.
    "qwen2_5_vl_text": Family(rope_parameters=MULTIPLE_POSITIONS),
    "qwen3_vl_text": Family(rope_parameters=MULTIPLE_POSITIONS),
    "phimoe": Family(
        harmless={"input_jitter_noise": ANYTHING}, rope_parameters=LENGTH_SCALES, prepare=_biases_of_configuration
    ),
    "qwen3_5_text": Family(
        classes=("TextModel", "TextModelArgs"),
        arguments=attention_interval,
        constants={
            "num_experts": 0,
            "num_experts_per_tok": 0,
            "decoder_sparse_step": 1,
            "shared_expert_intermediate_size": 0,
            "moe_intermediate_size": 0,
            "norm_topk_prob": True,
        },
        # Of text, all three positions are the same.
        rope_parameters=frozenset({"mrope_section", "mrope_interleaved"}),
        harmless={"mlp_only_layers": ([],)},
        repair=use_chunked_delta_rule,
    ),
    "qwen3_next": Family(arguments=attention_interval, repair=use_chunked_delta_rule),
}


def own_families() -> frozenset[str]:
    """Return the families that have a class of ours."""
    return frozenset(name for name, facts in _FAMILIES.items() if facts.module)


def own_module(model_type: str) -> ModuleType | None:
    """Return our own module for a family, if it has one."""
    name = family(model_type).module
    return None if name is None else import_module(f"mindprint_mlx.classes.{name}")
