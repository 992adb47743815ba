"""`trackers: [tensorboard]` writes the run's numbers as TensorBoard event files into `RUN/tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindprint.events import Evaluated, Event, RunFinished, RunStarted, StepDone
from mindprint.hookspecs import hookimpl
from mindprint.trackers.scalars import evaluation_scalars, step_scalars


class TensorBoard:
    """A writer of one run's event file. If the run is killed, the file is whole up to the last step."""

    def __init__(self) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # noqa: PLC0415 (only where it is named)
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # noqa: PLC0415

        self._make: Any = EventFileWriter
        self._event: Any = event_pb2.Event
        self._summary: Any = summary_pb2.Summary
        self._writer: Any = None

    @hookimpl
    def mindprint_event(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._writer = self._make(str(Path(event.run) / "tensorboard"))
        elif isinstance(event, StepDone):
            self._write(event.step, step_scalars(event))
        elif isinstance(event, Evaluated):
            self._write(event.record.step, evaluation_scalars(event))
        elif isinstance(event, RunFinished):
            self._writer.close()

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        if not scalars:
            return
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._writer.add_event(self._event(step=step, summary=self._summary(value=values)))
        self._writer.flush()  # the writer buffers for two minutes otherwise, which a kill would lose
