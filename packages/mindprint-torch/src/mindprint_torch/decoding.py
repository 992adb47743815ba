"""The forward passes of prompts that continue together: all of their tokens first, and then one new token of each.

They are those of the model's class, with transformers' caches, which know windows and recurrent states. Only plain
attention gets another cache: transformers' own copies all keys and values for each new token.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from mindprint.contract import Int32
from mindprint_torch.model import TorchModel
from mindprint_torch.rope import forget_lengths

Int64 = NDArray[np.int64]

GRAIN = 64
"""Places by which the arrays of keys and values grow."""

CACHES = ("past_key_values", "cache_params", "state")
"""Names under which models take their cache and return it."""


RowCache = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of one row by layer, each `[1, heads, tokens, dims]`."""


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, `[rows, heads, places, dims]`, in arrays with room for the next places."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new places, and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._room is None or end > self._room[0].shape[-2]:
            self._room = _grown(self.keys, key_states, end + GRAIN), _grown(self.values, value_states, end + GRAIN)
        keys, values = self._room
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep these rows, int64 `[kept]`, in this order."""
        super().reorder_cache(beam_idx)
        # The selected rows are a copy without room. The next update makes some.
        self._room = None


class Decoder:
    """Prompts that continue together: a forward pass for each new token of all of them.

    Args:
        model: The model. Whether the adapter is on is the caller's affair.
        prompts: int32 `[P]` each.
        fill: The token that pads shorter prompts, on the left.
        adapter: Whose kept caches are used for the beginnings of prompts: those with the adapter (True) or without
            (False). None reads all tokens.
    """

    def __init__(self, model: TorchModel, prompts: Sequence[Int32], fill: int, *, adapter: bool | None = None) -> None:
        self._network: Any = model.network
        self._device = model.device
        if model.head.rotary_limit is not None:
            forget_lengths(model.network)
        tokens, mask = left_padded(prompts, fill)
        self._tokens = torch.from_numpy(tokens).to(model.device)
        self._starts = [tokens.shape[1] - len(prompt) for prompt in prompts]
        accepted = inspect.signature(self._network.forward).parameters
        self._state: dict[str, Any] = {"use_cache": True}
        # Only the last position of a prompt has a next token to choose.
        if "logits_to_keep" in accepted:
            self._state["logits_to_keep"] = 1
        seen = torch.from_numpy(mask).to(model.device)
        if "position_ids" in accepted:
            self._state["position_ids"] = (seen.cumsum(-1) - 1).clamp_(min=0)
        # Without a mask, attention takes its fastest way. Rows of one length need none.
        if not mask.all():
            self._state["attention_mask"] = seen
        cache = new_cache(self._network)
        if cache is not None:
            self._state["cache_params" if "cache_params" in accepted else "past_key_values"] = cache
        # A frequency that depends on the length of a text would be another one for its beginning.
        if adapter is not None and model.head.rotary_limit is None and self._plain_layers() is not None:
            self._fetch([model.kept.find(prompt, adapter=adapter) for prompt in prompts], prompts)

    def read(self) -> Tensor:
        """Read the prompts. Return the logits of each one's next token, `[rows, vocabulary]`."""
        return self._forward(self._tokens, is_first_iteration=True)

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row, int64 `[rows]`. Return the logits of the next one, `[rows, vocabulary]`."""
        if "attention_mask" in self._state:
            mask = self._state["attention_mask"]
            self._state["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        if "position_ids" in self._state:
            self._state["position_ids"] = self._state["position_ids"][:, -1:] + 1
        return self._forward(tokens[:, None], is_first_iteration=False)

    def decoding(self) -> AbstractContextManager[None]:
        """Return transformers' context for single tokens, in which experts are computed differently on a GPU."""
        context: AbstractContextManager[None] = self._network._optimize_model_for_decode()
        return context

    @property
    def drops_rows(self) -> bool:
        """Whether rows can be taken out: the cache is one of transformers' present ones."""
        return any(isinstance(self._state.get(name), Cache) for name in CACHES)

    def row_cache(self, place: int) -> RowCache | None:
        """Return a copy of one row's keys and values by layer, or None if the cache holds anything else."""
        layers, start = self._plain_layers(), self._starts[place]
        if layers is None or not all(layer.is_initialized for layer in layers):
            return None
        return tuple(
            (layer.keys[place, None, :, start:].clone(), layer.values[place, None, :, start:].clone())
            for layer in layers
        )

    def _plain_layers(self) -> list[Any] | None:
        """Return the layers of the cache if all of them are plain attention."""
        cache: Any = self._state.get("past_key_values")
        if not isinstance(cache, Cache) or any(type(layer) is not RoomyLayer for layer in cache.layers):
            return None
        return cache.layers

    def _fetch(self, kept: Sequence[tuple[int, RowCache] | None], prompts: Sequence[Int32]) -> None:
        """Take the beginnings of prompts out of kept caches, so that fewer tokens are left to read."""
        unread = [len(prompt) - (0 if found is None else found[0]) for prompt, found in zip(prompts, kept, strict=True)]
        # All rows read equally many tokens, their last ones. So filling stays in front, whatever each of them shares.
        width = self._tokens.shape[1]
        fetched = width - max(unread)
        layers = self._plain_layers()
        if not fetched or layers is None:
            return
        for number, layer in enumerate(layers):
            for_layer = [None if found is None else found[1][number] for found in kept]
            halves = ([None if row is None else row[half] for row in for_layer] for half in (0, 1))
            layer.update(*(_joined(half, self._starts, fetched) for half in halves))
        self._tokens = self._tokens[:, fetched:]

    def keep(self, places: Sequence[int]) -> None:
        """Keep these rows, and forget the others."""
        self._starts = [self._starts[place] for place in places]
        rows: Any = torch.tensor(places, device=self._device)
        for name, value in self._state.items():
            if isinstance(value, Cache):
                value.reorder_cache(rows)
            elif isinstance(value, Tensor):
                self._state[name] = value[rows]

    def _forward(self, tokens: Tensor, *, is_first_iteration: bool) -> Tensor:
        # A class says itself in which form it takes them: some cut tokens, name the cache differently, or make masks.
        inputs = self._network.prepare_inputs_for_generation(
            tokens, next_sequence_length=tokens.shape[1], is_first_iteration=is_first_iteration, **self._state
        )
        output = self._network(**inputs, return_dict=True)
        for name in CACHES:
            if name in output:
                self._state[name] = output[name]
        logits: Tensor = output.logits[:, -1]
        return logits


