"""Sliding windows as transformers has them: the configuration decides which token sees which, not the class.

Some of mlx-lm's classes slide by another pattern, some not at all. So all are built without windows, the layers that
slide are given their masks here, and generating keeps all keys and values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mindprint_mlx.imports import mlx_lm_module
from mindprint_mlx.prompts import Continuation
from mindprint_mlx.rows import RowCache


def windowed(window: int, attention: Callable[..., Any]) -> Callable[..., Any]:
    """Return a wrapper of an attention's call that gives it the mask of its window, where a sequence is longer.

    `attention` is the call that is wrapped: classes take mask and cache at different places.
    """
    signature = inspect.signature(attention)
    first, *_ = (name for name in signature.parameters if name != "self")

    def around(call: Callable[..., Any], *args: Any, **named: Any) -> Any:
        given = signature.bind(None, *args, **named).arguments
        x, cache = given[first], given.get("cache")
        # Shorter sequences keep the class's own mask, which its fast attention kernels know.
        if _length(x, cache) > window:
            given["mask"] = _mask(x.shape[1], window, cache)
        del given["self"]
        return call(**given)

    return around


def _length(x: mx.array, cache: Any) -> int:
    """Return how many positions a token can see at most."""
    if isinstance(cache, RowCache):
        return cache.places
    if isinstance(cache, Continuation):
        return int(x.shape[1] + cache.keys.shape[2])
    return int(x.shape[1] + (0 if cache is None else cache.offset))


def _mask(tokens: int, window: int, cache: Any) -> mx.array:
    if isinstance(cache, RowCache):
        return cache.window_mask(window)
    mask: mx.array = mlx_lm_module("models.base").create_causal_mask(
        tokens, 0 if cache is None else cache.offset, window
    )
    return mask
