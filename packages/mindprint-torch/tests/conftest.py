"""Small random models of real architectures, and batches and adapters to run them with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from mindprint.contract import (
    AdapterState,
    Dtype,
    LoadedModel,
    LoraConfig,
    LoraFactors,
    ModelSpec,
    PreferenceBatch,
    TokenBatch,
)
from mindprint.plugins.backend import Backend, load_backend

# pytest imports test modules by path here, so that their shared settings have to be found by path too.
sys.path.insert(0, str(Path(__file__).parent))

from torch_samples import COMMON, VOCABULARY

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "mistral": {"sliding_window": 16},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "bloom": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 4},
}


def save_model(folder: Path, architecture: str) -> Path:
    """A random model with weights large enough that every layer matters."""
    settings = {**COMMON, **ARCHITECTURES[architecture]}
    if architecture == "gpt2":
        settings.pop("rope_parameters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    logging.disable_progress_bar()
    # Models this small lose more to a second thread than they gain, above all beside other work.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small model of the named architecture, made once."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = save_model(tmp_path_factory.mktemp(architecture), architecture)
        return made[architecture]

    return folder


@pytest.fixture(scope="session")
def backend() -> Backend:
    return load_backend("torch")


@pytest.fixture
def load(backend: Backend, folders: Callable[[str], Path]) -> Iterator[Callable[..., LoadedModel]]:
    """Load a small model; all are released at the end of the test."""
    loaded: list[LoadedModel] = []

    def load_one(architecture: str = "qwen2", dtype: Dtype = "float32") -> LoadedModel:
        loaded.append(backend.load_model(ModelSpec(str(folders(architecture)), "cpu", dtype)))
        return loaded[-1]

    yield load_one
    for model in loaded:
        # As `release` does, without a garbage collection for every model of every test.
        vars(model.handle).clear()


@pytest.fixture(scope="session")
def make_adapter(backend: Backend) -> Callable[..., AdapterState]:
    """An adapter on every linear layer but the output layer, B not zero, so that it does something."""

    def make(model: LoadedModel, *, r: int = 4, dropout: float = 0.0, seed: int = 0, **settings: Any) -> AdapterState:
        rng = np.random.default_rng(seed)
        chosen = {
            site.name: site for site in backend.adapter_sites(model) if site.kind == "linear" and site.name != "lm_head"
        }
        config = LoraConfig(r, 8.0, tuple(chosen), dropout=dropout, **settings)
        return AdapterState(
            config,
            {
                name: LoraFactors(
                    _normal(rng, config.rank(name), site.in_features),
                    _normal(rng, site.out_features, config.rank(name)),
                )
                for name, site in chosen.items()
            },
        )

    return make


def _normal(rng: np.random.Generator, *shape: int) -> Any:
    return rng.normal(scale=0.1, size=shape).astype(np.float32)


@pytest.fixture
def train(
    load: Callable[..., LoadedModel], backend: Backend, make_adapter: Callable[..., AdapterState]
) -> Callable[..., LoadedModel]:
    """Load a small model and inject an adapter."""

    def loaded(architecture: str = "qwen2", dtype: Dtype = "float32", **settings: Any) -> LoadedModel:
        model = load(architecture, dtype)
        backend.inject_adapter(model, make_adapter(model, **settings))
        return model

    return loaded


@pytest.fixture(scope="session")
def token_batch() -> Callable[..., TokenBatch]:
    """Ragged random rows; everything after the first three tokens counts."""

    def make(rows: int = 3, width: int = 12, seed: int = 1) -> TokenBatch:
        rng = np.random.default_rng(seed)
        lengths = (width - 2 * np.arange(rows) % (width - 4)).astype(np.int32)
        columns = np.arange(width)
        mask = (columns >= 3) & (columns < lengths[:, None])
        return TokenBatch(rng.integers(3, VOCABULARY, (rows, width)).astype(np.int32), lengths, mask)

    return make


@pytest.fixture(scope="session")
def preference_batch() -> Callable[..., PreferenceBatch]:
    """Ragged pairs with made-up reference log-probs."""

    def make(pairs: int = 3, seed: int = 2) -> PreferenceBatch:
        rng = np.random.default_rng(seed)

        def part(width: int) -> tuple[Any, Any]:
            return (
                rng.integers(3, VOCABULARY, (pairs, width)).astype(np.int32),
                rng.integers(1, width + 1, pairs).astype(np.int32),
            )

        (prompt, prompts), (chosen, chosens), (rejected, rejecteds) = part(5), part(7), part(4)
        reference = rng.normal(-12, 2, (2, pairs)).astype(np.float32)
        return PreferenceBatch(prompt, prompts, chosen, chosens, rejected, rejecteds, *reference)

    return make
