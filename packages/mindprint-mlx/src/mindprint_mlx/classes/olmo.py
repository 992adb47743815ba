"""OLMo (arXiv 2402.00838): Llama's blocks with layer norms that have no weights.

mlx-lm's module needs the package `ai2-olmo`, and reads checkpoints in that package's own format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn

from mindprint_mlx.imports import mlx_lm_module

NORM_EPSILON = 1e-5
"""The constant of the norms, which no configuration states."""


@dataclass
class ModelArgs:
    """The fields of a configuration that decide the computation."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    attention_bias: bool
    clip_qkv: float | None
    tie_word_embeddings: bool


class Attention(nn.Module):
    """Llama's attention, with queries, keys and values clipped if the configuration says so."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        hidden, width, bias = args.hidden_size, args.head_dim, args.attention_bias
        self.head_dim, self.clip = width, args.clip_qkv
        self.q_proj = nn.Linear(hidden, args.num_attention_heads * width, bias=bias)
        self.k_proj = nn.Linear(hidden, args.num_key_value_heads * width, bias=bias)
        self.v_proj = nn.Linear(hidden, args.num_key_value_heads * width, bias=bias)
        self.o_proj = nn.Linear(args.num_attention_heads * width, hidden, bias=bias)
        self.rope = nn.RoPE(width)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        queries, keys, values = (self._heads(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        offset = 0 if cache is None else cache.offset
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        output = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.head_dim**-0.5, mask=mask)
        return self.o_proj(output.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1))

    def _heads(self, x: mx.array) -> mx.array:
        if self.clip is not None:
            x = mx.clip(x, -self.clip, self.clip)
        return x.reshape(*x.shape[:2], -1, self.head_dim).transpose(0, 2, 1, 3)


class MLP(nn.Module):
    """Llama's gated MLP."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.self_attn = Attention(args)
        self.mlp = MLP(args)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        x = x + self.self_attn(_norm(x), mask, cache)
        return x + self.mlp(_norm(x))


class Body(nn.Module):
    """Everything but the head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        x = self.embed_tokens(inputs)
        caches = cache or [None] * len(self.layers)
        mask = mlx_lm_module("models.base").create_attention_mask(x, caches[0])
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            x = layer(x, mask, layer_cache)
        return _norm(x)


class Model(nn.Module):
    """The language model."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.tied = args.tie_word_embeddings
        self.model = Body(args)
        if not self.tied:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        hidden = self.model(inputs, cache)
        return self.model.embed_tokens.as_linear(hidden) if self.tied else self.lm_head(hidden)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Leave out the copy of the embedding that a tied head is saved as."""
        return {name: values for name, values in weights.items() if not (self.tied and name == "lm_head.weight")}

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self.model.layers


def _norm(x: mx.array) -> mx.array:
    # In float32 whatever the model's dtype, as transformers does.
    return mx.fast.layer_norm(x.astype(mx.float32), None, None, NORM_EPSILON).astype(x.dtype)
