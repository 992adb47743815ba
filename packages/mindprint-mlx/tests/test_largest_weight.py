"""The largest magnitude among the base's weights: of any weight, in any dtype, None where weights are packed."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest

from mindprint.contract import LoadedModel
from mindprint_mlx.digest import largest_weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [-300.0, 300.0, float("inf"), float("-inf")])
def test_it_is_the_largest_magnitude(make: Callable[..., LoadedModel], dtype: str, value: float) -> None:
    model = make(dtype=dtype).handle
    model.module.model.layers[1].mlp.down_proj.weight[3, 5] = value
    assert largest_weight(model) == abs(value)


@pytest.mark.parametrize("name", ["embed_tokens", "norm"])
def test_nan_anywhere_is_nan(make: Callable[..., LoadedModel], name: str) -> None:
    model = make().handle
    assert largest_weight(model) < 100
    layer = getattr(model.module.model, name)
    layer.weight = mx.where(mx.arange(layer.weight.size).reshape(layer.weight.shape) == 7, mx.nan, layer.weight)
    assert largest_weight(model) != largest_weight(model)
