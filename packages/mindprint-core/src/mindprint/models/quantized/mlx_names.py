"""Tensors of folders that mlx-lm wrote, under transformers' names: the inverse of `sanitize` of mlx-lm's classes.

Backends that build transformers' classes from such a folder need it, and so does a merge that writes a folder for
transformers. Most families have the same names and values in both. For the others it says which names have another
beginning, to which norms mlx-lm added 1, and which convolutions it turned.
`tests/interop/test_mlx_names.py` compares every family with both libraries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mindprint.errors import ModelError

Change = Literal["none", "plus_one", "turned"]
"""A change that mlx-lm made to a tensor's values: none, 1 added, or `[channels, 1, width]` made `[channels, width, 1]`.
"""


@dataclass(frozen=True)
class MlxNames:
    """A family's differences between mlx-lm's folders and transformers' classes.

    Args:
        beginnings: Beginnings of names, mlx-lm's first.
        plus_one: Endings of the names of vectors to which mlx-lm adds 1.
        turned: Endings of the names of convolutions whose last two axes mlx-lm exchanges.
        ignored: Beginnings of names of parts that text does not use.
    """

    beginnings: tuple[tuple[str, str], ...] = ()
    plus_one: tuple[str, ...] = ()
    turned: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def in_transformers(self, name: str) -> str | None:
        """Return transformers' name of a stored tensor. None for one of a part that text does not use."""
        if name.startswith(self.ignored):
            return None
        for stored, renamed in self.beginnings:
            if name.startswith(stored):
                return renamed + name.removeprefix(stored)
        return name

    def change(self, name: str, shape: tuple[int, ...]) -> Change:
        """Return how the values of a stored tensor differ from those of transformers' weight."""
        if name.endswith(self.turned) and len(shape) == 3:
            return "turned"
        return "plus_one" if name.endswith(self.plus_one) and len(shape) == 1 else "none"


_SAME = MlxNames()
_PARTS = (
    "vision_tower.", "vision_model.", "visual.", "multi_modal_projector.", "audio_tower.", "embed_vision.",
    "embed_audio.", "mtp.", "language_model.mtp.", "model.visual.",
)  # fmt: skip
_WRAPPED = (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."))
# Zero-centred norms, which transformers' class adds 1 to. The norm inside of linear attention is not one of them.
_CENTRED = (
    ".input_layernorm.weight", ".post_attention_layernorm.weight", "model.norm.weight", ".q_norm.weight",
    ".k_norm.weight",
)  # fmt: skip

MLX_NAMES: Mapping[str, MlxNames] = {
    **dict.fromkeys(
        (
            "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "gemma4_text", "glm", "glm4",
            "granite", "helium", "hunyuan_v1_dense", "llama", "ministral3", "mistral", "nemotron", "olmo2", "olmo3",
            "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
        ),
        _SAME,
    ),
    **dict.fromkeys(("gemma3", "gemma4", "mistral3"), MlxNames(_WRAPPED, ignored=_PARTS)),
    "qwen3_5": MlxNames(_WRAPPED, plus_one=_CENTRED, turned=(".conv1d.weight",), ignored=_PARTS),
    "qwen3_5_text": MlxNames(
        (("language_model.", ""),), plus_one=_CENTRED, turned=(".conv1d.weight",), ignored=_PARTS
    ),
}  # fmt: skip
"""The families whose folders are known. Those with experts are not: mlx-lm packs a stack of them as one tensor."""


def mlx_names(config: Mapping[str, Any]) -> MlxNames:
    """Return the names of a folder that mlx-lm wrote, by its config.json. Raises `ModelError` for an unknown family."""
    kind = str(config.get("model_type"))
    if kind not in MLX_NAMES:
        raise ModelError(
            f"{kind} is quantized in MLX's format, and the names of its tensors there are not known (known: "
            f"{', '.join(sorted(MLX_NAMES))}); train it on MLX, or take a full-precision or bitsandbytes model"
        )
    return MLX_NAMES[kind]
