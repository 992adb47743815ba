"""A trace of hook calls on request: one line a call on standard error, with its arguments, its result and its time."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import pluggy

TRACE = "MINDPRINT_TRACE"
"""Environment variable. Set to 1, every hook call is traced."""


def trace_if_asked(manager: pluggy.PluginManager) -> None:
    """Trace the manager's hook calls if the environment asks for it."""
    if os.environ.get(TRACE) != "1":
        return
    # A hook may call another hook, so the starting times are a stack.
    started: list[float] = []

    def before(_hook: str, _impls: Sequence[Any], _arguments: Mapping[str, Any]) -> None:
        started.append(perf_counter())

    def after(outcome: pluggy.Result[Any], hook: str, impls: Sequence[Any], arguments: Mapping[str, Any]) -> None:
        seconds = perf_counter() - started.pop()
        plugins = ", ".join(impl.plugin_name for impl in impls) or "nobody"
        given = ", ".join(f"{name}={_summary(value)}" for name, value in arguments.items())
        error = outcome.exception
        result = f"raised {type(error).__name__}: {error}" if error else _summary(outcome.get_result())
        sys.stderr.write(f"mindprint: trace: {hook}({given}) [{plugins}] {seconds:.4f} s -> {result}\n")

    manager.add_hookcall_monitoring(before, after)


def _summary(value: object) -> str:
    # By kind and size, never by contents: a trace must not publish anyone's writing.
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{getattr(value, 'dtype', '')}{list(shape)}"
    if isinstance(value, list | tuple):
        return f"{len(value)} x {type(value[0]).__name__}" if value else "nothing"
    return str(value) if isinstance(value, bool | int | float) or value is None else type(value).__name__
