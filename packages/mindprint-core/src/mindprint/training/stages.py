"""The two stages: how each turns a step number into batches, takes the step, and reads what came back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mindprint.config import DpoConfig
from mindprint.contract import PreferenceBatch, StepMetrics, Update
from mindprint.data.collate import preference_batch, sft_batch
from mindprint.data.render import PreferenceExample, SftExample
from mindprint.draws import random_bits
from mindprint.models.engine import Engine
from mindprint.models.likelihoods import CompletionSums
from mindprint.plugins.backend import is_finite
from mindprint.training import guards
from mindprint.training.plan import StagePlan


@dataclass(frozen=True)
class Rewards:
    """Means over the pairs of a step."""

    chosen: float
    rejected: float
    margin: float
    accuracy: float


@dataclass(frozen=True)
class StepOutcome:
    """A step taken: the backend's metrics, the tokens the model read, where the rows came from, a pair's rewards.

    `padding` is the share of the batches' arrays that holds no tokens; a backend may well not read all of it.
    """

    metrics: StepMetrics
    tokens: int
    origins: tuple[object, ...]
    rewards: Rewards | None = None
    padding: float = 0.0


class Stage(Protocol):
    """What the loop needs of a stage."""

    plan: StagePlan

    def take_step(self, engine: Engine, step: int) -> StepOutcome:
        """Take the stage's optimizer step `step` (from 0)."""


class SftStage:
    """Supervised fine-tuning on one topic's completions."""

    def __init__(self, plan: StagePlan, examples: Sequence[SftExample], pad_id: int) -> None:
        self.plan = plan
        self._examples = examples
        self._pad_id = pad_id

    def take_step(self, engine: Engine, step: int) -> StepOutcome:
        rows = [[self._examples[row] for row in micro] for micro in self.plan.order.micro_batches(step)]
        batches = [sft_batch(micro, self._pad_id) for micro in rows]
        update = _update(self.plan, step, tokens=sum(batch.loss_tokens for batch in batches))
        metrics = engine.backend.sft_step(engine.model, batches, update)
        tokens = sum(int(batch.lengths.sum()) for batch in batches)
        origins = tuple(example.origin for micro in rows for example in micro)
        return StepOutcome(metrics, tokens, origins, padding=1 - tokens / sum(batch.tokens.size for batch in batches))


class DpoStage:
    """Preference optimization on one topic's pairs, against the reference taken at its start."""

    def __init__(
        self, plan: StagePlan, examples: Sequence[PreferenceExample], pad_id: int, reference: CompletionSums | None
    ) -> None:
        assert isinstance(plan.settings, DpoConfig)
        self.plan = plan
        self._examples = examples
        self._pad_id = pad_id
        self._reference = reference
        self._loss = plan.settings.preference_loss()

    def take_step(self, engine: Engine, step: int) -> StepOutcome:
        micro_batches = self.plan.order.micro_batches(step)
        batches = [self._batch(micro) for micro in micro_batches]
        chosen_tokens = sum(int(batch.chosen_lengths.sum()) for batch in batches)
        pairs = sum(batch.pairs for batch in batches)
        update = _update(self.plan, step, tokens=chosen_tokens, pairs=pairs)
        metrics = engine.backend.dpo_step(engine.model, batches, self._loss, update)
        self._check(engine, step, batches, metrics, update)
        origins = tuple(self._examples[row].origin for micro in micro_batches for row in micro)
        return StepOutcome(metrics, _tokens(batches), origins, self._rewards(batches, metrics), _padding(batches))

    def _batch(self, rows: Sequence[int]) -> PreferenceBatch:
        reference = None
        if self._reference is not None:
            index = np.asarray(rows)
            reference = (self._reference.chosen[index], self._reference.rejected[index])
        return preference_batch([self._examples[row] for row in rows], self._pad_id, reference)

    def _check(
        self, engine: Engine, step: int, batches: Sequence[PreferenceBatch], metrics: StepMetrics, update: Update
    ) -> None:
        if metrics.skipped or not is_finite(metrics):
            return
        if step == 0:
            guards.check_first_preference_step(batches, metrics, self._loss, engine.model.dtype)
        guards.check_preference_loss(batches, metrics, self._loss, update)

    def _rewards(self, batches: Sequence[PreferenceBatch], metrics: StepMetrics) -> Rewards:
        chosen, rejected = self._loss.rewards(guards.pair_log_probs(batches, metrics))
        margins = chosen - rejected
        return Rewards(float(chosen.mean()), float(rejected.mean()), float(margins.mean()), float((margins > 0).mean()))


def _update(plan: StagePlan, step: int, tokens: int, pairs: int = 0) -> Update:
    settings = plan.settings
    seed = int(random_bits(1, plan.order.seed, "step", plan.topic, plan.stage, step)[0] >> 33)
    return Update(
        plan.learning_rate(step),
        tokens,
        pairs,
        settings.optimizer,
        max_grad_norm=settings.max_grad_norm,
        seed=seed,
        share_prompts=isinstance(settings, DpoConfig) and settings.share_prompts,
        gradient_checkpointing=plan.backend.gradient_checkpointing,
    )


def _padding(batches: Sequence[PreferenceBatch]) -> float:
    parts = [
        part
        for batch in batches
        for part in (
            (batch.prompt, batch.prompt_lengths),
            (batch.chosen, batch.chosen_lengths),
            (batch.rejected, batch.rejected_lengths),
        )
    ]
    return 1 - sum(int(lengths.sum()) for _, lengths in parts) / sum(values.size for values, _ in parts)


def _tokens(batches: Sequence[PreferenceBatch]) -> int:
    return sum(
        int(2 * batch.prompt_lengths.sum() + batch.chosen_lengths.sum() + batch.rejected_lengths.sum())
        for batch in batches
    )
