"""How a batch can be laid out for the model: which rows it reads, and which hidden state predicts which token.

For backends to use, or not: the contract leaves the layout to them. A layout separates what the model reads from what
is asked of it, so that several layouts of the same batch (here: each sequence a row of its own) give the same log-probs
in the same places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Int32, PreferenceBatch, TokenBatch


@dataclass(frozen=True)
class Layout:
    """Rows for the model and the questions asked of them, int32.

    `tokens` `[rows, width]` are padded on the right and need no mask: attention is causal, so no token sees the
    padding behind it. The k-th question is the log-prob of `targets[k]` given the hidden state at the flat position
    `sources[k]` of `[rows, width]`; its answer belongs at the flat position `slots[k]` of an array of `shape`.
    """

    tokens: Int32
    sources: Int32
    targets: Int32
    slots: Int32
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.targets)


def sequences(batch: TokenBatch) -> Layout:
    """Each sequence a row; answers at the place of their tokens, `[rows, T]`."""
    width = max(int(batch.lengths.max(initial=1)), 1)
    rows, columns = np.nonzero(batch.loss_mask)
    return Layout(
        tokens=batch.tokens[:, :width],
        sources=_int32(rows * width + columns - 1),
        targets=batch.tokens[rows, columns],
        slots=_int32(rows * batch.tokens.shape[1] + columns),
        shape=(batch.tokens.shape[0], batch.tokens.shape[1]),
    )


def preference_rows(batch: PreferenceBatch) -> Layout:
    """Prompt + chosen of every pair, then prompt + rejected of every pair; answers `[2 * pairs, C]`, 0 after them."""
    prompts, prompt_lengths = np.tile(batch.prompt, (2, 1)), np.tile(batch.prompt_lengths, 2)
    completions = _stacked(batch.chosen, batch.rejected)
    lengths = np.concatenate([batch.chosen_lengths, batch.rejected_lengths])
    width = int((prompt_lengths + lengths).max())
    tokens = np.zeros((len(lengths), width), np.int32)
    _write(tokens, prompts, np.zeros_like(prompt_lengths), prompt_lengths)
    _write(tokens, completions, prompt_lengths, lengths)
    rows, columns = np.nonzero(np.arange(completions.shape[1]) < lengths[:, None])
    return Layout(
        tokens=tokens,
        sources=_int32(rows * width + prompt_lengths[rows] + columns - 1),
        targets=completions[rows, columns],
        slots=_int32(rows * completions.shape[1] + columns),
        shape=(len(lengths), completions.shape[1]),
    )


def _stacked(upper: Int32, lower: Int32) -> Int32:
    width = max(upper.shape[1], lower.shape[1])
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in (upper, lower)])


def _write(into: Int32, values: Int32, starts: Int32, lengths: Int32) -> None:
    """`into[row, start:start + length] = values[row, :length]` for every row."""
    rows, columns = np.nonzero(np.arange(values.shape[1]) < lengths[:, None])
    into[rows, starts[rows] + columns] = values[rows, columns]


def _int32(values: NDArray[np.integer]) -> Int32:
    return values.astype(np.int32)
