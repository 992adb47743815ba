"""Points at which a graph is evaluated on the way, so that graphs beside each other keep all cores at work.

Whoever evaluates a graph on a CPU waits once about a hundred operations are under way, and MLX counts those of all
streams together. Of two whole graphs one soon holds all these places, and the other's core waits for it: half of the
time only one of two worked. From point to point a graph is some twenty operations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import mlx.core as mx

_noted: deque[mx.array] | None = None


@contextmanager
def noted() -> Iterator[deque[mx.array]]:
    """The points of the graphs that are made within, in the order that they are reached. One thread at a time."""
    global _noted  # noqa: PLW0603  a graph is made by code that is mlx-lm's, which hands nothing through
    _noted = deque()
    try:
        yield _noted
    finally:
        _noted = None


def evaluate(points: deque[mx.array]) -> None:
    """One after the other, keeping none."""
    while points:
        mx.eval(points.popleft())


def forward(x: mx.array) -> mx.array:
    """`x`, a point on the way forward."""
    if _noted is not None:
        _noted.append(x)
    return x


def backward(x: mx.array) -> mx.array:
    """`x`, whose gradient is a point on the way back."""
    return x if _noted is None else cast(mx.array, _passed(x))


@mx.custom_function
def _passed(x: mx.array) -> mx.array:
    return x


@_passed.vjp
def _passed_vjp(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
    return forward(cotangent)
