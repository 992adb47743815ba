"""Events of a run, as values. `mindprint_event` receives them, and progress displays are made of them.

An event may get new fields, and a run may send new kinds of events: a tracker ignores the kinds that it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mindprint.contract import StageName

# For annotations alone. Trackers import this module, and need nothing of the code that runs.
if TYPE_CHECKING:
    from mindprint.config import Level
    from mindprint.runs.records import Decision, EvaluationRecord


@dataclass(frozen=True)
class Event:
    """Root of all events."""


@dataclass(frozen=True)
class RunStarted(Event):
    """The start of a run, or its continuation from a checkpoint.

    Args:
        run: The run's folder.
        total_steps: Optimizer steps of all topics and stages.
        resumed_from: The global step of the checkpoint. None for a new run.
    """

    run: str
    total_steps: int
    resumed_from: int | None = None


@dataclass(frozen=True)
class Notice(Event):
    """A sentence for the user: a choice made for them, rows that were cut, a plugin that was left out."""

    message: str
    warning: bool = False


@dataclass(frozen=True)
class StageStarted(Event):
    """The start of a topic's stage.

    Args:
        topic: The topic's name.
        stage: The stage.
        backend: The name of the backend that trains it.
        steps: Optimizer steps of the stage.
        first_step: The step at which it continues, from 0.
    """

    topic: str
    stage: StageName
    backend: str
    steps: int
    first_step: int = 0


@dataclass(frozen=True)
class StepDone(Event):
    """One optimizer step, with the fields of its line in metrics.jsonl.

    Args:
        topic: The topic's name.
        stage: The stage.
        backend: The name of the backend.
        step: The step within the whole run, from 1.
        stage_step: The step within the stage, from 1.
        loss: The loss before the update, in nats.
        learning_rate: The rate of this step.
        grad_norm: The global norm of the gradient before clipping.
        tokens: Tokens that the model read, without padding.
        seconds: Time of the step.
        skipped: Whether float16 gradients overflowed and no update was applied.
        loss_scale: The loss scale of a float16 base.
        reward_chosen: Mean reward of the step's chosen completions. As for all rewards, None in SFT.
        reward_rejected: Mean reward of the rejected completions.
        reward_margin: Mean difference of the two.
        reward_accuracy: Share of pairs whose chosen completion has the higher reward.
        attempt: The topic's attempt, given from the second on.
        padding: Share of the batches' arrays that is padding. `data.length_window` makes it smaller.
    """

    topic: str
    stage: StageName
    backend: str
    step: int
    stage_step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    skipped: bool = False
    loss_scale: float | None = None
    reward_chosen: float | None = None
    reward_rejected: float | None = None
    reward_margin: float | None = None
    reward_accuracy: float | None = None
    attempt: int | None = None
    padding: float = 0.0


@dataclass(frozen=True)
class CheckpointWritten(Event):
    """A checkpoint that is on disk, whole. `step` counts over the whole run."""

    path: str
    step: int


@dataclass(frozen=True)
class StageFinished(Event):
    """The end of a topic's stage.

    Args:
        topic: The topic's name.
        stage: The stage.
        backend: The name of the backend.
        steps: Optimizer steps of the stage.
        first_loss: The loss of the stage's first step, if this process took it.
        last_loss: The loss of its last step.
        seconds: Time of the stage's steps, also of those that an earlier process took.
    """

    topic: str
    stage: StageName
    backend: str
    steps: int
    first_loss: float | None
    last_loss: float | None
    seconds: float


@dataclass(frozen=True)
class Evaluating(Event):
    """The progress of an evaluation. The first one has `done` 0, the last one has `done` equal to `total`.

    Args:
        level: The part of the run that is evaluated.
        name: The topic's, chapter's or unit's name. Empty at the end of the run.
        done: Held-out rows that were answered or read so far, by either model.
        total: Held-out rows that this evaluation answers or reads.
    """

    level: Level
    name: str
    done: int
    total: int


@dataclass(frozen=True)
class Evaluated(Event):
    """An evaluation on held-out text. `record` is its line in evaluations.jsonl."""

    record: EvaluationRecord


@dataclass(frozen=True)
class Decided(Event):
    """A gate, a retry, a roll-back or a verdict.

    Args:
        decision: Its line in decisions.jsonl.
        total_steps: The run's optimizer steps as planned now: those taken and those to come.
    """

    decision: Decision
    total_steps: int


@dataclass(frozen=True)
class RunFinished(Event):
    """The end of a complete run. `adapter` is the folder of its adapter."""

    run: str
    adapter: str
    seconds: float


@runtime_checkable
class Observer(Protocol):
    """An object that watches a run: `mindprint.train(..., observers=[observer])`.

    It receives every event, in order, after core's own files are written. Tell events apart by their class::

        class Losses:
            def on_event(self, event: Event) -> None:
                match event:
                    case StepDone(step=step, loss=loss):
                        print(step, loss)
    """

    def on_event(self, event: Event) -> None:
        """Receive one event. An exception ends the run."""
