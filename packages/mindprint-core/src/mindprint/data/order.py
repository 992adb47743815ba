"""The order of rows: which rows a step sees, as a pure function of seed, topic, stage and step.

Every draw is keyed by its purpose (`draws.py`), so that a run resumes from a cursor alone and every backend sees the
same order. A step costs the same whatever the number of rows: an epoch of many rows is never drawn whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mindprint.draws import permutation, permuted, random_bits

ORDER_VERSION = 2
"""The version of the order, which a run's manifest records. Version 1 drew every epoch whole, whatever its rows."""

DRAWN_WHOLE = 2**16
"""Rows up to which an epoch is drawn whole: so short a permutation takes milliseconds, and is exactly uniform."""

BLOCK = 4096
"""Rows of a longer epoch that are drawn at a time: enough for NumPy, and little in memory."""


Lengths = Sequence[int] | NDArray[np.int32]
"""The tokens of each row."""


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
    # Not compared: arrays have no truth value, and rows of other lengths are another plan in other ways as well.
    lengths: Lengths | None = field(default=None, repr=False, compare=False)
    length_window: int = 1
    version: int = ORDER_VERSION
    _drawn: dict[tuple[int, int], NDArray[np.int64]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

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
        rows = self._slice(epoch, within * per_step, min((within + 1) * per_step, self.rows))
        return tuple(tuple(rows[start : start + self.batch_size]) for start in range(0, len(rows), self.batch_size))

    @cached_property
    def _is_drawn_whole(self) -> bool:
        return self.version == 1 or self.rows <= DRAWN_WHOLE

    @cached_property
    def _block_rows(self) -> int:
        """Return how many consecutive positions of an epoch are drawn together: whole windows of micro-batches."""
        window = self.batch_size * self.length_window
        return self.rows if self._is_drawn_whole else window * max(1, BLOCK // window)

    def _slice(self, epoch: int, start: int, stop: int) -> list[int]:
        """Return the rows at the positions from `start` to `stop` of an epoch."""
        size, rows = self._block_rows, []
        for block in range(start // size, (stop - 1) // size + 1):
            first = block * size
            rows += self._block(epoch, block)[max(0, start - first) : stop - first].tolist()
        return rows

    def _block(self, epoch: int, block: int) -> NDArray[np.int64]:
        """Return the rows of one block of an epoch. The last one that was drawn is kept for the next steps."""
        if (epoch, block) not in self._drawn:
            purpose = ("order", self.topic, self.stage, epoch)
            labels: tuple[str | int, ...] = ("micro-batches", self.topic, self.stage, epoch)
            if self._is_drawn_whole:
                order = permutation(self.rows, self.seed, *purpose)
            else:
                first = block * self._block_rows
                positions = np.arange(first, min(first + self._block_rows, self.rows))
                order = permuted(positions, self.rows, self.seed, *purpose)
                labels += (block,)
            if self.lengths is not None and self.length_window > 1:
                order = self._by_length(order, *labels)
            # One block only, so that a stage of many epochs needs no more memory than a stage of one.
            self._drawn.clear()
            self._drawn[epoch, block] = order
        return self._drawn[epoch, block]

    def _by_length(self, order: NDArray[np.int64], *labels: str | int) -> NDArray[np.int64]:
        # Sorting by length only within a window keeps most of the epoch's randomness: a row moves by less than
        # `length_window` micro-batches.
        windows = np.arange(len(order)) // (self.batch_size * self.length_window)
        order = order[np.lexsort((np.asarray(self.lengths)[order], windows))]
        # The last micro-batch may be smaller and stays last.
        whole = len(order) // self.batch_size
        bits = random_bits(whole, self.seed, *labels)
        # Without this, every window would go from its short rows to its long ones.
        shuffled = np.lexsort((bits, np.arange(whole) // self.length_window))
        batches = order[: whole * self.batch_size].reshape(whole, self.batch_size)[shuffled]
        return np.concatenate([batches.ravel(), order[whole * self.batch_size :]])
