"""A command in a process of its own, on a folder that somebody edited, with its time, memory and neighbours watched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

CPU_SECONDS = 10
"""A command on files this small takes less than one, and one that runs longer hangs."""

TRAINING_SECONDS = 40
"""For a command that loads, trains, evaluates and fingerprints: it takes five on a machine that does nothing else."""

MEMORY = 2**30
"""The most memory that a command may take, in bytes, with all that it has imported."""

TRAIN = ["sft.steps_per_topic=1", "dpo.steps_per_topic=1", "curriculum.max_topics=1", "checkpoints.every=1",
         "evaluation.prompts_per_topic=1", "evaluation.levels=[final]", "generation.max_new_tokens=4"]  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What a try runs: a command line, or what `train` does before a model is loaded."""

    kind: Literal["command", "prepare"]
    words: tuple[str, ...]


def command(*words: str | Path) -> Work:
    """Return a command line as a try."""
    return Work("command", tuple(map(str, words)))


def prepared(project: Path, *overrides: str) -> Work:
    """Return what `train` does before a model is loaded: most of what can be wrong, in a tenth of the time."""
    return Work("prepare", (str(project), *overrides))


@dataclass(frozen=True)
class Ended:
    """How a try ended. `code` is None where a signal ended it, `hang` says how long it waited before it was killed."""

    code: int | None
    signal: str | None
    hang: str | None
    seconds: float
    memory: int
    out: str
    err: str

    def faults(self, names: tuple[str, ...]) -> Iterator[str]:
        """Yield what breaks the promise: exit 0, 1 or 2, bounds, and a wrong input in one line that names the file."""
        if self.hang:
            yield self.hang
        elif self.signal:
            yield f"ended by {self.signal} (SIGXCPU: too long a time of computing)"
        elif self.code not in (0, 1, 2):
            yield f"exit {self.code}"
        if self.memory > MEMORY:
            yield f"took {self.memory / 2**20:.0f} MB of memory"
        if "Traceback" in self.err:
            yield "a traceback is printed"
        if steering := [sign for sign in self.out + self.err if ord(sign) < 32 and sign not in "\n\t\r"]:
            yield f"control characters are printed raw: {steering[:5]}"
        if self.code == 2:
            yield from self._faults_of_the_line(names)

    def _faults_of_the_line(self, names: tuple[str, ...]) -> Iterator[str]:
        errors = [line for line in self.err.splitlines() if line.startswith("mindprint: error: ")]
        if len(errors) != 1:
            yield f"{len(errors)} lines of errors and not one"
        elif len(errors[0]) >= 3000:
            yield f"the line has {len(errors[0])} characters"
        elif not any(name in errors[0] for name in names):
            yield f"the line names none of {names}"


class ForkServer:
    """A process that has one thread and all imports, and that runs each try in a fork: see fork_server.py."""

    def __init__(self, project: Path) -> None:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        script = Path(__file__).with_name("fork_server.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(project)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.seconds = 0.0
        """Processor time of all tries so far."""
        self.tries = 0
        self.longest = 0.0
        """Processor time of the longest try since a test set it to zero."""

    def run(self, work: Work, folder: Path, limit: int = CPU_SECONDS) -> Ended:
        """Run one try, with its output in files of `folder`, and return how it ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"work": work.kind, "words": work.words, "folder": str(folder), "limit": limit}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the fork server ended with exit code {self._process.wait(10)}"
        texts = [(folder / name).read_text(encoding="utf-8", errors="surrogateescape") for name in ("stdout", "stderr")]
        ended = Ended(*(json.loads(answer)[name] for name in ("code", "signal", "hang", "seconds", "memory")), *texts)
        self.seconds += ended.seconds
        self.tries += 1
        self.longest = max(self.longest, ended.seconds)
        return ended

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Assert that nothing under a folder changes while the block runs."""
    before = snapshot(folder)
    yield
    assert snapshot(folder) == before, "files outside the folder were touched"


def snapshot(folder: Path) -> Mapping[str, Any]:
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


def difference(before: bytes, file: Path) -> str:
    """Describe an edited file by the place where it differs from what it was."""
    if file.is_symlink():
        return f"the file is a link to {file.readlink()}"
    if not file.is_file():
        return (
            "the file is a folder" if file.is_dir() else "the file is a pipe" if file.exists() else "the file is gone"
        )
    if file.stat().st_size > 100_000_000 or not file.stat().st_mode & 0o400:
        return f"the file has {file.stat().st_size} bytes, mode {file.stat().st_mode:o}"
    after = file.read_bytes()
    # An edit of values writes the whole file in another layout: compared in one layout, only the values differ.
    with suppress(ValueError, RecursionError):
        before, after = (json.dumps(json.loads(text)).encode() for text in (before, after))
    start = same_length(before, after)
    end = same_length(before[start:][::-1], after[start:][::-1])
    was, now = before[start : len(before) - end], after[start : len(after) - end]
    context = before[max(0, start - 60) : start]
    return f"behind {context!r} at byte {start}, {shortened(was)} became {shortened(now)}"


def same_length(first: bytes, second: bytes) -> int:
    """Return how many bytes two texts have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def shortened(content: bytes, most: int = 400) -> str:
    return repr(content) if len(content) <= most else f"{content[:most]!r}… ({len(content)} bytes)"


def make_samples(folder: Path) -> None:
    """Make a project with a finished run on the built-in model, and a copy of that model."""
    run_command(folder, "init", "voice")
    # A try reads and evaluates the whole project, so a few rows are enough.
    for name, rows in {"sft": 8, "preferences": 6, "heldout": 2}.items():
        keep_rows(folder / "voice" / "data" / f"{name}.jsonl", topics=2, rows=rows)
    run_command(folder, "train", "voice", "--backend", "mlx", *TRAIN, "--run", "voice/run")
    import mindprint

    shutil.copytree(Path(str(mindprint.__file__)).parent / "resources" / "tiny", folder / "model")
    shutil.copytree(folder / "voice" / "run" / "adapter", folder / "adapter")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "model")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def run_command(folder: Path, *words: str) -> None:
    """Run a command line of Mindprint in a new process."""
    subprocess.run([sys.executable, "-m", "mindprint", *words], cwd=folder, check=True, capture_output=True)


def keep_rows(file: Path, topics: int, rows: int) -> None:
    """Keep the first rows of the first topics of a file."""
    by_topic: dict[str, list[str]] = {}
    for line in file.read_text().splitlines(keepends=True):
        by_topic.setdefault(json.loads(line)["topic"], []).append(line)
    file.write_text("".join(line for lines in list(by_topic.values())[:topics] for line in lines[:rows]))
