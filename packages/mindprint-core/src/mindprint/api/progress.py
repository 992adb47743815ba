"""A run as it proceeds, from its events: a bar on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import io
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from time import monotonic
from typing import Any, Self, TextIO, cast

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from mindprint.events import (
    Decided,
    Evaluated,
    Evaluating,
    Event,
    Notice,
    RunStarted,
    StageFinished,
    StageStarted,
    StepDone,
)
from mindprint.printing import PROGRAM, LossyStream, tell, visible
from mindprint.reports.phrases import MISSING, interval, plural
from mindprint.runs.records import Decision, DecisionKind, EvaluationRecord, Figures
from mindprint.training.pace import duration

SECONDS_BETWEEN_LINES = 10.0
"""Time between two plain lines within a stage."""

SECONDS_BETWEEN_PICTURES = 0.2
"""Time between two pictures in a notebook: each one is sent to the browser whole."""

NOTEBOOK_LINES = 12
NOTEBOOK_WIDTH = 110
NOTEBOOK_PICTURE = '<pre style="line-height:1.3;margin:0;white-space:pre-wrap">{code}</pre>'

TOPIC_WIDTH = 28

STOPPING = "stopping after this step or batch, with a checkpoint; a second Ctrl-C stops at once"
"""The acknowledgement of a request to stop."""

OnEvent = Callable[[Event], None]


@contextmanager
def show_progress(console: Console | None = None) -> Iterator[OnEvent]:
    """Show a run for as long as the block lasts. Give the function that takes its events."""
    # rich ends the process when its terminal goes away, which must not end a run.
    console = console or Console(file=cast(TextIO, LossyStream(sys.stderr)), stderr=True)
    if console.is_jupyter:
        with NotebookBar() as notebook_bar:
            yield notebook_bar
    elif console.is_terminal and not console.is_dumb_terminal:
        with Bar(console) as bar:
            yield bar
    else:
        yield Lines()


def is_interactive() -> bool:
    """Return whether a person is likely to watch: standard error is a terminal, or this is a notebook."""
    # Checked at each call, because the standard error may be redirected between two runs.
    console = Console(stderr=True)
    return console.is_jupyter or console.is_terminal


class Lines:
    """A line when a stage begins and ends, and every ten seconds in between."""

    def __init__(self, write: Callable[[str], None] = tell, clock: Callable[[], float] = monotonic) -> None:
        self._write = write
        self._clock = clock
        self._last = clock()
        self._total = 0
        self._stage_steps = 0
        self._evaluation_began = clock()
        self._evaluations = Evaluations()

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._total = event.total_steps
                self._line(_started(event))
            case Notice():
                self._write(_noticed(event))
            case StageStarted():
                self._stage_steps = event.steps
                self._line(f"{event.topic} {event.stage}: {_steps(event)} on {event.backend}")
            # A log file of a long run would otherwise get a line for every step.
            case StepDone() if self._is_due():
                self._line(f"{event.topic} {event.stage}: {self._position(event)}, loss {event.loss:.4f}")
            case StageFinished():
                self._line(f"{event.topic} {event.stage}: done{_losses(event)}, {event.seconds:.1f} s")
            case Evaluating(done=0):
                self._evaluation_began = self._clock()
            case Evaluating() if self._is_due():
                self._line(f"{_evaluation(event)}: {event.done}/{event.total}{self._time_left(event)}")
            case Evaluated() if line := self._evaluations.line(event.record):
                self._line(line)
            case Decided():
                # A skipped or repeated stage changes the number of steps that are planned.
                self._total = event.total_steps
                self._line(_decided(event.decision))

    def _is_due(self) -> bool:
        return self._clock() - self._last >= SECONDS_BETWEEN_LINES

    def _time_left(self, event: Evaluating) -> str:
        # Rows of one kind take unlike times: the rest of this evaluation is only about as fast as its beginning.
        left = (self._clock() - self._evaluation_began) / event.done * (event.total - event.done)
        return f", about {duration(left)} left" if event.done < event.total else ""

    def _position(self, event: StepDone) -> str:
        return f"step {event.stage_step}/{self._stage_steps} ({event.step}/{self._total} in all)"

    def _line(self, text: str) -> None:
        self._last = self._clock()
        self._write(f"{PROGRAM}: {text}")


class Bar:
    """A bar over the whole run with the current stage and its loss. Notices scroll by above it."""

    def __init__(self, console: Console, *, auto_refresh: bool = True) -> None:
        self._console = console
        self._bar = Progress(
            # Topic names come from the user's data. Brackets in them must not be read as rich's markup.
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            auto_refresh=auto_refresh,
        )
        # The bar is hidden until the number of steps is known: before, it could only guess.
        self._task = self._bar.add_task("loading the model", total=None, loss="", visible=False)
        # Evaluations have a second bar: the steps stand still meanwhile, which would look like a hang.
        self._evaluation = self._bar.add_task("evaluating", total=None, loss="rows", visible=False)
        self._evaluations = Evaluations()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._print(f"{PROGRAM}: {_started(event)}")
                # The bar of a resumed run starts at the step from which it continues.
                self._bar.update(self._task, total=event.total_steps, completed=event.resumed_from or 0, visible=True)
            case Notice():
                self._print(_noticed(event), "yellow" if event.warning else "")
            case StageStarted():
                self._bar.update(self._task, description=f"{visible(_short(event.topic))} {event.stage}")
            case StepDone():
                self._bar.update(self._task, completed=event.step, loss=f"loss {event.loss:.4f}")
            case Evaluating(done=0):
                # Started again, so that the time left is that of this evaluation.
                self._bar.reset(
                    self._evaluation, total=event.total, visible=True, description=visible(_short(_evaluation(event)))
                )
            case Evaluating():
                self._bar.update(self._evaluation, completed=event.done, visible=event.done < event.total)
            case Evaluated() if line := self._evaluations.line(event.record):
                self._print(f"{PROGRAM}: {line}")
            case Decided():
                self._bar.update(self._task, total=event.total_steps)
                self._print(f"{PROGRAM}: {_decided(event.decision)}")

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(Text(visible(text), style=style), soft_wrap=True)


class NotebookBar(Bar):
    """The same bar in the output of a notebook's cell, with the latest notices above it.

    Rich's own live display needs ipywidgets in the notebook and in the kernel. Here rich writes the picture, and
    IPython replaces it in place, which every notebook can do.
    """

    def __init__(self, display: Callable[[str], None] | None = None, clock: Callable[[], float] = monotonic) -> None:
        super().__init__(Console(file=io.StringIO(), force_jupyter=False), auto_refresh=False)
        self._display = display or _notebook_display()
        self._clock = clock
        # The first event is shown at once.
        self._shown_at = -SECONDS_BETWEEN_PICTURES
        # Old lines are dropped, because the whole picture is sent each time.
        self._lines: deque[Text] = deque(maxlen=NOTEBOOK_LINES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # The last picture may have been skipped for its time, and must show the end.
        self._show()

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if self._clock() - self._shown_at >= SECONDS_BETWEEN_PICTURES:
            self._show()

    def _print(self, text: str, style: str = "") -> None:
        self._lines.append(Text(visible(text), style=style))

    def _show(self) -> None:
        self._shown_at = self._clock()
        # Each picture has its own console, so that its record holds this picture only.
        console = Console(file=io.StringIO(), record=True, width=NOTEBOOK_WIDTH, force_jupyter=False)
        console.print(Group(*self._lines, self._bar.get_renderable()), soft_wrap=False)
        self._display(console.export_html(inline_styles=True, code_format=NOTEBOOK_PICTURE))


def _notebook_display() -> Callable[[str], None]:
    """Return a function that shows HTML in the current cell and replaces it at each further call."""
    ipython: Any = import_module("IPython.display")
    with warnings.catch_warnings():
        # Libraries that are loaded later import this. Without ipywidgets it warns, and nothing here needs them.
        warnings.simplefilter("ignore")
        import_module("tqdm.auto")
    handle = ipython.DisplayHandle()
    shown = False

    def display(html: str) -> None:
        nonlocal shown
        (handle.update if shown else handle.display)(ipython.HTML(html))
        shown = True

    return display


class Evaluations:
    """The lines of a run's evaluations, each figure once.

    An adapter is often evaluated as the end of a topic, of a chapter and of the run at once. All of these are in
    evaluations.jsonl. A line that only repeats the figures of the one before says nothing.
    """

    def __init__(self) -> None:
        self._told: set[tuple[int, str]] = set()

    def line(self, record: EvaluationRecord) -> str:
        """Return the line to show, empty for one whose figures have been shown without a verdict of this level."""
        figures = record.step, _figures(record.figures)
        if figures in self._told and record.outcome == "measured":
            return ""
        self._told.add(figures)
        return _evaluated(record)


def _evaluation(event: Evaluating) -> str:
    return f"evaluating {event.name or 'the whole run'}"


def _started(event: RunStarted) -> str:
    resumed = f", continuing after step {event.resumed_from}" if event.resumed_from is not None else ""
    return f"run {event.run}: {event.total_steps} steps{resumed}"


def _noticed(event: Notice) -> str:
    return f"{PROGRAM}: {'warning: ' if event.warning else ''}{event.message}"


def _steps(event: StageStarted) -> str:
    if event.first_step == event.steps:
        return f"all {event.steps} steps are done"
    return f"step {event.first_step + 1} to {event.steps}" if event.first_step else f"{event.steps} steps"


def _losses(event: StageFinished) -> str:
    if event.first_loss is None or event.last_loss is None:
        return ""
    return f", loss {event.first_loss:.4f} → {event.last_loss:.4f}"


def _evaluated(record: EvaluationRecord) -> str:
    where = record.name if record.level == "topic" else f"{record.level} {record.name}"
    at = "at the end" if record.level == "final" else f"{where}{f' after {record.stage}' if record.stage else ''}"
    outcome = "" if record.outcome == "measured" else f": {record.outcome}"
    return f"evaluated {at}{outcome}: {_figures(record.figures)}"


def _figures(figures: Figures) -> str:
    parts = [_voice(figures)]
    if figures.copy_rate is not None:
        parts.append(f"{figures.copy_rate:.0%} copied")
    if figures.reward_accuracy is not None:
        pairs = plural(figures.pairs, "held-out pair")
        parts.append(
            f"reward accuracy {figures.reward_accuracy:.0%} (share of {pairs} whose chosen answer gained more)"
        )
    if figures.perplexity is not None:
        parts.append(f"perplexity {figures.base_perplexity:.1f} → {figures.perplexity:.1f}")
    if figures.concept_coverage is not None:
        parts.append(f"{figures.concept_coverage:.0%} of key concepts")
    return ", ".join(parts)


def _voice(figures: Figures) -> str:
    if figures.voice is None:
        return f"voice {MISSING} ({figures.unmeasured.get('voice', 'was not measured')})"
    return f"{figures.voice_name} {interval(figures.voice)}"


def _decided(decision: Decision) -> str:
    stage = f" {decision.stage}" if decision.stage else ""
    change = "".join(f", {name} × {factor:g}" for name, factor in (decision.change or {}).items())
    why = f": {decision.why}" if decision.why else ""
    return f"{decision.topic}{stage}: {SAID[decision.decision]}{change}{why}"


SAID: Mapping[DecisionKind, str] = {
    "skip": "skipped",
    "train": "goes ahead",
    "roll back": "rolled back to its start",
    "retry": "trained again from where it began",
    "pass": "passed",
    "fail": "failed",
    "not evaluated": "could not be evaluated",
    "stop": "the run ends here",
}


def _short(topic: str) -> str:
    # The last part of the path tells topics apart. The units before it are often the same.
    name = topic.rstrip("/").rpartition("/")[2]
    return name if len(name) <= TOPIC_WIDTH else name[: TOPIC_WIDTH - 1] + "…"
