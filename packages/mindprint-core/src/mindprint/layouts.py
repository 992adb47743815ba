"""Layouts of a batch: the rows that the model reads, and the hidden state that predicts each token.

They are for backends to use or not: the contract leaves the layout to them. A layout separates the rows that the model
reads from the log-probs that are asked of it, so that several layouts of one batch give the same log-probs in the same
places. Each sequence can be a row (`Layout`). Or a prompt is read once for both of its completions (Wang & Hegde 2024,
arXiv 2410.20305), within one row (`Forked`) or ahead of them (`Continued`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Int32, PreferenceBatch, TokenBatch

PROMPT, FIRST, SECOND, PADDING = range(4)
"""The parts of a forked row, to one of which each token belongs."""


@dataclass(frozen=True)
class Layout:
    """Rows for the model, and the log-probs asked of them.

    Args:
        tokens: int32 `[rows, width]`, padded on the right. They need no mask: attention is causal, so no token sees the
            padding behind it.
        sources: int32 `[questions]`, flat positions in `[rows, width]`. The hidden state there predicts the target.
        targets: int32 `[questions]`, the token whose log-prob is asked for.
        slots: int32 `[questions]`, flat positions in an array of `shape`, to which the answers belong.
        shape: The shape of the array of answers.
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
    """Rows of a prompt, its first completion and its second, one behind the other.

    Args:
        positions: int32 `[rows, width]`. In both completions they continue those of the prompt.
        parts: int32 `[rows, width]`: `PROMPT`, `FIRST`, `SECOND` or `PADDING` for each token. They decide which tokens
            it sees (`sees`).
    """

    positions: Int32
    parts: Int32


@dataclass(frozen=True)
class Continued:
    """Prompts, and completions that continue them: row k and row pairs + k continue prompt k.

    A token of a completion sees the first `prompt_lengths[k]` tokens of its prompt, and its own row up to itself. Its
    position is its column plus that length.

    Args:
        prompts: int32 `[pairs, P]`, padded on the right.
        prompt_lengths: int32 `[pairs]`.
        completions: int32 `[2 * pairs, C]`, padded on the right.
        sources: Flat positions in the hidden states of the prompts, followed by those of the completions.
        targets: As in `Layout`.
        slots: As in `Layout`.
        shape: As in `Layout`.
        completion_lengths: int32 `[2 * pairs]`, how many tokens of each completion are read.
    """

    prompts: Int32
    prompt_lengths: Int32
    completions: Int32
    sources: Int32
    targets: Int32
    slots: Int32
    shape: tuple[int, int]
    completion_lengths: Int32 = field(default_factory=lambda: np.zeros(0, dtype=np.int32))

    def __len__(self) -> int:
        return len(self.targets)


def sees(parts: Any, order: Any) -> Any:
    """Return which tokens see which in forked rows, bool `[rows, width, width]`.

    A token sees the tokens before it that belong to the prompt or to its part. Padding sees the prompt, and is seen by
    nothing that counts.

    Args:
        parts: `Forked.parts`, an array of any framework.
        order: `[0, 1, ..., width - 1]`, of the same framework.
    """
    seeing, seen = parts[:, :, None], parts[:, None, :]
    # By column and not by position: the second completion has the same positions as the first.
    return (order[:, None] >= order[None, :]) & ((seen == PROMPT) | (seen == seeing))


def sequences(batch: TokenBatch) -> Layout:
    """Return a layout with each sequence as a row. Answers belong at the places of their tokens, `[rows, T]`."""
    # At least one column, because models do not accept rows of width 0.
    width = max(int(batch.lengths.max(initial=1)), 1)
    rows, columns = np.nonzero(batch.loss_mask)
    return Layout(
        tokens=batch.tokens[:, :width],
        sources=_int32(rows * width + columns - 1),  # the hidden state one column before predicts a token
        targets=batch.tokens[rows, columns],
        slots=_int32(rows * batch.tokens.shape[1] + columns),
        shape=(batch.tokens.shape[0], batch.tokens.shape[1]),
    )


@dataclass(frozen=True)
class RotaryLimit:
    """The length above which a model's rotary embedding depends on how long its input is.

    LongRoPE has a second set of frequencies for inputs of more than `positions` tokens. Dynamic NTK scaling has other
    frequencies for each length above it (`each_length`). Models choose by the longest row of a batch, so that rows of
    different kinds must not be read together.
    """

    positions: int
    each_length: bool = False

    def kinds(self, lengths: Int32) -> Int32:
        """Return a number for each length: rows with the same number can be read together."""
        return _int32(np.where(lengths > self.positions, lengths if self.each_length else 1, 0))


