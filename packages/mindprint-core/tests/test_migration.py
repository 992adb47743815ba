"""An old pipeline's file becomes a configuration that loads; what has no counterpart is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mindprint.cli import main
from mindprint.cli.migration import migrate
from mindprint.config import load_config
from mindprint.errors import ConfigError

OLD = """
backend: {type: pytorch, device: cpu, dtype: bf16}
sft: {learning_rate: 3e-4, num_epochs: 2, per_device_train_batch_size: 8, lora_r: 16, lora_alpha: 32}
dpo: {lr: 5e-6, max_steps: 80, beta: 0.2, loss_type: ipo, lora_r: 16}
thresholds: {preference_accuracy: 0.7, min_accuracy: 0.7, voice: 60}
pipeline: {seed: 7, merge_after_topic: true}
paths: {base_model: builtin:tiny, data_dir: rows, output_dir: out}
"""


def test_every_section_is_translated_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.yaml").write_text(OLD)
    assert main(["migrate", str(tmp_path / "old.yaml"), "--json"]) == 0
    left = json.loads(capsys.readouterr().out)["without_counterpart"]
    assert left == ["thresholds.min_accuracy", "thresholds.voice", "pipeline.merge_after_topic", "paths.output_dir"]
    config = load_config(tmp_path).config
    assert (config.backend.type, config.backend.device, config.backend.dtype) == ("torch", "cpu", "bfloat16")
    assert (config.sft.learning_rate, config.sft.epochs_per_topic, config.sft.batch_size) == (3e-4, 2, 8)
    assert (config.dpo.learning_rate, config.dpo.steps_per_topic, config.dpo.beta) == (5e-6, 80, 0.2)
    assert (config.dpo.loss, config.adapter.r, config.adapter.alpha, config.seed) == ("ipo", 16, 32.0, 7)
    assert config.evaluation.topic.reward_accuracy == 0.7
    assert (config.model.name, config.data.path) == ("builtin:tiny", "rows")


@pytest.mark.parametrize("backend", [None, {"type": None, "device": None, "dtype": None}], ids=["null", "null type"])
def test_a_null_backend_is_auto(backend: Any) -> None:
    values = migrate({"backend": backend}).values["backend"]
    assert set(values.values()) == {"auto"}


def test_stages_that_disagree_about_the_one_adapter() -> None:
    with pytest.raises(ConfigError, match=r"sft\.lora_r is 8 and dpo\.lora_r is 16: adapter\.r can have one value"):
        migrate({"sft": {"lora_r": 8}, "dpo": {"lora_r": 16}})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a list", "expected sections such as"),
        ("a: [", "cannot be read as YAML"),
        ("sft: {epochs: 1, steps: 2}", "translates to settings that are refused: .*give epochs_per_topic or"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    (tmp_path / "old.yaml").write_text(text)
    assert main(["migrate", str(tmp_path / "old.yaml")]) == 2
    import re

    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "mindprint.yaml").exists()


def test_a_configuration_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.yaml").write_text(OLD)
    (tmp_path / "mindprint.yaml").write_text("seed: 1\n")
    assert main(["migrate", str(tmp_path / "old.yaml")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "mindprint.yaml").read_text() == "seed: 1\n"
