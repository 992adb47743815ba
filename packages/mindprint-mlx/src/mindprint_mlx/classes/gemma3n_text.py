"""The language model of Gemma 3n, under the names that transformers gives its parts.

mlx-lm's class computes keys and values again in layers that share those of an earlier one, unless it has a cache. It
also clips weights while it computes. Both would change training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import mlx.core as mx
from mlx import nn

from mindprint_mlx.imports import mlx_lm_module

SMALL = 1e-5
"""The least mean square that a stream is scaled by."""

Pair = tuple[mx.array, mx.array]


@dataclass
class ModelArgs:
    """The fields of a configuration that decide the computation."""

    hidden_size: int
    intermediate_size: Any
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    vocab_size: int
    vocab_size_per_layer_input: int
    hidden_size_per_layer_input: int
    layer_types: Sequence[str]
    sliding_window: int | None
    num_kv_shared_layers: int
    activation_sparsity_pattern: Any
    final_logit_softcapping: float | None
    altup_num_inputs: int
    altup_active_idx: int
    altup_correct_scale: bool
    laurel_rank: int
    attention_bias: bool

    def width(self, layer: int) -> int:
        """Return the hidden dimensions of a layer's MLP."""
        sizes = self.intermediate_size
        return int(sizes[layer] if isinstance(sizes, list) else sizes)

    def sparsity(self, layer: int) -> float:
        """Return the share of a layer's activations that are made zero."""
        pattern = self.activation_sparsity_pattern
        if pattern is None:
            return 0.95 if self.num_hidden_layers > 10 and layer < 10 else 0.0
        return float(pattern[layer])

    def shares(self, layer: int) -> bool:
        """Return whether a layer uses the keys and values of an earlier one."""
        return layer >= self.num_hidden_layers - self.num_kv_shared_layers

    def source(self, layer: int) -> int:
        """Return the layer whose keys and values a layer uses: the last of its kind that has some."""
        if not self.shares(layer):
            return layer
        own = range(self.num_hidden_layers - self.num_kv_shared_layers)
        return max(earlier for earlier in own if self.layer_types[earlier] == self.layer_types[layer])


class PlainNorm(nn.Module):
    """An RMS norm without weights."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, None, self.epsilon)


class Attention(nn.Module):
    """Attention whose keys and values may be those of an earlier layer."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        hidden, width, bias = args.hidden_size, args.head_dim, args.attention_bias
        self.head_dim, self.shares = width, args.shares(layer)
        self.q_proj = nn.Linear(hidden, args.num_attention_heads * width, bias=bias)
        self.q_norm = nn.RMSNorm(width, args.rms_norm_eps)
        if not self.shares:
            self.k_proj = nn.Linear(hidden, args.num_key_value_heads * width, bias=bias)
            self.v_proj = nn.Linear(hidden, args.num_key_value_heads * width, bias=bias)
            self.k_norm = nn.RMSNorm(width, args.rms_norm_eps)
            self.v_norm = PlainNorm(args.rms_norm_eps)
        self.o_proj = nn.Linear(args.num_attention_heads * width, hidden, bias=bias)
        self.rope = nn.RoPE(width)

    def __call__(self, x: mx.array, mask: Any, cache: Any, shared: Pair | None, offset: Any) -> tuple[mx.array, Pair]:
        queries = self.rope(self.q_norm(self._heads(self.q_proj(x))), offset=offset)
        if shared is None:
            keys = self.rope(self.k_norm(self._heads(self.k_proj(x))), offset=offset)
            values = self.v_norm(self._heads(self.v_proj(x)))
            shared = (keys, values) if cache is None else cache.update_and_fetch(keys, values)
        output = mx.fast.scaled_dot_product_attention(queries, *shared, scale=1.0, mask=mask)
        return self.o_proj(output.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)), shared

    def _heads(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:2], -1, self.head_dim).transpose(0, 2, 1, 3)


