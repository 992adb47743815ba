"""`trackers: [wandb]`: the run's numbers as an offline W&B run in `RUN/wandb`; `wandb sync` uploads it, if you want to.

Nothing leaves the machine by itself, and no text of anyone's writing is in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindprint.events import Event, RunFinished, RunStarted, StepDone
from mindprint.hookspecs import hookimpl
from mindprint.trackers.scalars import scalars


class Wandb:
    """One offline run."""

    def __init__(self) -> None:
        import wandb  # noqa: PLC0415 (only where it is named)

        self._wandb: Any = wandb
        self._run: Any = None

    @hookimpl
    def mindprint_event(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            settings = self._wandb.Settings(console="off", disable_git=True, disable_code=True, silent=True)
            self._run = self._wandb.init(
                mode="offline", project="mindprint", name=Path(event.run).name, dir=event.run, settings=settings
            )
        elif isinstance(event, StepDone):
            self._run.log(scalars(event), step=event.step)
        elif isinstance(event, RunFinished):
            self._run.finish()
