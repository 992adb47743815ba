"""Families with layers that are not attention: gated delta networks, short convolutions, Mamba.

A token's state comes from those before it alone, so that padding behind a row changes nothing about it. Rows are padded
on the right everywhere, and prompts are neither shared nor continued together in these families.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn

from mindprint.errors import ModelError
from mindprint_mlx.calls import replace_call, replace_method
from mindprint_mlx.configuration import FULL, LINEAR, MIXTURE, MLP, Configuration
from mindprint_mlx.delta_rule import gated_delta_layer
from mindprint_mlx.imports import mlx_lm_module


def attention_interval(configuration: Configuration) -> dict[str, Any]:
    """Return the one number from which Qwen's classes derive the kinds of their layers.

    Raises:
        ModelError: If the layers of the configuration follow no such rule.
    """
    kinds = configuration.layer_types
    period = kinds.index(FULL) + 1 if FULL in kinds else 0
    regular = [FULL if period and (layer + 1) % period == 0 else LINEAR for layer in range(len(kinds))]
    # The class looks up the cache of its first layer of each kind.
    if list(kinds) != regular or period < 2:
        raise ModelError(
            f"model_type {configuration.model_type!r}: layer_types {list(kinds)} are not supported on MLX: every n-th "
            "layer must be one of full_attention, and the others linear_attention; train it on torch"
        )
    return {"full_attention_interval": period}


def use_chunked_delta_rule(module: nn.Module, _: Configuration) -> None:
    """Let gated delta networks read whole chunks of tokens, with gradients on every device."""

    def call(self: nn.Module, inputs: mx.array, _: Any = None, cache: Any = None) -> mx.array:
        # The mask is left out: it would hide padding on the left, which no row has here.
        return gated_delta_layer(self, inputs, cache)

    for layer in module.layers:
        if "linear_attn" in layer:
            replace_call(layer.linear_attn, call)


def lfm2_arguments(configuration: Configuration) -> dict[str, Any]:
    """Return the names that LFM2's class has for fields, and which of its layers attend."""
    fields = configuration.fields
    attending = [layer for layer, kind in enumerate(configuration.layer_types) if kind == FULL]
    if not attending or len(attending) == len(configuration.layer_types):
        raise ModelError("model_type 'lfm2': mlx-lm's class needs layers of both kinds, attention and convolution")
    return {
        "block_dim": fields["hidden_size"],
        "block_ff_dim": fields["intermediate_size"],
        "full_attn_idxs": attending,
    }


def mamba2_arguments(configuration: Configuration) -> dict[str, Any]:
    """Return parameters that Mamba 2's class computes from others, or does not use."""
    fields = configuration.fields
    return {
        "intermediate_size": fields["num_heads"] * fields["head_dim"],
        "ssm_state_size": fields["state_size"],
        "time_step_limit": tuple(fields["time_step_limit"]),
        "max_position_embeddings": 0,
    }


def mamba2_norms(module: nn.Module, configuration: Configuration) -> None:
    """Give the norms of Mamba 2's blocks the configuration's epsilon, and normalize its outputs by groups."""
    epsilon = configuration.fields["layer_norm_epsilon"]
    for layer in module.layers:
        layer.norm.eps = epsilon
        _normalize_groups(layer.mixer, epsilon)


def _normalize_groups(mixer: nn.Module, epsilon: float) -> None:
    # mlx-lm's classes take the mean square over all groups, where transformers takes it over each.
    norm = mlx_lm_module("models.nemotron_h").MambaRMSNormGated
    width = mixer.intermediate_size
    mixer.norm = norm(width, eps=epsilon, group_size=width // mixer.n_groups)


def granite_hybrid_arguments(configuration: Configuration) -> dict[str, Any]:
    """Return the kinds of Granite 4's layers in mlx-lm's words, whether attention rotates, and bounds of time steps."""
    fields = configuration.fields
    limit = fields["time_step_limit"]
    return {
        "layer_types": ["attention" if kind == FULL else "mamba" for kind in configuration.layer_types],
        "position_embedding_type": "rope" if fields["position_embedding_type"] == "rope" else "nope",
        "time_step_limit": (0.0, float("inf")) if limit is None else tuple(limit),
    }


def granite_hybrid_layers(module: nn.Module, configuration: Configuration) -> None:
    """Normalize the outputs of Granite 4's Mamba layers by groups, and keep a dense MLP's products in one layer."""
    for layer in module.layers:
        if "mamba" in layer:
            _normalize_groups(layer.mamba, configuration.fields["rms_norm_eps"])
    if module.args.use_moe:
        return
    shared_mlp = mlx_lm_module("models.granitemoehybrid").GraniteMoeHybridSharedMLP
    for layer in module.layers:
        layer.mlp = shared_mlp(module.args)

    def sanitize(_: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        if configuration.fields["tie_word_embeddings"]:
            weights.pop("lm_head.weight", None)
        return {name.replace(".shared_mlp.", ".mlp."): _convolution(name, values) for name, values in weights.items()}

    replace_method(module, "sanitize", sanitize)


def _convolution(name: str, values: mx.array) -> mx.array:
    # MLX has the channels of a convolution last, torch has them in the middle.
    return values.moveaxis(2, 1) if name.endswith("conv1d.weight") else values


def nemotron_arguments(configuration: Configuration) -> dict[str, Any]:
    """Return the kinds of Nemotron-H's layers as the letters of its class."""
    letters = {LINEAR: "M", FULL: "*", MLP: "-", MIXTURE: "E"}
    return {
        "hybrid_override_pattern": [letters[kind] for kind in configuration.layer_types],
        "layers_block_type": None,
        "layer_types": None,
        "time_step_limit": tuple(configuration.fields["time_step_limit"]),
    }
