"""What stands in for MLX's functions on Linux CPUs computes the same, and leaves mlx-lm as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mindprint.contract import LoadedModel
from mindprint_mlx import cpu
from mindprint_mlx.imports import mlx_lm_module


@pytest.fixture(autouse=True)
def on_cpu() -> Any:
    with mx.stream(mx.cpu):
        yield


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def gradients(function: Callable[..., mx.array], *values: mx.array) -> list[np.ndarray]:
    """Of the output's sum, weighted at random so that no two elements count alike."""

    def total(*values: mx.array) -> mx.array:
        out = function(*values)
        return mx.sum(out * normal(*out.shape, seed=9))

    return [np.array(value) for value in mx.grad(total, argnums=list(range(len(values))))(*values)]


def same(mine: Callable[..., mx.array], theirs: Callable[..., mx.array], *values: mx.array) -> None:
    for found, wanted in zip(
        [np.array(mine(*values)), *gradients(mine, *values)],
        [np.array(theirs(*values)), *gradients(theirs, *values)],
        strict=True,
    ):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-6 * (1 + np.abs(wanted).max()))


def test_exp_is_as_exact_as_float32() -> None:
    x = np.concatenate([np.linspace(-85, 85, 100_001), [0.0]]).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    error = np.array(cpu.exp(mx.array(x))).astype(np.float64) / expected - 1
    assert np.abs(error).max() < 2e-7
    assert abs(error.mean()) < 2e-8
    assert np.array(cpu.exp(mx.array([-3.4e38, -200.0, 0.0]))).tolist() == [0.0, 0.0, 1.0]


def test_swiglu() -> None:
    same(cpu.swiglu, lambda gate, x: nn.silu(gate) * x, 4 * normal(5, 17), normal(5, 17, seed=1))
    extreme = mx.array([-300.0, -90.0, 90.0, 300.0])
    assert np.array(cpu.swiglu(extreme, mx.ones(4))).tolist() == [0.0, pytest.approx(0, abs=1e-35), 90.0, 300.0]
    assert np.isfinite(gradients(cpu.swiglu, extreme, mx.ones(4))).all()


def test_rms_norm() -> None:
    for weight in (normal(700, seed=1), mx.array(1.0)):
        same(
            lambda x, weight: cpu.rms_norm(x, weight, 1e-5),
            lambda x, weight: x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight,
            3 * normal(2, 5, 700), weight,
        )  # fmt: skip
    x = normal(2, 5, 700)
    assert mx.array_equal(cpu.rms_norm(x, None, 1e-5), cpu.rms_norm(x, mx.array(1.0), 1e-5))
    half = x.astype(mx.float16)
    assert mx.array_equal(cpu.rms_norm(half, None, 1e-5), cpu.MLX_RMS_NORM(half, None, 1e-5))


def test_rms_norm_rounds_no_row_as_a_whole() -> None:
    x = 3 * np.array(normal(200, 4096))
    expected = x.astype(np.float64)
    expected /= np.sqrt((expected**2).mean(-1, keepdims=True) + 1e-5)

    def worst_row(norm: Callable[..., mx.array]) -> float:
        apart = np.array(norm(mx.array(x), None, 1e-5)) - expected
        return float((np.linalg.norm(apart, axis=-1) / np.linalg.norm(expected, axis=-1)).max())

    ours, theirs = worst_row(cpu.rms_norm), worst_row(cpu.MLX_RMS_NORM)
    print(f"greatest relative error of a row of 4096 numbers: {ours:.1e}, with MLX's norm {theirs:.1e}")
    assert ours < 4e-7


@pytest.mark.parametrize("mask", ["causal", "bool", "added", None])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("together", [4, 256])
def test_attention(mask: Any, groups: int, before: int, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CAUSAL_ROWS", together)
    queries, keys = normal(2, 4, 6, 8), normal(2, groups, 6 + before, 8, seed=1)
    values = normal(2, groups, 6 + before, 8, seed=2)
    if mask in ("bool", "added"):
        seen = normal(2, 1, 6, 6 + before, seed=3) > 0
        seen[..., 0] = True
        mask = seen if mask == "bool" else mx.where(seen, normal(*seen.shape, seed=4), -1e9)
    original = mlx_lm_module("models.base").scaled_dot_product_attention
    same(
        lambda *parts: cpu.attention(*parts, None, 0.3, mask),
        lambda *parts: original(*parts, None, 0.3, mask),
        queries, keys, values,
    )  # fmt: skip


def test_log_softmax() -> None:
    logits, targets = 5 * normal(6, 200), mx.array([0, 3, 199, 64, 5, 7])

    def plain(logits: mx.array) -> mx.array:
        scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return mx.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]

    same(lambda logits: cpu.log_softmax_at(logits, targets), plain, logits)


def test_mlx_lm_is_itself_again(make: Callable[..., LoadedModel]) -> None:
    module = make("llama").handle.module
    code = vars(mlx_lm_module("models.llama"))
    before = code["swiglu"], code["scaled_dot_product_attention"]
    with pytest.raises(ZeroDivisionError), cpu.in_place_of_mlx(module):
        assert (code["swiglu"], code["scaled_dot_product_attention"]) == (cpu.swiglu, cpu.attention)
        assert mx.fast.rms_norm is cpu.rms_norm
        raise ZeroDivisionError
    assert (code["swiglu"], code["scaled_dot_product_attention"]) == before
    assert mx.fast.rms_norm is cpu.MLX_RMS_NORM
