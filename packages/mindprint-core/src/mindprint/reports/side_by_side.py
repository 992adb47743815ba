"""Runs side by side: their final figures, the settings that differ, and whether their voices differ beyond chance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mindprint.contract import StageName
from mindprint.reports.content import flattened
from mindprint.runs.reading import RunRecord
from mindprint.runs.records import Figures, Interval


@dataclass(frozen=True)
class RunFigures:
    """A run's final figures. They are None if it was not evaluated, and `unmeasured` says why.

    `losses` has the loss of the last step that was kept, by stage. `topics` counts topics by outcome.
    """

    run: str
    complete: bool
    figures: Figures | None
    unmeasured: str
    losses: Mapping[StageName, float]
    topics: Mapping[str, int]
    seconds: float


@dataclass(frozen=True)
class VoiceDifference:
    """The voice of `run` less that of the first run.

    `beyond` is True if the two 95 % intervals do not overlap. It is None if a voice is missing, for `reason`. `name` is
    what was compared: a voice, or only the distance from the base model.
    """

    run: str
    difference: float | None
    beyond: bool | None
    reason: str = ""
    name: str = "voice"


@dataclass(frozen=True)
class RunsCompared:
    """Runs with the settings in which they differ, and cautions: reasons why figures may not be comparable."""

    runs: tuple[RunFigures, ...]
    settings: Mapping[str, tuple[str, ...]]
    differences: tuple[VoiceDifference, ...]
    cautions: tuple[str, ...]


def compare_runs(records: Sequence[RunRecord]) -> RunsCompared:
    """Compare two or more runs, each with the first."""
    runs = tuple(_figures(record) for record in records)
    return RunsCompared(
        runs,
        _settings(records),
        tuple(_difference(runs[0], other) for other in runs[1:]),
        tuple(_cautions(records)),
    )


def _figures(record: RunRecord) -> RunFigures:
    figures = record.final.figures if record.final else None
    kept = [step for step in record.steps if not step.undone and math.isfinite(step.loss)]
    return RunFigures(
        run=str(record.path),
        complete=record.complete,
        figures=figures,
        unmeasured="" if figures else _why(record),
        losses={step.stage: step.loss for step in kept},
        topics=Counter(record.outcome(topic) for topic in record.topics),
        seconds=sum(step.seconds for step in record.steps),
    )


def _why(record: RunRecord) -> str:
    if record.evaluations is None:
        return "it has no evaluations.jsonl: no held-out text, or older than evaluation in training"
    return "it has no final evaluation" + ("" if record.complete else ", and is not complete")


def _settings(records: Sequence[RunRecord]) -> dict[str, tuple[str, ...]]:
    """Return the settings that differ. A run whose configuration cannot be read has a `?` in each."""
    each = [dict(flattened(record.config.model_dump(mode="json"))) if record.config else None for record in records]
    names = dict.fromkeys(name for values in each for name in values or ())
    rows = {name: tuple("?" if values is None else values.get(name, "null") for values in each) for name in names}
    return {name: row for name, row in rows.items() if len(set(row)) > 1}


def _difference(first: RunFigures, other: RunFigures) -> VoiceDifference:
    first_voice, other_voice = (run.figures.voice if run.figures else None for run in (first, other))
    if first_voice is None or other_voice is None:
        lacking = [run.run for run, voice in ((first, first_voice), (other, other_voice)) if voice is None]
        return VoiceDifference(other.run, None, None, f"no voice was evaluated in {' and '.join(lacking)}")
    names = [run.figures.voice_name for run in (first, other) if run.figures]
    if len(set(names)) > 1:
        return VoiceDifference(other.run, None, None, f"one run has a {names[0]}, and the other a {names[1]}")
    difference = other_voice.value - first_voice.value
    return VoiceDifference(other.run, difference, apart(first_voice, other_voice), name=names[0])


def apart(first: Interval, other: Interval) -> bool:
    """Return whether two intervals do not overlap."""
    return first.high < other.low or other.high < first.low


def _cautions(records: Sequence[RunRecord]) -> list[str]:
    def differs(*keys: str) -> bool:
        return len({str(_at(record.manifest, keys)) for record in records}) > 1

    cautions = []
    if differs("identity", "base model"):
        cautions.append("the runs have different bases: each voice is measured from another base model")
    if differs("splits", "digests", "held_out"):
        cautions.append("the runs hold out different prompts: their figures are of different text")
    return cautions


def _at(values: object, keys: Sequence[str]) -> object:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values
