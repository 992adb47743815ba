"""What the toy backend trains on, and how it is installed without pip: for core's own tests."""

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
"""No space or line break between the parts; a turn ends with the end-of-sequence token."""


def write_toy_model(folder: Path, seed: int = 0, hidden: int = 32) -> Path:
    """Write a base in Hugging Face layout: config, weights, a byte-level tokenizer without merges, a chat template."""
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    config = {"model_type": "toy", "architectures": ["ToyForCausalLM"], "vocab_size": len(alphabet), "eos_token_id": 1}
    config |= {"num_hidden_layers": 1, "tie_word_embeddings": False}
    random = np.random.default_rng(seed)
    shapes = {
        "embed_tokens": (len(alphabet), hidden),
        "layers.0.up_proj": (2 * hidden, hidden),
        "layers.0.down_proj": (hidden, 2 * hidden),
        "lm_head": (len(alphabet), hidden),
    }
    weights = {name: random.normal(0, shape[1] ** -0.5, shape) for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    stored = {f"{name}.weight": values.astype(np.float32) for name, values in weights.items()}
    save_file(stored, folder / "model.safetensors")
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def install_toy(site: Path) -> Path:
    """Install this backend as `toy` into a folder for `sys.path` or PYTHONPATH: a module and its metadata, no more."""
    metadata = site / "toy_backend-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-backend\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text("[mindprint.backends]\ntoy = toy_backend\n", encoding="utf-8")
    (site / "toy_backend.py").write_bytes(Path(__file__).with_name("toy_backend.py").read_bytes())
    return site
