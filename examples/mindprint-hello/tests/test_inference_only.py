"""A backend that states that it does not train: driven, tested, and refused where training is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mindprint.config import BackendConfig
from mindprint.contract import BackendInfo, ModelSpec
from mindprint.errors import BackendError
from mindprint.hookspecs import REQUIRED_HOOKS, TRAINING_HOOKS, hookimpl
from mindprint.models.engine import Placements
from mindprint.plugins.backend import Backend, make_backend
from mindprint.plugins.entries import BACKENDS, Plugin
from mindprint_hello import plugin as hello
from mindprint_hello.model_folder import write_model


def backend(*, states_it: bool, without: tuple[str, ...] = TRAINING_HOOKS) -> Backend:
    """Return hello's backend without some hooks, and with or without a word about it."""
    module = ModuleType("reader")
    for name in set(REQUIRED_HOOKS) - set(without):
        setattr(module, name, getattr(hello, name))

    @hookimpl
    def mindprint_backend_info() -> BackendInfo:
        info: BackendInfo = hello.mindprint_backend_info()
        return replace(info, name="reader", training=False) if states_it else replace(info, name="reader")

    vars(module)["mindprint_backend_info"] = mindprint_backend_info
    plugin = Plugin(**{**plugin_fields(), "name": "reader", "group": BACKENDS})
    return make_backend(plugin, module)


def plugin_fields() -> dict[str, Any]:
    return {"name": "reader", "group": BACKENDS, "module": "reader", "distribution": "reader", "version": "1"}


def test_training_is_refused_in_a_line_and_everything_else_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = backend(states_it=True)
    model = reader.load_model(ModelSpec(str(write_model(tmp_path / "base")), "cpu", "float32"))
    assert reader.adapter_sites(model)
    for call in (lambda: reader.save(model), lambda: reader.restore(model, Any)):
        with pytest.raises(BackendError, match="backend 'reader' does not train, it only evaluates and answers"):
            call()
    placements = Placements()
    monkeypatch.setattr(placements, "_load", lambda name: reader)
    assert placements.resolve(BackendConfig(type="reader")).backend is reader
    with pytest.raises(BackendError, match="does not train"):
        placements.resolve_training(BackendConfig(type="reader"))


def test_a_backend_that_says_nothing_must_have_every_hook() -> None:
    assert backend(states_it=False, without=()).info.training
    with pytest.raises(BackendError, match="does not implement mindprint_sft_step, mindprint_dpo_step"):
        backend(states_it=False)


def test_the_other_hooks_cannot_be_left_out() -> None:
    with pytest.raises(BackendError, match="does not implement mindprint_log_probs, mindprint_generate"):
        backend(states_it=True, without=("mindprint_log_probs", "mindprint_generate"))
