"""`model.quantize`: from the settings to the backend, and the bases and backends that it does not fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mindprint.config import ModelConfig
from mindprint.errors import BackendError, ModelError
from mindprint.models.engine import check_quantize
from mindprint.models.folder import ModelFolder, resolve_model


def backend(*capabilities: str) -> Any:
    return SimpleNamespace(name="some", info=SimpleNamespace(capabilities=frozenset(capabilities)))


def test_the_setting_goes_with_the_folder(tmp_path: Path) -> None:
    assert resolve_model(ModelConfig(quantize="nf4"), tmp_path).quantize == "nf4"
    assert resolve_model(ModelConfig(), tmp_path).quantize is None


def test_a_backend_that_does_not_quantize() -> None:
    folder = ModelFolder(Path("base"), "base", quantize="4bit")
    with pytest.raises(BackendError, match="'some' cannot quantize a base while loading it .model.quantize: 4bit"):
        check_quantize(backend("dropout"), folder, None)
    check_quantize(backend("quantize"), folder, None)


def test_a_base_that_is_quantized_already() -> None:
    with pytest.raises(ModelError, match="base: is quantized already .mlx-4bit"):
        check_quantize(backend("quantize"), ModelFolder(Path("base"), "base", quantize="nf4"), "mlx-4bit")
