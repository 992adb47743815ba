"""The adapter file in PEFT's own hands: what a run wrote computes there what it computed where it was trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import mindprint
from mindprint.adapter.peft_format import read_adapter
from mindprint.contract import TokenBatch
from mindprint.runs.results import RunResult
from parity_cases import open_model, token_batch

WORDS = [
    "the",
    "ferry",
    "lamp",
    "bell",
    "tide",
    "rope",
    "gull",
    "salt",
    "stone",
    "wind",
    "bread",
    "clock",
    "garden",
    "bee",
]


@pytest.fixture(scope="module", params=["torch", "mlx"])
def trained(request: pytest.FixtureRequest, qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp(request.param)
    rng = np.random.default_rng(0)

    def text() -> str:
        return " ".join(rng.choice(WORDS, 8))

    (folder / "sft.jsonl").write_text(
        "".join(json.dumps({"prompt": text(), "completion": text()}) + "\n" for _ in range(8))
    )
    config = {
        "model": {"name": str(qwen2)},
        "backend": {"type": request.param, "device": "cpu", "dtype": "float32"},
        "data": {"path": str(folder), "heldout_fraction": 0.0},
        "sft": {"learning_rate": 1e-2, "steps_per_topic": 15},
        "dpo": {"enabled": False},
    }
    return mindprint.train(config, run=folder / "run")


def test_peft_computes_what_the_backend_computed(trained: RunResult, qwen2: Path) -> None:
    adapter, _ = read_adapter(trained.adapter)
    batch = token_batch(9)
    here = open_model(trained.stages[0].backend, qwen2, adapter)
    mine = here.backend.log_probs(here.model, batch)
    bare = here.backend.log_probs(here.model, batch, adapter=False)
    theirs = peft_log_probs(qwen2, trained.adapter, batch)
    difference = np.abs(mine - theirs)[batch.loss_mask]
    assert difference.mean() < 1e-5
    assert difference.max() < 1e-4
    assert np.abs(mine - bare)[batch.loss_mask].mean() > 0.1


def test_peft_finds_every_tensor_and_no_other(trained: RunResult, qwen2: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(qwen2)
    model = PeftModel.from_pretrained(base, trained.adapter)
    loaded = {name: value for name, value in model.named_parameters() if "lora_" in name}
    adapter, _ = read_adapter(trained.adapter)
    assert len(loaded) == 2 * len(adapter.tensors)
    for site, factors in adapter.tensors.items():
        for letter, mine in zip("AB", factors, strict=True):
            theirs = loaded[f"base_model.model.{site}.lora_{letter}.default.weight"]
            assert np.array_equal(theirs.detach().numpy(), mine)


def peft_log_probs(base: Path, adapter: Path, batch: TokenBatch) -> np.ndarray:
    """Transformers' own full logits, one row at a time, so that nothing is padded."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    result = np.zeros(batch.tokens.shape, np.float32)
    for row, length in enumerate(batch.lengths):
        tokens = torch.tensor(batch.tokens[row : row + 1, :length], dtype=torch.long)
        with torch.no_grad():
            log_probs = model(tokens).logits.float().log_softmax(-1)
        result[row, 1:length] = log_probs[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0].numpy()
    return np.where(batch.loss_mask, result, 0)
