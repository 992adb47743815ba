"""What of a base decides how an adapter's files are read and written: from its config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindprint.adapter.module_names import FAMILIES, Family
from mindprint.errors import ModelError
from mindprint.models.folder import model_config

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


@dataclass(frozen=True)
class BaseFacts:
    """`tied` says whether embedding and LM head are one tensor; None where nothing tells."""

    model_type: str
    layers: int
    tied: bool | None

    @property
    def family(self) -> Family:
        """What its modules are called; for a family that was not compared, transformers' names everywhere."""
        return FAMILIES.get(self.model_type, Family())

    @property
    def compared(self) -> bool:
        return self.model_type in FAMILIES


def read_base_facts(folder: Path) -> BaseFacts:
    """Read a base's config.json. Raises `ModelError` where it does not say how many layers there are."""
    config = model_config(folder)
    layers = next((config[name] for name in _LAYERS if isinstance(config.get(name), int)), None)
    if layers is None:
        raise ModelError(f"{folder / 'config.json'}: does not say how many layers there are ({_LAYERS[0]})")
    return BaseFacts(config["model_type"], layers, _tied(config))


def _tied(config: Mapping[str, Any]) -> bool | None:
    """What the configuration says, or what its class assumes where it says nothing."""
    stated = config.get("tie_word_embeddings")
    if stated is not None:
        return bool(stated)
    from transformers import CONFIG_MAPPING  # noqa: PLC0415 (seconds, and most configurations say it)

    try:
        return bool(CONFIG_MAPPING[config["model_type"]]().tie_word_embeddings)
    except (KeyError, AttributeError, ValueError, TypeError):
        return None
