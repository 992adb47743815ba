"""Small randomly initialised models in Hugging Face layout, with their tokenizers: made here, not downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
TEXTS = (
    "How does the ferry cross the river in the morning?",
    "It waits for the tide, and then the wind does the rest.",
)


def save_model(folder: Path, config: PreTrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model of `config`, its norms moved off 1 and its biases off 0, so that a dropped one shows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, parameter.detach().mean().item(), 0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


def save_qwen2(folder: Path) -> Path:
    """Write a random Qwen2 of 0.2M parameters with a tokenizer, its rope base far from every library's default."""
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


def save_tokenizer(
    folder: Path, texts: Iterable[str] = TEXTS, vocab_size: int = 400, template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts` and write it with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return wrapped
