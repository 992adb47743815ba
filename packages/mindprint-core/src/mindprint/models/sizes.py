"""Sizes of a base model, and the places that can take LoRA, from config.json and the headers of its files alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindprint.contract import AdapterSite, BaseSizes
from mindprint.errors import ModelError
from mindprint.models.folder import model_config
from mindprint.models.layer_names import is_embedding, is_lm_head
from mindprint.models.quantized import QuantizedWeight, StoredTensor, dense_weights
from mindprint.models.tensor_files import FLOAT_DTYPES

_TOWERS = re.compile(r"(^|\.)(vision\w*|visual|audio\w*|image\w*|multi_modal_projector|embed_vision|embed_audio)\.")
"""Parts of a multimodal base that are not loaded to train its language model."""

_LAYER = re.compile(r"\.(\d+)\.")

# The first of these that config.json has is the size. Families name them differently.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "key_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_kv_heads"),
    "head_size": ("head_dim", "attention_head_size"),
    "inner": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
    "expert_inner": ("moe_intermediate_size", "expert_ffn_hidden_size"),
    "experts": ("num_experts_per_tok", "num_experts_per_token", "moe_topk"),
    "vocabulary": ("vocab_size", "n_vocab"),
}

_PLAIN_NORMS = 2
"""The normalisations in a layer of a model whose files do not name any."""


def read_base_sizes(folder: Path) -> BaseSizes:
    """Return the sizes of a base model.

    Raises:
        ModelError: config.json or the weight files are missing or broken, or config.json does not state a size.
    """
    whole = model_config(folder)
    text = whole.get("text_config")
    config = {**whole, **text} if isinstance(text, dict) else whole
    weights = language_weights(folder)
    hidden, heads = _needed(folder, config, "hidden"), _needed(folder, config, "heads")
    first_layer = _first_layer(weights)
    norms = sum(info.shape == (hidden,) for name, info in first_layer.items() if _is_norm(name))
    packed = [weight for weight in weights.values() if isinstance(weight, QuantizedWeight)]
    plain = [weight for weight in weights.values() if not isinstance(weight, QuantizedWeight)]
    dtypes = {weight.dtype for weight in plain}
    inner = _stated(config, "inner") or 4 * hidden
    # Of a mixture of experts, a token passes through a few: their widths add up.
    experts = _stated(config, "experts")
    if experts:
        inner = experts * (_stated(config, "expert_inner") or inner)
    return BaseSizes(
        elements=sum(math.prod(weight.shape) for weight in plain),
        largest=max((math.prod(weight.shape) for weight in weights.values()), default=0),
        stored_dtype=FLOAT_DTYPES.get(dtypes.pop()) if len(dtypes) == 1 else None,
        packed_bytes=sum(weight.stored_bytes for weight in packed),
        layers=_needed(folder, config, "layers"),
        hidden=hidden,
        inner=inner,
        heads=heads,
        key_heads=_stated(config, "key_heads") or heads,
        head_size=_stated(config, "head_size") or hidden // heads,
        vocabulary=_needed(folder, config, "vocabulary"),
        norms=norms or _PLAIN_NORMS,
        head_norms=any("q_norm" in name for name in first_layer),
        config=config,
        layer_elements=sum(
            math.prod(weight.shape)
            for name, weight in weights.items()
            if _LAYER.search(name) and not isinstance(weight, QuantizedWeight)
        ),
    )


def read_sites(folder: Path) -> tuple[AdapterSite, ...]:
    """Return the sites that a backend would list for a base: its linear layers and its embedding, by their names.

    The names are those of the files. A loaded model may have others where its class renames them.
    """
    sites = []
    for name, info in language_weights(folder).items():
        path = name.removesuffix(".weight")
        if path == name or len(info.shape) != 2 or _is_norm(name):
            continue
        rows, columns = info.shape
        if is_embedding(path):
            sites.append(AdapterSite(path, "embedding", rows, columns))
        elif _LAYER.search(path) or is_lm_head(path):
            sites.append(AdapterSite(path, "linear", columns, rows))
    return tuple(sites)


def is_packed(site: AdapterSite) -> bool:
    """Return whether a site's weight is packed where a base is quantized while it is loaded."""
    return site.kind == "linear" and not is_lm_head(site.name)


def language_weights(folder: Path) -> dict[str, StoredTensor]:
    """Return the weights of a base's language model by name, from the headers alone."""
    config = model_config(folder)
    weights = {name: info for name, info in dense_weights(folder).items() if not _TOWERS.search(name)}
    # A tied head may lie in the files as a copy of the embedding, and is loaded as one weight.
    if config.get("tie_word_embeddings") and any(is_embedding(name.removesuffix(".weight")) for name in weights):
        weights = {name: info for name, info in weights.items() if not is_lm_head(name.removesuffix(".weight"))}
    return weights


def _first_layer(weights: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    numbered = {name: int(match[1]) for name in weights if (match := _LAYER.search(name))}
    first = min(numbered.values(), default=0)
    return {name: weights[name] for name, number in numbered.items() if number == first}


def _is_norm(name: str) -> bool:
    parts = name.split(".")
    return any("norm" in part or part.startswith("ln_") for part in parts[-2:]) and name.endswith(".weight")


def _stated(config: Mapping[str, Any], size: str) -> int | None:
    values = (config.get(name) for name in _NAMES[size])
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _needed(folder: Path, config: Mapping[str, Any], size: str) -> int:
    value = _stated(config, size)
    if value is None:
        names = ", ".join(_NAMES[size])
        raise ModelError(f"{folder / 'config.json'}: states none of {names}: its memory cannot be estimated")
    return value
