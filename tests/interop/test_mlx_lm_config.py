"""A base that mlx-lm computes otherwise without a word: named by convert and merge, and right with `--fix-config`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm import load as load_mlx_lm
from peft import PeftModel
from transformers import AutoModelForCausalLM

import mindprint
from mindprint.adapter.initial import initial_adapter
from mindprint.adapter.mlx_lm_config import missing_keys
from mindprint.adapter.peft_format import write_adapter
from mindprint.contract import AdapterSite, LoraConfig
from parity_cases import stirred

IDS = list(range(5, 45))


@pytest.fixture(scope="module")
def adapter(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on a base with a rope base of 500000, which only `rope_parameters` states."""
    sites = [AdapterSite(f"model.layers.{n}.self_attn.q_proj", "linear", 64, 64) for n in range(3)]
    state = initial_adapter(sites, LoraConfig(4, 8.0, tuple(site.name for site in sites)), seed=0)
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(folder, stirred(state, size=0.05), str(qwen2))
    return folder


@pytest.fixture(scope="module")
def expected(adapter: Path, qwen2: Path) -> np.ndarray:
    base = AutoModelForCausalLM.from_pretrained(qwen2, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, adapter).eval()(torch.tensor([IDS])).logits[0].numpy()


def mlx_lm_logits(model: Path, adapter: Path | None = None) -> np.ndarray:
    loaded: Any = load_mlx_lm(str(model), adapter_path=None if adapter is None else str(adapter))[0]
    return np.array(loaded(mx.array([IDS]))[0].astype(mx.float32))


@pytest.mark.parametrize("fix_config", [False, True])
def test_a_merged_model_is_computed_by_mlx_lm_with_the_keys_that_are_named(
    fix_config: bool, adapter: Path, qwen2: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    result = mindprint.merge(adapter, tmp_path / "m", model=str(qwen2), backend="torch", fix_config=fix_config)
    told = " ".join(notice.message for notice in result.notices)
    assert result.verification is not None
    assert result.verification.ok
    assert ('add "rope_theta": 500000.0 to config.json' in told) is not fix_config
    assert missing_keys(tmp_path / "m") == ({} if fix_config else {"rope_theta": 500000.0})
    apart = float(np.abs(mlx_lm_logits(tmp_path / "m") - expected).max())
    assert apart < 2e-5 if fix_config else apart > 2e-4


def test_a_converted_adapter_brings_the_config_of_its_base(
    adapter: Path, qwen2: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    (note,) = mindprint.convert(adapter, tmp_path / "plain", "mlx-lm", model=str(qwen2)).notes
    assert 'does not read rope_parameters and would compute another model without a word: add "rope_theta"' in note
    fixed = mindprint.convert(adapter, tmp_path / "fixed", "mlx-lm", model=str(qwen2), fix_config=True)
    assert "config.json is such a file, to copy over the base's" in fixed.notes[0]
    base = tmp_path / "base"
    base.mkdir()
    for file in qwen2.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    assert np.abs(mlx_lm_logits(base, tmp_path / "fixed") - expected).max() > 2e-4
    (base / "config.json").write_text((tmp_path / "fixed" / "config.json").read_text())
    assert np.abs(mlx_lm_logits(base, tmp_path / "fixed") - expected).max() < 2e-5


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        ({"model_type": "llama", "rope_theta": 500000.0}, {}),
        ({"model_type": "llama", "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}, {}),
        (
            {"model_type": "llama", "rope_parameters": {"rope_theta": 1e5, "rope_type": "linear", "factor": 2.0}},
            {"rope_theta": 1e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {
                    "full_attention": {"rope_theta": 500.0, "rope_type": "default"},
                    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
                },
            },
            {"rope_theta": 500.0},
        ),
        (
            {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 5e4, "partial_rotary_factor": 0.5}},
            {"rotary_emb_base": 5e4, "rotary_pct": 0.5},
        ),
    ],
)
def test_the_keys_that_mlx_lm_needs(config: dict[str, Any], keys: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert missing_keys(tmp_path) == keys
