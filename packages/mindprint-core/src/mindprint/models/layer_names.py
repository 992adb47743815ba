"""Names by which transformers' token embeddings and LM heads are recognised, in modules and in files alike."""

from __future__ import annotations

LM_HEADS = ("lm_head", "embed_out", "output")
"""Last name components of output projections, as transformers names them."""

EMBEDDINGS = (
    "embed_tokens", "embed_in", "embed", "embedding", "embeddings", "shared", "tok_embeddings", "token_embedding",
    "tokens_embed", "word_embedding", "word_embeddings", "wte",
)  # fmt: skip
"""Last name components of token embeddings, as transformers names them: their LoRA factors have names of their kind."""

FUSED_OUTPUTS = frozenset(
    {"bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "mamba", "mamba2", "nemotron_h", "zamba2"}
)
"""Families whose Mamba layers may hand the weight of `out_proj` to a fused kernel instead of calling the layer."""


def is_fused_output(model_type: str, site: str) -> bool:
    """Return whether a layer cannot take LoRA, because a kernel reads its weight directly."""
    # PEFT refuses most of them. Where it does not, LoRA would silently do nothing once the kernels are installed.
    return model_type in FUSED_OUTPUTS and site.rpartition(".")[2] == "out_proj"


def is_embedding(site: str) -> bool:
    """Return whether a module is a token embedding."""
    return site.rpartition(".")[2] in EMBEDDINGS


def is_lm_head(site: str) -> bool:
    """Return whether a module is an output projection."""
    return site.rpartition(".")[2] in LM_HEADS
