"""LoRA on a base: its layers, and its values in and out.

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

from mindprint.adapter.initial import factor_shapes
from mindprint.contract import AdapterFacts, AdapterState, LoraConfig, LoraFactors
from mindprint.errors import AdapterError
from mindprint_mlx import points
from mindprint_mlx.arrays import to_numpy
from mindprint_mlx.asked import skip_unasked
from mindprint_mlx.experts import StackLora, StackPlace
from mindprint_mlx.imports import mlx_lm_module
from mindprint_mlx.model import Adapter, MlxModel, Place


class KeyedDropout(nn.Module):
    """Dropout whose mask is a pure function of a key, and the identity without one.

    MLX's own draws from a generator that the whole process shares, so that a resumed run could not be exact.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self._rate = rate
        self._key: mx.array | None = None

    def use(self, key: mx.array | None) -> None:
        self._key = key

    @property
    def draws(self) -> bool:
        """Whether it has a mask, and so is not the identity."""
        return self._key is not None and self._rate > 0

    def __call__(self, x: mx.array) -> mx.array:
        if not self.draws:
            return x
        # Scaled up while training, so that nothing changes when dropout is off (inverted dropout, as in PyTorch).
        keep = 1 - self._rate
        return x * mx.random.bernoulli(keep, x.shape, key=self._key) / keep


def inject(model: MlxModel, state: AdapterState) -> AdapterFacts:
    """Attach an adapter to exactly its target modules, with its values.

    Raises:
        AdapterError: If the model has an adapter already, or the adapter does not fit the model.
    """
    if model.adapter is not None:
        raise AdapterError("the model has an adapter already; release it and load the base again")
    chosen = _target_places(model, state.config)
    factors = to_factors(state.config, state.tensors, chosen)
    with model.in_use():
        layers = {place.site: _lora_layer(place, state.config) for place in chosen}
        mx.eval(factors)
    model.kept.forget()
    model.adapter = Adapter(state.config, chosen, layers, factors)
    assign(model.adapter, factors)
    for place in chosen:
        place.put(layers[place.site])
    with model.in_use():
        skip_unasked(model.module, model.head)
    return AdapterFacts(state.config.target_modules, sum(values.size for values in factors.values()))


def require_adapter(model: MlxModel) -> Adapter:
    """Return the model's adapter.

    Raises:
        AdapterError: If none was injected.
    """
    if model.adapter is None:
        raise AdapterError("the model has no adapter; inject one first")
    return model.adapter


def assign(adapter: Adapter, factors: Mapping[str, mx.array]) -> None:
    """Make the adapter's layers compute with these factors: the model's, or those a gradient is traced through."""
    for name, values in factors.items():
        site, _, letter = name.rpartition(".")
        setattr(adapter.layers[site], f"lora_{letter}", values)


def outside_layers(factors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Return the factors of sites that are in no numbered layer: embedding and LM head."""
    return {name: values for name, values in factors.items() if not any(part.isdigit() for part in name.split("."))}


def use_dropout(adapter: Adapter, key: mx.array | None) -> None:
    """Turn dropout on with a key, of which each layer gets another part, or off with None."""
    keys = [None] * len(adapter.layers) if key is None else mx.random.split(key, len(adapter.layers))
    for layer, part in zip(adapter.layers.values(), keys, strict=True):
        layer.dropout.use(part)


def to_factors(
    config: LoraConfig, tensors: Mapping[str, LoraFactors], places: tuple[Place | StackPlace, ...]
) -> dict[str, mx.array]:
    """Return PEFT's factors in mlx-lm's layout.

    Raises:
        AdapterError: For a missing, unexpected or mis-shaped factor.
    """
    names = {place.site for place in places}
    if odd := sorted(names ^ set(tensors)):
        raise AdapterError(f"the adapter's tensors and its target modules disagree about {odd[0]}")
    factors = {}
    for place in places:
        site, (a, b) = place.adapter_site, tensors[place.site]
        rank = config.rank(place.site)
        a_shape, b_shape = factor_shapes(site, rank)
        if a.shape != a_shape or b.shape != b_shape:
            raise AdapterError(
                f"{place.site}: A is {list(a.shape)} and B {list(b.shape)}; the model and rank {rank} need "
                f"{list(a_shape)} and {list(b_shape)}"
            )
        for letter, values in (("a", a), ("b", b)):
            transposed = np.ascontiguousarray(values.swapaxes(-1, -2), dtype=np.float32)
            factors[f"{place.site}.{letter}"] = mx.array(transposed)
    return factors


def to_tensors(adapter: Adapter, factors: Mapping[str, mx.array]) -> dict[str, LoraFactors]:
    """Return mlx-lm's factors in PEFT's layout, float32, in NumPy's memory. Without factors there are none."""
    if not factors:
        return {}
    return {
        place.site: LoraFactors(
            *(to_numpy(factors[f"{place.site}.{letter}"].swapaxes(-1, -2)) for letter in ("a", "b"))
        )
        for place in adapter.places
    }


def _target_places(model: MlxModel, config: LoraConfig) -> tuple[Place | StackPlace, ...]:
    places = {place.site: place for place in model.places}
    if not config.target_modules:
        raise AdapterError("the adapter names no target modules")
    for target in config.target_modules:
        if target not in places:
            raise AdapterError(f"the model has no place called {target!r} that can take LoRA")
        if isinstance(places[target], StackPlace) and config.dropout:
            raise AdapterError(f"{target!r} is a stack of experts, on which PEFT has no dropout: set it to 0")
    return tuple(places[target] for target in config.target_modules)


def _lora_layer(place: Place | StackPlace, config: LoraConfig) -> Any:
    if isinstance(place, StackPlace):
        stack = StackLora(config.scale(place.site))
        stack.dropout = KeyedDropout(0.0)
        return stack
    lora = mlx_lm_module("tuner.lora")
    embedding = isinstance(place.layer, nn.Embedding)
    kind = _lora_embedding(lora.LoRAEmbedding) if embedding else lora.LoRALinear
    layer = kind.from_base(place.layer, r=config.rank(place.site), scale=config.scale(place.site))
    if not embedding:
        layer.__class__ = _fused_linear(kind)
    # PEFT has no dropout on embeddings, where no activation comes before the factors.
    layer.dropout = KeyedDropout(0.0 if embedding else config.dropout)
    return layer


@cache
def _fused_linear(kind: Any) -> Any:
    """Return mlx-lm's layer, but scaled where rows are `r` wide, and added while it multiplies by B."""
    # Both save an array of the output's size. The output and the input's gradient are points at which graphs that are
    # computed at the same time are evaluated (`points.py`).

    class FusedLoRA(kind):  # type: ignore[misc]
        def __call__(self, x: mx.array) -> mx.array:
            x = points.backward(x)
            base: mx.array = self.linear(x)
            inner = self.scale * (self.dropout(x) @ self.lora_a)
            if base.dtype == inner.dtype:
                base = mx.addmm(base, inner, self.lora_b)
            else:
                base = base + (inner @ self.lora_b).astype(base.dtype)
            return points.forward(base)

    return FusedLoRA


def _lora_embedding(kind: Any) -> Any:
    """Return mlx-lm's layer, but with PEFT's meaning where the head is tied: only the lookup changes, not the head."""

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
