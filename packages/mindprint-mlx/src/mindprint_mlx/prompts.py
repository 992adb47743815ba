"""Prompts that are read once for both of their completions, through the cache that mlx-lm's classes take.

These classes take no mask and no positions, but they ask their cache for both. So the prompts are read with one that
keeps the keys and values of each layer, as part of the graph that gradients flow back through, and the completions with
one that puts those in front of theirs. A cache means nothing to recurrent layers, and a class may do anything with it.
So loading a model measures whether it can share prompts, and the windows of its configuration bound the length.
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
    """A cache that keeps one layer's keys and values of the prompts, `[pairs, heads, P, dims]`."""

    offset = 0
    keys: mx.array
    values: mx.array

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values


class Continuation:
    """One layer's cache for completions `[2 * pairs, C]`: row k and row pairs + k continue prompt k.

    `offset` are the prompts' lengths, int32 `[2 * pairs]`, where the completions' positions start.
    """

    def __init__(self, prompts: Kept, lengths: mx.array) -> None:
        self.offset = mx.concatenate([lengths, lengths])
        self.keys = mx.concatenate([prompts.keys, prompts.keys])
        self.values = mx.concatenate([prompts.values, prompts.values])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return mx.concatenate([self.keys, keys], axis=2), mx.concatenate([self.values, values], axis=2)

    def make_mask(self, tokens: int, **_: Any) -> mx.array:
        """Return which tokens each sees: its prompt, and its row up to itself. Bool `[2 * pairs, 1, C, P + C]`."""
        own = mx.arange(tokens)
        before = mx.arange(self.keys.shape[2]) < self.offset[:, None, None]
        after = mx.broadcast_to(own[:, None] >= own, (len(self.offset), tokens, tokens))
        before = mx.broadcast_to(before, (len(self.offset), tokens, self.keys.shape[2]))
        return mx.concatenate([before, after], axis=2)[:, None]


def hidden_states(head: Head, layers: int, layout: Layout | Continued) -> mx.array:
    """Return the hidden states of a layout's tokens, flat, in the order that its sources count: `[n, ...]`."""
    if isinstance(layout, Layout):
        return head.states(mx.array(layout.tokens))
    kept = [Kept() for _ in range(layers)]
    prompts = head.states(mx.array(layout.prompts), kept)
    # Padding after a short prompt leaves keys too; `Continuation.make_mask` hides them by the prompts' lengths.
    lengths = mx.array(layout.prompt_lengths)
    completions = head.states(mx.array(layout.completions), [Continuation(layer, lengths) for layer in kept])
    return mx.concatenate([prompts, completions])


def longest_shared(head: Head, empty: Sequence[Any], window: int | None) -> int:
    """Return the most tokens that prompt and completion may have together to be shared, or 0 if they cannot be.

    `empty` is the cache that the model's class would generate with, `window` the shortest of its layers'.
    """
    # A class with another cache keeps something else than keys and values, which ours would not.
    if any(type(cache) is not mlx_lm_module("models.cache").KVCache for cache in empty):
        return 0
    batch = sharing_probe(head.vocabulary)
    expected = _asked_states(head, len(empty), sequences(batch))
    try:
        states = _asked_states(head, len(empty), continued(batch))
        difference = mx.abs(states - expected).max() / mx.abs(expected).max()
        same = bool((difference <= AGREEMENT.get(expected.dtype, COARSE_AGREEMENT)).item())
    except Exception:  # noqa: BLE001  a class that cannot take such a cache may fail in any way
        same = False
    limits = [] if head.rotary_limit is None else [head.rotary_limit.positions]
    return min([UNLIMITED if window is None else window, *limits]) if same else 0


def _asked_states(head: Head, layers: int, layout: Layout | Continued) -> mx.array:
    """Return the hidden states from which a layout's targets are predicted, `[n, ...]`."""
    return hidden_states(head, layers, layout)[mx.array(layout.sources)]
