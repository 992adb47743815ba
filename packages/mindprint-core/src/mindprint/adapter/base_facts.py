"""Facts from a base's config.json that are needed to read, write and merge adapter files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindprint.adapter.module_names import FAMILIES, TRANSPOSED_LINEARS, TRANSPOSED_STACKS, WRAPPERS, Family
from mindprint.models.folder import model_config

_TIED_IN_TEXT = ("llava", "qwen2_5_vl")
"""Models with more than text for which it is enough that their `text_config` ties embedding and LM head."""

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


@dataclass(frozen=True)
class BaseFacts:
    """Facts about a base.

    `layers` is None where its config.json does not say how many layers there are. `tied` is whether embedding and LM
    head are one tensor, and None where nothing tells.
    """

    model_type: str
    layers: int | None
    tied: bool | None

    @property
    def family(self) -> Family:
        """Return the names of its modules: transformers' names everywhere for a family that was not compared."""
        return FAMILIES.get(self.model_type) or WRAPPERS.get(self.model_type, Family())

    @property
    def compared(self) -> bool:
        """Return whether the names of this family's modules were compared with mlx-lm's."""
        return self.model_type in FAMILIES

    @property
    def transposed_linears(self) -> bool:
        """Return whether the files keep the weights of linear layers, but for the LM head, as `[in, out]`."""
        return self.model_type in TRANSPOSED_LINEARS

    @property
    def transposed_stacks(self) -> bool:
        """Return whether the files keep stacks of experts as `[experts, in, out]`."""
        return self.model_type in TRANSPOSED_STACKS


def read_base_facts(folder: Path) -> BaseFacts:
    """Read a base's config.json. Raises `ModelError` for one that is broken or missing."""
    config = model_config(folder)
    text = config.get("text_config")
    parts = (config, text) if isinstance(text, dict) else (config,)
    # Models of text and images keep the text part's sizes in `text_config`.
    layers = next((part[name] for part in parts for name in _LAYERS if isinstance(part.get(name), int)), None)
    # Nemotron-H names the kind of each layer instead.
    layers = layers or len(config.get("layers_block_type") or config.get("hybrid_override_pattern") or ()) or None
    return BaseFacts(config["model_type"], layers, _tied(config))


def _tied(config: Mapping[str, Any]) -> bool | None:
    """Return the configuration's own statement, or the default of its class where it has none."""
    # transformers leaves out what equals the class's default, so silence means the default and not False.
    stated = config.get("tie_word_embeddings")
    text = config.get("text_config")
    if config["model_type"] in _TIED_IN_TEXT and isinstance(text, dict):
        stated = stated or text.get("tie_word_embeddings")
    if stated is not None:
        return bool(stated)
    from transformers import CONFIG_MAPPING  # noqa: PLC0415 (seconds, and most configurations say it)

    try:
        return bool(CONFIG_MAPPING[config["model_type"]]().tie_word_embeddings)
    except (KeyError, AttributeError, ValueError, TypeError):
        return None
