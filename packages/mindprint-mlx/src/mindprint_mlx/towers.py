"""The language model of a checkpoint that also has a vision or audio part, which text never uses.

mlx-lm's classes for such checkpoints are not used: the language model is built alone, from the configuration's
`text_config`, by the rules for any text model. Its sites have the names of the class that the checkpoint is of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mindprint.errors import ModelError

WRAPPERS: Mapping[str, str] = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "llava": "llama",
    "mistral3": "mistral",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_vl": "qwen3_vl_text",
}
"""The kinds of checkpoints with more than text, and the `model_type` of a `text_config` that names none."""

TIED_WRAPPERS = frozenset({"gemma3", "gemma3n", "gemma4", "mistral3"})
"""Those whose head is the embedding where the configuration does not say it."""

TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
"""Beginnings of the names of the language model's tensors in files, the longest first."""

HEADS = ("language_model.lm_head.", "lm_head.")

OTHER_PARTS = (
    "vision_tower", "vision_model", "visual", "multi_modal_projector", "audio_tower", "embed_vision", "embed_audio",
    "mtp",
)  # fmt: skip
"""First components of the names of parts that text does not use, behind `model.` or not."""

SITE_PREFIX = "model.language_model."
"""The place of the language model in transformers' classes."""


@dataclass(frozen=True)
class Tower:
    """The language model of a checkpoint: its configuration, and the names of its parts."""

    config: Mapping[str, Any]
    wrapped: bool

    def own_tensors(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return the language model's tensors, under the names that they have in a checkpoint of it alone."""
        if not self.wrapped:
            return dict(weights)
        return {own: values for name, values in weights.items() if (own := _own_name(name)) is not None}

    def site(self, name: str) -> str:
        """Return the name of a part of the language model in the whole model."""
        if not self.wrapped or not name.startswith("model."):
            return name
        return SITE_PREFIX + name.removeprefix("model.")


def language_model(config: Mapping[str, Any]) -> Tower:
    """Return the language model of a config.json, which may be all of it.

    Raises:
        ModelError: For a model of several parts that is not known here, or that has no language model.
    """
    kind = config["model_type"]
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{kind} is an encoder-decoder; only causal language models can be trained")
    if kind not in WRAPPERS:
        if isinstance(config.get("text_config"), dict):
            raise ModelError(
                f"{kind} has parts for more than text, and its language model is not known on MLX (known: "
                f"{', '.join(sorted(WRAPPERS))}); train it with backend.type=torch"
            )
        return Tower(config, wrapped=False)
    # Qwen2.5-VL's first configurations have the language model's fields at the top.
    stated = config.get("text_config")
    text = dict(stated if isinstance(stated, dict) else config)
    text["model_type"] = (stated or {}).get("model_type") or WRAPPERS[kind]
    for name in ("transformers_version", "quantization", "quantization_config"):
        if name in config:
            text[name] = config[name]
    text["tie_word_embeddings"] = _is_tied(config, stated or {})
    for name in ("text_config", "vision_config", "audio_config"):
        text.pop(name, None)
    return Tower(text, wrapped=True)


def _is_tied(config: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    # The whole model decides. Some classes also read what the text's part states, where the whole model says no.
    kind = config["model_type"]
    tied = config.get("tie_word_embeddings", kind in TIED_WRAPPERS)
    return bool(tied or (kind in ("llava", "qwen2_5_vl") and text.get("tie_word_embeddings")))


def _own_name(name: str) -> str | None:
    """Return the name of a tensor in a checkpoint of the language model alone, None for one of another part."""
    for head in HEADS:
        if name.startswith(head):
            return "lm_head." + name.removeprefix(head)
    if name.removeprefix("model.").startswith(OTHER_PARTS):
        return None
    for prefix in TEXT_PREFIXES:
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return name
