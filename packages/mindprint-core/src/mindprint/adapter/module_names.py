"""Names of modules by family of models: in transformers, in mlx-lm, and in the files of a checkpoint.

Sites have transformers' names. Where mlx-lm or the files say something else, it is in this table and nowhere else;
`tests/interop/test_module_names.py` builds every family with both libraries and compares.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mindprint.adapter.targets import is_stack
from mindprint.models.layer_names import is_embedding, is_lm_head


@dataclass(frozen=True)
class Experts:
    """The place of a family's experts, and the names of an expert's parts.

    transformers 5 stacks them: `{module}.gate_up_proj` `[experts, 2 · inner, hidden]`, gate before up, and
    `{module}.down_proj`. mlx-lm has three stacks under `{mlx_lm}`, always called gate, up and down. Files have each
    expert for itself: `{file}.{expert}.{gate}.weight`.
    """

    module: str = "mlp.experts"
    mlx_lm: str = "mlp.switch_mlp"
    file: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    @property
    def parts(self) -> Mapping[str, str]:
        """Return mlx-lm's names of a single expert's parts."""
        return {self.gate: "gate_proj", self.up: "up_proj", self.down: "down_proj"}


@dataclass(frozen=True)
class Family:
    """Names that differ from transformers': beginnings or inner parts, transformers' first.

    `mlx_lm_head` is False where mlx-lm computes with the embedding as the head, whatever the base's config.json says.
    """

    mlx_lm: tuple[tuple[str, str], ...] = ()
    file: tuple[tuple[str, str], ...] = ()
    experts: Experts | None = None
    mlx_lm_head: bool = True


_SAME = Family()
_MIXTRAL = Family(
    mlx_lm=((".mlp.gate", ".block_sparse_moe.gate"),),
    file=((".mlp.gate", ".block_sparse_moe.gate"),),
    experts=Experts("mlp.experts", "block_sparse_moe.switch_mlp", "block_sparse_moe.experts", "w1", "w3", "w2"),
)

FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(
        (
            "apertus", "ernie4_5", "exaone4", "gemma3_text", "glm4", "granite", "helium",
            "hunyuan_v1_dense", "llama", "mistral", "nemotron", "olmo2", "phi", "phi3", "qwen2", "qwen3", "seed_oss",
            "smollm3", "stablelm", "starcoder2",
        ),
        _SAME,
    ),
    **dict.fromkeys(("cohere", "gemma", "gemma2"), Family(mlx_lm_head=False)),
    **dict.fromkeys(("olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next"), Family(experts=Experts())),
    "mixtral": _MIXTRAL,
    # GPT-NeoX calls its head `embed_out` in files. transformers 5 calls the module `lm_head`.
    "gpt_neox": Family(
        mlx_lm=(
            ("gpt_neox.layers.", "model.h."),
            ("gpt_neox.embed_in", "model.embed_in"),
            ("lm_head", "model.embed_out"),
        ),
        file=(("lm_head", "embed_out"),),
    ),
    # The files of Nemotron-H have the name that its first code gave the body.
    "nemotron_h": Family(mlx_lm=(("model.", "backbone."),), file=(("model.", "backbone."),)),
    # The published GPT-2 files were saved from the model without its head, so their names lack `transformer.`.
    "gpt2": Family(mlx_lm=(("transformer.", "model."),), file=(("transformer.", ""),), mlx_lm_head=False),
}  # fmt: skip
"""The families whose names were compared."""

_INSIDE = Family(file=(("model.language_model.", "language_model.model."), ("lm_head", "language_model.lm_head")))

WRAPPERS: Mapping[str, Family] = {
    **dict.fromkeys(("gemma3", "llava", "mistral3"), _INSIDE),
    "qwen2_5_vl": Family(file=(("model.language_model.", "model."),)),
    **dict.fromkeys(("gemma3n", "gemma4", "qwen3_5", "qwen3_vl"), _SAME),
}
"""Models with more than text: the names of their language model's parts in files.

`tests/parity/test_towers.py` loads an adapter of each with PEFT, and merges it.
"""

TRANSPOSED_LINEARS = frozenset({"gpt2", "openai-gpt"})
"""The families whose linear layers are transformers' `Conv1D`, which keeps its weight as `[in, out]`."""

TRANSPOSED_STACKS = frozenset({"gpt_oss", "aria", "aria_text"})
"""The families whose stacks of experts are `[experts, in, out]`: transformers' `is_transposed`, which PEFT obeys."""


def to_mlx_lm(site: str, known: Family) -> str:
    """Return the path in mlx-lm's model of a site that is a module. A stack of experts is three (`Experts`)."""
    return _renamed(site, known.mlx_lm)


def from_mlx_lm(path: str, known: Family) -> str:
    """Return the site of a path in mlx-lm's model that is not part of its experts."""
    return _renamed(path, tuple((theirs, ours) for ours, theirs in known.mlx_lm))


def file_names(site: str, known: Family) -> tuple[str, ...]:
    """Return the possible names of a module's weight in a checkpoint's files, likeliest first.

    The last has no first component: a checkpoint saved from the model without its LM head has none (`model.`,
    `transformer.`), and transformers adds it on loading.
    """
    names = [site, _renamed(site, known.file)]
    if site.count(".") > 1 or is_embedding(site):
        names.append(site.partition(".")[2] or site)
    return tuple(dict.fromkeys(f"{name}.weight" for name in names))


def from_file(name: str, known: Family) -> str:
    """Return the site of a module that a checkpoint's files call `name`. A name that is a site already stays."""
    for site, file in known.file:
        if site.startswith("."):
            if name.endswith(file):
                return name.removesuffix(file) + site
        elif name.startswith(file) and not name.startswith(site) and (file or not is_lm_head(name)):
            return site + name.removeprefix(file)
    return name


def split_stack(site: str, experts: Experts) -> tuple[str, str] | None:
    """Return layer and parameter of a stack's site, `("model.layers.0", "gate_up_proj")`, None for other sites."""
    host, _, parameter = site.rpartition(".")
    layer = host.removesuffix(f".{experts.module}")
    return (layer, parameter) if is_stack(site) and layer != host else None


def split_expert(site: str, experts: Experts) -> tuple[str, int, str] | None:
    """Return layer, number and part of a single expert's site, as transformers 4 had them, None for other sites."""
    found = re.fullmatch(rf"(.+)\.{re.escape(experts.file)}\.(\d+)\.(\w+)", site)
    return (found[1], int(found[2]), found[3]) if found else None


def _renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    """Return a name with the beginning, ending or inner part replaced that a family calls otherwise."""
    for old, new in renames:
        # A leading dot marks an ending: the same part may appear in any layer.
        if old.startswith("."):
            if name.endswith(old):
                return name.removesuffix(old) + new
        elif name.startswith(old):
            return new + name.removeprefix(old)
    return name