def _joined(beginnings: Sequence[Tensor | None], starts: Sequence[int], places: int) -> Tensor:
    """Return the beginnings of rows, `[1, heads, tokens, dims]` each, as one array, `[rows, heads, places, dims]`."""
    like = next(beginning for beginning in beginnings if beginning is not None)
    joined = like.new_zeros(len(beginnings), like.shape[1], places, like.shape[-1])
    for row, (beginning, start) in enumerate(zip(beginnings, starts, strict=True)):
        if beginning is not None and start < places:
            joined[row, :, start:] = beginning[0, :, : places - start]
    return joined


def _grown(filled: Tensor | None, new: Tensor, places: int) -> Tensor:
    """Return an array for more places, which begins with those that are filled."""
    room = new.new_empty(*new.shape[:2], places, new.shape[-1])
    if filled is not None and filled.numel():
        room[:, :, : filled.shape[-2]] = filled
    return room


def new_cache(network: Any) -> Cache | None:
    """Return an empty cache for a model, or None if its class makes one of another kind."""
    if not network._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=network.config.get_text_config(decoder=True))
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def left_padded(prompts: Sequence[Int32], fill: int) -> tuple[Int64, Int64]:
    """Return prompts as rows that end together, and a mask that is 0 on the filling; both int64 `[rows, P]`."""
    width = max(len(prompt) for prompt in prompts)
    tokens, mask = np.full((len(prompts), width), fill, np.int64), np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return tokens, mask
