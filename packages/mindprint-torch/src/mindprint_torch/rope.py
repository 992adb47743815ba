"""Rotary embeddings whose frequencies depend on the length of their input: LongRoPE, and dynamic NTK scaling.

transformers chooses the frequencies by the longest row of a batch, and dynamic scaling also keeps those of the longest
input so far. A row's log-probs would then depend on its neighbours and on everything read before. So rows of different
kinds are read apart (`layouts.sequences_apart`), and the memory of lengths is cleared before each forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from mindprint.layouts import RotaryLimit


def read_rotary_limit(network: nn.Module) -> RotaryLimit | None:
    """Return the length above which the network's rotary embeddings depend on it, or None if none of them does."""
    limits = set()
    for module, prefix, rope_type in _rotary_embeddings(network):
        if "dynamic" in rope_type:
            limits.add(RotaryLimit(module.original_max_seq_len, each_length=True))
        elif rope_type == "longrope":
            parameters = module.config.rope_parameters
            parameters = parameters[prefix.removesuffix("_")] if prefix else parameters
            limits.add(RotaryLimit(parameters["original_max_position_embeddings"]))
    if len(limits) < 2:
        return next(iter(limits), None)
    # Layers with different limits: above the lowest, only rows of one length are surely alike to all of them.
    return RotaryLimit(min(limit.positions for limit in limits), each_length=True)


def forget_lengths(network: nn.Module) -> None:
    """Put dynamic rotary embeddings into the state in which they were loaded."""
    for module, prefix, rope_type in _rotary_embeddings(network):
        if "dynamic" in rope_type:
            inverse = getattr(module, f"{prefix}inv_freq")
            original = getattr(module, f"{prefix}original_inv_freq").to(inverse.device)
            module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _rotary_embeddings(network: nn.Module) -> Iterator[tuple[Any, str, str]]:
    """Yield each rotary embedding, the prefix of its attributes, and its type; with a prefix for each kind of layer."""
    for module in network.modules():
        rope_type: Any = getattr(module, "rope_type", None)
        if isinstance(rope_type, str):
            yield module, "", rope_type
        elif isinstance(rope_type, dict):
            for layer_type, kind in rope_type.items():
                yield module, f"{layer_type}_", kind
