"""A run's folder: what lies where, who may write, and the lines of metrics.jsonl."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from mindprint import atomic
from mindprint.config import Config, ConfigFile
from mindprint.contract import StageName
from mindprint.errors import RunError
from mindprint.events import StepDone
from mindprint.input_files import MALFORMED, parse_json, read_json, read_text, typed
from mindprint.runs.records import (
    AnswerRecord,
    Decision,
    EvaluationRecord,
    as_line,
    decision_from,
    evaluation_from,
)

Resume = Literal["last", "latest"]
"""From the last checkpoint, or from the newest that is sound."""

Record = TypeVar("Record")

CONFIG_FILE = "config.yaml"
MANIFEST_FILE = "manifest.json"

_NUMBERED = re.compile(r"run-(\d+)")


@dataclass(frozen=True)
class _StepLine:
    """The fields of a line of metrics.jsonl that a run needs to continue."""

    topic: str
    stage: StageName
    step: int
    loss: float
    seconds: float
    backend: str
    attempt: int | None = None


class RunFolder:
    """Paths of a run, and the few writes that are not a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = path / ".lock"
        self.config = path / CONFIG_FILE
        self.manifest = path / MANIFEST_FILE
        self.split = path / "split.json"
        self.metrics = path / "metrics.jsonl"
        self.evaluations_file = path / "evaluations.jsonl"
        self.decisions_file = path / "decisions.jsonl"
        self.answers_file = path / "answers.jsonl"
        self.checkpoints = path / "checkpoints"
        self.references = path / "references"
        self.adapter = path / "adapter"

    @property
    def begun(self) -> bool:
        """Whether a run was started here, if only just: its first file is the lock (which a copy may have left out)."""
        return self._lock.exists() or self.holds_run

    @property
    def holds_run(self) -> bool:
        """Whether a run got as far as writing down what it is."""
        return self.manifest.exists()

    @property
    def complete(self) -> bool:
        return self.adapter.is_dir()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold the run for this process. Raises `RunError` if another one is writing to it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written: {error.strerror}; choose another place with --run"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise RunError(f"{self.path}: another process is training this run") from None
        finally:
            os.close(handle)

    def write_manifest(self, content: Mapping[str, Any]) -> None:
        atomic.write_text(self.manifest, json.dumps(content, indent=2) + "\n")

    def write_split(self, trained: Sequence[str], held_out: Sequence[str]) -> None:
        """Hashes of the prompts on either side, for whoever scores the run later."""
        atomic.write_text(self.split, json.dumps({"trained": trained, "held_out": held_out}, indent=1) + "\n")

    def trained_prompts(self) -> frozenset[str]:
        """Hashes of the prompts that were trained on; none are known of a run that an older version began."""
        if not self.split.exists():
            return frozenset()
        try:
            return typed(frozenset[str], read_json(self.split)["trained"])
        except (OSError, *MALFORMED) as error:
            raise RunError(f"{self.split}: cannot be read, so what was trained on is unknown: {error}") from error

    def append_step(self, event: StepDone) -> None:
        """One line of metrics.jsonl; what does not apply to the stage is left out."""
        _append(self.metrics, {name: value for name, value in asdict(event).items() if value is not None})

    def read_steps(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl. A last line that was cut off by a crash is not one."""
        return [_checked(self.metrics, number, line) for number, line in enumerate(_lines(self.metrics), 1)]

    def append_evaluation(self, record: EvaluationRecord) -> None:
        _append(self.evaluations_file, as_line(record))

    def evaluations(self) -> list[EvaluationRecord]:
        return _parsed(self.evaluations_file, evaluation_from)

    def append_decision(self, decision: Decision) -> None:
        _append(self.decisions_file, as_line(decision))

    def decisions(self) -> list[Decision]:
        return _parsed(self.decisions_file, decision_from)

    def write_answers(self, answers: Sequence[AnswerRecord]) -> None:
        """The held-out prompts of the final evaluation with all answers."""
        _write(self.answers_file, [as_line(one) for one in answers])

    def mark_rolled_back(self, first: int, last: int) -> None:
        """Mark the lines of steps that were undone; they stay where they are."""
        lines = self.read_steps()
        _write(
            self.metrics, [{**line, "rolled_back": True} if first <= line["step"] <= last else line for line in lines]
        )

    def forget_after(self, step: int, *, ended: bool) -> None:
        """Drop what a resumed run will do again after `step`: steps, and what was found and decided later.

        Of a run whose training has `ended` the final evaluation too.
        """
        decisions = [one for one in self.decisions() if one.step <= step]
        undone = [range(one.first_step, (one.last_step or 0) + 1) for one in decisions if one.first_step]
        kept = [line for line in self.read_steps() if line["step"] <= step]
        for line in kept:
            if not any(line["step"] in steps for steps in undone):
                line.pop("rolled_back", None)
        found = [one for one in self.evaluations() if one.step <= step and not (ended and _is_final(one))]
        _write(self.metrics, kept)
        _write(self.decisions_file, [as_line(one) for one in decisions])
        _write(self.evaluations_file, [as_line(one) for one in found])


def _is_final(record: EvaluationRecord) -> bool:
    return record.level == "final" or (record.level == "topic" and record.stage is None)


def _append(file: Path, line: Mapping[str, Any]) -> None:
    try:
        # A link that somebody planted in the folder must not lead the lines elsewhere.
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with os.fdopen(handle, "a", encoding="utf-8") as opened:
            opened.write(json.dumps(line) + "\n")
    except OSError as error:
        raise RunError(f"{file}: cannot be written: {error.strerror}") from error


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    try:
        text = read_text(file)
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: cannot be read: {error}; restore it from a copy") from error
    lines = []
    for line in text.splitlines():
        try:
            lines.append(parse_json(line))
        except ValueError:
            break
    return lines


def _parsed(file: Path, parse: Callable[[dict[str, Any]], Record]) -> list[Record]:
    records = []
    for number, line in enumerate(_lines(file), 1):
        try:
            records.append(parse(line))
        except ValueError as error:
            raise RunError(f"{file}: line {number}: {error}; restore the file from a copy") from error
    return records


def _checked(file: Path, number: int, line: dict[str, Any]) -> dict[str, Any]:
    """Return a line of metrics.jsonl as it is, if it has what every step has."""
    try:
        typed(_StepLine, line)
    except ValueError as error:
        raise RunError(f"{file}: line {number}: {error}; restore the file from a copy") from error
    return line


def _write(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the lines, if there are any or were."""
    if lines or file.exists():
        atomic.write_text(file, "".join(json.dumps(line) + "\n" for line in lines))


def open_run(runs: Path, run: str | os.PathLike[str] | None, resume: Resume | None) -> RunFolder:
    """The folder to train in: `run`, or under `runs` a new one, or with `resume` the newest.

    Raises `RunError` where there is nothing to go on with, or something that a new run would overwrite.
    """
    if resume:
        path = Path(run) if run else newest_run(runs)
        if path is None or not RunFolder(path).begun:
            raise RunError(f"{path or runs}: holds no run to resume; leave out --resume to start one")
        folder = RunFolder(path.resolve())
        if folder.complete:
            raise RunError(f"{path}: is complete already; its adapter is {folder.adapter}")
        return folder
    folder = RunFolder((Path(run) if run else new_run_path(runs)).resolve())
    if folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir())):
        raise RunError(
            f"{folder.path}: already holds {'a run' if folder.begun else 'something else'}; "
            "choose another --run, or go on with it by --resume"
        )
    return folder


