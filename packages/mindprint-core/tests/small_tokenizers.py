"""Tokenizers small enough to be read: the id of a byte is the byte, and what is merged is written down here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

CAT, IM_START, IM_END, BOS, EOS = 257, 300, 301, 302, 303

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITING = (  # as Qwen3's: only the last answer carries its (empty) thoughts
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<t></t>{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (  # as Gemma 4's: the generation prompt ends with something that an answer does not have
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<t></t>{% endif %}"
)
WITH_BOS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if message.role == 'user' %}[{{ message.content }}]{% else %}{{ message.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
SILENT = "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% endif %}{% endfor %}"


def write_tokenizer(folder: Path, template: str | None = CHATML, *, bos: bool = False, **config: Any) -> Path:
    """Write a tokenizer as a model folder has it; `config` goes into tokenizer_config.json. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_level_bpe(bos=bos).save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<eos>", "pad_token": "<eos>", **({"bos_token": "<bos>"} if bos else {}), **config}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def byte_level_bpe(*, bos: bool = False) -> Tokenizer:
    """Bytes 0 to 255 under their own numbers, `ca` 256, `cat` 257, then special tokens from 300."""
    symbols = _byte_symbols()
    names = ("<|im_start|>", "<|im_end|>", "<bos>", "<eos>")
    vocab = {symbols[byte]: byte for byte in range(256)} | {"ca": 256, "cat": CAT}
    vocab |= {f"<unused{index}>": index for index in range(258, 300)}
    vocab |= dict(zip(names, (IM_START, IM_END, BOS, EOS), strict=True))
    tokenizer = Tokenizer(BPE(vocab, [("c", "a"), ("ca", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return tokenizer


def _byte_symbols() -> dict[int, str]:
    """The printable stand-ins of byte-level BPE (Radford et al. 2019): bytes that print stand for themselves."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printing]
    return {byte: chr(byte) for byte in printing} | {byte: chr(256 + index) for index, byte in enumerate(others)}
