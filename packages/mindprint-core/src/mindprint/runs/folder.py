"""A run's folder: its files, who may write them, and how it is made and found.

The manifest states the format of the folder as a whole: of itself, metrics.jsonl, evaluations.jsonl, decisions.jsonl
and answers.jsonl. Files that are read alone (split.json, costs.json, checkpoints, references) state their own.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from mindprint import atomic
from mindprint.config import Config, ConfigFile
from mindprint.contract import StageName
from mindprint.errors import RunError
from mindprint.events import StepDone
from mindprint.input_files import MALFORMED, parse_json, read_json, read_object, read_text, typed
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

RUN_FORMAT = 1
"""The format of a run's folder, in its manifest. Fields that are added do not change it: readers ignore them."""

SPLIT_FORMAT = 1

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
    """The paths of a run, and the few writes that are not a checkpoint."""

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
        self.on_policy = path / "on_policy"
        self.adapter = path / "adapter"

    @property
    def begun(self) -> bool:
        """Return whether a run was started here. Its first file is the lock, which a copy may have left out."""
        return self._lock.exists() or self.holds_run

    @property
    def holds_run(self) -> bool:
        """Return whether a run got as far as writing its manifest."""
        return self.manifest.exists()

    @property
    def complete(self) -> bool:
        return self.adapter.is_dir()

    @property
    def has_checkpoint(self) -> bool:
        return self.checkpoints.is_dir() and any(path.name.isdigit() for path in self.checkpoints.iterdir())

    def unfinished(self) -> bool:
        """Return whether a run has a checkpoint and no adapter, and no process is training it now."""
        if self.complete or not (self.holds_run and self.has_checkpoint):
            return False
        try:
            handle = os.open(self._lock, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            return True  # a copy without the lock: nobody trains it
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            os.close(handle)
        return True

    def steps_done(self) -> tuple[int, int]:
        """Return the optimizer steps before the newest checkpoint, and those that the run planned at its start."""
        newest = max(int(path.name) for path in self.checkpoints.iterdir() if path.name.isdigit())
        stages = read_object(self.manifest, RunError).get("stages")
        stages = stages if isinstance(stages, list) else []
        planned = (
            [stage.get("steps") for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
        )
        return newest, sum(steps for steps in planned if isinstance(steps, int))

    def started(self) -> str | None:
        """Return when the run was started, as its manifest records it. None for a run of an older version."""
        try:
            started = read_json(self.manifest)["started"]
        except (OSError, *MALFORMED):
            return None
        return started if isinstance(started, str) else None

    def order_version(self) -> int | None:
        """Return the version of the order in which the run reads its rows. None where its manifest is not readable."""
        try:
            # Manifests from before it was recorded do not have it.
            version = read_json(self.manifest).get("order", 1)
        except (OSError, *MALFORMED):
            return None
        return version if isinstance(version, int) else None

    def start_order(self) -> tuple[str, int, str]:
        """Return a key that sorts runs by their start: as recorded in the run, then by number and name.

        Never by the times of files: a copy or a clone of a project has others.
        """
        numbered = _NUMBERED.fullmatch(self.path.name)
        return self.started() or "", int(numbered[1]) if numbered else -1, self.path.name

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold the run for this process. Raises `RunError` if another one is writing to it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # The kernel releases the lock when the process dies, however it dies: a run is never locked for good.
            # A link that was planted under the lock's name must not make this process create a file elsewhere.
            handle = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written: {error.strerror}; choose another place with --run"
            ) from error
        try:
            # Waiting could take hours, because a run holds its lock for as long as it trains.
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{self.path}: another process is training this run") from None
            except OSError as error:
                # NFS without its lock service, and some FUSE file systems: two processes could then train one run.
                raise RunError(
                    f"{self._lock}: cannot be locked: {error.strerror}; choose a place on a file system with locks "
                    "with --run"
                ) from error
            # The folder may have been removed after the file was opened. A lock on a removed file excludes nobody.
            self._check_in_place(handle)
            # A process that was killed here may have left a folder that it was replacing under another name.
            for folder in (self.path, self.checkpoints):
                atomic.tidy(folder)
            yield
        finally:
            os.close(handle)

    def _check_in_place(self, lock: int) -> None:
        """Raise `RunError` if a run that failed removed the folder between the opening of its lock and the locking."""
        try:
            in_place = os.path.samestat(os.fstat(lock), self._lock.lstat())
        except FileNotFoundError:
            in_place = False
        if not in_place:
            raise RunError(f"{self.path}: another process has just removed this run, which failed; start it again")

    def write_manifest(self, content: Mapping[str, Any]) -> None:
        atomic.write_text(self.manifest, json.dumps(content, indent=2) + "\n")

    def add_to_manifest(self, facts: Mapping[str, Any]) -> None:
        """Add entries to the manifest of a run that has one."""
        self.write_manifest({**read_object(self.manifest, RunError), **facts})

    def write_split(self, trained: Sequence[str], held_out: Sequence[str]) -> None:
        """Write the hashes of the prompts on either side, for whoever scores the run later."""
        # In pieces: there can be millions of hashes.
        parts = [f'{{\n "format": {SPLIT_FORMAT}'.encode()]
        for name, hashes in (("trained", trained), ("held_out", held_out)):
            lines = bytearray(b",\n  ").join(f'"{short}"'.encode() for short in hashes)
            parts.append(
                b',\n "%s": [\n  %s\n ]' % (name.encode(), lines) if lines else b',\n "%s": []' % name.encode()
            )
        atomic.write_bytes(self.split, b"".join((*parts, b"\n}\n")))

    def trained_prompts(self) -> frozenset[str]:
        """Read the hashes of the trained prompts. None are known of a run that an older version began."""
        if not self.split.exists():
            return frozenset()
        try:
            content = read_json(self.split)
            check_format(self.split, content.get("format", 1), SPLIT_FORMAT)
            return typed(frozenset[str], content["trained"])
        except (OSError, *MALFORMED) as error:
            raise RunError(f"{self.split}: cannot be read, so the trained prompts are unknown: {error}") from error

    def append_step(self, event: StepDone) -> None:
        """Append a line to metrics.jsonl, without the fields that do not apply to the stage."""
        _append(self.metrics, {name: value for name, value in asdict(event).items() if value is not None})

    def read_steps(self) -> list[dict[str, Any]]:
        """Read the lines of metrics.jsonl, without a last line that a crash cut off."""
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
        """Write the held-out prompts of the final evaluation with all answers."""
        _write(self.answers_file, [as_line(answer) for answer in answers])

    def mark_rolled_back(self, first: int, last: int) -> None:
        """Mark the lines of steps that were undone. They stay in the file."""
        lines = self.read_steps()
        _write(
            self.metrics, [{**line, "rolled_back": True} if first <= line["step"] <= last else line for line in lines]
        )

    def forget_after(self, step: int, *, ended: bool, evaluates_again: bool = False) -> None:
        """Drop everything after `step` that a resumed run will do again: steps, evaluations and decisions.

        If its training has `ended`, the final evaluation is dropped too. If it `evaluates_again`, the evaluations and
        decisions at `step` itself are.
        """
        last = step - 1 if evaluates_again else step
        # Decisions are kept or dropped by step, and a roll-back only counts with its decision.
        decisions = [decision for decision in self.decisions() if decision.step <= last]
        undone = [range(past.first_step, (past.last_step or 0) + 1) for past in decisions if past.first_step]
        kept = [line for line in self.read_steps() if line["step"] <= step]
        for line in kept:
            if not any(line["step"] in steps for steps in undone):
                # The mark was written before a decision that is dropped now: the steps count again.
                line.pop("rolled_back", None)
        evaluations = [
            record for record in self.evaluations() if record.step <= last and not (ended and _is_final(record))
        ]
        _write(self.metrics, kept)
        _write(self.decisions_file, [as_line(decision) for decision in decisions])
        _write(self.evaluations_file, [as_line(record) for record in evaluations])


def _is_final(record: EvaluationRecord) -> bool:
    return record.level == "final" or (record.level == "topic" and record.stage is None)


def _append(file: Path, line: Mapping[str, Any]) -> None:
    try:
        # A link that somebody planted in the folder must not lead the lines elsewhere.
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with os.fdopen(handle, "a", encoding="utf-8") as opened:
            # The line is handed over whole, so a crash can cut off the last line only.
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
    # Not `splitlines`, which also splits at characters that JSON may hold in a string.
    lines = text.split("\n")
    parsed = []
    for number, line in enumerate(lines, 1):
        # Somebody's editor may have left blank lines. They hold nothing that could be lost.
        if not line.strip():
            continue
        try:
            parsed.append(parse_json(line))
        except ValueError as error:
            # A crash cuts off the last line, and a resumed run does its step again. Before other lines it is damage:
            # to stop reading there would drop them.
            if any(rest.strip() for rest in lines[number:]):
                raise RunError(
                    f"{file}: line {number}: cannot be read as JSON: {error}; restore the file from a copy, or remove "
                    "the line"
                ) from error
    return parsed


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


def check_format(file: Path, found: object, known: int) -> None:
    """Raise `RunError` if a file states a format that is newer than `known`, or none that can be one."""
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise RunError(f"{file}: states the format {found!r}, which is not one; restore the file from a copy")
    if found > known:
        raise RunError(
            f"{file}: is in format {found}, which a newer Mindprint wrote; this one reads formats up to {known}: "
            "pip install --upgrade mindprint-core"
        )


@contextmanager
def open_run(runs: Path, run: str | os.PathLike[str] | None, resume: Resume | None) -> Iterator[RunFolder]:
    """Hold the folder to train in while the block lasts: `run`, or a new one in `runs`, or the newest to resume.

    If the block fails before the run's first checkpoint, the folder is removed again. Only a folder that this call made
    is, under its lock, and only while it is still in its place. Raises `RunError` where there is nothing to resume, or
    something that a new run would overwrite.
    """
    if resume:
        folder = _find_resumable(runs, run)
        with folder.locked():
            yield folder
        return
    target = Path(run).resolve() if run else None
    with _make_parents(target.parent if target else runs.resolve()) as parent:
        path = _make_named(target) if target else _make_numbered(parent)
        folder = RunFolder(path or target or parent)
        own = folder.path.lstat() if path is not None else None
        with folder.locked():
            # Interrupts count too: a run that was stopped before its first checkpoint has nothing to resume.
            try:
                yield folder
            except BaseException:
                if own is not None and not folder.has_checkpoint:
                    _remove_folder(folder.path, own)
                raise


def _find_resumable(runs: Path, run: str | os.PathLike[str] | None) -> RunFolder:
    path = Path(run) if run else newest_run(runs)
    if path is None or not RunFolder(path).begun:
        raise RunError(f"{path or runs}: holds no run to resume; leave out --resume to start one")
    folder = RunFolder(path.resolve())
    if folder.complete:
        raise RunError(f"{path}: is complete already; its adapter is {folder.adapter}")
    try:
        written = read_json(folder.manifest).get("format", RUN_FORMAT) if folder.holds_run else RUN_FORMAT
    except (OSError, *MALFORMED):
        written = RUN_FORMAT  # it is written again from the configuration
    check_format(folder.manifest, written, RUN_FORMAT)
    return folder


@contextmanager
def _make_parents(folder: Path) -> Iterator[Path]:
    """Make a folder with its parents. If the block fails, remove those that were made here and are empty."""
    made: list[Path] = []
    try:
        for path in (*reversed(folder.parents), folder):
            try:
                path.mkdir()
                made.append(path)
            except FileExistsError:
                continue
            except OSError as error:
                # Root and the folders of other people exist, and need not be writable.
                if not path.is_dir():
                    raise RunError(
                        f"{path}: cannot be written: {error.strerror}; choose another place with --run"
                    ) from error
        yield folder
    except BaseException:
        # `rmdir` alone: another process may have put its run here in the meantime.
        for path in reversed(made):
            with suppress(OSError):
                path.rmdir()
        raise


def _make_numbered(parent: Path) -> Path:
    """Make the next free `run-NNN`, exclusively: two runs that start at once get two numbers."""
    # Another process may take the number between the look and the `mkdir`, so a taken one is tried again.
    while True:
        path = new_run_path(parent)
        try:
            path.mkdir()
        except FileExistsError:
            continue
        except FileNotFoundError:
            # A run that failed has just removed the folder of runs, which was empty.
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror}; choose another place with --run") from error
        else:
            return path


