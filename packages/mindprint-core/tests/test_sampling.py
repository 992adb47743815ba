"""The draw of a token, against probabilities that are known."""

from __future__ import annotations

import numpy as np
import pytest

from mindprint.contract import Sampling
from mindprint.sampling import draw_token, token_generator


def test_draws_follow_the_tempered_distribution() -> None:
    """Probabilities 0.5, 0.3, 0.2; at temperature 0.5 their squares over the sum of them: 25, 9, 4 of 38."""
    logits = np.log(np.array([0.3, 0.5, 0.2]))
    grid = (np.arange(10000) + 0.5) / 10000
    plain = np.bincount([draw_token(logits, 1.0, 1.0, uniform) for uniform in grid], minlength=3) / 10000
    np.testing.assert_allclose(plain, [0.3, 0.5, 0.2], atol=2e-4)
    cold = np.bincount([draw_token(logits, 0.5, 1.0, uniform) for uniform in grid], minlength=3) / 10000
    np.testing.assert_allclose(cold, [9 / 38, 25 / 38, 4 / 38], atol=2e-4)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, {1}), (0.6, {0, 1}), (0.8, {0, 1}), (0.81, {0, 1, 2}), (0.0, {1})])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, kept: set[int]) -> None:
    logits = np.log(np.array([0.3, 0.5, 0.2]))
    found = {draw_token(logits, 1.0, top_p, uniform) for uniform in np.linspace(0, 0.9999, 500)}
    assert found == kept


def test_random_numbers_follow_from_the_seed_and_the_prompt() -> None:
    first, second = np.array([3, 4], np.int32), np.array([3, 5], np.int32)
    draws = [
        token_generator(Sampling(1, (), seed=seed), prompt).random() for seed in (0, 1) for prompt in (first, second)
    ]
    assert len(set(draws)) == 4
    assert token_generator(Sampling(9, (7,), 0.5, seed=1), second).random() == draws[-1]
