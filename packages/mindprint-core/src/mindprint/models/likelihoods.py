"""Summed log-probs of whole completions under a loaded model: what references and held-out figures are made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Bool, Float64, LoadedModel, TokenBatch
from mindprint.data.collate import pair_sequences, sft_batch, shared_sequences
from mindprint.data.render import PreferenceExample, SftExample
from mindprint.plugins.backend import Backend
from mindprint.plugins.ranks import Ranks

BATCH_ROWS = 16
"""Rows, or pairs, that are read in one call of the backend."""

BATCH_TOKENS = 32768
"""The most tokens of a batch, padding included: 16 long rows need more memory than a training step on one of them."""


@dataclass(frozen=True)
class CompletionSums:
    """Summed completion log-probs of preference pairs under one model, `[pairs]` each, in the order of the rows."""

    chosen: Float64
    rejected: Float64

    def select(self, rows: Sequence[int] | Bool) -> CompletionSums:
        """Return the sums of some of the pairs: by their indices, in that order, or by a mask `[pairs]`."""
        return CompletionSums(self.chosen[rows], self.rejected[rows])


def sum_pairs(
    backend: Backend,
    model: LoadedModel,
    examples: Sequence[PreferenceExample],
    pad_id: int,
    *,
    adapter: bool = True,
    share_prompts: bool = True,
    ranks: Ranks | None = None,
) -> CompletionSums:
    """Return `log p(chosen | prompt)` and `log p(rejected | prompt)` of every pair, with the adapter on or off.

    With `share_prompts` the backend may read each prompt once for both completions. The numbers are the same. With
    `ranks` each of them reads its share of the batches, and all get all sums.
    """
    sums = CompletionSums(np.zeros(len(examples)), np.zeros(len(examples)))
    longest = (len(example.prompt) + max(len(example.chosen), len(example.rejected)) for example in examples)
    lengths = np.fromiter(longest, dtype=np.int32, count=len(examples))

    def read_batch(rows: list[int]) -> Float64:
        pairs = [examples[row] for row in rows]
        batches = (shared_sequences(pairs, pad_id),) if share_prompts else pair_sequences(pairs, pad_id)
        # Every chosen answer comes first, then every rejected one, in one batch or in two.
        return np.concatenate([_sum_rows(backend, model, batch, adapter=adapter) for batch in batches])

    divided = (ranks or Ranks()).divide(
        list(batches_by_length(lengths)), read_batch, encode=lambda both: both.tolist(), decode=np.array
    )
    for rows, both in divided:
        sums.chosen[rows], sums.rejected[rows] = np.split(both, 2)
    return sums


def sum_texts(
    backend: Backend, model: LoadedModel, examples: Sequence[SftExample], pad_id: int, *, adapter: bool = True
) -> Float64:
    """Return the summed log-probs of each row's trained tokens, `[rows]`, with the adapter on or off."""
    sums = np.zeros(len(examples))
    for rows in batches_by_length([len(example.tokens) for example in examples]):
        batch = sft_batch([examples[row] for row in rows], pad_id)
        sums[rows] = _sum_rows(backend, model, batch, adapter=adapter)
    return sums


def batches_by_length(lengths: Sequence[int] | NDArray[np.int32], size: int = BATCH_ROWS) -> Iterator[list[int]]:
    """Yield the indices of rows in batches of rows of similar length, so that little of a batch is padding.

    The shortest rows come first. Rows of one length keep their order. A batch has at most `size` rows, and at most
    `BATCH_TOKENS` tokens unless it is a single row.
    """
    batch: list[int] = []
    # Indices as an array: a list of millions of them would fill memory.
    for place in np.argsort(np.asarray(lengths), kind="stable"):
        row = int(place)
        # The row that comes next is the longest so far, to which the others would be padded.
        if len(batch) == size or (len(batch) + 1) * int(lengths[row]) > BATCH_TOKENS:
            if batch:
                yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _sum_rows(backend: Backend, model: LoadedModel, batch: TokenBatch, *, adapter: bool) -> Float64:
    # The backend's log-probs are float32. Sums of thousands of tokens are kept in float64, because figures compare
    # differences of a few hundredths of a nat between them.
    sums: Float64 = backend.log_probs(model, batch, adapter=adapter).sum(axis=1, dtype=np.float64)
    return sums
