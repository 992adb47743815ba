"""Layouts on paper: small batches whose rows, sources and slots are written out by hand."""

from __future__ import annotations

import numpy as np

from mindprint.contract import PreferenceBatch, TokenBatch
from mindprint.layouts import preference_rows, sequences


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
    layout = preference_rows(batch)
    np.testing.assert_array_equal(layout.tokens, [[1, 2, 3, 5, 6], [4, 7, 0, 0, 0], [1, 2, 3, 8, 0], [4, 9, 10, 11, 0]])
    np.testing.assert_array_equal(layout.sources, [2, 3, 5, 12, 15, 16, 17])
    np.testing.assert_array_equal(layout.targets, [5, 6, 7, 8, 9, 10, 11])
    np.testing.assert_array_equal(layout.slots, [0, 1, 3, 6, 9, 10, 11])
    assert layout.shape == (4, 3)
