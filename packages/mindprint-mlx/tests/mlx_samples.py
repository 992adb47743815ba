"""Small random models and batches, written by hand: these tests run where torch is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mindprint.contract import (
    AdapterSite,
    AdapterState,
    LoadedModel,
    LoraConfig,
    LoraFactors,
    ModelSpec,
    PreferenceBatch,
    TokenBatch,
)
from mindprint_mlx import model

VOCABULARY = 61
HIDDEN = 32
LAYERS = 2
HEADS, KEY_HEADS, HEAD = 4, 2, 8
INNER = 48

QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
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
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "torch_dtype": "float32",
}
LLAMA: dict[str, Any] = {
    **{name: value for name, value in QWEN2.items() if name != "use_sliding_window"},
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "tie_word_embeddings": False,
}
GEMMA2: dict[str, Any] = {
    **{name: value for name, value in QWEN2.items() if name not in ("use_sliding_window", "hidden_act")},
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "head_dim": HEAD,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 1.5,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 6,
}
CONFIGS = {"qwen2": QWEN2, "llama": LLAMA, "gemma2": GEMMA2}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint of one of the configurations above."""
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", HEADS * HEAD), ("k", KEY_HEADS * HEAD), ("v", KEY_HEADS * HEAD)):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            if config["model_type"] == "qwen2":
                tensors[f"{prefix}.self_attn.{name}_proj.bias"] = (rows,)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD)
        for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
            tensors[f"{prefix}.mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = (HIDDEN,)
        if config["model_type"] == "gemma2":
            for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
                tensors[f"{prefix}.{name}.weight"] = (HIDDEN,)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return tensors


def write_model(folder: Path, family: str = "qwen2", seed: int = 0, **changes: Any) -> Path:
    """A model folder with random weights. `changes` are of its config.json; None removes a field."""
    config = {name: value for name, value in {**CONFIGS[family], **changes}.items() if value is not None}
    random = np.random.default_rng(seed)
    # Gemma's norms multiply with 1 + weight. Gains of 2 at four norms a layer would saturate its soft caps and amplify
    # float32's rounding tenfold, more than these tests are to tell apart.
    gain = 0.0 if family == "gemma2" else 1.0
    tensors = {
        name: (0.3 * random.standard_normal(shape) + gain * (len(shape) == 1 and "norm" in name)).astype(np.float32)
        for name, shape in shapes(config).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def load(folder: Path, dtype: Any = "float32") -> LoadedModel:
    return model.load_model(ModelSpec(str(folder), "cpu", dtype))


def linear_sites(loaded: LoadedModel) -> tuple[AdapterSite, ...]:
    """What core resolves `all-linear` to."""
    sites = loaded.handle.sites
    return tuple(site for site in sites if site.kind == "linear" and site.name != "lm_head")


def lora(sites: tuple[AdapterSite, ...], r: int = 4, seed: int = 1, **config: Any) -> AdapterState:
    """An adapter whose B is not zero, so that every factor has a gradient."""
    random = np.random.default_rng(seed)
    settings = LoraConfig(r=r, alpha=2.0 * r, target_modules=tuple(site.name for site in sites), **config)
    return AdapterState(
        settings,
        {
            site.name: LoraFactors(
                (0.1 * random.standard_normal((settings.rank(site.name), site.in_features))).astype(np.float32),
                (0.1 * random.standard_normal((site.out_features, settings.rank(site.name)))).astype(np.float32),
            )
            for site in sites
        },
    )


def token_batch(rows: int = 4, width: int = 14, seed: int = 2) -> TokenBatch:
    """Ragged rows, padded on the right with an id that also occurs in them; the first third of each is prompt."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCABULARY, (rows, width)).astype(np.int32)
    lengths = random.integers(width // 2, width + 1, rows).astype(np.int32)
    columns = np.arange(width)[None, :]
    mask = (columns >= np.maximum(1, lengths[:, None] // 3)) & (columns < lengths[:, None])
    tokens[columns >= lengths[:, None]] = 7
    return TokenBatch(tokens, lengths, mask)


def preference_batch(pairs: int = 3, seed: int = 3, *, reference: bool = True) -> PreferenceBatch:
    """Ragged pairs with reference log-probs near what a random model gives."""
    random = np.random.default_rng(seed)

    def part(width: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = random.integers(0, VOCABULARY, (pairs, width)).astype(np.int32)
        return tokens, random.integers(1, width + 1, pairs).astype(np.int32)

    (prompt, prompts), (chosen, chosens), (rejected, rejecteds) = part(6), part(5), part(7)
    values = -4.0 * np.stack([chosens, rejecteds]).astype(np.float32) if reference else (None, None)
    return PreferenceBatch(prompt, prompts, chosen, chosens, rejected, rejecteds, values[0], values[1])


def rows_of(batch: TokenBatch) -> list[TokenBatch]:
    """Each row as a batch of its own, without padding."""
    return [
        TokenBatch(
            batch.tokens[row : row + 1, :length], batch.lengths[row : row + 1], batch.loss_mask[row : row + 1, :length]
        )
        for row, length in enumerate(batch.lengths)
    ]
