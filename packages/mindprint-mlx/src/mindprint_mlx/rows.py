"""A cache in which several rows continue at once, each at another position.

Prompts lie at their positions and are filled up on the right to the longest one. New positions of all rows are appended
behind that, at one place, so that an array is extended and not copied. A mask hides the filling. mlx-lm's own
`BatchKVCache` fills prompts up on the left, which moves the positions of a row with the length of its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from mindprint.contract import Int32
from mindprint_mlx.imports import mlx_lm_module

ROWS = 16
"""The most rows that continue at once."""

GRAIN = 256
"""Places by which the arrays of keys and values grow."""

POSITIONS = 4096
CACHE_BYTES = 4 * 2**30
"""A model whose rows would need more bytes than this for `POSITIONS` positions continues its prompts one by one."""

AGREEMENT = 1e-2
"""Relative distance of logits that rounding may explain: a class that cannot do this is off by far more, or fails."""


class RowCache:
    """One layer's keys and values, `[rows, heads, places, dims]`, and the next position of each row, `[rows]`."""

    def __init__(self, cache: Any, lengths: Sequence[int]) -> None:
        """Take over mlx-lm's cache of prompts that were read together, filled up on the right, with their lengths."""
        self._width = self._filled = int(cache.offset)
        self._prompts = self.offset = mx.array(list(lengths))
        # Rows of one length have no filling, and need no mask.
        self._is_even = min(lengths) == self._width
        self._keys, self._values = cache.keys, cache.values

    @property
    def places(self) -> int:
        """Return the number of places that the next position may see, its own among them."""
        return self._filled + 1

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append one new position of each row, `[rows, heads, 1, dims]`, and return all that are filled."""
        place, self._filled = self._filled, self._filled + 1
        if self._filled > self._keys.shape[2]:
            self._keys, self._values = (_grown(array) for array in (self._keys, self._values))
        self._keys[:, :, place : self._filled] = keys
        self._values[:, :, place : self._filled] = values
        self.offset = self.offset + 1
        return self._keys[:, :, : self._filled], self._values[:, :, : self._filled]

    def make_mask(self, _: int, window_size: int | None = None, **__: Any) -> mx.array | None:
        """Return which places the next position of each row sees: bool `[rows, 1, 1, places]`, or None for all."""
        if window_size is not None:
            return self.window_mask(window_size)
        return None if self._is_even else self._seen()[:, None, None, :]

    def window_mask(self, window: int) -> mx.array:
        """Return which places the next position sees if it sees `window` positions: bool `[rows, 1, 1, places]`."""
        places = mx.arange(self.places)
        positions = mx.where(places < self._width, places, self._prompts[:, None] + places - self._width)
        near = self.offset[:, None] - positions < window
        return mx.logical_and(self._seen(), near)[:, None, None, :]

    def _seen(self) -> mx.array:
        """Return which places are no filling, bool `[rows, places]`."""
        places = mx.arange(self.places)
        return mx.logical_or(places >= self._width, places < self._prompts[:, None])

    def keep(self, rows: mx.array) -> None:
        """Keep these rows, int32 `[kept]`, and forget the others."""
        self._keys, self._values = self._keys[rows], self._values[rows]
        self._prompts, self.offset = self._prompts[rows], self.offset[rows]


def read_together(module: nn.Module, empty: Sequence[Any], prompts: Sequence[Int32]) -> list[RowCache]:
    """Read prompts (int32 `[P]`, which may be empty) and return their caches by layer. No logits are computed."""
    # Filling is behind the tokens, where causal attention does not see it. Without any tokens there is one place of it.
    width = max(1, *map(len, prompts))
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    # MLX computes only what it is asked for, and these are not the logits.
    module(mx.array(tokens), cache=empty)
    mx.eval([cache.state for cache in empty])
    lengths = [len(prompt) for prompt in prompts]
    return [RowCache(cache, lengths) for cache in empty]


def can_continue_rows(module: nn.Module, empty: Sequence[Any]) -> bool:
    """Return whether the model continues rows of different lengths together as it does alone, tried out on two."""
    if any(type(cache) is not mlx_lm_module("models.cache").KVCache for cache in empty):
        return False
    prompts = [np.array(prompt, np.int32) for prompt in ([1, 2, 3, 0], [4])]
    try:
        caches = [[_small_cache(type(cache)) for cache in empty] for _ in range(3)]
        rows = read_together(module, caches[2], prompts)
        if ROWS * POSITIONS * sum(_bytes_a_position(cache) for cache in caches[2]) > CACHE_BYTES:
            return False
        # Compared with the same tokens read and continued alone.
        together = module(mx.array([[2]] * len(prompts)), cache=rows)[:, -1].astype(mx.float32)
        alone = [
            module(mx.array([[*prompt.tolist(), 2]]), cache=cache)[0, -1].astype(mx.float32)
            for prompt, cache in zip(prompts, caches, strict=False)
        ]
        wanted = mx.stack(alone)
        return bool((mx.linalg.norm(together - wanted) <= AGREEMENT * mx.linalg.norm(wanted)).item())
    except Exception:  # noqa: BLE001  a class that cannot take such a cache may fail in any way
        return False


def _small_cache(kind: Any) -> Any:
    """Return an empty cache that grows by a few positions at once: mlx-lm's grows by 256."""
    cache = kind()
    cache.step = 8
    return cache


def _bytes_a_position(cache: Any) -> int:
    rows, _, positions, _ = cache.keys.shape
    return sum(values.nbytes // (rows * positions) for values in (cache.keys, cache.values))


def _grown(values: mx.array) -> mx.array:
    rows, heads, _, dims = values.shape
    return mx.concatenate([values, mx.zeros((rows, heads, GRAIN, dims), values.dtype)], axis=2)
