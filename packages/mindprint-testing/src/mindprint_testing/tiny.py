"""The models of the suite: a random Llama, and a random Mixtral for stacks of experts, written by NumPy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

# Vocabulary, hidden and inner size differ, so that a transposed table or MLP weight cannot pass by its shape.
VOCABULARY = 61
HIDDEN, INNER, LAYERS = 32, 48, 2
# Fewer key heads than heads, so that a model without grouped-query attention computes something else.
HEADS, KEY_HEADS, HEAD = 4, 2, 8

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


EXPERTS = 3

MIXTURE_CONFIG = {
    **{name: value for name, value in CONFIG.items() if name not in ("attention_bias", "mlp_bias")},
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
}


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write a model of 21,000 parameters, without a tokenizer.

    Its weights are large enough that every layer matters, its head is not tied, and its rope base is far from every
    library's default: a backend that ignores one of them computes something visibly different.
    """
    return _write(folder, CONFIG, _shapes(), seed)


def write_tiny_mixture(folder: Path, seed: int = 0) -> Path:
    """Write the same model with three experts in each layer, of which two answer. Files have each expert for itself."""
    shapes = {name: shape for name, shape in _shapes().items() if ".mlp." not in name}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        shapes[f"{prefix}.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            shapes |= {
                f"{prefix}.experts.{expert}.w1.weight": (INNER, HIDDEN),
                f"{prefix}.experts.{expert}.w2.weight": (HIDDEN, INNER),
                f"{prefix}.experts.{expert}.w3.weight": (INNER, HIDDEN),
            }
    return _write(folder, MIXTURE_CONFIG, shapes, seed)


def _write(folder: Path, config: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], seed: int) -> Path:
    random = np.random.default_rng(seed)
    tensors = {
        # Norm weights are vectors and lie around 1, where a trained model has them.
        name: (0.3 * random.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (KEY_HEADS * HEAD, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (KEY_HEADS * HEAD, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
            f"{prefix}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": (HIDDEN, INNER),
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