def sequences_apart(batch: TokenBatch, limit: RotaryLimit) -> tuple[Layout, ...]:
    """Return a layout like `sequences` for the rows of each kind, with answers at their places in the whole batch."""
    kinds, layouts = limit.kinds(batch.lengths), []
    for kind in np.unique(kinds):
        rows = np.flatnonzero(kinds == kind)
        # Without `shared`, because the rows of one kind need not hold both rows of a pair.
        layout = sequences(token_rows(replace(batch, shared=None), rows))
        row, column = np.divmod(layout.slots, layout.shape[1])
        shape = (batch.tokens.shape[0], batch.tokens.shape[1])
        layouts.append(replace(layout, slots=_int32(rows[row] * shape[1] + column), shape=shape))
    return tuple(layouts)


def pair_lengths(batch: PreferenceBatch) -> Int32:
    """Return how many tokens are read for each pair, `[pairs]`: its prompt once, and both completions."""
    return batch.prompt_lengths + batch.chosen_lengths + batch.rejected_lengths


def preference_sequences(batch: PreferenceBatch) -> TokenBatch:
    """Return prompt + chosen of every pair, then prompt + rejected, `[2 * pairs, T]`, as rows that share prompts."""
    prompts, prompt_lengths = np.tile(batch.prompt, (2, 1)), np.tile(batch.prompt_lengths, 2)
    lengths = _int32(prompt_lengths + np.concatenate([batch.chosen_lengths, batch.rejected_lengths]))
    tokens = np.zeros((len(lengths), int(lengths.max(initial=1))), np.int32)
    _write(tokens, prompts, np.zeros_like(prompt_lengths), prompt_lengths)
    _write(tokens, _stacked(batch.chosen, batch.rejected), prompt_lengths, lengths - prompt_lengths)
    columns = np.arange(tokens.shape[1])
    mask = (columns >= prompt_lengths[:, None]) & (columns < lengths[:, None])
    return TokenBatch(tokens, lengths, mask, shared=batch.prompt_lengths)


def forked(batch: TokenBatch) -> Forked:
    """Return each prompt once, in a row with both of its completions.

    Args:
        batch: Rows that share prompts.

    Raises:
        ValueError: The rows share nothing.
    """
    prompts, read = _read_lengths(batch)
    pairs = len(prompts)
    first, second = read[:pairs], read[pairs:]
    ends = prompts + first
    width = int((ends + second).max())
    tokens, positions = np.zeros((pairs, width), np.int32), np.zeros((pairs, width), np.int32)
    parts = np.full((pairs, width), PADDING, np.int32)
    rows, columns = np.nonzero(np.arange(width) < ends[:, None])
    tokens[rows, columns] = batch.tokens[rows, columns]
    positions[rows, columns] = columns
    parts[rows, columns] = np.where(columns < prompts[rows], PROMPT, FIRST)
    rows, columns = np.nonzero(np.arange(width) < second[:, None])
    # The second completion lies behind the first, at the positions that it would have right behind the prompt.
    places, original = ends[rows] + columns, prompts[rows] + columns
    tokens[rows, places] = batch.tokens[pairs + rows, original]
    positions[rows, places] = original
    parts[rows, places] = SECOND
    rows, columns = np.nonzero(batch.loss_mask)
    pair = rows % pairs
    # A completion's first token is predicted by the prompt's last one, which both completions share. Only the later
    # tokens of the second completion are predicted by tokens that have moved.
    moved = (rows >= pairs) & (columns > prompts[pair])
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
    """Return each prompt once, and its two completions apart from it.

    Args:
        batch: Rows that share prompts.

    Raises:
        ValueError: The rows share nothing.
    """
    prompts, read = _read_lengths(batch)
    pairs, width = len(prompts), max(int(read.max()), 1)
    completions = np.zeros((2 * pairs, width), np.int32)
    rows, columns = np.nonzero(np.arange(width) < read[:, None])
    completions[rows, columns] = batch.tokens[rows, prompts[rows % pairs] + columns]
    rows, columns = np.nonzero(batch.loss_mask)
    longest = int(prompts.max())
    # The place of the predicting token within its completion. -1 means that it is the prompt's last token.
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
        completion_lengths=read,
    )


