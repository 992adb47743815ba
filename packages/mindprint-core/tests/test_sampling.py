"""The draw of a token, against probabilities that are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mindprint.contract import Sampling
from mindprint.sampling import TokenChoice, draw_token, token_generator

AT_ONE = Sampling(1, (), temperature=1.0)


def test_draws_follow_the_tempered_distribution() -> None:
    """Probabilities 0.5, 0.3, 0.2; at temperature 0.5 their squares over the sum of them: 25, 9, 4 of 38."""
    logits = np.log(np.array([0.3, 0.5, 0.2]))
    grid = (np.arange(10000) + 0.5) / 10000
    plain = np.bincount([draw_token(logits, AT_ONE, uniform) for uniform in grid], minlength=3) / 10000
    np.testing.assert_allclose(plain, [0.3, 0.5, 0.2], atol=2e-4)
    cold = (
        np.bincount([draw_token(logits, replace(AT_ONE, temperature=0.5), uniform) for uniform in grid], minlength=3)
        / 10000
    )
    np.testing.assert_allclose(cold, [9 / 38, 25 / 38, 4 / 38], atol=2e-4)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, {1}), (0.6, {0, 1}), (0.8, {0, 1}), (0.81, {0, 1, 2}), (0.0, {1})])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, kept: set[int]) -> None:
    logits = np.log(np.array([0.3, 0.5, 0.2]))
    found = {draw_token(logits, replace(AT_ONE, top_p=top_p), uniform) for uniform in np.linspace(0, 0.9999, 500)}
    assert found == kept


def test_random_numbers_follow_from_the_seed_and_the_prompt() -> None:
    first, second = np.array([3, 4], np.int32), np.array([3, 5], np.int32)
    draws = [
        token_generator(Sampling(1, (), seed=seed), prompt).random() for seed in (0, 1) for prompt in (first, second)
    ]
    assert len(set(draws)) == 4
    assert token_generator(Sampling(9, (7,), 0.5, seed=1), second).random() == draws[-1]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 9}, {0, 1, 2}),
        ({"min_p": 0.5}, {0, 1}),
        ({"min_p": 0.61}, {1}),
        ({"top_k": 2, "top_p": 0.62}, {1}),  # 0.5 of the 0.8 that top_k leaves is 0.625
        ({"top_k": 2, "top_p": 0.63}, {0, 1}),
    ],
)
def test_filters_leave_the_likeliest(settings: dict[str, float], kept: set[int]) -> None:
    logits = np.log(np.array([0.3, 0.5, 0.2]))
    sampling = replace(AT_ONE, **settings)
    assert {draw_token(logits, sampling, uniform) for uniform in np.linspace(0, 0.9999, 500)} == kept


def test_a_penalty_counts_the_prompt_and_the_answer() -> None:
    choose = TokenChoice(Sampling(3, (), repetition_penalty=2.0), np.array([1], np.int32))
    logits = np.array([-1.0, 3.0, 2.0, -0.8])
    # Token 1 has 1.5 after the penalty, then token 2 has 1.0 and token 1 is ahead again.
    assert [choose(logits) for _ in range(3)] == [2, 1, 1]
