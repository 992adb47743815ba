"""A run's folder as one value, read and never written. Files that older or unfinished runs lack are None here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from mindprint.config import Config, load_config
from mindprint.contract import StageName
from mindprint.errors import MindprintError, RunError
from mindprint.input_files import MALFORMED, parse_json, read_bytes, read_object, typed
from mindprint.runs.folder import RUN_FORMAT, RunFolder, check_format
from mindprint.runs.records import (
    OUTCOMES,
    AnswerRecord,
    Decision,
    EvaluationRecord,
    answer_from,
    decision_from,
    evaluation_from,
)

Record = TypeVar("Record")

Stretch = tuple[str, StageName, int, bool]


@dataclass(frozen=True)
class Step:
    """One line of metrics.jsonl. `undone`: it belongs to a stage or an attempt that was rolled back."""

    topic: str
    stage: StageName
    step: int
    loss: float
    seconds: float
    attempt: int = 1
    undone: bool = False
    skipped: bool = False
    reward_chosen: float | None = None
    reward_rejected: float | None = None
    reward_margin: float | None = None

    @property
    def stretch(self) -> Stretch:
        """Return the group of steps that it belongs to: a stage of a topic, in one attempt, undone or not."""
        return self.topic, self.stage, self.attempt, self.undone


@dataclass(frozen=True)
class _Sections:
    """The parts of a manifest that readers go through by name. A run of an older version may lack any of them."""

    model: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, dict[str, Any]] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedStage:
    """A stage as the manifest lists it."""

    topic: str
    stage: StageName
    steps: int
    backend: str
    device: str
    dtype: str


@dataclass(frozen=True)
class RunRecord:
    """Everything that a report shows.

    `evaluations`, `decisions` and `answers` are None where the run has no such file, which is not the same as none.
    `titles`: of topics, chapters and units by id. `config` is None where this version cannot read it. `broken` names
    files with a line that is none.
    """

    path: Path
    complete: bool
    config: Config | None
    manifest: Mapping[str, Any]
    titles: Mapping[str, str]
    stages: tuple[PlannedStage, ...]
    steps: tuple[Step, ...]
    evaluations: tuple[EvaluationRecord, ...] | None
    decisions: tuple[Decision, ...] | None
    answers: tuple[AnswerRecord, ...] | None
    broken: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def topics(self) -> tuple[str, ...]:
        """Return every topic of the run, in order of training."""
        # The plan gives the order. A manifest without a plan leaves only the steps to tell the topics.
        return tuple(dict.fromkeys([*(stage.topic for stage in self.stages), *(step.topic for step in self.steps)]))

    @property
    def final(self) -> EvaluationRecord | None:
        """Return the evaluation of the finished adapter on all held-out text."""
        return self._last(lambda one: one.level == "final")

    @property
    def voice_name(self) -> str:
        """Return the name of the run's voice: without other people's text it is a distance from the base model."""
        measured = [record.figures for record in self.evaluations or () if record.figures.voice]
        return measured[-1].voice_name if measured else "voice"

    def trained(self, topic: str) -> EvaluationRecord | None:
        """Return the evaluation right after the topic's training, of the state that was kept."""
        return self._last(lambda one: _about(one, topic) and one.stage is not None and not self.undone(one))

    def at_the_end(self, topic: str) -> EvaluationRecord | None:
        """Return the final evaluation of the topic, with everything trained."""
        return self._last(lambda one: _about(one, topic) and one.stage is None)

    def undone(self, record: EvaluationRecord) -> bool:
        """Return whether the evaluated state was rolled back afterwards."""
        return any(
            decision.topic == record.name
            and decision.first_step is not None
            and decision.last_step is not None
            and decision.first_step <= record.step <= decision.last_step
            and (decision.attempt, decision.stage or record.stage) == (record.attempt, record.stage)
            for decision in self.decisions or ()
        )

    def outcome(self, topic: str) -> str:
        """Return `passed`, `failed`, `not evaluated` or `measured`, or `not trained` if the run never reached it."""
        decided = [past.decision for past in self.decisions or () if past.topic == topic]
        # A retried topic has several. The last one is about the attempt that was kept.
        verdicts = [decision for decision in decided if decision in OUTCOMES]
        if verdicts:
            return OUTCOMES[verdicts[-1]]
        if not any(step.topic == topic for step in self.steps):
            return "not trained"
        found = self.trained(topic) or self.at_the_end(topic)
        if found is None:
            return "not evaluated"
        return "not evaluated" if found.figures.voice is None and found.outcome == "measured" else found.outcome

    def title(self, name: str) -> str:
        return self.titles.get(name) or name

    def _last(self, wanted: Callable[[EvaluationRecord], bool]) -> EvaluationRecord | None:
        # A retried topic is evaluated again. Its last evaluation is about the state that was kept.
        return next((record for record in reversed(self.evaluations or ()) if wanted(record)), None)


