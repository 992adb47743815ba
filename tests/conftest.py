"""Fixtures for tests that need several distributions: small random models, and both backends on them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  first, as a process that trains with torch alone has it: with the products of its own BLAS

import mindprint_mlx  # noqa: F401  before any test module imports mlx: it decides what MLX multiplies matrices with

sys.path.insert(0, str(Path(__file__).parent))  # for random_models.py and parity_cases.py
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # for on_gpu


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of 0.2M parameters with a tokenizer, its rope base far from every library's default."""
    from random_models import save_qwen2

    return save_qwen2(tmp_path_factory.mktemp("qwen2"))
