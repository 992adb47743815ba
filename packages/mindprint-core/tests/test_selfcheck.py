"""The training check must find what it is there for: each mistake is built into the toy backend and looked for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mindprint.backend import load_backend
from mindprint.contract import StepMetrics
from mindprint.models import ModelFolder
from mindprint.plugins import load_backend_plugin
from mindprint.selfcheck import check_training, guarded
from mindprint.training.engine import Placement

EVERYTHING = {"gradient", "adapter", "loss", "same numbers", "base", "adapter off"}


@pytest.fixture
def backend_module(toy: str) -> ModuleType:
    _, module = load_backend_plugin(toy)
    return module


def failed(toy_model: Path) -> set[str]:
    placement = Placement(load_backend("toy"), "cpu", "float32")
    findings = list(guarded("toy", lambda: check_training(placement, ModelFolder(toy_model, "toy"))))
    assert {finding.name for finding in findings} == EVERYTHING
    return {finding.name for finding in findings if not finding.ok}


def test_a_sound_backend_passes(backend_module: ModuleType, toy_model: Path) -> None:
    assert failed(toy_model) == set()


def test_an_optimizer_that_updates_nothing(
    backend_module: ModuleType, toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-lm-lora#68: plausible losses, and the adapter stays as it was."""
    monkeypatch.setattr(backend_module, "_apply", lambda *_: 1.0)
    assert failed(toy_model) == {"adapter", "loss"}


def test_a_step_that_was_compiled_with_the_first_adapter(
    backend_module: ModuleType, toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `mx.compile` can do: gradients of the first adapter for ever, while the optimizer goes on updating."""
    original: Callable[..., StepMetrics] = backend_module.mindprint_sft_step
    remembered: list[Any] = []

    def compiled(model: Any, batches: Any, update: Any) -> StepMetrics:
        remembered.append(model.adapter)
        current, model.adapter = model.adapter, remembered[0]
        frozen = original(model, batches, replace(update, learning_rate=0.0))
        model.adapter = current
        return replace(original(model, batches, update), loss=frozen.loss)

    monkeypatch.setattr(backend_module, "mindprint_sft_step", _hook(original, compiled))
    assert failed(toy_model) == {"loss", "same numbers"}


def test_a_base_that_moves(backend_module: ModuleType, toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = backend_module._apply

    def moving(model: Any, *rest: Any) -> float:
        model.weights["layers.0.up_proj"] = model.weights["layers.0.up_proj"] * 1.01
        return float(original(model, *rest))

    monkeypatch.setattr(backend_module, "_apply", moving)
    assert failed(toy_model) >= {"base", "adapter off"}


def test_a_gradient_that_is_zero(backend_module: ModuleType, toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module._Pass, "add_gradients", lambda *_: None)
    assert failed(toy_model) == {"gradient", "adapter", "loss"}


def test_whatever_a_backend_raises_is_a_finding(toy: str, tmp_path: Path) -> None:
    placement = Placement(load_backend(toy), "cpu", "float32")
    (finding,) = guarded("toy", lambda: check_training(placement, ModelFolder(tmp_path, "nothing")))
    assert (finding.subject, finding.ok) == ("toy", False)
    assert "has no tokenizer" in finding.detail


def _hook(original: Any, replacement: Any) -> Any:
    replacement.mindprint_impl = original.mindprint_impl
    return replacement
