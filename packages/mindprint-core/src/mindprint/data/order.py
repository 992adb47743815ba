"""The order of rows: which rows a step sees, as a pure function of seed, topic, stage and step.

Every draw is keyed by its purpose (`draws.py`), so that a run resumes from a cursor alone and every backend sees the
same order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mindprint.draws import permutation, random_bits


@dataclass(frozen=True)
class StageOrder:
    """The order of one stage of one topic: seeded epochs over `rows`, cut into micro-batches and optimizer steps.

    Neither a micro-batch nor an optimizer step reaches across the end of an epoch. The last one of an epoch may be
    smaller. Exactly one of `epochs` and `steps` is given.

    With `lengths`, the tokens of every row, each `length_window` consecutive micro-batches redistribute their rows:
    rows of similar length come together, and these micro-batches follow in a random order.
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
    _drawn: dict[int, NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def steps_per_epoch(self) -> int:
        micro_batches = -(-self.rows // self.batch_size)
        return -(-micro_batches // self.gradient_accumulation)

    @cached_property
    def total_steps(self) -> int:
        return self.steps if self.steps is not None else (self.epochs or 0) * self.steps_per_epoch

    def micro_batches(self, step: int) -> tuple[tuple[int, ...], ...]:
        """Return the row indices of each micro-batch of optimizer step `step` (from 0)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        per_step = self.batch_size * self.gradient_accumulation
        rows = self._epoch(epoch)[within * per_step : (within + 1) * per_step].tolist()
        return tuple(tuple(rows[start : start + self.batch_size]) for start in range(0, len(rows), self.batch_size))

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        """Return the row indices of an epoch. The last one that was drawn is kept: all its steps are cut from it."""
        if epoch not in self._drawn:
            order = permutation(self.rows, self.seed, "order", self.topic, self.stage, epoch)
            if self.lengths is not None and self.length_window > 1:
                order = self._by_length(order, epoch)
            # One epoch only, so that a stage of many epochs needs no more memory than a stage of one.
            self._drawn.clear()
            self._drawn[epoch] = order
        return self._drawn[epoch]

    def _by_length(self, order: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        # Sorting by length only within a window keeps most of the epoch's randomness: a row moves by less than
        # `length_window` micro-batches.
        windows = np.arange(self.rows) // (self.batch_size * self.length_window)
        order = order[np.lexsort((np.asarray(self.lengths)[order], windows))]
        # The last micro-batch may be smaller and stays last.
        whole = self.rows // self.batch_size
        bits = random_bits(whole, self.seed, "micro-batches", self.topic, self.stage, epoch)
        # Without this, every window would go from its short rows to its long ones.
        shuffled = np.lexsort((bits, np.arange(whole) // self.length_window))
        batches = order[: whole * self.batch_size].reshape(whole, self.batch_size)[shuffled]
        return np.concatenate([batches.ravel(), order[whole * self.batch_size :]])
