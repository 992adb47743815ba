"""A base model for this backend, in Hugging Face layout: random weights, and a tokenizer that knows every byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A chat template without space or line break between its parts. A turn ends with the end-of-sequence token."""

SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def write_model(folder: Path, seed: int = 0, hidden: int = 32) -> Path:
    """Write config, weights, a byte-level tokenizer without merges, and a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_tokenizer(folder)
    config = {"model_type": "hello", "architectures": ["Hello"], "vocab_size": vocabulary, "eos_token_id": 1}
    config |= {"num_hidden_layers": 1, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = {
        "embed_tokens": (vocabulary, hidden),
        "layers.0.up_proj": (2 * hidden, hidden),
        "layers.0.down_proj": (hidden, 2 * hidden),
        "lm_head": (vocabulary, hidden),
    }
    random = np.random.default_rng(seed)
    # A deviation of 1 / sqrt(inputs) keeps activations of the same size from layer to layer.
    weights = {f"{name}.weight": random.normal(0, shape[1] ** -0.5, shape) for name, shape in shapes.items()}
    save_file({name: values.astype(np.float32) for name, values in weights.items()}, folder / "model.safetensors")
    return folder


def _write_tokenizer(folder: Path) -> int:
    """Write the tokenizer and return the size of its vocabulary."""
    # Sorted, because the library promises no order, and ids must not change from call to call.
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return len(tokens)
