"""The places whose hidden states are asked for, while a backend computes or makes a graph.

Of a batch's hidden states the LM head reads only those that predict a counted token. A backend states their places with
`asking`, and modules of its last layer look them up with `asked_now` and leave out the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Places = TypeVar("Places")


@dataclass(frozen=True, eq=False)
class Asked(Generic[Places]):
    """Flat places in `[rows, width]` that are asked for, each once, and the value of a module's result at all others.

    Args:
        places: Integers `[asked]`, as an array of the backend's choice.
        elsewhere: Zero. A trial takes NaN, which shows whether anything depends on the other places.
    """

    places: Places
    elsewhere: float = 0.0


_asked: ContextVar[Asked[Any] | None] = ContextVar("asked", default=None)


@contextmanager
def asking(asked: Asked[Any] | None) -> Iterator[None]:
    """Ask for some places within this context, or for all of them with None."""
    token = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(token)


def asked_now() -> Asked[Any] | None:
    """Return what this context asks for."""
    return _asked.get()
