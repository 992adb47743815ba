"""Scorer plugins: measures of a voice in addition to core's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mindprint.plugins.entries import SCORERS
from mindprint.plugins.hooks import plugin_hooks
from mindprint.plugins.loading import call_plugin, failure, find_plugin, load_plugin

if TYPE_CHECKING:
    from mindprint.contract import Measure


def load_scorers(wanted: Mapping[str, Mapping[str, object]]) -> tuple[Measure, ...]:
    """Load the scorer plugins that a configuration names, and return their measures.

    Args:
        wanted: The settings of each scorer, by its name: `voice.scorers`.

    Raises:
        ScorerError: A scorer is not installed, claimed twice, broken, or does not fit the contract.
        ConfigError: A scorer refuses its settings.
    """
    return tuple(measure for name, settings in wanted.items() for measure in _load_measures(name, settings))


def _load_measures(name: str, settings: Mapping[str, object]) -> Sequence[Measure]:
    plugin = find_plugin(SCORERS, name)
    hooks = plugin_hooks(plugin, load_plugin(plugin))

    def ask() -> list[Any]:
        # A hook may answer with a generator, whose code runs only here: it belongs to the guarded call.
        return [measure for answer in hooks.mindprint_scorers(settings=settings) for measure in answer]

    measures = call_plugin(plugin, "mindprint_scorers", ask)
    for measure in measures:
        if not isinstance(getattr(measure, "name", None), str) or not callable(getattr(measure, "fit", None)):
            finding = f": mindprint_scorers returned a {type(measure).__name__}, the contract asks for a Measure"
            raise failure(plugin, finding)
    return measures
