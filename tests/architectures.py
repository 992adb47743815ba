"""The matrix of architectures: small random models that transformers saves, and how far MLX computes from them.

Models have a rope base that is no library's default. `compare` is one row of the matrix: the tests assert on it and
`benchmarks/parity.py` prints it, so that the table in the documentation is what the tests saw.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from mindprint.contract import AdapterSite, LoadedModel, ModelSpec, Update
from mindprint_mlx import model
from parity_cases import Opened, open_model, token_batch

RELATIVE = 1e-4
"""Greatest relative distance of logits (DESIGN.md's matrix); 1e-6 is seen."""

TEN_STEPS = 1e-5
"""Greatest deviation of an SFT loss, over 1 + loss, in ten steps (DESIGN.md's table)."""

TOKENS = 24

SMALL: Mapping[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

MATRIX: Mapping[str, Mapping[str, Any]] = {
    "apertus": {},
    "cohere": {"logit_scale": 0.3},
    "ernie4_5": {"head_dim": 16},
    "exaone4": {"head_dim": 16, "sliding_window": 8},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "hidden_size": 72},
    "glm4": {"head_dim": 16},
    "gpt_neox": {"intermediate_size": 256},
    "granite": {
        "logits_scaling": 8.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.3,
    },
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "llama": {},
    "mistral": {"head_dim": 16, "sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron": {},
    "olmo2": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3": {"head_dim": 24},
    "qwen3_moe": {**EXPERTS, "head_dim": 16},
    "seed_oss": {"head_dim": 16},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 8},
}


@dataclass(frozen=True)
class Reference:
    """A model that transformers saved: where, its logits `[rows, tokens, vocabulary]`, and its linear layers."""

    folder: Path
    tokens: np.ndarray
    logits: np.ndarray
    linears: frozenset[str]


def saved(folder: Path, model_type: str, base: float = 500000.0, **changes: Any) -> Reference:
    """Save a random model of a family and compute its logits with transformers."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SMALL, **MATRIX[model_type], **changes})
    set_rope_base(config, base)
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            # Norms and biases too: a layer that left one out must show.
            parameter.add_(0.05 * torch.randn_like(parameter))
        reference.save_pretrained(folder)
        tokens = torch.randint(3, 131, (2, TOKENS))
        logits = reference(tokens).logits.float().numpy()
    linears = {name for name, module in reference.named_modules() if type(module) is torch.nn.Linear}
    return Reference(folder, tokens.numpy(), logits, frozenset(linears))


def set_rope_base(config: Any, base: float) -> None:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for entry in nested or [parameters]:
        entry["rope_theta"] = base


def rewritten(folder: Path, change: Mapping[str, Any], remove: tuple[str, ...] = ()) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | dict(change)
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in remove}))


def loaded(folder: Path) -> LoadedModel:
    return model.load(ModelSpec(str(folder), "cpu", "float32"))


def distance(reference: Reference) -> float:
    handle = loaded(reference.folder).handle
    with handle.in_use():
        logits = np.array(handle.module(mx.array(reference.tokens)))
    return float(np.linalg.norm(logits - reference.logits) / np.linalg.norm(reference.logits))


@dataclass(frozen=True)
class Compared:
    """One architecture: relative distance of MLX's logits from transformers', whether LoRA goes on the same modules
    under the same names, and the greatest deviation of ten SFT losses from torch's, over 1 + loss."""

    model_type: str
    logits: float
    same_sites: bool
    ten_steps: float

    @property
    def right(self) -> bool:
        return self.logits < RELATIVE and self.same_sites and self.ten_steps < TEN_STEPS


def compare(model_type: str, folder: Path) -> Compared:
    """Save a random model of a family into `folder`, and compute one row of the matrix."""
    reference = saved(folder, model_type)
    torch_side, mlx_side = opened = open_model("torch", folder), open_model("mlx", folder)
    curves = [ten_losses(each) for each in opened]
    deviation = float(np.max(np.abs(curves[0] - curves[1]) / (1 + np.abs(curves[0]))))
    return Compared(model_type, distance(reference), linears(torch_side) == linears(mlx_side), deviation)


def linears(opened: Opened) -> dict[str, AdapterSite]:
    """Linear sites by name. A tied head is no layer of its own on MLX; nobody adapts it (DESIGN.md: never the head)."""
    sites = opened.backend.adapter_sites(opened.model)
    return {site.name: site for site in sites if site.kind == "linear" and site.name not in ("lm_head", "embed_out")}


def ten_losses(opened: Opened) -> np.ndarray:
    """Losses of ten optimizer steps of two ragged micro-batches, float64 `[10]`."""
    losses = []
    for step in range(10):
        batches = [
            token_batch(2 * step, (23, 9, 14), SMALL["vocab_size"]),
            token_batch(2 * step + 1, (7, 19), SMALL["vocab_size"]),
        ]
        update = Update(1e-3, tokens=sum(batch.loss_tokens for batch in batches))
        losses.append(opened.backend.sft_step(opened.model, batches, update).loss)
    return np.array(losses)
