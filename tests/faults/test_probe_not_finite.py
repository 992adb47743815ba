"""NaN in a row of the base that only the fingerprint's probe meets: refused before training, and no adapter is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mindprint
from mindprint.config import load_config
from mindprint.errors import ModelError, NotFiniteError
from mindprint.training.prepare import Prepared, prepare


@pytest.fixture(params=["mlx", "torch"])
def project(request: pytest.FixtureRequest, qwen2: Path, tmp_path: Path) -> Path:
    """A project on a model of its own, with little to train."""
    shutil.copytree(qwen2, tmp_path / "model")
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    row = {"prompt": "the water", "completion": "the river"}
    (folder / "data" / "sft.jsonl").write_text((json.dumps(row) + "\n") * 4)
    (folder / "mindprint.yaml").write_text(
        f"model: {{name: {tmp_path / 'model'}}}\nbackend: {{type: {request.param}, device: cpu}}\n"
        "dpo: {enabled: false}\nsft: {steps_per_topic: 2}\nevaluation: {levels: []}\n"
    )
    return folder


@contextmanager
def rewritten(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """Lend the tensors of a model's only file, and write them back."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    yield tensors
    save_file(tensors, file, metadata={"format": "pt"})


def only_in_the_probe(prepared: Prepared) -> int:
    """Return a token that the probe has, and neither a row of data nor the row that is read where weights are sound."""
    read = {token for plan in prepared.plans for row in prepared.examples_of(plan) for token in row.tokens.tolist()}
    read |= set(min(prepared.probe.rows, key=len).tolist())
    return next(token for row in prepared.probe.rows for token in row.tolist()[:-1] if token not in read)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_damaged_row_is_refused_before_training(project: Path, tmp_path: Path, value: float) -> None:
    prepared = prepare(load_config(project))
    with rewritten(prepared.model.path) as tensors:
        tensors["model.embed_tokens.weight"][only_in_the_probe(prepared)] = value
    with pytest.raises(ModelError, match="no finite log-probs for tokens of the fingerprint's probe"):
        mindprint.train(project, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# PyTorch trains in float16 on a GPU only.
@pytest.mark.parametrize("project", ["mlx"], indirect=True)
def test_sound_weights_that_overflow_in_float16_with_one_token_are_refused(project: Path, tmp_path: Path) -> None:
    """In the first layer this token alone makes `gate * up` 1e4 squared. float32 has room for that, float16 has not."""
    prepared = prepare(load_config(project))
    with rewritten(prepared.model.path) as tensors:
        embedding = tensors["model.embed_tokens.weight"]
        embedding[:, 0] = 0
        embedding[only_in_the_probe(prepared), 0] = 100
        tensors["model.layers.0.self_attn.o_proj.weight"][0] = 0
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.0.mlp.{name}.weight"][0, 0] = 1e4
    mindprint.train(project, run=tmp_path / "float32")
    with pytest.raises(ModelError, match="no finite log-probs for tokens of the fingerprint's probe"):
        mindprint.train(project, run=tmp_path / "float16", backend={"dtype": "float16"})


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
