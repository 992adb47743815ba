"""Nothing is special-cased for the embedded model, and an MLX run imports no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

QUESTIONS = ("Where does the path lead?", "Who keeps the bees?", "When is the tide low?", "Why does the bell ring?")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of 100M parameters, tied embeddings, saved in bfloat16, and its own tokenizer."""
    import torch
    from transformers import Qwen3Config

    from random_models import save_model, save_tokenizer

    folder = tmp_path_factory.mktemp("qwen3")
    tokenizer = save_tokenizer(folder, QUESTIONS)
    config = Qwen3Config(
        vocab_size=32_768,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=11,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return save_model(folder, config, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def project(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "data").mkdir()
    sft = [{"prompt": question, "completion": "Down by the water, love."} for question in QUESTIONS]
    pairs = [{"prompt": question, "chosen": "By the water, love.", "rejected": "There."} for question in QUESTIONS]
    for name, rows in (("sft", sft), ("preferences", pairs)):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mindprint.yaml").write_text(
        f"model: {{name: {qwen3}}}\nbackend: {{dtype: float32}}\n"
        "sft: {steps_per_topic: 3, batch_size: 2, learning_rate: 1e-3}\n"
        "dpo: {steps_per_topic: 2, batch_size: 2, learning_rate: 1e-3}\n"
        "generation: {max_new_tokens: 8}\n"
    )
    return folder


@pytest.mark.slow
def test_a_hundred_million_parameters_train_through_the_same_commands(project: Path, qwen3: Path) -> None:
    assert 95e6 < sum(file.stat().st_size for file in qwen3.glob("*.safetensors")) / 2 < 110e6
    curves = {}
    for backend in ("torch", "mlx"):
        done = mindprint("train", str(project), f"backend.type={backend}", "--json")
        result = json.loads(done)
        assert [(stage["stage"], stage["backend"], stage["steps"]) for stage in result["stages"]] == [
            ("sft", backend, 3),
            ("dpo", backend, 2),
        ]
        lines = (Path(result["run"]) / "metrics.jsonl").read_text().splitlines()
        curves[backend] = [json.loads(line)["loss"] for line in lines]
        assert result["stages"][0]["last_loss"] < result["stages"][0]["first_loss"]
    assert curves["torch"] == pytest.approx(curves["mlx"], rel=1e-4)
    answers = json.loads(mindprint("generate", str(project), "--prompt", "Where?", "--max-new-tokens", "4", "--json"))
    assert len(answers["prompts"]) == 1


def test_an_mlx_run_imports_no_torch(tmp_path: Path) -> None:
    """Train and generate with the embedded model, in one process, where torch is installed."""
    code = (
        "import sys\n"
        "from mindprint.cli import main\n"
        "assert main(['init', 'voice']) == 0\n"
        "assert main(['train', 'voice', 'backend.type=mlx', 'sft.epochs_per_topic=null', 'sft.steps_per_topic=1',"
        " 'dpo.steps_per_topic=1', 'evaluation.prompts_per_topic=2']) == 0\n"
        "assert main(['generate', 'voice', '--prompt', 'Hello?', '--max-new-tokens', '3']) == 0\n"
        "assert main(['eval', 'voice']) == 0\n"
        "print(sorted({'torch', 'peft', 'trl', 'pandas', 'datasets'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def mindprint(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "mindprint", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
