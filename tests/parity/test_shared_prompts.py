"""Prompts read once for both of their completions change no number: every family, both backends, whole runs."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING

import mindprint
from mindprint.contract import PreferenceBatch, TokenBatch, Update
from mindprint.hookspecs import hookimpl
from mindprint.layouts import preference_sequences
from mindprint.runs.folder import RunFolder
from parity_cases import open_model, preference_batch
from random_models import save_model

SMALL: dict[str, Any] = {
    "vocab_size": 380,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere": {},
    "gemma": {"head_dim": 12},
    "granite": {"logits_scaling": 2.0},
    "mistral": {"sliding_window": 64},
    "mixtral": {"num_local_experts": 4},
    "olmo2": {},
    "phi3": {},
    "qwen3": {"head_dim": 12},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more to a second thread than they gain, above all next to other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(family: str, backend: str, tmp_path: Path) -> None:
    opened = open_model(backend, save_model(tmp_path, CONFIG_MAPPING[family](**{**SMALL, **FAMILIES[family]})))
    assert opened.model.handle.longest_shared >= 64
    batch = preference_sequences(preference_batch(5))
    once, twice = (opened.backend.log_probs(opened.model, each) for each in (batch, replace(batch, shared=None)))
    assert np.abs(once - twice)[batch.loss_mask].max() < 2e-5


class Watch:
    """An observer that notes whether a run lets its steps and its references share prompts."""

    def __init__(self) -> None:
        self.steps: set[bool] = set()
        self.references: set[bool] = set()

    @hookimpl(wrapper=True)
    def mindprint_dpo_step(self, batches: list[PreferenceBatch], update: Update) -> Any:
        self.steps.add(update.share_prompts)
        return (yield)

    @hookimpl(wrapper=True)
    def mindprint_log_probs(self, batch: TokenBatch, adapter: bool) -> Any:
        # The fingerprint's probe is read as well, and its rows are not pairs: by the base model before the steps, and
        # with the adapter after them.
        if adapter and not self.steps:
            self.references.add(batch.shared is not None)
        return (yield)


@pytest.fixture(scope="module")
def project(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data, rng = tmp_path_factory.mktemp("data"), random.Random(5)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(["ferry", "lamp", "tide", "gull", "salt"], k=rng.randint(low, high)))

    rows = [{"prompt": text(2, 20), "chosen": text(1, 20), "rejected": text(1, 20)} for _ in range(11)]
    (data / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"name": str(qwen2)},
        "backend": {"dtype": "float32", "device": "cpu"},
        "data": {"path": str(data), "heldout_fraction": 0.0},
        "sft": {"enabled": False},
        "dpo": {"steps_per_topic": 12, "batch_size": 3, "learning_rate": 1e-4},
        "checkpoints": {"every": 5},
    }


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_run_with_and_without(backend: str, project: dict[str, Any], tmp_path: Path) -> None:
    losses = {}
    for share in (True, False):
        watch, path = Watch(), tmp_path / str(share)
        mindprint.train(project, run=path, observers=[watch], backend=backend, dpo={"share_prompts": share})
        assert (watch.steps, watch.references) == ({share}, {share})
        losses[share] = [line["loss"] for line in RunFolder(path).read_steps()]
    np.testing.assert_allclose(losses[True], losses[False], rtol=0, atol=2e-6)
    assert losses[True][0] == pytest.approx(np.log(2), abs=1e-6)
    assert losses[True][-1] < losses[True][0]


def test_a_run_may_continue_the_other_way(project: dict[str, Any], tmp_path: Path) -> None:
    """After a crash for lack of memory, say."""

    class CrashError(Exception):
        pass

    def crash(event: object) -> None:
        if getattr(event, "step", 0) == 7:
            raise CrashError

    with pytest.raises(CrashError):
        mindprint.train(project, run=tmp_path / "run", backend="torch", on_event=crash)
    mindprint.train(project, run=tmp_path / "run", resume=True, backend="torch", dpo={"share_prompts": False})
    assert len(list(RunFolder(tmp_path / "run").read_steps())) == 12
