"""The backend passes the suite that every backend must pass."""

from __future__ import annotations

import os

from mindprint.contract import QUANTIZED_FORMATS
from mindprint_testing import BackendConformance


class TestConformance(BackendConformance):
    backend_name = "torch"
    # On a machine with a GPU, `MINDPRINT_TEST_DEVICE=cuda` runs the same suite there.
    device = os.environ.get("MINDPRINT_TEST_DEVICE", "cpu")
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
            "quantize",
            "experts",
        }
        | {"ranks", "shard", "devices"}
        | set(QUANTIZED_FORMATS)
    )
