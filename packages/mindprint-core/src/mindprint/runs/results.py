"""The results of a run, read from the run itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindprint.config import Level
from mindprint.contract import StageName
from mindprint.runs.folder import RunFolder
from mindprint.runs.records import OUTCOMES, Outcome


@dataclass(frozen=True)
class StageResult:
    """The result of a stage of a topic. The losses are those of its first and last step."""

    topic: str
    stage: StageName
    backend: str
    steps: int
    first_loss: float
    last_loss: float
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """The outcome for a topic, chapter or unit, or for the whole run (`final`), where thresholds were set."""

    level: Level
    name: str
    outcome: Outcome
    why: str

    def __str__(self) -> str:
        words = {"failed": "failed", "not evaluated": "could not be evaluated", "passed": "passed"}
        what = "the final evaluation" if self.level == "final" else f"{self.level} {self.name}"
        return f"{what} {words.get(self.outcome, self.outcome)}{f': {self.why}' if self.why else ''}"


@dataclass(frozen=True)
class RunResult:
    """The result of a run. `verdicts` are those of every evaluation with thresholds, in order."""

    run: Path
    adapter: Path
    stages: tuple[StageResult, ...]
    verdicts: tuple[Verdict, ...] = ()

    @property
    def failed(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if verdict.outcome == "failed")

    @property
    def not_evaluated(self) -> tuple[Verdict, ...]:
        """Return the verdicts whose threshold could not be applied: neither passed nor failed."""
        return tuple(verdict for verdict in self.verdicts if verdict.outcome == "not evaluated")


def stage_results(folder: RunFolder) -> tuple[StageResult, ...]:
    """Return each stage's result from metrics.jsonl, also of a run that was resumed, without steps that were undone."""
    # From the file and not from this process, which may have resumed in the middle of a stage.
    stages: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in folder.read_steps():
        if not line.get("rolled_back"):
            stages.setdefault((line["topic"], line["stage"]), []).append(line)
    return tuple(
        StageResult(
            topic=lines[0]["topic"],
            stage=lines[0]["stage"],
            backend=lines[-1]["backend"],
            steps=len(lines),
            first_loss=lines[0]["loss"],
            last_loss=lines[-1]["loss"],
            seconds=round(sum(line["seconds"] for line in lines), 3),
        )
        for lines in stages.values()
    )


def verdicts(folder: RunFolder) -> tuple[Verdict, ...]:
    """Return topics' verdicts from decisions.jsonl, and those of the other levels from evaluations.jsonl."""
    # A topic's verdict is a decision, because retries and early ends depend on it.
    topics = [
        Verdict("topic", decision.topic, OUTCOMES[decision.decision], decision.why)
        for decision in folder.decisions()
        if decision.decision in OUTCOMES
    ]
    others = [
        Verdict(record.level, record.name, record.outcome, "; ".join(record.reasons))
        for record in folder.evaluations()
        if record.level != "topic" and record.outcome != "measured"
    ]
    return (*topics, *others)
