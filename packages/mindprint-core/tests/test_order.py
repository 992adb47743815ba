"""Order and random numbers as pure functions of their keys."""

from itertools import chain

import numpy as np
import pytest
from numpy.typing import NDArray

from mindprint.data.order import StageOrder
from mindprint.draws import permutation, random_bits, uniform


def test_the_stream_is_what_it_was_when_this_was_written() -> None:
    """A change of these numbers changes every run's order and initial adapter: a new version, not a refactoring."""
    assert random_bits(2, 0, "order", "a", "sft", 0).tolist() == [17796826120260662953, 15100096128036561109]
    assert permutation(6, 7, "x").tolist() == [2, 3, 1, 5, 4, 0]


def test_keys_do_not_collide() -> None:
    assert random_bits(1, 1, "a", "b") != random_bits(1, 1, "ab")
    assert random_bits(1, 1, 2) != random_bits(1, 12)


def test_uniform_is_uniform() -> None:
    draws = uniform((100_000,), 0, "u")
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 4 / np.sqrt(12 * 100_000)
    counts = np.histogram(draws, 20, (0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 50  # chi-squared, 19 degrees: p < 1e-4 beyond 50


def test_every_row_once_an_epoch() -> None:
    order = StageOrder(11, batch_size=2, gradient_accumulation=2, seed=3, topic="t", stage="sft", epochs=2)
    assert order.steps_per_epoch == 3
    assert order.total_steps == 6
    for epoch in range(2):
        steps = [order.micro_batches(epoch * 3 + step) for step in range(3)]
        assert sorted(chain.from_iterable(chain.from_iterable(steps))) == list(range(11))
        assert [[len(micro) for micro in step] for step in steps] == [[2, 2], [2, 2], [2, 1]]
    assert order.micro_batches(0) != order.micro_batches(3)


def test_steps_go_on_through_epochs() -> None:
    order = StageOrder(3, batch_size=2, gradient_accumulation=1, seed=0, topic="t", stage="dpo", steps=5)
    assert order.total_steps == 5
    assert [len(order.micro_batches(step)[0]) for step in range(5)] == [2, 1, 2, 1, 2]


def test_stages_topics_and_seeds_have_orders_of_their_own() -> None:
    orders = [
        StageOrder(50, 50, 1, seed, topic, stage, epochs=1).micro_batches(0)
        for seed in (0, 1)
        for topic in ("a", "b")
        for stage in ("sft", "dpo")
    ]
    assert len(set(orders)) == 8


def test_rows_of_like_length_meet_within_their_window() -> None:
    lengths = tuple(int(length) for length in random_bits(23, 5, "lengths") % 90 + 10)
    plain = StageOrder(23, 2, 2, seed=3, topic="t", stage="sft", epochs=2)
    grouped = StageOrder(23, 2, 2, seed=3, topic="t", stage="sft", epochs=2, lengths=lengths, length_window=4)

    def micro_batches(order: StageOrder) -> list[tuple[int, ...]]:
        return [micro for step in range(order.steps_per_epoch) for micro in order.micro_batches(step)]

    before, after = micro_batches(plain), micro_batches(grouped)
    assert [len(micro) for micro in after] == [2] * 11 + [1]
    for start in (0, 4, 8):
        rows = sorted(chain.from_iterable(after[start : start + 4]), key=lambda row: lengths[row])
        assert set(rows) == set(chain.from_iterable(before[start : start + 4]))
        pairs = {frozenset(micro) for micro in after[start : start + 4]}
        assert {frozenset(rows[at : at + 2]) for at in range(0, len(rows), 2)} == pairs
    longest = [max(lengths[row] for row in micro) for micro in after]
    assert any(longest[start : start + 4] != sorted(longest[start : start + 4]) for start in (0, 4))
    assert grouped.micro_batches(0) != grouped.micro_batches(6)


def test_a_window_of_one_does_nothing() -> None:
    plain = StageOrder(9, 2, 1, seed=3, topic="t", stage="sft", epochs=1)
    of_one = StageOrder(9, 2, 1, seed=3, topic="t", stage="sft", epochs=1, lengths=tuple(range(9)), length_window=1)
    assert [plain.micro_batches(step) for step in range(5)] == [of_one.micro_batches(step) for step in range(5)]


def test_an_epoch_is_drawn_once_and_its_steps_are_those_of_a_fresh_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step costs a slice: at millions of rows, drawing the epoch again took seconds at every step."""
    drawn: list[int] = []

    def counted(count: int, seed: int, *labels: str | int) -> NDArray[np.int64]:
        drawn.append(count)
        return permutation(count, seed, *labels)

    monkeypatch.setattr("mindprint.data.order.permutation", counted)

    def order() -> StageOrder:
        lengths = tuple(range(37))
        return StageOrder(37, 4, 2, 7, "t", "sft", epochs=3, lengths=lengths, length_window=2)

    kept = order()
    steps = [kept.micro_batches(step) for step in range(kept.total_steps)]
    assert len(drawn) == 3
    assert steps == [order().micro_batches(step) for step in range(kept.total_steps)]
    # In any order, and with no more than one epoch in memory.
    assert [kept.micro_batches(step) for step in (14, 0, 7)] == [steps[14], steps[0], steps[7]]
    assert len(kept._drawn) == 1
    assert kept == order() and hash(kept) == hash(order())
