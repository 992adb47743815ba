"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): of each layer only its input is kept.

`mx.checkpoint` computes a layer again when its gradient is due. It differentiates arguments alone, so that the layer's
factors, and the keys and values that come through a cache of ours (`prompts.py`), are passed in and returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx import nn

from mindprint.asked_places import asked_now, asking
from mindprint_mlx import adapter as adapters
from mindprint_mlx.model import Adapter, MlxModel
from mindprint_mlx.prompts import Continuation, Kept


@contextmanager
def recomputed(model: MlxModel, factors: Mapping[str, mx.array]) -> Iterator[None]:
    """Make graphs of this context compute each layer again in their backward passes, instead of keeping it."""
    # Python looks up `__call__` on the class, so that a layer gets another class for as long as this lasts.
    layers = {id(layer): (layer, type(layer)) for layer in model.module.layers}
    try:
        for layer, kind in layers.values():
            layer.__class__ = _checkpointed(kind, model.adapter, _factors_within(layer, model.adapter, factors))
        yield
    finally:
        for layer, kind in layers.values():
            layer.__class__ = kind


def _factors_within(layer: nn.Module, adapter: Adapter | None, factors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Return the factors of the sites in a layer."""
    parts = {id(part) for _, part in layer.named_modules()}
    sites = {site for site, place in (adapter.layers if adapter else {}).items() if id(place) in parts}
    return {name: values for name, values in factors.items() if name.rpartition(".")[0] in sites}


def _checkpointed(kind: Any, adapter: Adapter | None, own: Mapping[str, mx.array]) -> Any:
    def call(self: nn.Module, *args: Any, **named: Any) -> Any:
        values = [*args, *named.values()]
        arrays = {at: value for at, value in enumerate(values) if isinstance(value, mx.array)}
        cache = next((value for value in values if isinstance(value, (Kept, Continuation))), None)
        ahead = [cache.keys, cache.values] if isinstance(cache, Continuation) else []
        asked = asked_now()

        # All arrays are arguments, since gradients do not reach those that a closure holds.
        def layer(arrays: dict[int, mx.array], ahead: list[mx.array], own: Mapping[str, mx.array]) -> Any:
            if adapter is not None:
                adapters.assign(adapter, own)
            if isinstance(cache, Continuation):
                cache.keys, cache.values = ahead
            given = [arrays.get(at, value) for at, value in enumerate(values)]
            # The layer is computed again after the context that it was first computed in.
            with asking(asked):
                out = kind.__call__(self, *given[: len(args)], **dict(zip(named, given[len(args) :], strict=True)))
            return out, [cache.keys, cache.values] if isinstance(cache, Kept) else []

        out, kept = mx.checkpoint(layer)(arrays, ahead, own)
        if isinstance(cache, Kept):
            cache.keys, cache.values = kept
        return out

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
