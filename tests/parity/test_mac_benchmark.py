"""The benchmarks of MLX ask for a Mac's GPU when they are told to, and read nothing there that only Linux has."""

from __future__ import annotations

import resource
import sys
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import pytest

from mindprint.config import ModelConfig
from mindprint.errors import BackendError
from mindprint.models.folder import resolve_model
from side_by_side import contestants, turns, work


def test_the_peak_is_in_mib_on_either_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux counts KiB, macOS bytes."""
    on_linux = turns._peak_mib()
    assert on_linux == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, rel=0.1)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert turns._peak_mib() == pytest.approx(on_linux / 2**10, rel=0.1)


def test_a_system_without_proc_has_no_libraries_to_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: False)
    assert turns._blas() == ""


def test_the_device_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(work.DEVICE, "metal")
    folder = resolve_model(ModelConfig(name="builtin:tiny"), Path()).path
    expected = nullcontext() if mx.metal.is_available() else pytest.raises(BackendError, match="Metal")
    with expected:
        contestants.loaded("mlx", folder)
