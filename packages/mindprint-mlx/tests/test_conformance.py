"""The backend passes the suite that every backend must pass."""

from __future__ import annotations

from mindprint.contract import QUANTIZED_FORMATS
from mindprint_testing import BackendConformance


class TestConformance(BackendConformance):
    backend_name = "mlx"
    capabilities = frozenset(
        {
            "dropout",
            "bfloat16",
            "float16",
            "sampling",
            "filters",
            "mixed",
            "streaming",
            "embedding",
            "experts",
            "ranks",
            *QUANTIZED_FORMATS,
        }
    )
