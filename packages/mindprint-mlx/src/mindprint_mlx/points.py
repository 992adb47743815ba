"""Points at which a graph is evaluated on the way, so that graphs on several threads keep all cores at work.

A thread that evaluates a graph on a CPU waits once about a hundred operations are under way, and MLX counts those of
all streams together. Of two whole graphs one soon holds all these places, and the other's core waits for it: half of
the time only one of two worked. From point to point a graph is some twenty operations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import mlx.core as mx

# A graph is made by code of mlx-lm's, which hands nothing through: so the list is the module's.
_noted: deque[mx.array] | None = None


@contextmanager
def noted() -> Iterator[deque[mx.array]]:
    """Collect the points of the graphs that are made within this context, in order. One thread at a time."""
    global _noted  # noqa: PLW0603
    _noted = deque()
    try:
        yield _noted
    finally:
        _noted = None


def evaluate(points: deque[mx.array]) -> None:
    """Evaluate arrays in order, dropping each reference as soon as it is done."""
    # Popped, since a reference would keep the array and all that it was made of.
    while points:
        mx.eval(points.popleft())


def forward(x: mx.array) -> mx.array:
    """Return `x`, noted as a point on the way forward."""
    if _noted is not None:
        _noted.append(x)
    return x


def reached(x: mx.array) -> mx.array:
    """Return `x`, noted as a point, or evaluated now where no points are noted. Not for what is differentiated."""
    if _noted is None:
        mx.eval(x)
    return forward(x)


def backward(x: mx.array) -> mx.array:
    """Return `x`, its gradient noted as a point on the way back."""
    return x if _noted is None else cast(mx.array, _passed(x))


@mx.custom_function
def _passed(x: mx.array) -> mx.array:
    return x


# The cotangent of the identity is the gradient itself, on its way back through the graph.
@_passed.vjp
def _passed_vjp(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
    return forward(cotangent)