def _make_named(path: Path) -> Path | None:
    """Make a run's folder. None if it exists and is empty. Raises `RunError` if it holds something."""
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir() or any(path.iterdir()):
            raise RunError(
                f"{path}: already holds {'a run' if RunFolder(path).begun else 'something else'}; "
                "choose another --run, or continue it with --resume"
            ) from None
        return None
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}; choose another place with --run") from error
    return path


def _remove_folder(path: Path, own: os.stat_result) -> None:
    """Remove a folder if it is still the one that `own` describes: it may have been moved, and another put there."""
    aside = atomic.temporary_name(path)
    with suppress(OSError):
        # The name is taken away first, so that nothing can be put in its place between the look and the removal.
        path.rename(aside)
        if os.path.samestat(aside.lstat(), own):
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(path)


def runs_folder(file: ConfigFile) -> Path:
    """Return the folder for new runs: `runs` next to the configuration, or the one that a run's own copy is in."""
    return file.folder.parent if RunFolder(file.folder).holds_run else file.folder / "runs"


def new_run_path(parent: Path) -> Path:
    """Return the path of the next free `run-NNN` under `parent`."""
    # Gaps that deleted runs left are not filled, so that the numbers keep the order of the starts.
    taken = [int(found[1]) for path in _entries(parent) if (found := _NUMBERED.fullmatch(path.name))]
    return parent / f"run-{max(taken, default=0) + 1:03d}"


