"""MLX arrays for core's losses (`mindprint.losses.ArrayNamespace`) and contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from mindprint.contract import Float32

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


class MlxArrays:
    """The namespace of MLX: every function differentiates, in the dtype of its input (float32 in steps)."""

    def log_sigmoid(self, x: Any) -> Any:
        return -mx.logaddexp(mx.zeros_like(x), -x)

    def sigmoid(self, x: Any) -> Any:
        return mx.sigmoid(x)

    def relu(self, x: Any) -> Any:
        return nn.relu(x)

    def exp(self, x: Any) -> Any:
        return mx.exp(x)

    def log1p(self, x: Any) -> Any:
        return mx.log1p(x)

    def sum(self, x: Any) -> Any:
        return mx.sum(x)


MLX = MlxArrays()


def parameters_of(module: nn.Module) -> list[tuple[str, mx.array]]:
    """Return the parameters of a module and of all modules in it, by path, in the module's order."""
    return list(tree_flatten(module.parameters()))  # type: ignore[arg-type]  # pairs, as long as no mapping is given


def scalar(value: mx.array) -> float:
    """Return the number in an array of one element, as soon as it is computed."""
    return float(value.item())  # type: ignore[arg-type]  # complex numbers do not occur


def to_numpy(values: mx.array) -> Float32:
    """Return a float32 copy in NumPy's memory, row by row."""
    return np.array(values.astype(mx.float32), dtype=np.float32, order="C")


BLOCK = 64
"""The number of terms that are added one after another."""


def in_blocks(values: mx.array, reduced: Callable[..., mx.array]) -> mx.array:
    """Return a sum over the last axis of `[n, terms]`, `[n]`, in blocks and blocks of blocks of MLX's own sums.

    `reduced` is `mx.sum` or another reduction that can be taken in parts.
    """
    # One after another, each of thousands of small terms is lost next to the sum so far: rounding is then a bias.
    while (width := values.shape[-1]) > BLOCK:
        whole = width - width % BLOCK
        sums = reduced(values[:, :whole].reshape(len(values), -1, BLOCK), axis=-1)
        values = sums if whole == width else mx.concatenate([sums, values[:, whole:]], axis=-1)
    return reduced(values, axis=-1)
