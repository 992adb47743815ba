"""The learning rate, by hand."""

import pytest

from mindprint.training.schedule import learning_rate


def test_warm_up_starts_at_zero_and_reaches_the_peak() -> None:
    rates = [learning_rate("constant", step, 10, 4.0, warmup_steps=4) for step in range(6)]
    assert rates == [0.0, 1.0, 2.0, 3.0, 4.0, 4.0]


def test_linear_would_reach_zero_after_the_last_step() -> None:
    assert [learning_rate("linear", step, 5, 1.0) for step in range(6)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])


def test_cosine_is_half_way_down_in_the_middle() -> None:
    """1/2 (1 + cos(pi * p)): 1 at 0, cos 45° gives 0.8535533906 at a quarter, 1/2 at a half."""
    rates = [learning_rate("cosine", step, 10, 1.0, warmup_steps=2) for step in (2, 4, 6, 10)]
    assert rates == pytest.approx([1.0, 0.8535533906, 0.5, 0.0])


def test_warm_up_longer_than_the_stage_only_rises() -> None:
    assert [learning_rate("cosine", step, 3, 1.0, warmup_steps=10) for step in range(3)] == pytest.approx([0, 0.1, 0.2])
