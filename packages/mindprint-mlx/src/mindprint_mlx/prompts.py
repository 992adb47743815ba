"""Whether and how a model reads a prompt once for both of its completions: through the cache that its classes take.

mlx-lm's classes take no mask and no positions, but they ask their cache for both. So the prompts are read with one that
keeps the keys and values of each layer, as part of the graph that gradients go back through, and the completions with
one that puts them in front of their own. A cache means nothing to recurrent layers, and a class may do anything with
it: what can be shared is measured when the model is loaded, and bounded by the windows of its configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mindprint.layouts import Continued, Layout, continued, sequences, sharing_probe
from mindprint_mlx.head import Head
from mindprint_mlx.imports import mlx_lm_module

UNLIMITED = sys.maxsize

AGREEMENT = {mx.float32: 1e-4}
COARSE_AGREEMENT = 5e-2
"""Greatest difference of hidden states, relative to the largest of them: rounding alone, by dtype."""


class Kept:
    """One layer's keys and values of the prompts, `[pairs, heads, P, dims]`, as it makes them."""

    offset = 0
    keys: mx.array
    values: mx.array

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values


class Continuation:
    """One layer's cache for completions `[2 * pairs, C]`: row k and row pairs + k go on from prompt k.

    `offset` are the prompts' lengths, int32 `[2 * pairs]`: positions go on from there.
    """

    def __init__(self, prompts: Kept, lengths: mx.array) -> None:
        self.offset = mx.concatenate([lengths, lengths])
        self.keys = mx.concatenate([prompts.keys, prompts.keys])
        self.values = mx.concatenate([prompts.values, prompts.values])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return mx.concatenate([self.keys, keys], axis=2), mx.concatenate([self.values, values], axis=2)

    def make_mask(self, tokens: int, **_: Any) -> mx.array:
        """A token sees its prompt, and its own row up to itself. Bool `[2 * pairs, 1, C, P + C]`."""
        own = mx.arange(tokens)
        before = mx.arange(self.keys.shape[2]) < self.offset[:, None, None]
        after = mx.broadcast_to(own[:, None] >= own, (len(self.offset), tokens, tokens))
        before = mx.broadcast_to(before, (len(self.offset), tokens, self.keys.shape[2]))
        return mx.concatenate([before, after], axis=2)[:, None]


def hidden_states(head: Head, layers: int, layout: Layout | Continued) -> mx.array:
    """What the model makes of a layout's tokens, flat, in the order that its sources count: `[n, ...]`."""
    if isinstance(layout, Layout):
        return head.states(mx.array(layout.tokens))
    kept = [Kept() for _ in range(layers)]
    prompts = head.states(mx.array(layout.prompts), kept)
    lengths = mx.array(layout.prompt_lengths)
    completions = head.states(mx.array(layout.completions), [Continuation(layer, lengths) for layer in kept])
    return mx.concatenate([prompts, completions])


def longest_shared(head: Head, empty: Sequence[Any], window: int | None) -> int:
    """The most tokens of the longest prompt and the longest completion that this model can share; 0 if it cannot.

    `empty` is the cache that its class would generate with; `window` the shortest of its layers'.
    """
    if any(type(cache) is not mlx_lm_module("models.cache").KVCache for cache in empty):
        return 0
    batch = sharing_probe(head.vocab_size)
    expected = _answers(head, len(empty), sequences(batch))
    try:
        answered = _answers(head, len(empty), continued(batch))
        difference = mx.abs(answered - expected).max() / mx.abs(expected).max()
        same = bool((difference <= AGREEMENT.get(expected.dtype, COARSE_AGREEMENT)).item())
    except Exception:  # noqa: BLE001  a class that cannot take such a cache may fail in any way
        same = False
    return (UNLIMITED if window is None else window) if same else 0


def _answers(head: Head, layers: int, layout: Layout | Continued) -> mx.array:
    return hidden_states(head, layers, layout)[mx.array(layout.sources)]
