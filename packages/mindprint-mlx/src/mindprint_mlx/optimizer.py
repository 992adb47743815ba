"""AdamW and gradient clipping as PyTorch computes them, over flat mappings of arrays.

MLX's own AdamW is not used. By default it leaves the moments' bias in, and it orders its operations otherwise, so that
its numbers drift from PyTorch's. Here each operation is PyTorch's, in its order, and the bias corrections are Python's
float64, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt

import mlx.core as mx

from mindprint.contract import AdamW

Arrays = Mapping[str, mx.array]


@dataclass(frozen=True)
class Moments:
    """The state of AdamW: both moments by parameter name, empty before the first update, and the count of updates."""

    first: Arrays = field(default_factory=dict)
    second: Arrays = field(default_factory=dict)
    steps: int = 0


def adamw(
    parameters: Arrays, gradients: Arrays, moments: Moments, learning_rate: float, options: AdamW
) -> tuple[dict[str, mx.array], Moments]:
    """Return parameters and moments after one update of AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101).

    Operations and their order are those of `torch.optim.AdamW` (`_single_tensor_adam` with decoupled decay).
    """
    steps = moments.steps + 1
    beta1, beta2 = options.betas
    step_size = learning_rate / (1 - beta1**steps)
    correction = sqrt(1 - beta2**steps)
    updated, first, second = {}, {}, {}
    ahead = {name: gradient - _moment(moments.first, name, gradient) for name, gradient in gradients.items()}
    # Computed now, the differences leave each old moment one last use, so that the new one takes its place in memory.
    mx.eval(ahead)
    for name, gradient in gradients.items():
        v = _moment(moments.second, name, gradient)
        # torch computes m + (1 - beta1) (g - m), its `lerp_`, which rounds otherwise than beta1 m + (1 - beta1) g.
        first[name] = m = _moment(moments.first, name, gradient) + (1 - beta1) * ahead[name]
        second[name] = v = beta2 * v + (1 - beta2) * (gradient * gradient)
        decayed = parameters[name] * (1 - learning_rate * options.weight_decay)
        updated[name] = decayed - step_size * (m / (mx.sqrt(v) / correction + options.eps))
    return updated, Moments(first, second, steps)


def _moment(moments: Arrays, name: str, gradient: mx.array) -> mx.array:
    return moments.get(name, mx.zeros_like(gradient))


def global_norm(gradients: Arrays) -> mx.array:
    """Return the 2-norm of all gradients together: of their norms, as `torch.nn.utils.clip_grad_norm_` takes it."""
    if not gradients:
        return mx.array(0.0)
    return mx.linalg.norm(mx.stack([mx.linalg.norm(gradient) for gradient in gradients.values()]))


def clip_gradients(gradients: Arrays, norm: mx.array, maximum: float | None) -> dict[str, mx.array]:
    """Return gradients whose global norm is at most `maximum`: times `max / (norm + 1e-6)`, at most 1, as PyTorch."""
    if maximum is None:
        return dict(gradients)
    factor = mx.minimum(maximum / (norm + 1e-6), 1.0)
    return {name: gradient * factor for name, gradient in gradients.items()}
