"""AdamW, clipping and loss scale against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mindprint.contract import AdamW, Update
from mindprint_torch.optimizer import Optimizer

SHAPES = ((3, 5), (4, 3))


def made(seed: int, *, loss_scale: float | None = None) -> Optimizer:
    rng = np.random.default_rng(seed)
    parameters = [torch.nn.Parameter(torch.tensor(rng.normal(size=shape), dtype=torch.float32)) for shape in SHAPES]
    return Optimizer(parameters, loss_scale=loss_scale)


def feed(optimizer: Optimizer, gradients: list[np.ndarray]) -> None:
    for parameter, gradient in zip(optimizer.parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)


def adamw_by_hand(
    parameters: list[np.ndarray], steps: list[tuple[list[np.ndarray], float]], settings: AdamW, clip: float | None
) -> list[np.ndarray]:
    """Loshchilov & Hutter 2019, algorithm 2, with PyTorch's order: decay first, eps outside the corrected root."""
    (beta1, beta2), eps, decay = settings.betas, settings.eps, settings.weight_decay
    first, second = [np.zeros_like(p) for p in parameters], [np.zeros_like(p) for p in parameters]
    for count, (gradients, rate) in enumerate(steps, start=1):
        norm = np.sqrt(sum((g**2).sum() for g in gradients))
        factor = 1.0 if clip is None else min(clip / (norm + 1e-6), 1.0)
        for index, gradient in enumerate(gradients):
            g = gradient * factor
            parameters[index] = parameters[index] * (1 - rate * decay)
            first[index] = beta1 * first[index] + (1 - beta1) * g
            second[index] = beta2 * second[index] + (1 - beta2) * g**2
            corrected = first[index] / (1 - beta1**count)
            root = np.sqrt(second[index] / (1 - beta2**count)) + eps
            parameters[index] = parameters[index] - rate * corrected / root
    return parameters


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("settings", [AdamW(), AdamW((0.8, 0.95), 1e-6, 0.1)])
def test_adamw_against_numpy(settings: AdamW, clip: float | None) -> None:
    rng = np.random.default_rng(0)
    steps = [([rng.normal(size=shape) for shape in SHAPES], 1e-2 / (1 + step)) for step in range(20)]
    optimizer = made(1)
    start = [parameter.detach().numpy().astype(np.float64) for parameter in optimizer.parameters]
    for gradients, rate in steps:
        feed(optimizer, gradients)
        applied = optimizer.step(Update(rate, 1, optimizer=settings, max_grad_norm=clip))
        assert applied.grad_norm == pytest.approx(np.sqrt(sum((g**2).sum() for g in gradients)), rel=1e-6)
    for parameter, expected in zip(optimizer.parameters, adamw_by_hand(start, steps, settings, clip), strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_first_step_is_the_learning_rate_towards_minus_the_sign() -> None:
    """Bias correction makes the first step `rate * g / (|g| + eps)`: without it, it would be three times larger."""
    optimizer = made(2)
    before = [parameter.detach().clone() for parameter in optimizer.parameters]
    feed(optimizer, [np.full(SHAPES[0], 0.5), np.full(SHAPES[1], -2.0)])
    optimizer.step(Update(1e-3, 1, max_grad_norm=None))
    for old, new, sign in zip(before, optimizer.parameters, (1, -1), strict=True):
        torch.testing.assert_close(old - new.detach(), torch.full_like(old, 1e-3 * sign), rtol=1e-3, atol=0)


def test_clipping_is_torchs_own() -> None:
    gradients = [np.full(SHAPES[0], 3.0), np.full(SHAPES[1], 4.0)]
    norm = np.sqrt(15 * 9 + 12 * 16)
    optimizer = made(3)
    feed(optimizer, gradients)
    applied = optimizer.step(Update(0.0, 1, max_grad_norm=2.0))
    assert applied.grad_norm == pytest.approx(norm)
    first, _ = optimizer.moments(optimizer.parameters[0])
    np.testing.assert_allclose(first.numpy(), 0.1 * 3.0 * 2.0 / (norm + 1e-6), rtol=1e-6)


def test_small_gradients_are_not_scaled_up() -> None:
    optimizer = made(3)
    feed(optimizer, [np.full(SHAPES[0], 1e-3), np.zeros(SHAPES[1])])
    optimizer.step(Update(0.0, 1, max_grad_norm=1.0))
    np.testing.assert_allclose(optimizer.moments(optimizer.parameters[0])[0].numpy(), 1e-4, rtol=1e-6)


def test_gradients_do_not_outlive_their_step() -> None:
    optimizer = made(4)
    feed(optimizer, [np.ones(shape) for shape in SHAPES])
    optimizer.step(Update(1e-2, 1))
    assert all(parameter.grad is None for parameter in optimizer.parameters)


def test_a_factor_without_gradient_counts_as_zero() -> None:
    """An expert that no token reached: its moments decay with all others, and one step count serves them all."""
    optimizer = made(5)
    feed(optimizer, [np.ones(shape) for shape in SHAPES])
    optimizer.step(Update(1e-2, 1, max_grad_norm=None))
    optimizer.parameters[0].grad = torch.ones(SHAPES[0])
    applied = optimizer.step(Update(1e-2, 1, max_grad_norm=None))
    assert applied.grad_norm == pytest.approx(np.sqrt(15))
    np.testing.assert_allclose(optimizer.moments(optimizer.parameters[1])[0].numpy(), 0.09, rtol=1e-5)


def test_scaled_gradients_are_unscaled_before_the_norm() -> None:
    optimizer = made(6, loss_scale=1024.0)
    feed(optimizer, [np.full(SHAPES[0], 1024.0), np.zeros(SHAPES[1])])
    applied = optimizer.step(Update(1e-2, 1))
    assert applied.grad_norm == pytest.approx(np.sqrt(15))
    assert not applied.skipped


def test_overflow_halves_the_scale_and_applies_nothing() -> None:
    optimizer = made(7, loss_scale=1024.0)
    before = [parameter.detach().clone() for parameter in optimizer.parameters]
    feed(optimizer, [np.full(SHAPES[0], np.inf), np.zeros(SHAPES[1])])
    assert optimizer.step(Update(1e-2, 1)).skipped
    assert (optimizer.loss_scale, optimizer.steps) == (512.0, 0)
    for old, new in zip(before, optimizer.parameters, strict=True):
        assert torch.equal(old, new.detach())


def test_the_scale_grows_every_2000_updates() -> None:
    optimizer = made(8, loss_scale=1024.0)
    optimizer.steps = 1998
    scales = []
    for _ in range(3):
        feed(optimizer, [np.ones(shape) for shape in SHAPES])
        optimizer.step(Update(1e-2, 1))
        scales.append(optimizer.loss_scale)
    assert scales == [1024.0, 2048.0, 2048.0]
