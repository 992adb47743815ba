"""`trackers: [wandb]` writes the run's numbers as an offline W&B run into `RUN/wandb`. `wandb sync` uploads it.

Nothing leaves the machine by itself, and no text of anyone's writing is in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindprint.events import Evaluated, Event, RunFinished, RunStarted, StepDone
from mindprint.hookspecs import hookimpl
from mindprint.trackers.scalars import evaluation_scalars, step_scalars


class Wandb:
    """A writer of one offline run."""

    def __init__(self) -> None:
        import wandb  # noqa: PLC0415 (only where it is named)

        self._wandb: Any = wandb
        self._run: Any = None

    @hookimpl
    def mindprint_event(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            # W&B would record the console, the git diff and the source code: none of them is anyone's business.
            settings = self._wandb.Settings(console="off", disable_git=True, disable_code=True, silent=True)
            self._run = self._wandb.init(
                mode="offline", project="mindprint", name=Path(event.run).name, dir=event.run, settings=settings
            )
        elif isinstance(event, StepDone):
            self._run.log(step_scalars(event), step=event.step)
        elif isinstance(event, Evaluated):
            self._run.log(evaluation_scalars(event), step=event.record.step)
        elif isinstance(event, RunFinished):
            self._run.finish()
