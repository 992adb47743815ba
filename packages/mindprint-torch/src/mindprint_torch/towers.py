"""The language model of a checkpoint that also has a vision or audio part, which text never uses.

The model is of the class that the checkpoint names, so that its modules have the names that PEFT, vLLM and llama.cpp's
converter see. The other parts are taken out of it before weights are read, so that theirs never are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from mindprint.errors import ModelError


def model_class(config: PreTrainedConfig) -> Any:
    """Return the class to load a base with.

    Raises:
        ModelError: For a checkpoint that has no language model.
    """
    if config.get_text_config() is config:
        return AutoModelForCausalLM
    return _language_model(_named_class(config))


def concrete_class(config: PreTrainedConfig) -> Any:
    """Return transformers' own class for a base, or the subclass of it that has only its language model.

    Raises:
        ModelError: For a checkpoint that has no language model.
    """
    kind = model_class(config)
    if kind is not AutoModelForCausalLM:
        return kind
    mapping: Any = AutoModelForCausalLM._model_mapping
    return mapping[type(config)]


def _named_class(config: PreTrainedConfig) -> Any:
    """Return the class that the checkpoint names, or else transformers' class for such a configuration."""
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    mapping: Any = AutoModelForImageTextToText._model_mapping
    known = named[0] if named and named[0] is not None else mapping.get(type(config), None)
    if known is None or not hasattr(known, "generate"):
        stated = ", ".join(config.architectures or ()) or config.model_type
        raise ModelError(
            f"{stated} has no language model that generates text, so no voice can be trained on it; name the folder "
            "of a language model"
        )
    return known


@cache
def _language_model(kind: Any) -> Any:
    """Return a subclass of a model's class that has only its language model and its head."""

    def initialize(self: Any, config: PreTrainedConfig, *args: Any, **named: Any) -> None:
        kind.__init__(self, config, *args, **named)
        if self.get_output_embeddings() is None or self.get_decoder() is self:
            raise ModelError(f"{kind.__name__} has no language model that is known here")
        kept = {id(self.get_decoder()), id(self.get_output_embeddings())}
        self.left_out = tuple(f"{path}." for path in _remove_others(self, kept))

    # transformers looks up facts by the class's name and module, which stay the same.
    return type(kind.__name__, (kind,), {"__init__": initialize, "__module__": kind.__module__})


def _remove_others(module: nn.Module, kept: set[int], path: str = "") -> Iterator[str]:
    """Take out every part that is neither kept nor around one that is kept, and yield its name."""
    for name, child in list(module.named_children()):
        if id(child) in kept:
            continue
        if any(id(part) in kept for part in child.modules()):
            yield from _remove_others(child, kept, f"{path}{name}.")
        else:
            setattr(module, name, None)
            yield path + name
