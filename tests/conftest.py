"""Fixtures for tests that need several distributions: small random models, and both backends on them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import mindprint_mlx  # noqa: F401  before any test module imports mlx: it decides what MLX multiplies matrices with

sys.path.insert(0, str(Path(__file__).parent))  # for random_models.py and parity_cases.py


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of 0.2M parameters with a tokenizer, its rope base far from every library's default."""
    from transformers import Qwen2Config

    from random_models import save_model, save_tokenizer

    folder = tmp_path_factory.mktemp("qwen2")
    tokenizer = save_tokenizer(folder)
    config = Qwen2Config(
        vocab_size=400,  # wider than the tokenizer, as published models are
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return save_model(folder, config)
