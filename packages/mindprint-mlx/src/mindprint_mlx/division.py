"""The division of a micro-batch into groups of rows: the cores of a CPU finish together and read little padding.

The cores take groups from a queue, the most expensive first. Of a few divisions the one is chosen that costs least. A
group's cost is counted in tokens of the model's body, and follows from lengths alone, so that a division never depends
on timing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Int32, TokenBatch
from mindprint.layouts import groups_of_like_length

Rows = NDArray[np.intp]

GROUP_TOKENS = 512
"""About how many tokens a group has at most: enough for products to run at full speed, few enough for caches."""

LIMITS = (1.0, 0.5, 0.25, 0.0)
"""The greatest sizes of groups that are tried, as shares of `GROUP_TOKENS`. With 0 each row is a group."""


WAITING = 0.75
"""The price of a core's waiting, where its work is 1. So a prompt is not read twice only to end a little earlier."""


@dataclass(frozen=True)
class Work:
    """The cores that share a micro-batch, and costs in tokens.

    Args:
        cores: How many groups are computed at once.
        read: The cost of a further read of the model, in addition to its tokens.
        log_prob: The cost of one log-prob: the LM head's share.
        least: A batch with fewer tokens a core is one group.
    """

    cores: int
    read: int
    log_prob: float
    least: int = 1


@dataclass(frozen=True)
class PairGroup:
    """Pairs that are read together, or one pair whose completions are read `apart`, each behind its prompt."""

    pairs: Rows
    apart: bool = False

    def rows(self, batch_pairs: int) -> list[Rows]:
        """Return the rows of each part, where row k and row `batch_pairs` + k are the completions of pair k."""
        if self.apart:
            return [self.pairs, self.pairs + batch_pairs]
        return [np.concatenate([self.pairs, self.pairs + batch_pairs])]


def row_groups(batch: TokenBatch, work: Work | None) -> list[Rows]:
    """Return groups of rows, the most expensive first. There is one group without `work`, and for a small batch."""
    everything = np.arange(len(batch.lengths))
    if work is None or int(batch.lengths.sum()) < work.cores * work.least:
        return [everything]
    asked = batch.loss_mask.sum(axis=1)

    def cost(rows: Rows) -> float:
        return len(rows) * int(batch.lengths[rows].max()) + work.read + work.log_prob * int(asked[rows].sum())

    divisions = [sorted(groups, key=lambda rows: (-cost(rows), rows[0])) for groups in _by_length(batch.lengths, work)]
    return min(divisions, key=lambda groups: _price([[cost(rows)] for rows in groups], work.cores))


def pair_groups(
    prompts: Int32, completions: Int32, work: Work | None, *, share: bool, split: bool = True
) -> list[PairGroup]:
    """Return groups of pairs, the most expensive first.

    Args:
        prompts: Lengths of the prompts, `[pairs]`.
        completions: Lengths of both completions of each, `[2, pairs]`.
        work: None for one group.
        share: Whether a prompt is read once for both of its completions.
        split: Whether the completions of a pair may be read apart.
    """
    lengths = prompts + completions.sum(axis=0)
    if work is None or int(lengths.sum()) < work.cores * work.least:
        return [PairGroup(np.arange(len(prompts)))]
    costs = _PairCosts(prompts, completions, work, share)
    divisions = []
    for groups in _by_length(lengths, work):
        whole = sorted(map(PairGroup, groups), key=costs.order)
        alone = [int(group.pairs[0]) for group in whole if len(group.pairs) == 1] if split else []
        for count in range(len(alone) + 1):
            division = [PairGroup(group.pairs, apart=int(group.pairs[0]) in alone[:count]) for group in whole]
            divisions.append(sorted(division, key=costs.order))
    return min(divisions, key=lambda groups: _price([costs.of(group) for group in groups], work.cores))


def completion_reads(lengths: Int32, read: int | None) -> list[Rows]:
    """Return which completions are read at once, by their lengths, so that tokens and reads cost least together.

    Without the cost of a `read` all are.
    """
    if read is None:
        return [np.arange(len(lengths))]
    everything = len(lengths) * int(lengths.max(initial=1))
    return [rows.astype(np.intp) for rows in groups_of_like_length(lengths, everything, read)]


class _PairCosts:
    """The costs of groups of pairs."""

    def __init__(self, prompts: Int32, completions: Int32, work: Work, share: bool) -> None:
        self._prompts, self._completions = prompts, completions
        self._work, self._share = work, share

    def of(self, group: PairGroup) -> list[float]:
        """Return the cost of each part of a group."""
        if group.apart:
            return [self._rows(group.pairs, self._completions[half, group.pairs]) for half in (0, 1)]
        completions = self._completions[:, group.pairs].reshape(-1)
        if not self._share:
            return [self._rows(np.tile(group.pairs, 2), completions)]
        # The last token of a completion predicts nothing and is not read.
        read = np.maximum(completions - 1, 0).astype(np.int32)
        reads = completion_reads(read, self._work.read)
        tokens = len(group.pairs) * int(self._prompts[group.pairs].max())
        tokens += sum(len(rows) * int(read[rows].max()) for rows in reads)
        return [tokens + (1 + len(reads)) * self._work.read + self._work.log_prob * int(completions.sum())]

    def order(self, group: PairGroup) -> tuple[float, int]:
        return -sum(self.of(group)), int(group.pairs[0])

    def _rows(self, pairs: Rows, completions: Int32) -> float:
        width = int((self._prompts[pairs] + completions).max())
        return len(pairs) * width + self._work.read + self._work.log_prob * int(completions.sum())


def _by_length(lengths: Int32, work: Work) -> Iterator[list[Rows]]:
    """Yield divisions into groups of like length, each with another limit of a group's tokens."""
    for limit in LIMITS:
        groups = groups_of_like_length(lengths, round(limit * GROUP_TOKENS), work.read)
        yield [rows.astype(np.intp) for rows in groups]


def _price(groups: Sequence[Sequence[float]], cores: int) -> float:
    """Return the cost of a division for each core, if each takes the next part, in order, whenever it is free."""
    ends = [0.0] * cores
    for parts in groups:
        for cost in parts:
            ends[ends.index(min(ends))] += cost
    return WAITING * max(ends) + (1 - WAITING) * sum(ends) / cores
