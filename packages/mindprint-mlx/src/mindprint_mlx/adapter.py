"""LoRA on a base: which places can take it, putting it there, and its values in and out.

The layers are mlx-lm's. Their layout is the transpose of PEFT's: `lora_a` is `[in, r]` and `lora_b` `[r, out]`, and
`scale` multiplies their product. Factors are float32 whatever the base's dtype; mlx-lm's layers compute the change in
float32 then, and cast it to the dtype of the activations before they add it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from mindprint.contract import AdapterFacts, AdapterSite, AdapterState, LoraConfig, LoraFactors
from mindprint.errors import AdapterError
from mindprint_mlx import points
from mindprint_mlx.arrays import to_numpy
from mindprint_mlx.imports import mlx_lm_module
from mindprint_mlx.model import Adapter, Handle, Place


class KeyedDropout(nn.Module):
    """Dropout whose mask is a pure function of a key; without a key, the identity.

    MLX's own draws from a generator that the whole process shares.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self._rate = rate
        self._key: mx.array | None = None

    def use(self, key: mx.array | None) -> None:
        self._key = key

    def __call__(self, x: mx.array) -> mx.array:
        if self._key is None or not self._rate:
            return x
        keep = 1 - self._rate
        return x * mx.random.bernoulli(keep, x.shape, key=self._key) / keep


def sites(handle: Handle) -> tuple[AdapterSite, ...]:
    """Every place that can take LoRA, under transformers' names, in the model's order."""
    return tuple(_site(place) for place in handle.places)


def inject(handle: Handle, state: AdapterState) -> AdapterFacts:
    """Attach an adapter with its values. Raises `AdapterError` if there is one already or it does not fit."""
    if handle.adapter is not None:
        raise AdapterError("the model has an adapter already; release it and load the base again")
    chosen = _chosen_places(handle, state.config)
    factors = to_factors(state.config, state.tensors, chosen)
    with handle.in_use():
        layers = {place.site: _lora_layer(place, state.config) for place in chosen}
        mx.eval(factors)
    handle.adapter = Adapter(state.config, chosen, layers, factors)
    assign(handle.adapter, factors)
    for place in chosen:
        place.put(layers[place.site])
    return AdapterFacts(state.config.target_modules, sum(values.size for values in factors.values()))


def assign(adapter: Adapter, factors: Mapping[str, mx.array]) -> None:
    """Let the adapter's layers compute with these factors: the model's own, or those a gradient is traced through."""
    for name, values in factors.items():
        site, _, letter = name.rpartition(".")
        setattr(adapter.layers[site], f"lora_{letter}", values)


def outside_layers(factors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The factors of sites that are in no numbered layer: embedding and LM head."""
    return {name: values for name, values in factors.items() if not any(part.isdigit() for part in name.split("."))}


def use_dropout(adapter: Adapter, key: mx.array | None) -> None:
    """Turn dropout on with one key for all layers, each with a part of its own, or off with None."""
    keys = [None] * len(adapter.layers) if key is None else mx.random.split(key, len(adapter.layers))
    for layer, part in zip(adapter.layers.values(), keys, strict=True):
        layer.dropout.use(part)


def to_factors(
    config: LoraConfig, tensors: Mapping[str, LoraFactors], places: tuple[Place, ...]
) -> dict[str, mx.array]:
    """PEFT's layout to mlx-lm's. Raises `AdapterError` for a missing, unexpected or mis-shaped factor."""
    names = {place.site for place in places}
    if odd := sorted(names ^ set(tensors)):
        raise AdapterError(f"the adapter's tensors and its target modules disagree about {odd[0]}")
    factors = {}
    for place in places:
        site, (a, b) = _site(place), tensors[place.site]
        rank = config.rank(place.site)
        if a.shape != (rank, site.in_features) or b.shape != (site.out_features, rank):
            raise AdapterError(
                f"{place.site}: A is {list(a.shape)} and B {list(b.shape)}; the model and rank {rank} need "
                f"{[rank, site.in_features]} and {[site.out_features, rank]}"
            )
        factors[f"{place.site}.a"] = mx.array(np.ascontiguousarray(a.T, dtype=np.float32))
        factors[f"{place.site}.b"] = mx.array(np.ascontiguousarray(b.T, dtype=np.float32))
    return factors


def to_tensors(adapter: Adapter, factors: Mapping[str, mx.array]) -> dict[str, LoraFactors]:
    """mlx-lm's layout to PEFT's, float32, in NumPy's memory; empty for empty factors."""
    if not factors:
        return {}
    return {
        place.site: LoraFactors(to_numpy(factors[f"{place.site}.a"].T), to_numpy(factors[f"{place.site}.b"].T))
        for place in adapter.places
    }


def _site(place: Place) -> AdapterSite:
    rows, columns = place.layer.weight.shape
    if isinstance(place.layer, nn.Embedding):
        return AdapterSite(place.site, "embedding", rows, columns)
    return AdapterSite(place.site, "linear", columns, rows)


def _chosen_places(handle: Handle, config: LoraConfig) -> tuple[Place, ...]:
    places = {place.site: place for place in handle.places}
    if not config.target_modules:
        raise AdapterError("the adapter names no target modules")
    for target in config.target_modules:
        if target not in places:
            raise AdapterError(f"the model has no place called {target!r} that can take LoRA")
    return tuple(places[target] for target in config.target_modules)


def _lora_layer(place: Place, config: LoraConfig) -> Any:
    lora = mlx_lm_module("tuner.lora")
    embedding = isinstance(place.layer, nn.Embedding)
    kind = _lora_embedding(lora.LoRAEmbedding) if embedding else lora.LoRALinear
    layer = kind.from_base(place.layer, r=config.rank(place.site), scale=config.scale(place.site))
    if not embedding:
        layer.__class__ = _folded(kind)
    # PEFT has no dropout on embeddings: there is no activation before the factors.
    layer.dropout = KeyedDropout(0.0 if embedding else config.dropout)
    return layer


@cache
def _folded(kind: Any) -> Any:
    """mlx-lm's layer, multiplying by the scale where rows are `r` wide, and adding as it multiplies by B.

    Its output and its input's gradient are points at which graphs beside each other are evaluated.
    """

    class FoldedLoRA(kind):  # type: ignore[misc]
        def __call__(self, x: mx.array) -> mx.array:
            x = points.backward(x)
            base: mx.array = self.linear(x)
            inner = self.scale * (self.dropout(x) @ self.lora_a)
            if base.dtype == inner.dtype:
                base = mx.addmm(base, inner, self.lora_b)
            else:
                base = base + (inner @ self.lora_b).astype(base.dtype)
            return points.forward(base)

    return FoldedLoRA


def _lora_embedding(kind: Any) -> Any:
    """mlx-lm's layer, with PEFT's meaning where the head is tied: the change is in the lookup, not in the head."""

    class LookupLoRA(kind):  # type: ignore[misc]
        @classmethod
        def from_base(cls, embedding: nn.Embedding, r: int, scale: float) -> Any:
            layer = cls(*embedding.weight.shape, r=r, scale=scale)
            layer.embedding = embedding
            return layer

        def as_linear(self, x: mx.array) -> mx.array:
            logits: mx.array = self.embedding.as_linear(x)
            return logits

    return LookupLoRA
