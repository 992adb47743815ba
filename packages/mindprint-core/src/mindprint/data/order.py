"""Which rows are seen when, as a pure function of seed, topic, stage and step.

Every draw is keyed by what it is for (`draws.py`), so that a run resumes from a cursor alone and every backend sees the
same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mindprint.draws import permutation, random_bits


@dataclass(frozen=True)
class StageOrder:
    """The order of one stage of one topic: seeded epochs over `rows`, cut into micro-batches and optimizer steps.

    Neither a micro-batch nor an optimizer step reaches across the end of an epoch: the last of an epoch may be smaller.
    Exactly one of `epochs` and `steps` is given.

    With `lengths`, of every row in tokens, each `length_window` micro-batches that follow one another share out their
    rows anew: rows of like length together, and these micro-batches in a random order.
    """

    rows: int
    batch_size: int
    gradient_accumulation: int
    seed: int
    topic: str
    stage: str
    epochs: int | None = None
    steps: int | None = None
    lengths: tuple[int, ...] | None = None
    length_window: int = 1

    @cached_property
    def steps_per_epoch(self) -> int:
        micro_batches = -(-self.rows // self.batch_size)
        return -(-micro_batches // self.gradient_accumulation)

    @cached_property
    def total_steps(self) -> int:
        return self.steps if self.steps is not None else (self.epochs or 0) * self.steps_per_epoch

    def micro_batches(self, step: int) -> tuple[tuple[int, ...], ...]:
        """The row indices of each micro-batch of optimizer step `step` (from 0)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = self._epoch(epoch)
        per_step = self.batch_size * self.gradient_accumulation
        mine = order[within * per_step : (within + 1) * per_step]
        return tuple(mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size))

    def _epoch(self, epoch: int) -> tuple[int, ...]:
        order = permutation(self.rows, self.seed, "order", self.topic, self.stage, epoch)
        if self.lengths is not None and self.length_window > 1:
            order = self._by_length(order, epoch)
        return tuple(order.tolist())

    def _by_length(self, order: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        windows = np.arange(self.rows) // (self.batch_size * self.length_window)
        order = order[np.lexsort((np.asarray(self.lengths)[order], windows))]
        # The last micro-batch may be smaller and stays last.
        whole = self.rows // self.batch_size
        bits = random_bits(whole, self.seed, "micro-batches", self.topic, self.stage, epoch)
        shuffled = np.lexsort((bits, np.arange(whole) // self.length_window))
        batches = order[: whole * self.batch_size].reshape(whole, self.batch_size)[shuffled]
        return np.concatenate([batches.ravel(), order[whole * self.batch_size :]])
