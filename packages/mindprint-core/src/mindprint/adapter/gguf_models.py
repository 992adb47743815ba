"""The keys of a base model's GGUF file, written from its Hugging Face folder: sizes, rotary embedding, tokenizer.

Only for families whose keys and tensors were compared with those that llama.cpp's own converter writes (`nox -s gguf`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mindprint.adapter.base_facts import BaseFacts
from mindprint.adapter.gguf_files import gguf_package
from mindprint.contract import Float32
from mindprint.errors import AdapterError, ModelError
from mindprint.input_files import read_object
from mindprint.models.folder import model_config

WRITTEN = ("llama", "qwen2", "qwen3")
"""The families whose files are written from a folder, by transformers' `model_type`."""

OTHERWISE = "merge into the base's own GGUF file instead (--into base.gguf)"

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRE_TOKENIZERS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "gpt-2": ({"type": "ByteLevel", "use_regex": True},),
    "smollm": ({"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}),
    "qwen2": ({"type": "Split", "pattern": {"Regex": _SPLIT % ""}}, {"type": "ByteLevel", "use_regex": False}),
    "llama-bpe": (
        {"type": "Split", "pattern": {"Regex": _SPLIT % "{1,3}"}},
        {"type": "ByteLevel", "use_regex": False},
    ),
}
"""llama.cpp's names for ways of splitting text before BPE, by the steps in tokenizer.json that split in that way."""


def require_family(folder: Path, *, vocabulary: bool = True) -> None:
    """Raise `AdapterError` unless a GGUF file, with or without a vocabulary, can be written from a base's folder."""
    config = model_config(folder)
    if config["model_type"] not in WRITTEN:
        raise AdapterError(
            f"{folder}: a GGUF file of model_type {config['model_type']!r} cannot be written from its folder, only of "
            f"{', '.join(WRITTEN)}; {OTHERWISE}"
        )
    kind = _rotary(config).get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise AdapterError(f"{folder}: rotary embeddings of type {kind!r} cannot be written to GGUF; {OTHERWISE}")
    if config.get("use_sliding_window"):
        raise AdapterError(f"{folder}: a sliding window cannot be written to GGUF; {OTHERWISE}")
    if vocabulary:
        _pre_tokenizer(folder, _tokenizer(folder))


def base_keys(writer: Any, folder: Path, name: str, facts: BaseFacts, *, vocabulary: bool = True) -> None:
    """Add the keys of a base model to a writer: its sizes, then its tokenizer and chat template."""
    config = model_config(folder)
    heads, width = _number(config, "num_attention_heads"), _number(config, "hidden_size")
    writer.add_type(gguf_package("writing GGUF").GGUFType.MODEL)
    writer.add_name(Path(name).name)
    writer.add_block_count(facts.layers)
    writer.add_context_length(_number(config, "max_position_embeddings"))
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(_number(config, "intermediate_size"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_rope_freq_base(_theta(config))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if config["model_type"] == "llama" or not vocabulary:
        writer.add_vocab_size(_number(config, "vocab_size"))
    if config["model_type"] == "llama":
        writer.add_rope_dimension_count(config.get("head_dim") or width // heads)
    writer.add_quantization_version(gguf_package("writing GGUF").GGML_QUANT_VERSION)
    if vocabulary:
        _add_vocabulary(writer, folder, _number(config, "vocab_size"))
    else:
        writer.add_tokenizer_model("no_vocab")


def extra_tensors(folder: Path) -> dict[str, Float32]:
    """Return tensors that no folder has: the factors of Llama 3's frequencies."""
    config = model_config(folder)
    rotary = _rotary(config)
    if rotary.get("rope_type") != "llama3":
        return {}
    size = config.get("head_dim") or _number(config, "hidden_size") // _number(config, "num_attention_heads")
    turns = 2 * np.pi * np.float32(_theta(config)) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    # Wave lengths longer than the trained context are stretched by the factor, short ones stay, and those between are
    # interpolated (transformers, `_compute_llama3_parameters`).
    low, high = rotary.get("low_freq_factor", 1.0), rotary.get("high_freq_factor", 4.0)
    context, factor = rotary.get("original_max_position_embeddings", 8192), rotary.get("factor", 8.0)
    smooth = np.clip((context / turns - low) / (high - low), 0.0, 1.0)
    factors = 1 / ((1 - smooth) / factor + smooth)
    return {"rope_freqs.weight": factors.astype(np.float32)}


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the rotary embedding under transformers 5's names."""
    # Before transformers 5 the base frequency had a key for itself, and the type was called `type`.
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    settings = dict(found) if isinstance(found, dict) else {}
    if "type" in settings:
        settings.setdefault("rope_type", settings["type"])
    return settings


def _theta(config: Mapping[str, Any]) -> float:
    return float(_rotary(config).get("rope_theta") or config.get("rope_theta") or 10000.0)


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"the base's config.json must state {name} as a positive whole number")
    return value


def _tokenizer(folder: Path) -> dict[str, Any]:
    return read_object(folder / "tokenizer.json", AdapterError, missing=f"{folder}: has no tokenizer.json; {OTHERWISE}")


def _pre_tokenizer(folder: Path, tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the way that a tokenizer splits text. Raises `AdapterError` for an unknown way."""
    model, splitter = tokenizer.get("model") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter]) if isinstance(splitter, dict) else []
    for name, known in PRE_TOKENIZERS.items():
        alike = len(steps) == len(known) and all(
            all(step.get(key) == value for key, value in wanted.items())
            for step, wanted in zip(steps, known, strict=True)
        )
        prefixed = any(step.get("add_prefix_space") for step in steps)
        if alike and not prefixed and model.get("type") == "BPE" and not model.get("byte_fallback"):
            return name
    raise AdapterError(
        f"{folder / 'tokenizer.json'}: splits text in a way that is not one of {', '.join(PRE_TOKENIZERS)}, so that "
        f"llama.cpp's name for it is not known; {OTHERWISE}"
    )


def _add_vocabulary(writer: Any, folder: Path, size: int) -> None:
    gguf = gguf_package("writing GGUF")
    tokenizer = _tokenizer(folder)
    types = gguf.TokenType
    # The embedding may have more rows than the tokenizer has tokens. llama.cpp needs a name for each row.
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [types.UNUSED] * size
    for token, number in tokenizer["model"]["vocab"].items():
        _require_row(folder, number, size)
        tokens[number], kinds[number] = token, types.NORMAL
    for added in tokenizer.get("added_tokens") or ():
        number, token = added["id"], added["content"]
        _require_row(folder, number, size)
        # llama.cpp finds control tokens in text only where it is asked to, and others always.
        control = added.get("special") or (token.startswith("<|") and token.endswith("|>"))
        tokens[number], kinds[number] = token, types.CONTROL if control else types.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(folder, tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # Merges, special tokens and the chat template are the package's own reading of the folder.
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)
    if not _adds_start(tokenizer):
        writer.add_add_bos_token(False)


def _require_row(folder: Path, number: object, size: int) -> None:
    if not isinstance(number, int) or not 0 <= number < size:
        raise ModelError(f"{folder / 'tokenizer.json'}: token {number!r} has no row in the embedding of {size:,} rows")


def _adds_start(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer puts a token before every text."""
    return '"SpecialToken"' in json.dumps(tokenizer.get("post_processor") or {})
