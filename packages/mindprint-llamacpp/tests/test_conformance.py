"""The backend passes the suite that every backend must pass, without the tests that train."""

from __future__ import annotations

from mindprint_testing import BackendConformance


class TestConformance(BackendConformance):
    backend_name = "llamacpp"
    capabilities = frozenset({"sampling", "filters", "mixed", "streaming", "gguf"})
    training = False
