"""Core's losses differentiate, and compile to static shapes, on arrays that are not NumPy's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest

from mindprint.losses import NUMPY, PairLogProbs, PreferenceLoss, PreferenceLossName
from mindprint_hello.traced import Traced, TracedArrays, gradient

PAIRS = PairLogProbs(
    policy_chosen=np.array([-10.0, -3.0, -7.5]),
    policy_rejected=np.array([-14.0, -2.0, -9.0]),
    reference_chosen=np.array([-12.0, -3.5, -7.0]),
    reference_rejected=np.array([-11.0, -2.5, -8.0]),
    chosen_tokens=np.array([4.0, 2.0, 5.0]),
    rejected_tokens=np.array([6.0, 1.0, 3.0]),
)
STEP = {"pair_count": 4, "chosen_token_count": 16}
"""Another micro-batch has one more pair, of five tokens."""


def loss_of(loss: PreferenceLoss, pairs: PairLogProbs, weights: np.ndarray | None = None) -> Any:
    """Return the loss as a function of the policy's log-probs: the function that a framework differentiates."""

    def total(chosen: Any, rejected: Any) -> Any:
        xp = TracedArrays() if isinstance(chosen, Traced) else NUMPY
        policy = replace(pairs, policy_chosen=chosen, policy_rejected=rejected)
        return loss.total(xp, policy, **STEP, weights=weights)

    return total


@pytest.mark.parametrize("name", get_args(PreferenceLossName))
def test_the_gradient_of_every_loss_by_central_differences(name: PreferenceLossName) -> None:
    """Of a smooth function, central differences with a step of 1e-5 are exact to about 1e-9."""
    smoothing = 0.1 if name in ("sigmoid", "robust") else 0.0
    loss = PreferenceLoss(name, beta=0.3, label_smoothing=smoothing, sft_weight=0.5)
    total, h = loss_of(loss, PAIRS), 1e-5
    policy = [PAIRS.policy_chosen, PAIRS.policy_rejected]
    value, slopes = gradient(total, policy)
    assert value == pytest.approx(total(*policy), rel=1e-12)
    for argument, slope in enumerate(slopes):
        for pair in range(3):
            up, down = [part.copy() for part in policy], [part.copy() for part in policy]
            up[argument][pair] += h
            down[argument][pair] -= h
            assert slope[pair] == pytest.approx((total(*up) - total(*down)) / (2 * h), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", get_args(PreferenceLossName))
def test_rows_that_pad_a_batch_have_no_gradient(name: PreferenceLossName) -> None:
    """Of eight rows five are padding, without tokens: the gradient of the others is unchanged, theirs is exactly 0."""
    loss = PreferenceLoss(name, sft_weight=0.5)
    padded = PairLogProbs(*(np.append(values, np.zeros(5)) for values in vars(PAIRS).values()))
    weights = np.array([1.0] * 3 + [0.0] * 5)
    value, slopes = gradient(loss_of(loss, padded, weights), [padded.policy_chosen, padded.policy_rejected])
    expected, alone = gradient(loss_of(loss, PAIRS), [PAIRS.policy_chosen, PAIRS.policy_rejected])
    assert value == pytest.approx(expected, rel=1e-14)
    for slope, plain in zip(slopes, alone, strict=True):
        np.testing.assert_allclose(slope[:3], plain, rtol=1e-13)
        np.testing.assert_array_equal(slope[3:], np.zeros(5))
