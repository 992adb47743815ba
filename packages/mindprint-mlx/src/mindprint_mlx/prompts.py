"""Prompts that are read once for both of their completions, through the cache that mlx-lm's classes take.

These classes take no mask and no positions, but they ask their cache for both. So the prompts are read with one that
keeps the keys and values of each layer, as part of the graph that gradients flow back through, and the completions with
one that puts those in front of theirs. A cache means nothing to recurrent layers, and a class may do anything with it.
So loading a model measures whether it can share prompts, and the windows of its configuration bound the length.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import numpy as np

from mindprint.asked_places import asking
from mindprint.contract import Int32
from mindprint.layouts import Continued, Layout, continued, sequences, sharing_probe
from mindprint_mlx.asked import worth_asking
from mindprint_mlx.division import completion_reads
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
    """One layer's cache for completions `[rows, C]`, of which row k continues prompt `prompts[k]`.

    `offset` are the prompts' lengths, int32 `[rows]`, where the completions' positions start.
    """

    def __init__(self, kept: Kept, prompts: Sequence[int], offset: mx.array) -> None:
        self.offset = offset
        self.keys, self.values = (_chosen(values, prompts) for values in (kept.keys, kept.values))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return mx.concatenate([self.keys, keys], axis=2), mx.concatenate([self.values, values], axis=2)

    def make_mask(self, tokens: int, **_: Any) -> mx.array:
        """Return which tokens each sees: its prompt, and its row up to itself. Bool `[rows, 1, C, P + C]`."""
        own = mx.arange(tokens)
        before = mx.arange(self.keys.shape[2]) < self.offset[:, None, None]
        after = mx.broadcast_to(own[:, None] >= own, (len(self.offset), tokens, tokens))
        before = mx.broadcast_to(before, (len(self.offset), tokens, self.keys.shape[2]))
        return mx.concatenate([before, after], axis=2)[:, None]


def _chosen(values: mx.array, rows: Sequence[int]) -> mx.array:
    """Return some rows, each of which may be chosen again."""
    everything = list(range(len(values)))
    if list(rows) == everything:
        return values
    if list(rows) == everything * 2:
        return mx.concatenate([values, values])
    # By concatenation, whose gradient is added up in one order. That of an index is scattered, on GPUs in any order.
    return mx.concatenate([values[row : row + 1] for row in rows])


def asked_states(
    head: Head, layers: int, layout: Layout | Continued, read: int | None = None, *, skip_unasked: bool = False
) -> mx.array:
    """Return the hidden states from which a layout's targets are predicted, `[n, ...]`.

    With the cost of a `read`, in tokens, completions of unlike lengths are read apart (`division.completion_reads`).
    `skip_unasked` lets the last layer leave out other places (`asked.py`).
    """

    def within(places: Int32, tokens: int) -> AbstractContextManager[None]:
        return asking(worth_asking(places, tokens) if skip_unasked else None)

    if isinstance(layout, Layout):
        with within(layout.sources, layout.tokens.size):
            return head.states(mx.array(layout.tokens))[mx.array(layout.sources)]
    kept = [Kept() for _ in range(layers)]
    of_prompts = layout.sources < layout.prompts.size
    with within(layout.sources[of_prompts], layout.prompts.size):
        states = [head.states(mx.array(layout.prompts), kept)]
    pairs, width = len(layout.prompts), layout.completions.shape[1]
    # The place among all states of each completion's first one.
    starts, filled = np.zeros(2 * pairs, np.int32), layout.prompts.size
    row, column = np.divmod(layout.sources - layout.prompts.size, width)
    for rows in completion_reads(layout.completion_lengths, read):
        longest = int(layout.completion_lengths[rows].max())
        if not longest:
            continue  # completions of one token, which the prompt predicts
        starts[rows] = filled + np.arange(len(rows)) * longest
        # Padding after a short prompt leaves keys too; `Continuation.make_mask` hides them by the prompts' lengths.
        prompts = [int(row) % pairs for row in rows]
        offset = mx.array(layout.prompt_lengths[prompts])
        caches = [Continuation(layer, prompts, offset) for layer in kept]
        tokens = layout.completions[rows, :longest]
        places = (starts[row] + column)[~of_prompts & np.isin(row, rows)] - filled
        with within(places, tokens.size):
            states.append(head.states(mx.array(tokens), caches))
        filled += tokens.size
    sources = np.where(of_prompts, layout.sources, starts[row] + column).astype(np.int32)
    return mx.concatenate(states)[mx.array(sources)]


def longest_shared(head: Head, empty: Sequence[Any], window: int | None) -> int:
    """Return the most tokens that prompt and completion may have together to be shared, or 0 if they cannot be.

    `empty` is the cache that the model's class would generate with, `window` the shortest of its layers'.
    """
    # A class with another cache keeps something else than keys and values, which ours would not.
    if any(type(cache) is not mlx_lm_module("models.cache").KVCache for cache in empty):
        return 0
    batch = sharing_probe(head.vocabulary)
    expected = asked_states(head, len(empty), sequences(batch))
    try:
        states = asked_states(head, len(empty), continued(batch))
        difference = mx.abs(states - expected).max() / mx.abs(expected).max()
        same = bool((difference <= AGREEMENT.get(expected.dtype, COARSE_AGREEMENT)).item())
    except Exception:  # noqa: BLE001  a class that cannot take such a cache may fail in any way
        same = False
    limits = [] if head.rotary_limit is None else [head.rotary_limit.positions]
    return min([UNLIMITED if window is None else window, *limits]) if same else 0
