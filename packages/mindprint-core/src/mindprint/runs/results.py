"""What a run came to, read from the run itself."""

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
    """What a stage of a topic came to; losses are those of its first and last step."""

    topic: str
    stage: StageName
    backend: str
    steps: int
    first_loss: float
    last_loss: float
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """What held-out text said of a topic, chapter or unit, or of the whole (`final`), where thresholds were set."""

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
    """What a run left behind. `verdicts` are those of every evaluation with thresholds, in order."""

    run: Path
    adapter: Path
    stages: tuple[StageResult, ...]
    verdicts: tuple[Verdict, ...] = ()

    @property
    def failed(self) -> tuple[Verdict, ...]:
        return tuple(one for one in self.verdicts if one.outcome == "failed")

    @property
    def not_evaluated(self) -> tuple[Verdict, ...]:
        """What had a threshold and could not be held against it: neither passed nor failed."""
        return tuple(one for one in self.verdicts if one.outcome == "not evaluated")


def stage_results(folder: RunFolder) -> tuple[StageResult, ...]:
    """What each stage came to, from metrics.jsonl: true also for a run that was resumed. What was undone is none."""
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
    """Topics' verdicts from decisions.jsonl, those of the other levels from evaluations.jsonl."""
    topics = [
        Verdict("topic", one.topic, OUTCOMES[one.decision], one.why)
        for one in folder.decisions()
        if one.decision in OUTCOMES
    ]
    others = [
        Verdict(one.level, one.name, one.outcome, "; ".join(one.reasons))
        for one in folder.evaluations()
        if one.level != "topic" and one.outcome != "measured"
    ]
    return (*topics, *others)
