"""The training check must find what it is there for: each mistake is built into the toy backend and looked for."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mindprint.config import make_config
from mindprint.contract import Generation, StepMetrics
from mindprint.models.engine import Placement
from mindprint.models.folder import ModelFolder
from mindprint.plugins.backend import load_backend
from mindprint.plugins.loading import load_backend_plugin
from mindprint.training.prepare import Prepared, prepare
from mindprint.training.selfcheck import Finding, check_deeply, check_training, guarded

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
    """As `mx.compile` can do: gradients of the first adapter for ever, while the optimizer continues to update."""
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


@pytest.fixture
def own(toy: str, toy_model: Path, tmp_path: Path) -> Prepared:
    rows = [{"prompt": f"{n}?", "completion": "aye " * (n + 1)} for n in range(4)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = {"sft": {"steps_per_topic": 3, "learning_rate": 1e-2}, "dpo": {"enabled": False}}
    config = {"model": {"name": str(toy_model)}, "backend": toy, "data": {"path": str(tmp_path)}, **stages}
    return prepare(make_config(config))


def deeply(own: Prepared) -> dict[str, Finding]:
    placement = Placement(load_backend("toy"), "cpu", "float32")
    return {finding.name: finding for finding in guarded("toy", lambda: check_deeply(own, placement))}


def test_a_sound_backend_passes_deeply(backend_module: ModuleType, own: Prepared) -> None:
    found = deeply(own)
    assert {name for name, finding in found.items() if not finding.ok} <= {"generation"}  # the toy never learnt to end
    assert found["LoRA"].detail == "2 modules, 1,536 elements, and nothing else is trainable"
    assert found["save and load"].detail == "log-probs within 0 nats of those in training"
    assert found["merge"].detail.startswith("log-probs within ")


def test_adapter_on_other_modules(backend_module: ModuleType, own: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    original = backend_module.mindprint_inject_adapter

    def elsewhere(model: Any, adapter: Any) -> Any:
        return replace(original(model, adapter), sites=("layers.0.up_proj",))

    monkeypatch.setattr(backend_module, "mindprint_inject_adapter", _hook(original, elsewhere))
    assert "adapted other modules than the configuration names: layers.0.down_proj" in deeply(own)["works"].detail


def test_a_base_that_is_trained_too(backend_module: ModuleType, own: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    original = backend_module._apply

    def moving(model: Any, *rest: Any) -> float:
        model.weights["lm_head"] = model.weights["lm_head"] * 1.001
        return float(original(model, *rest))

    monkeypatch.setattr(backend_module, "_apply", moving)
    found = deeply(own)
    assert not found["base"].ok
    assert not found["save and load"].ok
    assert not found["merge"].ok


def test_what_is_saved_is_not_what_was_trained(
    backend_module: ModuleType, own: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = backend_module.mindprint_save

    def halved(model: Any) -> Any:
        state = original(model)
        tensors = {site: pair._replace(b=pair.b / 2) for site, pair in state.adapter.tensors.items()}
        return replace(state, adapter=replace(state.adapter, tensors=tensors))

    monkeypatch.setattr(backend_module, "mindprint_save", _hook(original, halved))
    assert [name for name, finding in deeply(own).items() if not finding.ok and name != "generation"] == [
        "save and load",
        "merge",
    ]


@pytest.mark.parametrize(
    ("tokens", "reason", "holds"),
    [([10, 11], "stop", True), ([10, 11], "length", False), ([], "stop", False), ([10] * 5, "stop", False)],
)
def test_answers_have_words_and_end(
    tokens: list[int],
    reason: Any,
    holds: bool,
    backend_module: ModuleType,
    own: Prepared,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = backend_module.mindprint_generate

    def fixed(model: Any, prompts: Any, sampling: Any, adapter: Any) -> Any:
        return [Generation(np.array(tokens, np.int32), reason) for _ in prompts]

    monkeypatch.setattr(backend_module, "mindprint_generate", _hook(original, fixed))
    assert deeply(own)["generation"].ok is holds


def _hook(original: Any, replacement: Any) -> Any:
    replacement.mindprint_impl = original.mindprint_impl
    return replacement
