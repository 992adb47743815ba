"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from mindprint.config import Schedule


def learning_rate(schedule: Schedule, step: int, total_steps: int, peak: float, warmup_steps: int = 0) -> float:
    """Return the learning rate of step `step` (from 0) of a stage of `total_steps`.

    Matches transformers' `get_constant_schedule_with_warmup`, `get_linear_...` and `get_cosine_...`: linear from 0
    during warm-up (so the first step of a warm-up has rate 0), then constant, or down to 0 by a line or half a cosine.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * max(0.0, 1.0 - progress)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
