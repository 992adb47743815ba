"""The conformance suite for Mindprint backends: subclass `BackendConformance`, name the backend, inherit every test.

    from mindprint_testing import BackendConformance

    class TestConformance(BackendConformance):
        backend_name = "hello"
        capabilities = frozenset({"sampling"})

Names are imported when they are first used: pytest loads `mindprint_testing.plugin` in every run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.register_assert_rewrite("mindprint_testing")

if TYPE_CHECKING:
    from mindprint_testing.bench import Bench
    from mindprint_testing.override import departs
    from mindprint_testing.suite import BackendConformance
    from mindprint_testing.tiny import write_tiny_model

__version__ = "0.1.0"
__all__ = ["BackendConformance", "Bench", "__version__", "departs", "write_tiny_model"]

_EXPORTS = {
    "BackendConformance": "suite",
    "Bench": "bench",
    "departs": "override",
    "write_tiny_model": "tiny",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mindprint_testing' has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 (with the names themselves)

    return getattr(import_module(f"mindprint_testing.{_EXPORTS[name]}"), name)
