"""NaN in a row of the base that only the fingerprint's probe meets: refused before training, and no adapter is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mindprint
from mindprint.config import load_config
from mindprint.errors import ModelError, NotFiniteError
from mindprint.training.prepare import prepare


@pytest.fixture
def project(qwen2: Path, tmp_path: Path) -> Path:
    """A project on a model of its own, with little to train."""
    shutil.copytree(qwen2, tmp_path / "model")
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    row = {"prompt": "the water", "completion": "the river"}
    (folder / "data" / "sft.jsonl").write_text((json.dumps(row) + "\n") * 4)
    (folder / "mindprint.yaml").write_text(
        f"model: {{name: {tmp_path / 'model'}}}\nbackend: {{type: mlx, device: cpu}}\ndpo: {{enabled: false}}\n"
        "sft: {steps_per_topic: 2}\nevaluation: {levels: []}\n"
    )
    return folder


def poison(project: Path) -> None:
    """Make the embedding of a token NaN that the probe has and no row has."""
    prepared = prepare(load_config(project))
    trained = {token for plan in prepared.plans for row in prepared.examples_of(plan) for token in row.tokens.tolist()}
    only = next(token for row in prepared.probe.rows for token in row.tolist()[:-1] if token not in trained)
    file = prepared.model.path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][only] = np.nan
    save_file(tensors, file, metadata={"format": "pt"})


def test_such_a_base_is_refused_before_training(project: Path, tmp_path: Path) -> None:
    poison(project)
    with pytest.raises(ModelError, match="no finite log-probs for tokens of the fingerprint's probe"):
        mindprint.train(project, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_cannot_be_fingerprinted_is_written_and_said(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise NotFiniteError("log-probs are not finite")

    monkeypatch.setattr("mindprint.training.run.take_fingerprint", fail)
    notices: list[str] = []
    result = mindprint.train(project, run=tmp_path / "run", on_event=lambda event: notices.append(str(event)))
    assert (result.adapter / "adapter_model.safetensors").is_file()
    assert not (result.adapter / "fingerprint.json").exists()
    assert any("without a fingerprint" in notice for notice in notices)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["fingerprint"] == "not taken: log-probs are not finite"
