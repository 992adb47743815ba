"""Divisions of a micro-batch, by costs that are added up by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mindprint.contract import TokenBatch
from mindprint_mlx import division
from mindprint_mlx.division import Work, completion_reads, pair_groups, row_groups


def lengths(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def batch(*values: int) -> TokenBatch:
    """Rows of these lengths. Every token but the first is asked for."""
    columns = np.arange(max(values))
    mask = (columns > 0) & (columns < lengths(*values)[:, None])
    return TokenBatch(np.zeros(mask.shape, np.int32), lengths(*values), mask)


def test_rows_go_to_as_many_groups_as_the_cores_finish_first_with() -> None:
    """Two groups of 80 and 46 tokens read once each; one core takes them in turn, two at the same time."""
    rows = batch(40, 23, 39, 22)
    assert [found.tolist() for found in row_groups(rows, Work(2, 5, 0.0))] == [[0], [2], [1], [3]]
    assert [found.tolist() for found in row_groups(rows, Work(1, 5, 0.0))] == [[0, 2], [1, 3]]


def test_a_long_row_is_no_padding_of_the_others() -> None:
    """Together 4 x 100 tokens, in two groups 100 + 3 x 10, which two cores finish with the long row."""
    assert [found.tolist() for found in row_groups(batch(10, 100, 9, 8), Work(2, 20, 0.0))] == [[1], [0, 2, 3]]


def test_a_small_batch_is_one_group_and_so_is_any_on_a_gpu() -> None:
    rows = batch(40, 7, 33)
    assert [found.tolist() for found in row_groups(rows, Work(2, 1, 0.0, least=41))] == [[0, 1, 2]]
    assert [found.tolist() for found in row_groups(rows, None)] == [[0, 1, 2]]
    (pairs,) = pair_groups(lengths(9, 9), np.full((2, 2), 20, np.int32), None, share=True)
    assert (pairs.pairs.tolist(), pairs.apart) == ([0, 1], False)


def test_log_probs_count() -> None:
    """A row of 30 tokens with 29 log-probs costs more than one of 40 with none, if a log-prob costs a token."""
    mask = batch(40, 30).loss_mask
    mask[0] = False
    rows = TokenBatch(np.zeros(mask.shape, np.int32), lengths(40, 30), mask)
    assert [found.tolist() for found in row_groups(rows, Work(2, 5, 1.0))] == [[1], [0]]
    assert [found.tolist() for found in row_groups(rows, Work(2, 5, 0.0))] == [[0], [1]]


def test_a_long_pair_is_shared_by_two_cores() -> None:
    """Read once it is 10 + 100 + 90 tokens for one core, with a prompt for each 110 and 100 for two."""
    prompts, completions = lengths(10, 10), np.array([[100, 6], [90, 6]], np.int32)
    found = pair_groups(prompts, completions, Work(2, 5, 0.0), share=True)
    assert [(group.pairs.tolist(), group.apart) for group in found] == [([0], True), ([1], False)]
    assert [[rows.tolist() for rows in group.rows(2)] for group in found] == [[[0], [2]], [[1, 3]]]
    whole = pair_groups(prompts, completions, Work(2, 5, 0.0), share=True, split=False)
    assert [group.apart for group in whole] == [False, False]
    one_core = pair_groups(prompts, completions, Work(1, 5, 0.0), share=True)
    assert [group.apart for group in one_core] == [False, False]


def test_equal_pairs_are_not_split() -> None:
    completions = np.full((2, 4), 73, np.int32)
    found = pair_groups(lengths(147, 147, 147, 147), completions, Work(2, 20, 0.5), share=True)
    assert [(group.pairs.tolist(), group.apart) for group in found] == [([pair], False) for pair in range(4)]


def test_a_long_prompt_is_not_read_twice_for_short_completions() -> None:
    """It would take 505 tokens instead of 510, and the other core as much again."""
    (found,) = pair_groups(lengths(500), lengths(5, 5).reshape(2, 1), Work(2, 5, 0.0), share=True)
    assert not found.apart


@pytest.mark.parametrize("cores", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(6))
def test_every_row_is_in_one_group(seed: int, cores: int) -> None:
    random = np.random.default_rng(seed)
    work = Work(cores, 16, 0.5)
    rows = batch(*random.integers(2, 400, 9).tolist())
    assert sorted(np.concatenate(row_groups(rows, work))) == list(range(9))
    completions = random.integers(1, 300, (2, 9)).astype(np.int32)
    found = pair_groups(random.integers(1, 300, 9).astype(np.int32), completions, work, share=True)
    assert sorted(np.concatenate([rows for group in found for rows in group.rows(9)])) == list(range(18))


def test_completions_are_read_with_those_of_their_length() -> None:
    """90 and 80 together are 10 tokens of padding, and 90 and 9 would be 81."""
    assert [found.tolist() for found in completion_reads(lengths(9, 90, 80, 0), 20)] == [[1, 2], [0, 3]]
    assert [found.tolist() for found in completion_reads(lengths(9, 90, 80, 0), None)] == [[0, 1, 2, 3]]


def test_limits_are_shares_of_a_groups_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """No group is larger than the limit, although one core would read all rows at once for less."""
    monkeypatch.setattr(division, "GROUP_TOKENS", 40)
    found = row_groups(batch(20, 20, 20, 20), Work(1, 30, 0.0))
    assert [rows.tolist() for rows in found] == [[0, 1], [2, 3]]
