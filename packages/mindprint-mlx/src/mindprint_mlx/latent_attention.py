"""The attention of DeepSeek V2 and V3, with the linear layers that transformers has.

mlx-lm splits `kv_b_proj` into two stacks of matrices when it loads, and multiplies queries and latents with them. The
results are the same, but a stack of matrices is not a layer that LoRA can be put on. So the layer is kept here. Keys
and values are computed from the latents as transformers does (DeepSeek-V2, arXiv 2405.04434, section 2.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx import nn

from mindprint_mlx.calls import replace_method
from mindprint_mlx.configuration import Configuration
from mindprint_mlx.rope import softmax_scale

NORM_EPSILON = 1e-6
"""The constant of the two inner norms. transformers does not take it from the configuration."""


class LatentAttention(nn.Module):
    """Attention whose keys and values are computed from one low-rank latent a token."""

    def __init__(self, fields: Mapping[str, Any], scale: float, *, interleaved: bool) -> None:
        super().__init__()
        self.heads = fields["num_attention_heads"]
        self.plain, self.rotated = fields["qk_nope_head_dim"], fields["qk_rope_head_dim"]
        self.value_dims, self.latent = fields["v_head_dim"], fields["kv_lora_rank"]
        self.scale = scale
        hidden, bias, query_rank = fields["hidden_size"], fields["attention_bias"], fields["q_lora_rank"]
        width = self.heads * (self.plain + self.rotated)
        if query_rank is None:
            self.q_proj = nn.Linear(hidden, width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, query_rank, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(query_rank, NORM_EPSILON)
            self.q_b_proj = nn.Linear(query_rank, width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent + self.rotated, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(self.latent, NORM_EPSILON)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.plain + self.value_dims), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value_dims, hidden, bias=bias)
        self.rope = nn.RoPE(self.rotated, traditional=interleaved)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        rows, tokens, _ = x.shape
        compressed, shared_key = mx.split(self.kv_a_proj_with_mqa(x), [self.latent], axis=-1)
        expanded = self._by_head(self.kv_b_proj(self.kv_a_layernorm(compressed)))
        keys, values = mx.split(expanded, [self.plain], axis=-1)
        queries, rotated_queries = mx.split(self._by_head(self._queries(x)), [self.plain], axis=-1)
        offset = 0 if cache is None else cache.offset
        # One rotated key is shared by all heads.
        shared_key = self.rope(shared_key[:, None], offset)
        shared_key = mx.broadcast_to(shared_key, (rows, self.heads, tokens, self.rotated))
        keys = mx.concatenate([keys, shared_key], axis=-1)
        queries = mx.concatenate([queries, self.rope(rotated_queries, offset)], axis=-1)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        output = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=mask)
        return self.o_proj(output.transpose(0, 2, 1, 3).reshape(rows, tokens, -1))

    def _queries(self, x: mx.array) -> mx.array:
        if "q_proj" in self:
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))

    def _by_head(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(0, 2, 1, 3)


def use_latent_attention(module: nn.Module, configuration: Configuration) -> None:
    """Give each layer the attention with transformers' linear layers, and keep `kv_b_proj` when loading."""
    fields = configuration.fields
    for layer, rope in zip(module.layers, configuration.rope, strict=True):
        scale = softmax_scale(rope or {}, (fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]) ** -0.5)
        layer.self_attn = LatentAttention(fields, scale, interleaved=bool(fields.get("rope_interleave", True)))
    sanitize: Any = getattr(type(module), "sanitize", None)

    def keeping_projections(self: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        # The class would take these apart, so that they are kept out of its sight.
        kept = {name: values for name, values in weights.items() if ".kv_b_proj." in name}
        others = {name: values for name, values in weights.items() if name not in kept}
        return {**sanitize(self, others), **kept}

    replace_method(module, "sanitize", keeping_projections)
