"""The largest magnitude among the base's weights: of any weight, in any dtype, and not the adapter's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mindprint.contract import AdapterState, LoadedModel
from mindprint.plugins.backend import Backend

Load = Callable[..., LoadedModel]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [-300.0, 300.0, float("inf"), float("-inf")])
def test_it_is_the_largest_magnitude(backend: Backend, load: Load, dtype: str, value: float) -> None:
    model = load("qwen2", dtype)
    with torch.no_grad():
        model.handle.network.model.layers[1].mlp.down_proj.weight[3, 5] = value
    assert backend.largest_weight(model) == abs(value)


@pytest.mark.parametrize("name", ["embed_tokens.weight", "norm.weight", "layers.0.self_attn.q_proj.bias"])
def test_nan_anywhere_is_nan(backend: Backend, load: Load, name: str) -> None:
    model = load("qwen2")
    assert backend.largest_weight(model) < 100
    with torch.no_grad():
        model.handle.network.model.get_parameter(name).view(-1)[-1] = torch.nan
    assert backend.largest_weight(model) != backend.largest_weight(model)


def test_the_adapter_does_not_count(backend: Backend, load: Load, make_adapter: Callable[..., AdapterState]) -> None:
    model = load("qwen2")
    before = backend.largest_weight(model)
    backend.inject_adapter(model, make_adapter(model))
    with torch.no_grad():
        for factor in model.handle.adapter.parameters:
            factor.fill_(1e6)
    assert backend.largest_weight(model) == before
