"""Fixtures; `mlx_samples.py` has what they are made of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mindprint.contract import LoadedModel

# pytest imports test modules by path here, so that what they share has to be found by path too.
sys.path.insert(0, str(Path(__file__).parent))

from mlx_samples import load, write_model


@pytest.fixture(params=["qwen2", "llama", "gemma2"])
def family(request: pytest.FixtureRequest) -> str:
    """Tied, untied and soft-capped with sliding windows."""
    return str(request.param)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., LoadedModel]:
    """A new loaded model of a family."""
    return lambda family="qwen2", dtype="float32", **changes: load(
        write_model(tmp_path / family, family, **changes), dtype
    )
