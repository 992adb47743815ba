"""How a batch can be laid out for the model: which rows it reads, and which hidden state predicts which token.

For backends to use, or not: the contract leaves the layout to them. A layout separates what the model reads from what
is asked of it, so that several layouts of the same batch give the same log-probs in the same places: each sequence a
row of its own (`Layout`), or a prompt read once for both of its completions (Wang & Hegde 2024, arXiv 2410.20305),
within one row (`Forked`) or ahead of them (`Continued`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Int32, PreferenceBatch, TokenBatch

PROMPT, FIRST, SECOND, PADDING = range(4)
"""What a token of a forked row belongs to."""


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


@dataclass(frozen=True)
class Forked(Layout):
    """Rows of a prompt, its first completion and its second, one behind the other; `[rows, width]` as `tokens`.

    `positions` go on from the prompt in both completions; `parts` say what each token belongs to, and so which tokens
    it sees (`sees`). Sources, targets, slots and shape are those of a layout.
    """

    positions: Int32
    parts: Int32


@dataclass(frozen=True)
class Continued:
    """Prompts `[pairs, P]`, and what goes on from them `[2 * pairs, C]`: row k and row pairs + k from prompt k.

    All are padded on the right. A token of a completion sees the first `prompt_lengths[k]` tokens of its prompt and its
    own row up to itself; its position is its column plus that length. `sources` are flat positions in the hidden states
    of the prompts, followed by those of the completions; the rest as in `Layout`.
    """

    prompts: Int32
    prompt_lengths: Int32
    completions: Int32
    sources: Int32
    targets: Int32
    slots: Int32
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.targets)


def sees(parts: Any, order: Any) -> Any:
    """Which tokens see which in forked rows: bool `[rows, width, width]`, for `parts` `[rows, width]` of any framework.

    `order` is `[0, 1, ..., width - 1]`. A token sees what stands before it and is of the prompt or of its own part;
    padding sees the prompt and is seen by nothing that counts.
    """
    mine, theirs = parts[:, :, None], parts[:, None, :]
    return (order[:, None] >= order[None, :]) & ((theirs == PROMPT) | (theirs == mine))


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


def preference_sequences(batch: PreferenceBatch) -> TokenBatch:
    """Prompt + chosen of every pair, then prompt + rejected of every pair, `[2 * pairs, T]`, said to share prompts."""
    prompts, prompt_lengths = np.tile(batch.prompt, (2, 1)), np.tile(batch.prompt_lengths, 2)
    lengths = _int32(prompt_lengths + np.concatenate([batch.chosen_lengths, batch.rejected_lengths]))
    tokens = np.zeros((len(lengths), int(lengths.max(initial=1))), np.int32)
    _write(tokens, prompts, np.zeros_like(prompt_lengths), prompt_lengths)
    _write(tokens, _stacked(batch.chosen, batch.rejected), prompt_lengths, lengths - prompt_lengths)
    columns = np.arange(tokens.shape[1])
    mask = (columns >= prompt_lengths[:, None]) & (columns < lengths[:, None])
    return TokenBatch(tokens, lengths, mask, shared=batch.prompt_lengths)


def forked(batch: TokenBatch) -> Forked:
    """Each prompt of a batch that shares prompts once, in a row with both of its completions.

    The last token of a completion predicts nothing and is left out. Raises `ValueError` if the batch shares nothing.
    """
    prompts, own = _parts(batch)
    pairs = len(prompts)
    first, second = own[:pairs], own[pairs:]
    ends = prompts + first
    width = int((ends + second).max())
    tokens, positions = np.zeros((pairs, width), np.int32), np.zeros((pairs, width), np.int32)
    parts = np.full((pairs, width), PADDING, np.int32)
    rows, columns = np.nonzero(np.arange(width) < ends[:, None])
    tokens[rows, columns] = batch.tokens[rows, columns]
    positions[rows, columns] = columns
    parts[rows, columns] = np.where(columns < prompts[rows], PROMPT, FIRST)
    rows, columns = np.nonzero(np.arange(width) < second[:, None])
    places, read = ends[rows] + columns, prompts[rows] + columns
    tokens[rows, places] = batch.tokens[pairs + rows, read]
    positions[rows, places] = read
    parts[rows, places] = SECOND
    rows, columns = np.nonzero(batch.loss_mask)
    pair = rows % pairs
    moved = (rows >= pairs) & (columns > prompts[pair])  # predicted by a token of the second completion
    return Forked(
        tokens=tokens,
        sources=_int32(pair * width + columns - 1 + np.where(moved, first[pair], 0)),
        targets=batch.tokens[rows, columns],
        slots=_int32(rows * batch.tokens.shape[1] + columns),
        shape=(batch.tokens.shape[0], batch.tokens.shape[1]),
        positions=positions,
        parts=parts,
    )


def continued(batch: TokenBatch) -> Continued:
    """Each prompt of a batch that shares prompts once, and then its completions, without their last tokens.

    Raises `ValueError` if the batch shares nothing.
    """
    prompts, own = _parts(batch)
    pairs, width = len(prompts), max(int(own.max()), 1)
    completions = np.zeros((2 * pairs, width), np.int32)
    rows, columns = np.nonzero(np.arange(width) < own[:, None])
    completions[rows, columns] = batch.tokens[rows, prompts[rows % pairs] + columns]
    rows, columns = np.nonzero(batch.loss_mask)
    longest = int(prompts.max())
    within = columns - 1 - prompts[rows % pairs]
    after = pairs * longest + rows * width + within
    return Continued(
        prompts=batch.tokens[:pairs, :longest],
        prompt_lengths=_int32(prompts),
        completions=completions,
        sources=_int32(np.where(within < 0, (rows % pairs) * longest + columns - 1, after)),
        targets=batch.tokens[rows, columns],
        slots=_int32(rows * batch.tokens.shape[1] + columns),
        shape=(batch.tokens.shape[0], batch.tokens.shape[1]),
    )


def sharing_probe(vocabulary: int) -> TokenBatch:
    """A batch to find out with whether a model can share prompts: do its layouts give the same log-probs?

    Two prompts of unlike lengths with two ragged completions each; every token after the prompt is asked for.
    """
    prompts, lengths = np.array([5, 2], np.int32), np.array([9, 7, 8, 5], np.int32)
    columns = np.arange(9)
    tokens = np.arange(4 * 9, dtype=np.int32).reshape(4, 9)
    tokens[2:] = np.where(columns < prompts[:, None], tokens[:2], tokens[2:])
    mask = (columns >= np.tile(prompts, 2)[:, None]) & (columns < lengths[:, None])
    return TokenBatch(tokens % vocabulary, lengths, mask, shared=prompts)


def groups_of_like_length(lengths: Int32, most_tokens: int, overhead: int) -> tuple[Int32, ...]:
    """The rows of a batch, int32 `[rows]` a group, grouped so that reading group by group costs least.

    A group costs what its rows take when all are padded to its longest, and `overhead` tokens beside; it takes no more
    than `most_tokens`, unless a single row does. Losses are sums over rows, so any grouping gives the same step.
    """
    order = np.argsort(-lengths, kind="stable")
    longest_first = lengths[order].tolist()
    least: list[tuple[int, int]] = [(0, 0)]  # for the first n rows: the cost, and where the last group starts
    for end in range(1, len(order) + 1):
        options = [
            (least[start][0] + (end - start) * longest_first[start] + overhead, start)
            for start in range(end)
            if end - start == 1 or (end - start) * longest_first[start] <= most_tokens
        ]
        least.append(min(options))
    groups, end = [], len(order)
    while end:
        start = least[end][1]
        groups.append(_int32(np.sort(order[start:end])))
        end = start
    return tuple(reversed(groups))


def token_rows(batch: TokenBatch, rows: NDArray[np.integer]) -> TokenBatch:
    """Some rows of a batch, no wider than they need. Of rows that share prompts: first ones, then their second ones."""
    shared = None if batch.shared is None else batch.shared[rows[: len(rows) // 2]]
    width = int(batch.lengths[rows].max(initial=1))
    return TokenBatch(batch.tokens[rows, :width], batch.lengths[rows], batch.loss_mask[rows, :width], shared)


def pairs_of(batch: PreferenceBatch, pairs: NDArray[np.integer]) -> PreferenceBatch:
    """Some pairs of a batch."""
    return replace(batch, **{name: values[pairs] for name, values in vars(batch).items() if values is not None})


def _parts(batch: TokenBatch) -> tuple[Int32, Int32]:
    """How many tokens of each prompt, `[pairs]`, and of each sequence after it, `[2 * pairs]`, are read."""
    if batch.shared is None:
        raise ValueError("the rows of this batch are not said to share prompts")
    return batch.shared, _int32(np.maximum(batch.lengths - np.tile(batch.shared, 2) - 1, 0))


def preference_rows(batch: PreferenceBatch) -> Layout:
    """Prompt + chosen of every pair, then prompt + rejected of every pair; answers `[2 * pairs, C]`, 0 after them."""
    joined = preference_sequences(batch)
    rows, columns = np.nonzero(joined.loss_mask)
    width = max(batch.chosen.shape[1], batch.rejected.shape[1])
    slots = _int32(rows * width + columns - np.tile(batch.prompt_lengths, 2)[rows])
    return replace(sequences(joined), slots=slots, shape=(len(joined.lengths), width))


def _stacked(upper: Int32, lower: Int32) -> Int32:
    width = max(upper.shape[1], lower.shape[1])
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in (upper, lower)])


def _write(into: Int32, values: Int32, starts: Int32, lengths: Int32) -> None:
    """`into[row, start:start + length] = values[row, :length]` for every row."""
    rows, columns = np.nonzero(np.arange(values.shape[1]) < lengths[:, None])
    into[rows, starts[rows] + columns] = values[rows, columns]


def _int32(values: NDArray[np.integer]) -> Int32:
    return values.astype(np.int32)
