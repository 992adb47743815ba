"""AdamW, clipping and the loss scale against their definitions in NumPy's float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mindprint.contract import AdamW
from mindprint_mlx.optimizer import Moments, adamw, clip_gradients, global_norm


def reference(
    values: np.ndarray, gradients: list[np.ndarray], rates: list[float], options: AdamW
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loshchilov & Hutter 2019, algorithm 2, as `torch.optim.AdamW` has it, in float64."""
    p = values.astype(np.float64)
    m, v = np.zeros_like(p), np.zeros_like(p)
    beta1, beta2 = options.betas
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        p = p * (1 - rate * options.weight_decay)
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        p = p - rate * (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + options.eps)
    return p, m, v


@pytest.mark.parametrize(
    "options",
    [AdamW(), AdamW(weight_decay=0.1), AdamW(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.01)],
    ids=["default", "decay", "other"],
)
def test_adamw_is_the_published_one(options: AdamW) -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal((5, 7)).astype(np.float32)
    gradients = [
        (10.0 ** random.integers(-4, 1) * random.standard_normal((5, 7))).astype(np.float32) for _ in range(30)
    ]
    rates = [1e-3 * (1 - step / 40) for step in range(30)]
    parameters, moments = {"w": mx.array(values)}, Moments()
    for gradient, rate in zip(gradients, rates, strict=True):
        parameters, moments = adamw(parameters, {"w": mx.array(gradient)}, moments, rate, options)
    p, m, v = reference(values, gradients, rates, options)
    assert moments.steps == 30
    np.testing.assert_allclose(parameters["w"], p, rtol=0, atol=1e-6 * np.abs(p).max())
    np.testing.assert_allclose(moments.first["w"], m, rtol=0, atol=1e-6 * np.abs(m).max())
    np.testing.assert_allclose(moments.second["w"], v, rtol=1e-5)


def test_the_first_update_moves_every_element_by_the_learning_rate() -> None:
    """Bias correction makes m-hat the gradient and v-hat its square, whose quotient is its sign."""
    gradient = mx.array([3.0, -0.02, 400.0])
    parameters, _ = adamw({"w": mx.zeros(3)}, {"w": gradient}, Moments(), 0.01, AdamW())
    np.testing.assert_allclose(parameters["w"], [-0.01, 0.01, -0.01], rtol=1e-5)


def test_what_is_given_is_not_changed() -> None:
    given, gradient = {"w": mx.ones(3)}, {"w": mx.ones(3)}
    adamw(given, gradient, Moments(), 0.1, AdamW(weight_decay=0.5))
    np.testing.assert_array_equal(given["w"], np.ones(3))


def test_clipping_is_by_the_norm_of_all_gradients_together() -> None:
    """3, 4 and 12 have the norm 13; the factor is 2 / (13 + 1e-6)."""
    gradients = {"a": mx.array([3.0, 4.0]), "b": mx.array([[12.0]])}
    norm = global_norm(gradients)
    assert norm.item() == pytest.approx(13.0)
    limited = clip_gradients(gradients, norm, 2.0)
    np.testing.assert_allclose(limited["a"], np.array([3.0, 4.0]) * 2 / 13.000001, rtol=1e-6)
    np.testing.assert_allclose(limited["b"], [[12 * 2 / 13.000001]], rtol=1e-6)


@pytest.mark.parametrize("maximum", [13.1, None])
def test_small_gradients_are_left_alone(maximum: float | None) -> None:
    gradients = {"a": mx.array([3.0, 4.0]), "b": mx.array([[12.0]])}
    limited = clip_gradients(gradients, global_norm(gradients), maximum)
    np.testing.assert_array_equal(limited["a"], [3.0, 4.0])
