"""A command in a process of its own, on a folder that somebody edited, with its time, memory and neighbours watched."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CPU_SECONDS = 10
"""A command on files this small takes less than one, and one that runs longer hangs."""

TRAINING_SECONDS = 40
"""For a command that loads, trains, evaluates and fingerprints: it takes five on a machine that does nothing else."""

WALL_SECONDS = 30
"""For what waits without computing, such as for a pipe. A command that computes may take longer on a busy machine."""

LONGEST_SECONDS = 300
"""For what computes a little now and then, and never ends."""

MEMORY = 2**30

TRAIN = ["sft.steps_per_topic=1", "dpo.steps_per_topic=1", "curriculum.max_topics=1", "checkpoints.every=1",
         "evaluation.prompts_per_topic=1", "evaluation.levels=[final]", "generation.max_new_tokens=4"]  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def check(self, names: tuple[str, ...]) -> None:
        """Assert the promise: exit 0, 1 or 2, and a wrong input in one clear line that names the file."""
        assert self.code in (0, 1, 2), f"exit {self.code}:\n{self.err[-3000:]}"
        assert "Traceback" not in self.err
        steering = [sign for sign in self.out + self.err if ord(sign) < 32 and sign not in "\n\t\r"]
        assert not steering, f"control characters are printed raw: {steering[:5]}"
        errors = [line for line in self.err.splitlines() if line.startswith("mindprint: error: ")]
        if self.code == 2:
            assert len(errors) == 1, self.err[-3000:]
            assert len(errors[0]) < 3000, f"the line has {len(errors[0])} characters: {errors[0][:300]}"
            assert any(name in errors[0] for name in names), f"names none of {names}: {errors[0]}"


def in_child(work: Callable[[], int], folder: Path, seconds: int = CPU_SECONDS) -> Ended:
    """Run `work` in a fork of this process, within limits, and return how it ended.

    Forking keeps what is imported: a try takes milliseconds where a new process takes seconds. But a fork can inherit a
    lock that a thread of this process held, and wait for it for ever (fork(2)). So what hangs is tried once more: an
    input that really hangs a command does it again.
    """
    try:
        return _in_fork(work, folder, seconds)
    except HangsError:
        return _in_fork(work, folder, seconds)


class HangsError(AssertionError):
    """A command that does not end."""


def _in_fork(work: Callable[[], int], folder: Path, seconds: int) -> Ended:
    outputs = folder / "stdout", folder / "stderr"
    child = os.fork()
    if not child:
        _become_command(work, outputs, seconds)
    started = progressed = time.monotonic()
    ticks = 0
    while True:
        ended, status, _ = os.wait4(child, os.WNOHANG)
        if ended:
            break
        now = time.monotonic()
        if (spent := processor_ticks(child)) != ticks:
            ticks, progressed = spent, now
        if now - progressed > WALL_SECONDS or now - started > LONGEST_SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise HangsError(f"hangs: {now - started:.0f} s, the last {now - progressed:.0f} s without computing")
        time.sleep(0.002)
    out, err = (file.read_text(encoding="utf-8", errors="surrogateescape") for file in outputs)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        raise AssertionError(f"ended by {name} (SIGXCPU: more than {seconds} s of computing):\n{err[-2000:]}")
    return Ended(os.WEXITSTATUS(status), out, err)


def processor_ticks(process: int) -> int:
    """Return the processor time of a process, its threads and its ended children, in ticks of the system (proc(5))."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(map(int, fields[11:15]))


def _become_command(work: Callable[[], int], outputs: tuple[Path, Path], seconds: int) -> None:
    code = 99
    try:
        for number, file in enumerate(outputs, 1):
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8") for number in (1, 2))
        sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        code = work()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:  # noqa: BLE001 (a fork must never return into the tests of its parent)
        import traceback

        os.write(2, "".join(traceback.format_exception(error)).encode(errors="replace"))
    finally:
        os._exit(code)


def command(*words: str | Path) -> Callable[[], int]:
    """Return a command line as `in_child` runs it."""
    from mindprint.cli import main

    return lambda: main([str(word) for word in words])


def prepared(project: Path, *overrides: str) -> Callable[[], int]:
    """Return what `train` does before a model is loaded: most of what can be wrong, in a tenth of the time."""

    def work() -> int:
        from mindprint import cli
        from mindprint.config import load_config
        from mindprint.printing import tell
        from mindprint.training.prepare import prepare

        try:
            prepare(load_config(project, overrides))
        except Exception as error:
            failure = cli._failure(error) or cli._internal(error)
            tell(failure.line)
            if failure.exit_code == cli.INTERNAL:
                raise
            return failure.exit_code
        return 0

    return work


def in_process(*words: str | Path) -> Ended:
    """Run a command as a user does, in a real process."""
    done = subprocess.run(
        [sys.executable, "-m", "mindprint", *map(str, words)], capture_output=True, timeout=120, check=False
    )
    return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())


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


def make_samples(folder: Path) -> None:
    """Make a project with a finished run on the built-in model, and a copy of that model."""
    words = ["train", "voice", "--backend", "mlx", *TRAIN, "--run", "voice/run"]
    for command_line in (["init", "voice"], words):
        subprocess.run([sys.executable, "-m", "mindprint", *command_line], cwd=folder, check=True, capture_output=True)
    import mindprint

    shutil.copytree(Path(str(mindprint.__file__)).parent / "resources" / "tiny", folder / "model")
    shutil.copytree(folder / "voice" / "run" / "adapter", folder / "adapter")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "model")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
