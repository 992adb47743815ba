"""The plan of a run, decided before anything is computed: a flat list of stages, topic by topic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mindprint.config import BackendConfig, Config, StageConfig
from mindprint.contract import StageName
from mindprint.data.order import Lengths, StageOrder
from mindprint.training.objectives import OBJECTIVES, Objective
from mindprint.training.schedule import learning_rate

RowLengths = Mapping[StageName, Mapping[str, Lengths]]
"""The tokens of each row, by stage and topic."""


@dataclass(frozen=True)
class StagePlan:
    """One stage of one topic. `first_step` is the number of optimizer steps of the run before it.

    The plan skips no stage and repeats no topic. `for_attempt` says where a stage is really taken.
    """

    index: int
    topic: str
    stage: StageName
    settings: StageConfig
    backend: BackendConfig
    order: StageOrder
    first_step: int
    attempt: int = 1

    @property
    def steps(self) -> int:
        return self.order.total_steps

    @property
    def tokens_per_step(self) -> float:
        """Return the mean number of tokens that an optimizer step reads."""
        lengths = self.order.lengths
        return 0.0 if lengths is None else float(np.sum(lengths)) / self.order.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the stage's step `step` (from 0)."""
        settings = self.settings
        return learning_rate(settings.schedule, step, self.steps, settings.learning_rate, settings.warmup_steps)

    def for_order(self, version: int) -> StagePlan:
        """Return a copy with the order of an older version."""
        return replace(self, order=replace(self.order, version=version))

    def for_attempt(self, first_step: int, attempt: int = 1, learning_rate_factor: float = 1.0) -> StagePlan:
        """Return a copy for an attempt at its topic, with the learning rate multiplied by the factor."""
        rate = self.settings.learning_rate * learning_rate_factor
        settings = self.settings.model_copy(update={"learning_rate": rate})
        return replace(self, first_step=first_step, attempt=attempt, settings=settings)


def plan_run(config: Config, topics: Sequence[str], lengths: RowLengths) -> tuple[StagePlan, ...]:
    """Plan the stages of each topic, in the order given. A stage that is off or has no rows is left out."""
    plans: list[StagePlan] = []
    for topic in topics:
        for stage, objective in OBJECTIVES.items():
            settings, rows = objective.settings(config), lengths.get(stage, {}).get(topic, ())
            # A topic of one kind of rows has one stage. `check_topics` refuses it where both were asked for.
            for _ in range(objective.repeats(settings) if settings.enabled and len(rows) else 0):
                first_step = plans[-1].first_step + plans[-1].steps if plans else 0
                order = _stage_order(config, objective, topic, rows)
                backend = settings.backend or config.backend
                plans.append(StagePlan(len(plans), topic, stage, settings, backend, order, first_step))
    return tuple(plans)


def total_steps(plans: Sequence[StagePlan]) -> int:
    """Count the optimizer steps of all stages."""
    return sum(plan.steps for plan in plans)


def _stage_order(config: Config, objective: Objective[Any, Any], topic: str, lengths: Lengths) -> StageOrder:
    settings = objective.settings(config)
    epochs, steps = settings.epochs_per_topic, settings.steps_per_topic
    # Defaults of an objective and not of the configuration: there, one of the two would have to be unset.
    if epochs is None and steps is None:
        epochs, steps = objective.default_epochs, objective.default_steps
    return StageOrder(
        len(lengths),
        settings.rows_at_once,
        settings.gradient_accumulation,
        config.seed,
        topic,
        objective.name,
        epochs=epochs,
        steps=steps,
        lengths=lengths,
        length_window=config.data.length_window,
    )
