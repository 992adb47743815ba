"""What a run says as it goes: lines for logs, a bar for terminals."""

import io

from rich.console import Console

from mindprint.api.progress import Lines, show_progress
from mindprint.events import (
    CheckpointWritten,
    Event,
    Notice,
    RunFinished,
    RunStarted,
    StageFinished,
    StageStarted,
    StepDone,
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def step(number: int, loss: float = 2.5) -> StepDone:
    return StepDone("sea/tides", "sft", "toy", number, number, loss, 1e-3, 1.0, 100, 0.5)


STAGE = StageStarted("sea/tides", "sft", "toy", 30)


def test_lines_come_at_stages_and_every_ten_seconds() -> None:
    written: list[str] = []
    clock = Clock()
    lines = Lines(written.append, clock)
    lines(RunStarted("runs/run-001", 60))
    lines(Notice("backend: toy on cpu, float32"))
    lines(Notice("3 rows were cut", warning=True))
    lines(STAGE)
    for number in range(1, 31):  # 0.4 s a step: 12 s in all
        clock.now += 0.4
        lines(step(number, loss=3 - number / 20))
    lines(CheckpointWritten("runs/run-001/checkpoints/000030", 30))
    lines(StageFinished("sea/tides", "sft", "toy", 30, 2.95, 1.5, 12.0))
    lines(RunFinished("runs/run-001", "runs/run-001/adapter", 12.5))
    assert written == [
        "mindprint: run runs/run-001: 60 steps",
        "mindprint: backend: toy on cpu, float32",
        "mindprint: warning: 3 rows were cut",
        "mindprint: sea/tides sft: 30 steps on toy",
        "mindprint: sea/tides sft: step 25/30 (25/60 in all), loss 1.7500",
        "mindprint: sea/tides sft: done, loss 2.9500 → 1.5000, 12.0 s",
    ]


def test_lines_of_a_resumed_run() -> None:
    written: list[str] = []
    lines = Lines(written.append, Clock())
    lines(RunStarted("runs/run-001", 60, resumed_from=20))
    lines(StageStarted("sea/tides", "sft", "toy", 30, first_step=20))
    assert written == [
        "mindprint: run runs/run-001: 60 steps, continuing after step 20",
        "mindprint: sea/tides sft: step 21 to 30 on toy",
    ]


def test_a_bar_on_a_terminal() -> None:
    shown = _shown(RunStarted("runs/run-001", 60), Notice("[red] is no markup"), STAGE, step(15))
    assert "mindprint: run runs/run-001: 60 steps" in shown
    assert "mindprint: [red] is no markup" in shown
    last = shown.splitlines()[-1]
    assert last.startswith("tides sft")
    assert "15/60 loss 2.5000" in last


def test_a_bar_stays_on_one_line_however_long_the_topic() -> None:
    stage = StageStarted("unit/" + "very-long-topic-name-" * 5, "dpo", "toy", 10)
    last = _shown(RunStarted("r", 60), stage, step(15)).splitlines()[-1]
    assert last.startswith("very-long-topic-name-very-l… dpo")
    assert len(last) <= 100


def test_a_dumb_terminal_gets_lines() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    with show_progress(console) as on_event:
        assert isinstance(on_event, Lines)


def _shown(*events: Event) -> str:
    """What stands on a terminal of 100 columns at the end, its control sequences left out."""
    console = Console(
        file=io.StringIO(), force_terminal=True, width=100, color_system=None, legacy_windows=False, _environ={}
    )
    with show_progress(console) as on_event:
        for event in events:
            on_event(event)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    for sequence in ("\x1b[?25l", "\x1b[?25h", "\x1b[2K", "\x1b[1A"):
        text = text.replace(sequence, "")
    return text.replace("\r", "\n").rstrip()
