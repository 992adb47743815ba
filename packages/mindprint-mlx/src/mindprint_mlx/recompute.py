"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): of each layer only what goes in is kept.

`mx.checkpoint` computes a layer again when its gradient is due. It sees only what a function is given, so that the
layer's factors, and the keys and values that come through a cache of ours (`prompts.py`), are given and returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx import nn

from mindprint_mlx import adapter as adapters
from mindprint_mlx.model import Adapter, Handle
from mindprint_mlx.prompts import Continuation, Kept


@contextmanager
def checkpointed(handle: Handle, factors: Mapping[str, mx.array]) -> Iterator[None]:
    """Let graphs that are made of the model compute each layer again on the way back."""
    layers = {id(layer): (layer, type(layer)) for layer in handle.module.layers}
    try:
        for layer, kind in layers.values():
            layer.__class__ = _checkpointed(kind, handle.adapter, _within(layer, handle.adapter, factors))
        yield
    finally:
        for layer, kind in layers.values():
            layer.__class__ = kind


def _within(layer: nn.Module, adapter: Adapter | None, factors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The factors that sit in a layer."""
    parts = {id(part) for _, part in layer.named_modules()}
    sites = {site for site, place in (adapter.layers if adapter else {}).items() if id(place) in parts}
    return {name: values for name, values in factors.items() if name.rpartition(".")[0] in sites}


def _checkpointed(kind: Any, adapter: Adapter | None, own: Mapping[str, mx.array]) -> Any:
    def call(self: nn.Module, *args: Any, **named: Any) -> Any:
        values = [*args, *named.values()]
        arrays = {at: value for at, value in enumerate(values) if isinstance(value, mx.array)}
        cache = next((value for value in values if isinstance(value, (Kept, Continuation))), None)
        ahead = [cache.keys, cache.values] if isinstance(cache, Continuation) else []

        def layer(arrays: dict[int, mx.array], ahead: list[mx.array], own: Mapping[str, mx.array]) -> Any:
            if adapter is not None:
                adapters.assign(adapter, own)
            if isinstance(cache, Continuation):
                cache.keys, cache.values = ahead
            given = [arrays.get(at, value) for at, value in enumerate(values)]
            out = kind.__call__(self, *given[: len(args)], **dict(zip(named, given[len(args) :], strict=True)))
            return out, [cache.keys, cache.values] if isinstance(cache, Kept) else []

        out, kept = mx.checkpoint(layer)(arrays, ahead, own)
        if isinstance(cache, Kept):
            cache.keys, cache.values = kept
        return out

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
