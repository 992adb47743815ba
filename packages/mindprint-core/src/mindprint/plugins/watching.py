"""Trackers watch a run and cannot end it."""

from __future__ import annotations

from collections.abc import Sequence

from mindprint.events import Event
from mindprint.plugins.loading import Tracker, described


class Trackers:
    """The trackers of one run that still watch it."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._watching = list(trackers)

    def tell(self, event: Event) -> list[str]:
        """Hand an event to each. One that raises sees no more; returns what to say of it.

        A library that calls `sys.exit` ends no run either. KeyboardInterrupt is the user's and passes.
        """
        failures = []
        for tracker in tuple(self._watching):
            try:
                tracker.hooks.mindprint_event(event=event)
            except (Exception, SystemExit) as error:  # noqa: BLE001 (whatever it is, training goes on)
                self._watching.remove(tracker)
                failures.append(
                    f"{described(tracker.plugin)} raised {type(error).__name__}: {error}, at {type(event).__name__}; "
                    "it sees no more of this run, which goes on"
                )
        return failures