def newest_run(parent: Path) -> Path | None:
    """Return the numbered run under `parent` that was started last, if there is one."""
    runs = [path for path in _entries(parent) if _NUMBERED.fullmatch(path.name) and RunFolder(path).holds_run]
    return max(runs, key=lambda path: int(path.name.partition("-")[2]), default=None)


def _entries(parent: Path) -> list[Path]:
    return list(parent.iterdir()) if parent.is_dir() else []


def portable(file: ConfigFile, run: Path) -> Config:
    """Return the configuration with its paths relative to the run, so that `RUN/config.yaml` can be loaded again."""
    # Relative paths keep a project that is moved or copied as a whole usable.
    data = file.config.data

    def relative(entry: str) -> str:
        target = file.resolve(entry)
        # A hub name or a file that is gone cannot be made relative. It is kept as the user wrote it.
        return os.path.relpath(target, run) if target.exists() else entry

    def relative_all(entries: str | list[str] | None) -> str | list[str] | None:
        return [relative(entry) for entry in entries] if isinstance(entries, list) else entries and relative(entries)

    changed = {name: relative_all(getattr(data, name)) for name in ("path", "sft", "preferences", "heldout")}
    name = file.config.model.name
    model = file.config.model.model_copy(update={"name": relative(name) if file.resolve(name).is_dir() else name})
    start = file.config.adapter.start_from
    adapter = file.config.adapter.model_copy(update={"start_from": start and relative(start)})
    voice = file.config.voice.model_copy(update={"background": relative_all(file.config.voice.background)})
    changes = {"data": data.model_copy(update=changed), "model": model, "adapter": adapter, "voice": voice}
    return file.config.model_copy(update=changes)
