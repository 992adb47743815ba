"""The example passes every test of the contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindprint.contract import QUANTIZED_FORMATS
from mindprint_hello.model_folder import write_model
from mindprint_testing import BackendConformance


class TestConformance(BackendConformance):
    backend_name = "hello"
    capabilities = frozenset({"sampling", "streaming", *QUANTIZED_FORMATS})

    @pytest.fixture
    def model_folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.getbasetemp() / "hello"
        return folder if folder.exists() else write_model(folder, hidden=32)
