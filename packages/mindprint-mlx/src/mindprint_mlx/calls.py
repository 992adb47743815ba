"""Replacing the call of one module of a built model, and nothing else about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx import nn


def wrap_call(module: nn.Module, around: Callable[..., Any]) -> None:
    """Run `around(call, *args)` where the module is called. `call` is the call of its class."""
    kind = type(module)
    replace_call(
        module, lambda self, *args, **named: around(lambda *a, **n: kind.__call__(self, *a, **n), *args, **named)
    )


def replace_call(module: nn.Module, call: Callable[..., Any]) -> None:
    """Replace the call of one module."""
    replace_method(module, "__call__", call)


def replace_method(module: nn.Module, name: str, method: Callable[..., Any]) -> None:
    """Replace one method of one module."""
    # Python looks up `__call__` on the class, so that the module gets a class that differs in nothing else.
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {name: method})
