"""The choice of experts of DeepSeek V3, GLM 4 MoE and dots.llm1, as transformers makes it.

mlx-lm gives the experts of groups that were not chosen a score of 0. With a negative correction bias that is more than
the score of experts that were chosen. transformers gives them minus infinity.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn

from mindprint_mlx.calls import replace_call
from mindprint_mlx.configuration import Configuration

SMALL = 1e-20
"""The constant that keeps the sum of the chosen scores away from zero."""


def use_grouped_routing(module: nn.Module, configuration: Configuration) -> None:
    """Let each mixture choose its experts as transformers does."""
    fields = configuration.fields

    def choose(gate: Any, x: mx.array) -> tuple[mx.array, mx.array]:
        logits = x.astype(mx.float32) @ gate.weight.T.astype(mx.float32)
        return chosen_experts(
            mx.sigmoid(logits),
            gate.e_score_correction_bias,
            groups=fields["n_group"] or 1,
            kept_groups=fields["topk_group"] or 1,
            experts=fields["num_experts_per_tok"],
            normalize=bool(fields["norm_topk_prob"]),
            factor=fields["routed_scaling_factor"],
        )

    for layer in module.layers:
        if "gate" in layer.mlp:
            replace_call(layer.mlp.gate, choose)


def chosen_experts(
    scores: mx.array, bias: mx.array, *, groups: int, kept_groups: int, experts: int, normalize: bool, factor: float
) -> tuple[mx.array, mx.array]:
    """Return the indices `[..., experts]` of the experts of each token, and their weights.

    `bias` takes part in the choice, but not in the weights (DeepSeek-V3, arXiv 2412.19437, equation 16).
    """
    ranked = mx.stop_gradient(scores + bias)
    if groups > kept_groups:
        by_group = mx.unflatten(ranked, -1, (groups, -1))
        best = mx.topk(by_group, min(2, by_group.shape[-1]), axis=-1).sum(axis=-1)
        dropped = mx.argsort(best, axis=-1)[..., : groups - kept_groups, None]
        by_group = mx.put_along_axis(by_group, dropped, mx.array(-mx.inf), axis=-2)
        ranked = mx.flatten(by_group, -2, -1)
    # The whole order, since a partition fails where all experts are chosen.
    indices = mx.argsort(-ranked, axis=-1)[..., :experts]
    weights = mx.take_along_axis(scores, indices, axis=-1)
    if normalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + SMALL)
    return indices, weights * factor
