"""A run's folder: what lies where, who may write, and the lines of metrics.jsonl."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mindprint import atomic
from mindprint.errors import RunError
from mindprint.events import StepDone

CONFIG_FILE = "config.yaml"
MANIFEST_FILE = "manifest.json"

_NUMBERED = re.compile(r"run-(\d+)")


class RunFolder:
    """Paths of a run, and the few writes that are not a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = path / ".lock"
        self.config = path / CONFIG_FILE
        self.manifest = path / MANIFEST_FILE
        self.split = path / "split.json"
        self.metrics = path / "metrics.jsonl"
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
            handle = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
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
            return frozenset(json.loads(self.split.read_text(encoding="utf-8"))["trained"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.split}: cannot be read, so what was trained on is unknown: {error}") from error

    def append_step(self, event: StepDone) -> None:
        """One line of metrics.jsonl; what does not apply to the stage is left out."""
        line = {name: value for name, value in asdict(event).items() if value is not None}
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise RunError(f"{self.metrics}: cannot be written: {error.strerror}") from error

    def read_steps(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl. A last line that was cut off by a crash is not one."""
        if not self.metrics.exists():
            return []
        steps = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                steps.append(json.loads(line))
            except ValueError:
                break
        return steps

    def forget_steps_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run will take again."""
        kept = [json.dumps(line) + "\n" for line in self.read_steps() if line["step"] <= step]
        if self.metrics.exists():
            atomic.write_text(self.metrics, "".join(kept))


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
