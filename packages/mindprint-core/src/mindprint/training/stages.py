"""A stage of a topic: it turns a step number into batches, takes the step, and reads the backend's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mindprint.contract import StepMetrics, Update
from mindprint.draws import random_bits
from mindprint.models.engine import Engine
from mindprint.models.likelihoods import CompletionSums
from mindprint.plugins.backend import is_finite
from mindprint.training import guards
from mindprint.training.agreement import shared_metrics
from mindprint.training.objectives import OBJECTIVES, Rewards
from mindprint.training.plan import StagePlan


@dataclass(frozen=True)
class StepOutcome:
    """One optimizer step: the backend's metrics, the tokens that the model read, and where the rows came from.

    `rewards` are None for objectives that have none. `padding` is the share of the batches' arrays that holds no
    tokens. A backend may read less of it.
    """

    metrics: StepMetrics
    tokens: int
    origins: tuple[object, ...]
    rewards: Rewards | None = None
    padding: float = 0.0


class Stage:
    """One stage of one topic, with its examples and, where the objective needs one, its reference."""

    def __init__(
        self, plan: StagePlan, examples: Sequence[Any], pad_id: int, reference: CompletionSums | None = None
    ) -> None:
        self.plan = plan
        self._objective = OBJECTIVES[plan.stage]
        self._examples = examples
        self._pad_id = pad_id
        self._reference = reference

    def take_step(self, engine: Engine, step: int) -> StepOutcome:
        """Take the stage's optimizer step `step` (from 0), and check that it computed the objective."""
        objective, settings = self._objective, self.plan.settings
        micro_batches = self.plan.order.micro_batches(step)
        batches = [self._batch(rows) for rows in micro_batches]
        update = objective.complete_update(self._update(step), batches, settings)
        # Normalizers, checks and metrics are those of the whole step. Only its work is divided.
        ranks = engine.backend.ranks
        share = ranks.share(batches)
        if not ranks.alone:
            update = replace(update, micro_batches=tuple(ranks.share(range(len(batches)))))
        # Before the step, whose loss is that of the adapter before its update.
        expected = self._evaluated_loss(engine, share, update)
        metrics = objective.take_step(engine.backend, engine.model, share, settings, update)
        if not ranks.alone:
            metrics = shared_metrics(ranks, metrics, [getattr(batch, "pairs", 0) for batch in batches])
        # A skipped step has no update to check, and the loop names the rows of a loss that is not finite.
        if not metrics.skipped and is_finite(metrics):
            objective.check_step(batches, metrics, settings, update, engine.model.dtype, first=step == 0)
            if expected is not None:
                guards.check_evaluated_loss(engine.backend.name, metrics.loss, expected, engine.model.dtype)
                engine.compared_losses.add(self.plan.stage)
        parts = [part for batch in batches for part in objective.array_parts(batch)]
        return StepOutcome(
            metrics,
            tokens=sum(objective.tokens_read(batch) for batch in batches),
            origins=tuple(self._examples[row].origin for rows in micro_batches for row in rows),
            rewards=objective.rewards(batches, metrics, settings),
            padding=1 - sum(int(lengths.sum()) for _, lengths in parts) / sum(array.size for array, _ in parts),
        )

    def _evaluated_loss(self, engine: Engine, batches: Sequence[Any], update: Update) -> float | None:
        """Return the step's loss as evaluation computes it, None if it was compared already or has no counterpart."""
        # Once for each model that is loaded: it costs a forward pass, and a backend does not change its loss later.
        if self.plan.stage in engine.compared_losses or engine.drops_out():
            return None
        loss = self._objective.evaluated_loss(engine.backend, engine.model, batches, update)
        return None if loss is None else sum(engine.backend.ranks.gather(loss))

    def _batch(self, rows: Sequence[int]) -> Any:
        reference = None if self._reference is None else self._reference.select(list(rows))
        return self._objective.batch([self._examples[row] for row in rows], self._pad_id, reference)

    def _update(self, step: int) -> Update:
        plan, settings = self.plan, self.plan.settings
        # 31 bits: both frameworks take any such number as a seed.
        seed = int(random_bits(1, plan.order.seed, "step", plan.topic, plan.stage, step)[0] >> 33)
        return Update(
            plan.learning_rate(step),
            tokens=0,
            optimizer=settings.optimizer,
            max_grad_norm=settings.max_grad_norm,
            seed=seed,
            share_prompts=False,
            gradient_checkpointing=plan.backend.recomputes,
        )
