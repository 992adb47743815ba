"""What a run will do, decided before it does anything: a flat list of stages, topic by topic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mindprint.config import BackendConfig, Config, DpoConfig, SftConfig
from mindprint.contract import StageName
from mindprint.data.order import StageOrder
from mindprint.training.schedule import learning_rate

DEFAULT_SFT_EPOCHS = 3
DEFAULT_DPO_STEPS = 100


@dataclass(frozen=True)
class StagePlan:
    """One stage of one topic. `first_step` is how many optimizer steps of the run come before it.

    As planned, no stage is skipped and no topic tried again; `taken` says where a stage really comes.
    """

    index: int
    topic: str
    stage: StageName
    settings: SftConfig | DpoConfig
    backend: BackendConfig
    order: StageOrder
    first_step: int
    attempt: int = 1

    @property
    def steps(self) -> int:
        return self.order.total_steps

    def learning_rate(self, step: int) -> float:
        """The learning rate of the stage's step `step`, from 0."""
        chosen = self.settings
        return learning_rate(chosen.schedule, step, self.steps, chosen.learning_rate, chosen.warmup_steps)

    def taken(self, first_step: int, attempt: int = 1, learning_rate: float = 1.0) -> StagePlan:
        """The stage as it is taken: after `first_step` steps, in a topic's attempt, at so many times the rate."""
        rate = self.settings.learning_rate * learning_rate
        settings = self.settings.model_copy(update={"learning_rate": rate})
        return replace(self, first_step=first_step, attempt=attempt, settings=settings)


def plan_run(
    config: Config,
    topics: Sequence[str],
    sft_rows: Mapping[str, int],
    pairs: Mapping[str, int],
    lengths: Mapping[tuple[str, StageName], Sequence[int]] | None = None,
) -> tuple[StagePlan, ...]:
    """SFT, then DPO, for each topic in the order given. The mappings count the rows of each topic.

    `lengths` are the tokens of the rows of each topic and stage, for batches by length.
    """
    plans: list[StagePlan] = []
    for topic in topics:
        stages: tuple[tuple[StageName, SftConfig | DpoConfig, int], ...] = (
            ("sft", config.sft, sft_rows.get(topic, 0)),
            ("dpo", config.dpo, pairs.get(topic, 0)),
        )
        for stage, settings, rows in stages:
            if settings.enabled and rows:
                first_step = plans[-1].first_step + plans[-1].steps if plans else 0
                of_rows = (lengths or {}).get((topic, stage))
                order = _order(config, settings, topic, stage, rows, of_rows)
                backend = settings.backend or config.backend
                plans.append(StagePlan(len(plans), topic, stage, settings, backend, order, first_step))
    return tuple(plans)


def total_steps(plans: Sequence[StagePlan]) -> int:
    """Optimizer steps of the whole run."""
    return sum(plan.steps for plan in plans)


def _order(
    config: Config,
    settings: SftConfig | DpoConfig,
    topic: str,
    stage: StageName,
    rows: int,
    lengths: Sequence[int] | None,
) -> StageOrder:
    epochs, steps = settings.epochs_per_topic, settings.steps_per_topic
    if epochs is None and steps is None:
        epochs, steps = (DEFAULT_SFT_EPOCHS, None) if stage == "sft" else (None, DEFAULT_DPO_STEPS)
    return StageOrder(
        rows,
        settings.batch_size,
        settings.gradient_accumulation,
        config.seed,
        topic,
        stage,
        epochs=epochs,
        steps=steps,
        lengths=None if lengths is None else tuple(lengths),
        length_window=config.data.length_window,
    )
