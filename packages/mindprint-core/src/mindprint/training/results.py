"""What a run came to, read from the run itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindprint.events import StageName
from mindprint.training.run_folder import RunFolder


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
class RunResult:
    """What a run left behind."""

    run: Path
    adapter: Path
    stages: tuple[StageResult, ...]


def stage_results(folder: RunFolder) -> tuple[StageResult, ...]:
    """What each stage came to, from metrics.jsonl: true also for a run that was resumed."""
    stages: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in folder.read_steps():
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