def read_run(path: Path) -> RunRecord:
    """Read a run, complete or not. Raises `RunError` in one line where `path` holds none, or an unreadable manifest."""
    folder = RunFolder(path)
    if not folder.holds_run:
        problem = "is not a run (no manifest.json)" if path.is_dir() else "no such folder"
        raise RunError(f"{path}: {problem}; name the folder of a run, such as my-voice/runs/run-001")
    manifest = _manifest(folder.manifest)
    broken: list[str] = []
    curriculum = manifest.get("curriculum")
    titles = curriculum.get("titles", {}) if isinstance(curriculum, Mapping) else {}
    return RunRecord(
        path=path.resolve(),
        complete=folder.complete,
        config=_config(folder, broken),
        manifest=manifest,
        titles={str(name): str(title) for name, title in titles.items()} if isinstance(titles, Mapping) else {},
        stages=_planned(folder.manifest, manifest),
        steps=_read(folder.metrics, _step, broken) or (),
        evaluations=_read(folder.evaluations_file, evaluation_from, broken),
        decisions=_read(folder.decisions_file, decision_from, broken),
        answers=_read(folder.answers_file, answer_from, broken),
        broken=tuple(broken),
    )


def finite(values: Iterable[float | None]) -> list[float]:
    """Return the values that are finite numbers."""
    return [value for value in values if value is not None and math.isfinite(value)]


def _about(record: EvaluationRecord, topic: str) -> bool:
    return record.level == "topic" and record.name == topic


def _manifest(file: Path) -> Mapping[str, Any]:
    content = read_object(file, RunError, remedy="; it is the run's own record and cannot be rebuilt")
    check_format(file, content.get("format", 1), RUN_FORMAT)
    try:
        typed(_Sections, content)
    except ValueError as error:
        raise RunError(f"{file}: {error}; restore the file from a copy") from error
    return content


def _planned(file: Path, manifest: Mapping[str, Any]) -> tuple[PlannedStage, ...]:
    try:
        return tuple(typed(PlannedStage, stage) for stage in manifest.get("stages", ()))
    except MALFORMED as error:
        raise RunError(f"{file}: its stages cannot be read: {error}; restore the file from a copy") from error


def _config(folder: RunFolder, broken: list[str]) -> Config | None:
    try:
        # A report is still useful without the settings, so the problem is listed and does not end the reading.
        return load_config(folder.config).config
    except MindprintError as error:
        broken.append(str(error))
        return None


def _read(file: Path, parse: Callable[[Mapping[str, Any]], Record], broken: list[str]) -> tuple[Record, ...] | None:
    """Read the records of a file up to the first line that is not one: a crash cuts the last one off."""
    if not file.is_file():
        return None
    found: list[Record] = []
    for number, line in enumerate(_text(file).splitlines(), 1):
        try:
            found.append(parse(parse_json(line)))
        except MALFORMED:
            broken.append(
                f"{file.name}, line {number}: is not as this version writes it; this line and all after it are left out"
            )
            break
    return tuple(found)


def _text(file: Path) -> str:
    try:
        # A bad byte must spoil its own line only, not the reading of the whole file.
        return read_bytes(file).decode(errors="replace")
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}; restore it, or move it away") from error


def _step(line: Mapping[str, Any]) -> Step:
    # Most lines lack `rolled_back`, which is only written where it is true.
    marks = {"undone": bool(line.get("rolled_back")), "skipped": bool(line.get("skipped"))}
    return typed(Step, {"seconds": 0.0, **line, **marks, "attempt": line.get("attempt") or 1})