def sharing_probe(vocabulary: int) -> TokenBatch:
    """Return a batch with which a backend can find out whether its model can share prompts.

    If it can, the layouts of this batch give the same log-probs. There are two prompts of unlike lengths with two
    ragged completions each, and every token after the prompt is asked for.

    Args:
        vocabulary: The number of tokens of the model.
    """
    prompts, lengths = np.array([5, 2], np.int32), np.array([9, 7, 8, 5], np.int32)
    columns = np.arange(9)
    tokens = np.arange(4 * 9, dtype=np.int32).reshape(4, 9)
    tokens[2:] = np.where(columns < prompts[:, None], tokens[:2], tokens[2:])
    mask = (columns >= np.tile(prompts, 2)[:, None]) & (columns < lengths[:, None])
    return TokenBatch(tokens % vocabulary, lengths, mask, shared=prompts)


def groups_of_like_length(lengths: Int32, most_tokens: int, overhead: int) -> tuple[Int32, ...]:
    """Group the rows of a batch so that reading them group by group costs least.

    Losses are sums over rows, so any grouping gives the same step. This grouping suits one reader that takes the groups
    in turn, as torch does on a CPU. MLX deals such groups to several readers at once, and chooses among a few divisions
    the one after which they end soonest (`mindprint_mlx.division`).

    Args:
        lengths: int32 `[rows]`.
        most_tokens: Limit of a group's tokens, padding included. A single row may exceed it.
        overhead: The cost of a further group, in tokens.

    Returns:
        The rows of each group, int32, each row in one group.
    """
    # With rows sorted by length, an optimal group is a run of neighbours: a row exchanged with one of another group
    # would only widen it. So this is the shortest path over the places between rows, found by dynamic programming.
    order = np.argsort(-lengths, kind="stable")
    longest_first = lengths[order].tolist()
    # For the first n rows: the least cost, and the start of the last group.
    least: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(order) + 1):
        options = [
            (least[start][0] + (end - start) * longest_first[start] + overhead, start)
            for start in range(end)
            if end - start == 1 or (end - start) * longest_first[start] <= most_tokens
        ]
        # Of equal costs the earliest start wins, so that the groups follow from the lengths alone.
        least.append(min(options))
    groups, end = [], len(order)
    while end:
        start = least[end][1]
        groups.append(_int32(np.sort(order[start:end])))
        end = start
    return tuple(reversed(groups))


def token_rows(batch: TokenBatch, rows: NDArray[np.integer]) -> TokenBatch:
    """Return some rows of a batch, no wider than they need.

    Args:
        batch: The batch.
        rows: Their indices. Of rows that share prompts, the first rows of the pairs, then the second ones.
    """
    shared = None if batch.shared is None else batch.shared[rows[: len(rows) // 2]]
    width = int(batch.lengths[rows].max(initial=1))
    return TokenBatch(batch.tokens[rows, :width], batch.lengths[rows], batch.loss_mask[rows, :width], shared)


def pairs_of(batch: PreferenceBatch, pairs: NDArray[np.integer]) -> PreferenceBatch:
    """Return some pairs of a batch, by their indices."""
    return replace(batch, **{name: values[pairs] for name, values in vars(batch).items() if values is not None})


def _read_lengths(batch: TokenBatch) -> tuple[Int32, Int32]:
    """Return the numbers of tokens that are read of each prompt, `[pairs]`, and after it, `[2 * pairs]`.

    The last token of a completion predicts nothing and is not read.
    """
    if batch.shared is None:
        raise ValueError("the rows of this batch are not said to share prompts")
    return batch.shared, _int32(np.maximum(batch.lengths - np.tile(batch.shared, 2) - 1, 0))


def preference_rows(batch: PreferenceBatch) -> Layout:
    """Return a layout with prompt + chosen of every pair, then prompt + rejected, as rows.

    The answers of a row are those of its completion, in an array `[2 * pairs, C]` with 0 behind them.
    """
    joined = preference_sequences(batch)
    rows, columns = np.nonzero(joined.loss_mask)
    width = max(batch.chosen.shape[1], batch.rejected.shape[1])
    slots = _int32(rows * width + columns - np.tile(batch.prompt_lengths, 2)[rows])
    return replace(sequences(joined), slots=slots, shape=(len(joined.lengths), width))


def _stacked(upper: Int32, lower: Int32) -> Int32:
    width = max(upper.shape[1], lower.shape[1])
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in (upper, lower)])


def _write(into: Int32, values: Int32, starts: Int32, lengths: Int32) -> None:
    """Do `into[row, start:start + length] = values[row, :length]` for every row."""
    rows, columns = np.nonzero(np.arange(values.shape[1]) < lengths[:, None])
    into[rows, starts[rows] + columns] = values[rows, columns]


def _int32(values: NDArray[np.integer]) -> Int32:
    return values.astype(np.int32)
