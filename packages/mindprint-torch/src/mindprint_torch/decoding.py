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
        # What was selected is a copy without room. The next update makes some.
        self._room = None


class Decoder:
    """Prompts that continue together: a forward pass for each new token of all of them.

    Args:
        model: The model. Whether the adapter is on is the caller's affair.
        prompts: int32 `[P]` each.
        fill: The token that stands in front of shorter prompts.
    """

    def __init__(self, model: TorchModel, prompts: Sequence[Int32], fill: int) -> None:
        self._network: Any = model.network
        self._device = model.device
        if model.head.rotary_limit is not None:
            forget_lengths(model.network)
        tokens, mask = left_padded(prompts, fill)
        self._tokens = torch.from_numpy(tokens).to(model.device)
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

    def keep(self, places: Sequence[int]) -> None:
        """Keep these rows, and forget the others."""
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
