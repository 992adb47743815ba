"""Order and random numbers as pure functions of their keys."""

from itertools import chain
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mindprint.data import order as order_module
from mindprint.data.order import DRAWN_WHOLE, StageOrder
from mindprint.draws import permutation, permuted, random_bits, uniform


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


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 31, 32, 33, 1000, 4097])
def test_a_keyed_permutation_has_every_number_once(count: int) -> None:
    numbers = permuted(np.arange(count), count, 7, "x")
    assert sorted(numbers.tolist()) == list(range(count))
    # A part of it is drawn without the rest.
    assert permuted(np.arange(count)[::-3], count, 7, "x").tolist() == numbers[::-3].tolist()


def test_a_keyed_permutation_is_what_it_was_when_this_was_written() -> None:
    assert permuted(np.arange(4), 100_000, 0, "order", "a", "sft", 0).tolist() == [38650, 48782, 86397, 82056]
    assert permuted(np.arange(4), 100_000, 0, "order", "a", "sft", 1).tolist() != [38650, 48782, 86397, 82056]


def test_a_keyed_permutation_is_uniform() -> None:
    """Neither where a number lands nor how two neighbours lie to each other tells anything."""
    count = 70_000
    moved = permuted(np.arange(count), count, 1, "u")
    table = np.histogram2d(np.arange(count), moved, 10)[0]
    assert ((table - count / 100) ** 2 / (count / 100)).sum() < 140  # chi-squared, 81 degrees: p < 1e-4 beyond 140
    steps = np.histogram(np.diff(moved) % count, 20, (0, count))[0]
    assert ((steps - count / 20) ** 2 / (count / 20)).sum() < 50
    fixed = int((moved == np.arange(count)).sum())
    assert fixed < 8  # Poisson with mean 1: p < 1e-5 beyond 8


def long_order(**settings: Any) -> StageOrder:
    return StageOrder(DRAWN_WHOLE + 77, 3, 5, 7, "t", "sft", epochs=2, **settings)


def test_many_rows_come_once_an_epoch_and_a_step_does_not_draw_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (random_bits(DRAWN_WHOLE + 77, 5, "lengths") % np.uint64(90)).astype(np.int32)
    plain, grouped = long_order(), long_order(lengths=lengths, length_window=8)
    monkeypatch.setattr(order_module, "permutation", None)
    for order in (plain, grouped):
        steps = [order.micro_batches(step) for step in range(order.steps_per_epoch)]
        assert sorted(chain.from_iterable(chain.from_iterable(steps))) == list(range(order.rows))
        assert {len(micro) for step in steps[:-1] for micro in step} == {3}
        # Any step by itself, as a resumed run takes it, also one that reaches across two blocks.
        for step in (0, 272, 273, 274, order.steps_per_epoch - 1):
            fresh = StageOrder(**{name: getattr(order, name) for name in FIELDS})
            assert fresh.micro_batches(step) == steps[step]
            assert sum(map(len, fresh._drawn.values())) <= order_module.BLOCK
    assert plain.micro_batches(0) != plain.micro_batches(plain.steps_per_epoch)
    spread = [np.ptp(lengths[list(micro)]) for order in (plain, grouped) for micro in order.micro_batches(40)]
    assert sum(spread[:5]) > 2 * sum(spread[5:])


FIELDS = ("rows", "batch_size", "gradient_accumulation", "seed", "topic", "stage", "epochs", "lengths", "length_window")


def test_the_first_version_draws_every_epoch_whole() -> None:
    """A run of an earlier version continues in its own order. Few rows have the same order in both."""
    drawn = permutation(DRAWN_WHOLE + 77, 7, "order", "t", "sft", 0).tolist()
    assert list(chain.from_iterable(long_order(version=1).micro_batches(2))) == drawn[30:45]
    assert list(chain.from_iterable(long_order().micro_batches(2))) != drawn[30:45]
    few = [StageOrder(50, 4, 2, 7, "t", "sft", epochs=1, version=version).micro_batches(1) for version in (1, 2)]
    assert few[0] == few[1]
