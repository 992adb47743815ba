"""Departures from an inherited test: with a stated reason, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Test = TypeVar("Test", bound=Callable[..., Any])

REASON = "__departs_because__"


def departs(because: str) -> Callable[[Test], Test]:
    """Mark a test that replaces an inherited one, with the reason: `@departs(because="...")`.

    Args:
        because: The reason. An empty one is none.
    """

    def marked(test: Test) -> Test:
        setattr(test, REASON, because)
        return test

    return marked


def refuse_quiet_overrides(suite: type, subclass: type) -> None:
    """Let every inherited test that `subclass` replaces without a stated reason fail, whatever replaced it."""
    for name in conformance_tests(suite):
        # A test that was set to None is an override too: pytest would leave it out without a word.
        present = getattr(subclass, name, None)
        if present is not getattr(suite, name) and not str(getattr(present, REASON, "")).strip():
            setattr(subclass, name, _refused(name))


def conformance_tests(suite: type) -> dict[str, Callable[..., None]]:
    """Return the suite's tests by name."""
    return {name: getattr(suite, name) for name in dir(suite) if name.startswith("test_")}


def _refused(name: str) -> Callable[[object], None]:
    def refused(_self: object) -> None:
        raise AssertionError(
            f"{name} is part of the conformance suite and was overridden without a stated reason; "
            'mark what replaces it with @departs(because="..."), or leave it alone'
        )

    refused.__name__ = name
    return refused
