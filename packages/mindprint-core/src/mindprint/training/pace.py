"""The pace of a run: how long the steps that remain will take, judged by the first ones."""

from __future__ import annotations

from collections.abc import Sequence

from mindprint.events import StepDone
from mindprint.training.plan import StagePlan

STEPS_BEFORE_ESTIMATE = 3
"""The first step is left out of an estimate: it compiles, allocates and fills caches."""

WORTH_TELLING = 60.0
"""Seconds from which a person wants to know how long a run takes."""


class Pace:
    """The duration of the first steps that this process takes."""

    def __init__(self) -> None:
        self._steps: list[StepDone] = []

    def estimate(self, step: StepDone, plan: StagePlan, later: Sequence[StagePlan]) -> str | None:
        """Return the sentence to tell after `step`, None where it is not yet known, was told, or is a short time.

        Time goes with the tokens that the model reads: a step of DPO reads more of them than one of SFT.
        """
        if len(self._steps) == STEPS_BEFORE_ESTIMATE:
            return None
        self._steps.append(step)
        if len(self._steps) < STEPS_BEFORE_ESTIMATE:
            return None
        measured = self._steps[1:]
        seconds, tokens = sum(taken.seconds for taken in measured), sum(taken.tokens for taken in measured)
        left = plan.steps - step.stage_step
        remaining = plan.tokens_per_step * left + sum(stage.tokens_per_step * stage.steps for stage in later)
        expected = remaining * seconds / tokens if tokens else 0.0
        if expected < WORTH_TELLING:
            return None
        steps = left + sum(stage.steps for stage in later)
        return f"the remaining {steps:,} steps will take about {duration(expected)}, evaluations not included"


def duration(seconds: float) -> str:
    """Return a duration as a person says it: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
