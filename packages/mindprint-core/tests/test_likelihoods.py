"""Summed log-probs of completions: the same in batches by length as one row at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mindprint.contract import LoadedModel, ModelSpec
from mindprint.data.collate import pair_sequences, sft_batch
from mindprint.data.render import PreferenceExample, SftExample
from mindprint.data.rows import Origin
from mindprint.models.likelihoods import BATCH_ROWS, batches_by_length, sum_pairs, sum_texts
from mindprint.plugins.backend import Backend, load_backend

ORIGIN = Origin("x.jsonl", 1)
LENGTHS = [2 + (7 * row) % 11 for row in range(BATCH_ROWS + 5)]


@pytest.fixture
def loaded(toy: str, toy_model: Path) -> tuple[Backend, LoadedModel]:
    backend = load_backend(toy)
    return backend, backend.load_model(ModelSpec(str(toy_model), "cpu", "float32"))


def ids(count: int, first: int) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.int32)


@pytest.mark.parametrize("share_prompts", [True, False])
def test_pairs_in_batches_equal_pairs_alone(loaded: tuple[Backend, LoadedModel], share_prompts: bool) -> None:
    backend, model = loaded
    examples = [
        PreferenceExample("t", ids(3, row), ids(length, 2 * row), ids(4, 3 * row), ORIGIN)
        for row, length in enumerate(LENGTHS)
    ]
    sums = sum_pairs(backend, model, examples, 0, adapter=False, share_prompts=share_prompts)
    for row, example in enumerate(examples):
        chosen, rejected = pair_sequences([example], 0)
        assert sums.chosen[row] == pytest.approx(backend.log_probs(model, chosen, adapter=False).sum(), rel=1e-5)
        assert sums.rejected[row] == pytest.approx(backend.log_probs(model, rejected, adapter=False).sum(), rel=1e-5)
    assert (sums.chosen.dtype, sums.rejected.dtype) == (np.float64, np.float64)


def test_texts_in_batches_equal_texts_alone(loaded: tuple[Backend, LoadedModel]) -> None:
    backend, model = loaded
    examples = [
        SftExample("t", ids(length, row), np.arange(length) > row % 2, ORIGIN) for row, length in enumerate(LENGTHS)
    ]
    sums = sum_texts(backend, model, examples, 0, adapter=False)
    for row, example in enumerate(examples):
        alone = backend.log_probs(model, sft_batch([example], 0), adapter=False).sum()
        assert sums[row] == pytest.approx(alone, rel=1e-5)


def test_batches_hold_each_row_once_by_length() -> None:
    batches = list(batches_by_length([5, 1, 5, 3, 1], 2))
    assert batches == [[1, 4], [3, 0], [2]]
    assert list(batches_by_length([])) == []


def test_batches_of_long_rows_are_bounded_by_their_tokens() -> None:
    assert list(batches_by_length([2048] * 17)) == [list(range(16)), [16]]
    assert list(batches_by_length([100, 16384, 16384, 16385, 40000])) == [[0, 1], [2], [3], [4]]
