"""Run commands in forks of a process that has one thread and has everything imported, within limits.

A fork keeps what is imported, so that a try takes milliseconds where a new process takes seconds. It also keeps locks:
one that another thread held is never released in the child (fork(2)). A process of pytest has such threads, its own and
those of frameworks. This process has none: it imports, computes nothing, and counts its threads before each fork.

The protocol is one line of JSON for each request on standard input, and one for each answer on standard output.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

IDLE_SECONDS = 20
"""For what waits without computing, such as for a pipe. What computes may take longer on a busy machine."""

LONGEST_SECONDS = 300
"""For a command that computes a little now and then, and never ends."""

MEMORY = 2**30
"""Bytes of address space that a command may take, in addition to those of this process."""


def preload(project: str) -> None:
    """Import the modules that commands use, so that no try pays for them."""
    # The backend before mlx: it gives mlx a fast BLAS, which must be loaded first.
    for name in ("mindprint_mlx", "mindprint_mlx.model", "mindprint_mlx.steps", "mlx_lm.models.llama"):
        importlib.import_module(name)
    run_prepare([project])


def run_command(words: Sequence[str]) -> int:
    """Run a command line of Mindprint."""
    from mindprint.cli import main

    return main(list(words))


def run_prepare(words: Sequence[str]) -> int:
    """Do what `train` does before a model is loaded. Most that can be wrong is met here, in a tenth of the time."""
    from mindprint import cli
    from mindprint.config import load_config
    from mindprint.printing import tell
    from mindprint.training.prepare import prepare

    try:
        prepare(load_config(Path(words[0]), words[1:]))
    except Exception as error:
        failure = cli._failure(error) or cli._internal(error)
        tell(failure.line)
        if failure.exit_code == cli.INTERNAL:
            raise
        return failure.exit_code
    return 0


WORKS: Mapping[str, Callable[[Sequence[str]], int]] = {"command": run_command, "prepare": run_prepare}


def threads() -> int:
    """Return the number of threads of this process."""
    return len(list(Path("/proc/self/task").iterdir()))


def try_in_fork(request: Mapping[str, Any]) -> dict[str, Any]:
    """Fork, run the work of a request in the child within limits, and return how it ended."""
    if threads() != 1:
        raise RuntimeError(f"the fork server has {threads()} threads: a fork could wait for a lock of one")
    outputs = [Path(request["folder"], name) for name in ("stdout", "stderr")]
    child = os.fork()
    if not child:
        become_command(request, outputs)
    status, usage, hang = wait_for(child)
    return {
        "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        "signal": signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else None,
        "hang": hang,
        "seconds": usage.ru_utime + usage.ru_stime,
        # Linux gives it in units of 1024 bytes (getrusage(2)).
        "memory": usage.ru_maxrss * 1024,
    }


def wait_for(child: int) -> tuple[int, resource.struct_rusage, str | None]:
    """Wait until a child ends, or kill it and its children where it hangs. Return status, usage and the hang."""
    started = progressed = time.monotonic()
    ticks, pause = 0, 0.001
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            return status, usage, None
        now = time.monotonic()
        if (spent := processor_ticks(child)) != ticks:
            ticks, progressed = spent, now
        if now - progressed > IDLE_SECONDS or now - started > LONGEST_SECONDS:
            # The child leads a process group, so that processes that it started end with it.
            os.killpg(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            idle = now - progressed
            return status, usage, f"hangs: {now - started:.0f} s, the last {idle:.0f} s without computing"
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def processor_ticks(process: int) -> int:
    """Return the processor time of a process, its threads and its ended children, in ticks of the system (proc(5))."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(map(int, fields[11:15]))


def become_command(request: Mapping[str, Any], outputs: Sequence[Path]) -> None:
    """Turn this fork into the command of a request. Never returns."""
    code = 99
    try:
        os.setpgid(0, 0)
        for number, file in enumerate(outputs, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", encoding="utf-8"), open(2, "w", encoding="utf-8")  # noqa: SIM115
        seconds = int(request["limit"])
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        code = WORKS[request["work"]](request["words"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:  # noqa: BLE001 (a fork must never return into the loop of its parent)
        os.write(2, "".join(traceback.format_exception(error)).encode(errors="replace"))
    finally:
        os._exit(code)


def serve(project: str) -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    # Whatever an import prints must not become an answer.
    os.dup2(2, 1)
    preload(project)
    for line in sys.stdin:
        answers.write(json.dumps(try_in_fork(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
