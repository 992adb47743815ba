"""Trackers: made for one run each, watching it, unable to end it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pluggy

from mindprint.events import Event
from mindprint.plugins.entries import TRACKERS, Plugin, described
from mindprint.plugins.hooks import plugin_hooks
from mindprint.plugins.loading import ALTERNATIVES, cause_of, failure, find_plugin, load_plugin


# Compared by identity: the tracker that failed is removed from a list, and not another that equals it.
@dataclass(frozen=True, eq=False)
class Tracker:
    """A tracker made for one run. Its hooks are apart from all others, so that its failures can be told from theirs."""

    plugin: Plugin
    hooks: pluggy.HookRelay


class Trackers:
    """The trackers of one run that still watch it."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._watching = list(trackers)

    def tell(self, event: Event) -> list[str]:
        """Hand an event to each tracker, and drop the trackers that raise.

        Returns:
            A message for each tracker that was dropped.
        """
        failures = []
        # Over a copy, because trackers that raise are removed on the way.
        for tracker in tuple(self._watching):
            try:
                tracker.hooks.mindprint_event(event=event)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # noqa: BLE001 (no tracker ends a run, not even by `sys.exit`)
                self._watching.remove(tracker)
                failures.append(
                    f"{described(tracker.plugin)} raised {cause_of(error)}, at {type(event).__name__}; "
                    "it sees no more of this run, which continues"
                )
        return failures


def load_trackers(names: Iterable[str]) -> tuple[Tracker, ...]:
    """Load the trackers that a configuration names, and make each of them for one run.

    Raises:
        PluginError: A tracker is not installed, cannot be imported or started, or does not fit the contract.
    """
    return tuple(_start_tracker(name) for name in names)


def _start_tracker(name: str) -> Tracker:
    plugin = find_plugin(TRACKERS, name)
    tracker_class: Any = load_plugin(plugin)
    try:
        tracker = tracker_class()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # Trackers import their library when they are made: a ModuleNotFoundError names the package to install.
        library = getattr(error, "name", None) or plugin.distribution
        remedy = f"pip install {library}, or {ALTERNATIVES[TRACKERS]}"
        raise failure(plugin, f" cannot start: {cause_of(error)}", remedy) from error
    return Tracker(plugin, plugin_hooks(plugin, tracker))