def new_run_path(parent: Path) -> Path:
    """The next free `run-NNN` under `parent`."""
    taken = [int(found[1]) for path in _entries(parent) if (found := _NUMBERED.fullmatch(path.name))]
    return parent / f"run-{max(taken, default=0) + 1:03d}"


def newest_run(parent: Path) -> Path | None:
    """The run under `parent` that was started last, if any."""
    runs = [path for path in _entries(parent) if _NUMBERED.fullmatch(path.name) and RunFolder(path).holds_run]
    return max(runs, key=lambda path: int(path.name.partition("-")[2]), default=None)


def _entries(parent: Path) -> list[Path]:
    return list(parent.iterdir()) if parent.is_dir() else []


def portable(file: ConfigFile, run: Path) -> Config:
    """The configuration with its paths relative to the run, so that `RUN/config.yaml` can be loaded again."""
    data = file.config.data

    def relative(entry: str) -> str:
        target = file.resolve(entry)
        return os.path.relpath(target, run) if target.exists() else entry

    def relative_all(entries: str | list[str] | None) -> str | list[str] | None:
        return [relative(entry) for entry in entries] if isinstance(entries, list) else entries and relative(entries)

    changed = {name: relative_all(getattr(data, name)) for name in ("path", "sft", "preferences", "heldout")}
    name = file.config.model.name
    model = file.config.model.model_copy(update={"name": relative(name) if file.resolve(name).is_dir() else name})
    start = file.config.adapter.start_from
    adapter = file.config.adapter.model_copy(update={"start_from": start and relative(start)})
    changes = {"data": data.model_copy(update=changed), "model": model, "adapter": adapter}
    return file.config.model_copy(update=changes)
