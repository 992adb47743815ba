"""A run warns before training of what merge and convert would refuse after it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mindprint.contract import AdapterSite, LoraConfig
from mindprint.training.later_use import refused_uses

Q, HEAD, TABLE = "model.layers.0.self_attn.q_proj", "lm_head", "model.embed_tokens"
VISION = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
SITES = (
    AdapterSite(Q, "linear", 8, 8),
    AdapterSite(HEAD, "linear", 8, 20),
    AdapterSite(TABLE, "embedding", 20, 8),
    AdapterSite(VISION, "linear", 8, 8),
)


def base(folder: Path, *, tied: bool) -> Path:
    config = {"model_type": "llama", "tie_word_embeddings": tied, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"{Q}.weight": np.zeros((8, 8), np.float32), f"{TABLE}.weight": np.zeros((20, 8), np.float32)}
    if not tied:
        tensors[f"{HEAD}.weight"] = np.zeros((20, 8), np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("targets", "tied", "words"),
    [
        ((Q,), True, None),
        ((Q, HEAD), True, "lm_head: embedding and LM head are one tensor in this base"),
        ((Q, TABLE), True, "embed_tokens: embedding and LM head are one tensor in this base"),
        ((Q, HEAD), False, None),
        ((Q, TABLE), False, None),
        ((Q, VISION), True, "vision_tower.*the base has no weight"),
    ],
)
def test_uses_that_would_be_refused_are_said_before_training(
    targets: tuple[str, ...], tied: bool, words: str | None, tmp_path: Path
) -> None:
    refusal = refused_uses(base(tmp_path, tied=tied), SITES, LoraConfig(2, 4.0, targets))
    if words is None:
        assert refusal is None
    else:
        assert refusal is not None
        assert refusal.startswith("merge and convert will refuse this adapter: ")
        assert re.search(words, refusal)


def test_stacks_of_experts_that_cannot_be_merged_are_said(tmp_path: Path) -> None:
    """Whether files keep a square stack transposed is known for some families only."""
    folder = base(tmp_path, tied=False)
    stack = "model.layers.0.mlp.experts.down_proj"
    config = {"model_type": "unheard_of", "num_hidden_layers": 1, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({stack: np.zeros((3, 8, 8), np.float32)}, folder / "model.safetensors")
    refusal = refused_uses(folder, [AdapterSite(stack, "experts", 8, 8, 3)], LoraConfig(2, 4.0, (stack,)))
    assert refusal is not None
    assert re.search("is square, and whether the file keeps it transposed is not known", refusal)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt_oss"}))
    assert refused_uses(folder, [AdapterSite(stack, "experts", 8, 8, 3)], LoraConfig(2, 4.0, (stack,))) is None
