"""Layouts on paper: small batches whose rows, sources and slots are written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mindprint.contract import PreferenceBatch, TokenBatch
from mindprint.layouts import (
    RotaryLimit,
    continued,
    forked,
    groups_of_like_length,
    pair_lengths,
    preference_rows,
    preference_sequences,
    sees,
    sequences,
    sequences_apart,
)


def test_sequences() -> None:
    """Row 0 asks for tokens 12 and 13, row 1 for 21. Column 3 is padding everywhere and is not run."""
    batch = TokenBatch(
        tokens=np.array([[10, 11, 12, 13, 0], [20, 21, 0, 0, 0]], np.int32),
        lengths=np.array([4, 2], np.int32),
        loss_mask=np.array([[0, 0, 1, 1, 0], [0, 1, 0, 0, 0]], bool),
    )
    layout = sequences(batch)
    np.testing.assert_array_equal(layout.tokens, [[10, 11, 12, 13], [20, 21, 0, 0]])
    np.testing.assert_array_equal(layout.sources, [1, 2, 4])
    np.testing.assert_array_equal(layout.targets, [12, 13, 21])
    np.testing.assert_array_equal(layout.slots, [2, 3, 6])
    assert layout.shape == (2, 5)


def test_rows_on_either_side_of_a_rotary_limit_are_read_apart() -> None:
    """Lengths 2, 4, 3 and 4, a limit of 2: rows 0; then 1, 2 and 3 together, or 2 alone where each length differs."""
    limit = RotaryLimit(2)
    assert limit.kinds(np.array([1, 2, 3, 4], np.int32)).tolist() == [0, 0, 1, 1]
    assert RotaryLimit(2, each_length=True).kinds(np.array([1, 2, 3, 4], np.int32)).tolist() == [0, 0, 3, 4]
    batch = TokenBatch(
        tokens=np.array([[10, 11, 0, 0, 0], [20, 21, 22, 23, 0], [30, 31, 32, 0, 0], [40, 41, 42, 43, 0]], np.int32),
        lengths=np.array([2, 4, 3, 4], np.int32),
        loss_mask=np.array([[0, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0]], bool),
        shared=np.array([1, 1], np.int32),
    )
    short, long = sequences_apart(batch, limit)
    np.testing.assert_array_equal(short.tokens, [[10, 11]])
    assert (short.targets.tolist(), short.sources.tolist(), short.slots.tolist()) == ([11], [0], [1])
    np.testing.assert_array_equal(long.tokens, [[20, 21, 22, 23], [30, 31, 32, 0], [40, 41, 42, 43]])
    assert (long.targets.tolist(), long.slots.tolist()) == ([22, 23, 32, 43], [7, 8, 12, 18])
    assert long.sources.tolist() == [1, 2, 5, 10]
    assert short.shape == long.shape == (4, 5)
    apart = sequences_apart(batch, RotaryLimit(2, each_length=True))
    assert [layout.tokens.tolist() for layout in apart[1:]] == [[[30, 31, 32]], [[20, 21, 22, 23], [40, 41, 42, 43]]]


def test_preference_rows() -> None:
    """Two pairs: prompts (1 2 3) and (4); chosen (5 6) and (7); rejected (8) and (9 10 11)."""
    batch = PreferenceBatch(
        prompt=np.array([[1, 2, 3], [4, 0, 0]], np.int32),
        prompt_lengths=np.array([3, 1], np.int32),
        chosen=np.array([[5, 6], [7, 0]], np.int32),
        chosen_lengths=np.array([2, 1], np.int32),
        rejected=np.array([[8, 0, 0], [9, 10, 11]], np.int32),
        rejected_lengths=np.array([1, 3], np.int32),
    )
    assert pair_lengths(batch).tolist() == [6, 5]
    layout = preference_rows(batch)
    np.testing.assert_array_equal(layout.tokens, [[1, 2, 3, 5, 6], [4, 7, 0, 0, 0], [1, 2, 3, 8, 0], [4, 9, 10, 11, 0]])
    np.testing.assert_array_equal(layout.sources, [2, 3, 5, 12, 15, 16, 17])
    np.testing.assert_array_equal(layout.targets, [5, 6, 7, 8, 9, 10, 11])
    np.testing.assert_array_equal(layout.slots, [0, 1, 3, 6, 9, 10, 11])
    assert layout.shape == (4, 3)


SHARING = TokenBatch(
    tokens=np.array([[1, 2, 3, 5, 6], [4, 7, 0, 0, 0], [1, 2, 3, 8, 0], [4, 9, 10, 11, 0]], np.int32),
    lengths=np.array([5, 2, 4, 4], np.int32),
    loss_mask=np.array([[0, 0, 0, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0, 1, 0, 1, 0]], bool),
    shared=np.array([3, 1], np.int32),
)
"""The pairs of `test_preference_rows`; token 10 is not asked for."""


def test_preference_sequences() -> None:
    batch = PreferenceBatch(
        prompt=np.array([[1, 2, 3], [4, 0, 0]], np.int32),
        prompt_lengths=np.array([3, 1], np.int32),
        chosen=np.array([[5, 6], [7, 0]], np.int32),
        chosen_lengths=np.array([2, 1], np.int32),
        rejected=np.array([[8, 0, 0], [9, 10, 11]], np.int32),
        rejected_lengths=np.array([1, 3], np.int32),
    )
    joined = preference_sequences(batch)
    np.testing.assert_array_equal(joined.tokens, SHARING.tokens)
    np.testing.assert_array_equal(joined.lengths, SHARING.lengths)
    np.testing.assert_array_equal(joined.loss_mask.sum(axis=1), [2, 1, 1, 3])
    np.testing.assert_array_equal(joined.shared, [3, 1])


def test_forked_rows() -> None:
    """Row 0: prompt (1 2 3), first (5), second (). Row 1: prompt (4), first (), second (9 10). No last tokens."""
    layout = forked(SHARING)
    np.testing.assert_array_equal(layout.tokens, [[1, 2, 3, 5], [4, 9, 10, 0]])
    np.testing.assert_array_equal(layout.positions, [[0, 1, 2, 3], [0, 1, 2, 0]])
    np.testing.assert_array_equal(layout.parts, [[0, 0, 0, 1], [0, 2, 2, 3]])
    np.testing.assert_array_equal(layout.sources, [2, 3, 4, 2, 4, 6])
    np.testing.assert_array_equal(layout.targets, [5, 6, 7, 8, 9, 11])
    np.testing.assert_array_equal(layout.slots, [3, 4, 6, 13, 16, 18])
    assert layout.shape == (4, 5)


def test_completions_see_the_prompt_and_themselves() -> None:
    """Two tokens of prompt, one of the first completion, two of the second, one of padding."""
    parts = np.array([[0, 0, 1, 2, 2, 3]])
    np.testing.assert_array_equal(
        sees(parts, np.arange(6))[0],
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 0, 1, 0, 0],
            [1, 1, 0, 1, 1, 0],
            [1, 1, 0, 0, 0, 1],
        ],
    )


def test_continued_prompts() -> None:
    """Hidden states: 0 to 5 of the prompts, from 6 on of the completions, two a row."""
    layout = continued(SHARING)
    np.testing.assert_array_equal(layout.prompts, [[1, 2, 3], [4, 7, 0]])
    np.testing.assert_array_equal(layout.prompt_lengths, [3, 1])
    np.testing.assert_array_equal(layout.completions, [[5, 0], [0, 0], [0, 0], [9, 10]])
    np.testing.assert_array_equal(layout.completion_lengths, [1, 0, 0, 2])
    np.testing.assert_array_equal(layout.sources, [2, 6, 3, 2, 3, 13])
    np.testing.assert_array_equal(layout.targets, [5, 6, 7, 8, 9, 11])
    np.testing.assert_array_equal(layout.slots, [3, 4, 6, 13, 16, 18])


@pytest.mark.parametrize("layout", [forked, continued])
def test_rows_that_share_nothing_cannot_share(layout: Callable[[TokenBatch], object]) -> None:
    with pytest.raises(ValueError, match="not said to share prompts"):
        layout(replace(SHARING, shared=None))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("most_tokens", "overhead"), [(10_000, 0), (10_000, 20), (60, 5), (10_000, 1000)])
def test_groups_of_like_length_cost_least(seed: int, most_tokens: int, overhead: int) -> None:
    """Against every way to divide six rows into groups."""
    lengths = np.random.default_rng(seed).integers(1, 80, 6).astype(np.int32)

    def cost(groups: list[list[int]]) -> float:
        padded = [len(group) * int(lengths[group].max()) for group in groups]
        if any(size > most_tokens and len(group) > 1 for size, group in zip(padded, groups, strict=True)):
            return float("inf")
        return sum(padded) + overhead * len(groups)

    def divisions(rows: list[int]) -> list[list[list[int]]]:
        if not rows:
            return [[]]
        smaller = divisions(rows[1:])
        joined = [[*way[:at], [rows[0], *way[at]], *way[at + 1 :]] for way in smaller for at in range(len(way))]
        return [[[rows[0]], *way] for way in smaller] + joined

    found = [group.tolist() for group in groups_of_like_length(lengths, most_tokens, overhead)]
    assert sorted(row for group in found for row in group) == list(range(6))
    assert cost(found) == min(map(cost, divisions(list(range(6)))))
