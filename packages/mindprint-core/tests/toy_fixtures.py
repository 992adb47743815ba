"""Fixtures around the toy backend; conftest.py makes them known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_base import install_toy, write_toy_model

from mindprint.plugins.loading import load_backend_plugin


@pytest.fixture(scope="session")
def toy_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH in which the toy backend is installed."""
    return install_toy(tmp_path_factory.mktemp("site"))


@pytest.fixture
def toy(toy_site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The toy backend, installed in this process; its name."""
    monkeypatch.syspath_prepend(str(toy_site))
    load_backend_plugin.cache_clear()
    yield "toy"
    load_backend_plugin.cache_clear()


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a base for the toy backend."""
    return write_toy_model(tmp_path_factory.mktemp("toy-model"))
