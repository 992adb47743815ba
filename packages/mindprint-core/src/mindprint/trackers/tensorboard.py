"""`trackers: [tensorboard]` writes the run's numbers as TensorBoard event files into `RUN/tensorboard`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindprint.events import Event, RunFinished, RunStarted, StepDone
from mindprint.hookspecs import hookimpl
from mindprint.trackers.scalars import step_scalars


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
            values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in step_scalars(event).items()]
            self._writer.add_event(self._event(step=event.step, summary=self._summary(value=values)))
            self._writer.flush()  # the writer buffers for two minutes otherwise, which a kill would lose
        elif isinstance(event, RunFinished):
            self._writer.close()
