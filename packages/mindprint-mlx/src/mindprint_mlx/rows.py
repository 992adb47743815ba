"""A cache in which several rows continue at once, each at another position.

Keys and values lie at their positions, filled up on the right, and a mask hides the places beyond a row's end. mlx-lm's
own `BatchKVCache` fills up on the left instead, which changes a row's numbers with the length of its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx import nn

from mindprint_mlx.imports import mlx_lm_module

ROWS = 16
"""The number of rows that continue at once, always: with fewer, the rest are copies."""

POSITIONS = 4096
CACHE_BYTES = 4 * 2**30
"""A model whose rows would need more bytes than this for `POSITIONS` positions continues its prompts one by one."""

AGREEMENT = 1e-2
"""Relative distance of logits that rounding may explain: a class that cannot do this is off by far more, or fails."""


class RowCache:
    """One layer's keys and values, `[ROWS, heads, positions, dims]`, and how many of each row are filled, `[ROWS]`."""

    def __init__(self, caches: Sequence[Any], positions: int) -> None:
        """Join the caches of rows that were read alone. Places beyond them are copies of the first."""
        full = [*caches, *([caches[0]] * (ROWS - len(caches)))]
        self.offset = mx.array([cache.offset for cache in full])
        self.keys = mx.concatenate([_extended(cache, cache.keys, positions) for cache in full])
        self.values = mx.concatenate([_extended(cache, cache.values, positions) for cache in full])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Put one new position of each row, `[ROWS, heads, 1, dims]`, behind the others."""
        # Each row writes at its own position: an indexed assignment instead of the slice of mlx-lm's cache.
        rows = mx.arange(ROWS)
        self.keys[rows, :, self.offset] = keys[:, :, 0]
        self.values[rows, :, self.offset] = values[:, :, 0]
        self.offset = self.offset + 1
        return self.keys, self.values

    def make_mask(self, _: int, window_size: int | None = None, **__: Any) -> mx.array:
        """Return which positions each row's next one sees: itself and those before. Bool `[ROWS, 1, 1, positions]`."""
        ahead = self.offset[:, None] - mx.arange(self.keys.shape[2])
        seen = ahead >= 0 if window_size is None else (ahead >= 0) & (ahead < window_size)
        return seen[:, None, None, :]


def row_caches(rows: Sequence[Sequence[Any]], positions: int) -> list[RowCache]:
    """Return the caches of several prompts, each a list by layer, as one list by layer."""
    return [RowCache(layer, positions) for layer in zip(*rows, strict=True)]


def can_continue_rows(module: nn.Module, empty: Sequence[Any]) -> bool:
    """Return whether the model continues rows of different lengths together as it does alone, tried out on two."""
    if any(type(cache) is not mlx_lm_module("models.cache").KVCache for cache in empty):
        return False
    prompts = ([1, 2, 3, 0], [4])
    try:
        caches = [[_small_cache(type(cache)) for cache in empty] for _ in prompts]
        for prompt, cache in zip(prompts, caches, strict=True):
            module(mx.array([prompt]), cache=cache)
        if ROWS * POSITIONS * sum(_bytes_a_position(cache) for cache in caches[0]) > CACHE_BYTES:
            return False
        # Compared with the same tokens continued alone, in the places of the first two rows.
        together = module(mx.array([[2]] * ROWS), cache=row_caches(caches, 8))[:2, -1].astype(mx.float32)
        alone = [module(mx.array([[2]]), cache=cache)[0, -1].astype(mx.float32) for cache in caches]
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
    return sum(values.nbytes // values.shape[2] for values in (cache.keys, cache.values))


def _extended(cache: Any, values: mx.array, positions: int) -> mx.array:
    filled = values[:, :, : cache.offset]
    return mx.pad(filled, [(0, 0), (0, 0), (0, positions - cache.offset), (0, 0)])
