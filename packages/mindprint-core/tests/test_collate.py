"""Examples → padded arrays, element by element."""

from __future__ import annotations

import numpy as np

from mindprint.contract import Bool, Int32
from mindprint.data.collate import pair_sequences, preference_batch, sft_batch, shared_sequences
from mindprint.data.render import PreferenceExample, SftExample
from mindprint.data.rows import Origin

LINE = Origin("rows.jsonl", 1)
PAD = 9


def ids(*values: int) -> Int32:
    return np.array(values, dtype=np.int32)


def bits(*values: int) -> Bool:
    return np.array(values, dtype=np.bool_)


PAIRS = [
    PreferenceExample("t", ids(1, 2), ids(3), ids(4, 5), LINE),
    PreferenceExample("t", ids(6), ids(7, 8, 1), ids(2), LINE),
]


def test_rows_are_padded_on_the_right() -> None:
    rows = [SftExample("t", ids(1, 2, 3), bits(0, 0, 1), LINE), SftExample("t", ids(4, 5), bits(0, 1), LINE)]
    batch = sft_batch(rows, PAD)
    assert batch.tokens.tolist() == [[1, 2, 3], [4, 5, PAD]]
    assert batch.loss_mask.tolist() == [[False, False, True], [False, True, False]]
    assert batch.lengths.tolist() == [3, 2]
    assert batch.loss_tokens == 2
    assert [a.dtype.name for a in (batch.tokens, batch.lengths, batch.loss_mask)] == ["int32", "int32", "bool"]


def test_the_parts_of_pairs_are_padded_apart() -> None:
    batch = preference_batch(PAIRS, PAD)
    assert batch.prompt.tolist() == [[1, 2], [6, PAD]]
    assert batch.chosen.tolist() == [[3, PAD, PAD], [7, 8, 1]]
    assert batch.rejected.tolist() == [[4, 5], [2, PAD]]
    lengths = (batch.prompt_lengths, batch.chosen_lengths, batch.rejected_lengths)
    assert [part.tolist() for part in lengths] == [[2, 1], [1, 3], [2, 1]]
    assert {part.dtype for part in (batch.prompt, batch.chosen, batch.rejected, *lengths)} == {np.dtype(np.int32)}
    assert (batch.reference_chosen, batch.reference_rejected, batch.pairs) == (None, None, 2)


def test_reference_log_probs_are_float32() -> None:
    reference = (np.array([-1.5, -2.0], np.float32), np.array([-3.0, -4.0], np.float32))
    batch = preference_batch(PAIRS, PAD, reference)
    assert batch.reference_chosen is not None
    assert batch.reference_rejected is not None
    assert batch.reference_chosen.tolist() == [-1.5, -2.0]
    assert batch.reference_rejected.tolist() == [-3.0, -4.0]
    assert batch.reference_chosen.dtype == np.float32


def test_pairs_as_whole_sequences() -> None:
    chosen, rejected = pair_sequences(PAIRS, PAD)
    assert chosen.tokens.tolist() == [[1, 2, 3, PAD], [6, 7, 8, 1]]
    assert chosen.loss_mask.tolist() == [[False, False, True, False], [False, True, True, True]]
    assert rejected.tokens.tolist() == [[1, 2, 4, 5], [6, 2, PAD, PAD]]
    assert rejected.loss_mask.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert (chosen.lengths.tolist(), rejected.lengths.tolist()) == ([3, 4], [4, 2])


def test_pairs_as_sequences_that_share_prompts() -> None:
    batch = shared_sequences(PAIRS, PAD)
    assert batch.tokens.tolist() == [[1, 2, 3, PAD], [6, 7, 8, 1], [1, 2, 4, 5], [6, 2, PAD, PAD]]
    assert batch.lengths.tolist() == [3, 4, 4, 2]
    assert batch.loss_mask.sum(axis=1).tolist() == [1, 3, 2, 1]
    assert batch.shared is not None
    assert batch.shared.tolist() == [2, 1]