class MLP(nn.Module):
    """A gated MLP, in some layers with only the greatest activations kept."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        width, sparsity = args.width(layer), args.sparsity(layer)
        self.gate_proj = nn.Linear(args.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, args.hidden_size, bias=False)
        # How many standard deviations above the mean the kept ones begin, if they are normally distributed.
        self.deviations = NormalDist().inv_cdf(sparsity) if sparsity > 0 else None

    def __call__(self, x: mx.array) -> mx.array:
        gate = self.gate_proj(x)
        if self.deviations is not None:
            spread = mx.std(gate, axis=-1, keepdims=True)
            gate = mx.maximum(gate - (mx.mean(gate, axis=-1, keepdims=True) + spread * self.deviations), 0)
        output: mx.array = self.down_proj(nn.gelu_approx(gate) * self.up_proj(x))
        return output


class Laurel(nn.Module):
    """A residual connection with a low-rank part (LAuReL, arXiv 2411.07501)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.linear_left = nn.Linear(args.hidden_size, args.laurel_rank, bias=False)
        self.linear_right = nn.Linear(args.laurel_rank, args.hidden_size, bias=False)
        self.post_laurel_norm = nn.RMSNorm(args.hidden_size, args.rms_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        low_rank: mx.array = self.post_laurel_norm(self.linear_right(self.linear_left(x)))
        return x + low_rank


class AltUp(nn.Module):
    """Several streams of hidden states, of which a layer computes one (AltUp, arXiv 2301.13310)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.streams, self.active, self.factor = args.altup_num_inputs, args.altup_active_idx, args.hidden_size**-1.0
        self.correct_output_scale = mx.zeros(args.hidden_size)
        self.correction_coefs = nn.Linear(self.streams, self.streams, bias=False)
        self.prediction_coefs = nn.Linear(self.streams, self.streams**2, bias=False)
        self.modality_router = nn.Linear(args.hidden_size, self.streams, bias=False)
        self.router_norm = nn.RMSNorm(args.hidden_size, args.rms_norm_eps)

    def predict(self, x: mx.array) -> mx.array:
        """Return what each stream `[streams, rows, tokens, hidden]` will be, from all of them."""
        coefficients = self.prediction_coefs(self._modalities(x[self.active]))
        coefficients = mx.unflatten(coefficients, -1, (self.streams, self.streams)).swapaxes(-1, -2)
        return x + mx.moveaxis(mx.moveaxis(x, 0, -1) @ coefficients, -1, 0)

    def correct(self, predictions: mx.array, activated: mx.array) -> mx.array:
        """Return the streams, corrected by what the layer made of one."""
        coefficients = self.correction_coefs(self._modalities(activated)) + 1.0
        innovation = activated - predictions[self.active]
        return predictions + innovation[None] * mx.moveaxis(coefficients, -1, 0)[..., None]

    def _modalities(self, x: mx.array) -> mx.array:
        routed = self.modality_router(self.router_norm(x) * self.factor)
        return mx.tanh(routed.astype(mx.float32)).astype(x.dtype)


class Block(nn.Module):
    """One layer."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        hidden, extra, epsilon = args.hidden_size, args.hidden_size_per_layer_input, args.rms_norm_eps
        self.scaled = args.altup_correct_scale
        self.self_attn = Attention(args, layer)
        self.mlp = MLP(args, layer)
        self.input_layernorm = nn.RMSNorm(hidden, epsilon)
        self.post_attention_layernorm = nn.RMSNorm(hidden, epsilon)
        self.pre_feedforward_layernorm = nn.RMSNorm(hidden, epsilon)
        self.post_feedforward_layernorm = nn.RMSNorm(hidden, epsilon)
        self.altup = AltUp(args)
        self.laurel = Laurel(args)
        self.per_layer_input_gate = nn.Linear(hidden, extra, bias=False)
        self.per_layer_projection = nn.Linear(extra, hidden, bias=False)
        self.post_per_layer_input_norm = nn.RMSNorm(hidden, epsilon)

    def __call__(
        self, x: mx.array, mask: Any, cache: Any, shared: Pair | None, offset: Any, extra: mx.array
    ) -> tuple[mx.array, Pair]:
        predictions = self.altup.predict(x)
        active = predictions[self.altup.active]
        normed = self.input_layernorm(active)
        attended, shared = self.self_attn(normed, mask, cache, shared, offset)
        gated = active + self.post_attention_layernorm(attended)
        mixed = (gated + self.laurel(normed)) * 2.0**-0.5
        forward = self.mlp(self.pre_feedforward_layernorm(mixed))
        corrected = self.altup.correct(predictions, mixed + self.post_feedforward_layernorm(forward))
        first = corrected[self.altup.active]
        if self.scaled:
            first = first * self.altup.correct_output_scale
        first = self.per_layer_projection(nn.gelu_approx(self.per_layer_input_gate(first)) * extra)
        # Every stream but the first, whichever of them is active.
        return mx.concatenate([corrected[:1], corrected[1:] + self.post_per_layer_input_norm(first)]), shared


class Body(nn.Module):
    """Everything but the head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        hidden, extra, layers = args.hidden_size, args.hidden_size_per_layer_input, args.num_hidden_layers
        self.embed_tokens = nn.Embedding(args.vocab_size, hidden)
        self.layers = [Block(args, layer) for layer in range(layers)]
        self.norm = nn.RMSNorm(hidden, args.rms_norm_eps)
        self.embed_tokens_per_layer = nn.Embedding(args.vocab_size_per_layer_input, layers * extra)
        self.per_layer_model_projection = nn.Linear(hidden, layers * extra, bias=False)
        self.per_layer_projection_norm = nn.RMSNorm(extra, args.rms_norm_eps)
        others = range(1, args.altup_num_inputs)
        self.altup_projections = [nn.Linear(hidden, hidden, bias=False) for _ in others]
        self.altup_unembed_projections = [nn.Linear(hidden, hidden, bias=False) for _ in others]

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        x = self.embed_tokens(inputs) * self.args.hidden_size**0.5
        extra = self._layer_inputs(inputs, x)
        caches = [*(cache or []), *([None] * (len(self.layers) - len(cache or [])))]
        # Read before any layer puts keys into the caches.
        offset = 0 if caches[0] is None else caches[0].offset
        masks = self._masks(x, caches)
        streams = mx.stack([x, *(_scaled_like(project(x), x) for project in self.altup_projections)])
        pairs: dict[int, Pair] = {}
        for index, layer in enumerate(self.layers):
            source = self.args.source(index)
            mask = masks[self.args.layer_types[index]]
            streams, pairs[index] = layer(streams, mask, caches[index], pairs.get(source), offset, extra[:, :, index])
        first = streams[0]
        others = zip(self.altup_unembed_projections, streams[1:], strict=True)
        all_streams = mx.stack([first, *(_scaled_like(project(stream), first) for project, stream in others)])
        hidden: mx.array = self.norm(mx.mean(all_streams, axis=0))
        return hidden

    def _masks(self, x: mx.array, caches: Sequence[Any]) -> dict[str, Any]:
        """Return the mask of each kind of layer, made before any layer lengthens a cache."""
        make = mlx_lm_module("models.base").create_attention_mask
        window = self.args.sliding_window
        return {
            "full_attention": make(x, caches[0]),
            "sliding_attention": make(x, caches[0], window_size=window),
        }

    def _layer_inputs(self, inputs: mx.array, x: mx.array) -> mx.array:
        """Return each layer's input for each token: `[rows, tokens, layers, dims]`."""
        dims, shape = self.args.hidden_size_per_layer_input, (len(self.layers), -1)
        known = mx.where(inputs < self.args.vocab_size_per_layer_input, inputs, 0)
        looked_up = mx.unflatten(self.embed_tokens_per_layer(known) * dims**0.5, -1, shape)
        projected = mx.unflatten(self.per_layer_model_projection(x) * self.args.hidden_size**-0.5, -1, shape)
        together: mx.array = (self.per_layer_projection_norm(projected) + looked_up) * 2.0**-0.5
        return together


class Model(nn.Module):
    """The language model. Its head is the embedding."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model = Body(args)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        logits: mx.array = self.model.embed_tokens.as_linear(self.model(inputs, cache))
        cap = self.args.final_logit_softcapping
        return logits if cap is None else mx.tanh(logits / cap) * cap

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Leave out the copy of the embedding that the head is saved as."""
        return {name: values for name, values in weights.items() if name != "lm_head.weight"}

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self.model.layers

    def make_cache(self) -> list[Any]:
        """Return a cache for each layer that has keys of its own."""
        caches = mlx_lm_module("models.cache")
        return [caches.KVCache() for layer in range(len(self.layers)) if not self.args.shares(layer)]


def _scaled_like(x: mx.array, reference: mx.array) -> mx.array:
    """Return `x` with the root mean square of the reference, for each token."""
    target = mx.sqrt(mx.mean(reference**2, axis=-1, keepdims=True))
    return x * target / mx.sqrt(mx.maximum(mx.mean(x**2, axis=-1, keepdims=True), SMALL))
