"""What happens in a run, as values: what `mindprint_event` receives and what progress displays are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mindprint.contract import StageName

if TYPE_CHECKING:
    from mindprint.runs.records import Decision, EvaluationRecord


@dataclass(frozen=True)
class Event:
    """Root of all events."""


@dataclass(frozen=True)
class RunStarted(Event):
    """A run begins, or goes on from a checkpoint (`resumed_from`, a global step)."""

    run: str
    total_steps: int
    resumed_from: int | None = None


@dataclass(frozen=True)
class Notice(Event):
    """Something the user should hear: a choice made for them, rows cut, a fallback that the docs state."""

    message: str
    warning: bool = False


@dataclass(frozen=True)
class StageStarted(Event):
    """A stage of a topic begins at `first_step` of `steps`."""

    topic: str
    stage: StageName
    backend: str
    steps: int
    first_step: int = 0


@dataclass(frozen=True)
class StepDone(Event):
    """One optimizer step, as the line of metrics.jsonl has it. `step` counts over the whole run, from 1.

    `tokens` are those that the model read, without padding, and `padding` is the share that it would be of the batches'
    arrays (`data.length_window` makes it smaller); rewards are means over the step's pairs. `attempt` is given from a
    topic's second on.
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
    """A checkpoint is on disk, whole."""

    path: str
    step: int


@dataclass(frozen=True)
class StageFinished(Event):
    """A stage of a topic is complete."""

    topic: str
    stage: StageName
    backend: str
    steps: int
    first_loss: float | None
    last_loss: float | None
    seconds: float


@dataclass(frozen=True)
class Evaluated(Event):
    """The run evaluated itself on held-out text; the line of evaluations.jsonl."""

    record: EvaluationRecord


@dataclass(frozen=True)
class Decided(Event):
    """A gate, a retry, a roll-back, a verdict: the line of decisions.jsonl.

    `total_steps` are the run's as now planned: those taken, and those still to come.
    """

    decision: Decision
    total_steps: int


@dataclass(frozen=True)
class RunFinished(Event):
    """The run is complete and its adapter is written."""

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
