"""A run in a process of its own, so that the memory measured is that of one backend alone.

As a program, `python -m mindprint.cli.measured_run CONFIG RUN KEY=VALUE...`, it trains into RUN and writes its
`costs.json`; `train_measured` starts it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mindprint.cli.output import json_only
from mindprint.cli.progress import progress
from mindprint.config import load_config
from mindprint.errors import GuardError, MindprintError, RunError
from mindprint.runs.costs import Costs, LoadTimer, peak_bytes, write_costs
from mindprint.training.run import train


def train_measured(config: Path, overrides: Sequence[str], run: Path) -> None:
    """Train into `run`, with its `costs.json`, in a process of its own; progress goes to standard error.

    Raises `GuardError` where a guard stopped it and else `RunError`, with that process's own message.
    """
    command = [sys.executable, "-m", "mindprint.cli.measured_run", str(config), str(run), *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 (our own program)
    if done.returncode:
        said = done.stdout.strip() or f"its process ended with exit code {done.returncode}"
        stopped = done.stdout and done.returncode == GuardError.exit_code
        raise (GuardError if stopped else RunError)(f"training into {run} failed: {said}")


def main(arguments: Sequence[str]) -> int:
    """Train in this process. A deliberate error goes to standard output, for the process that asked."""
    config, run, *overrides = arguments
    timer = LoadTimer()
    try:
        with json_only(enabled=True), progress() as on_event:
            result = train(load_config(config, overrides), run=run, on_event=on_event, observers=[timer])
    except MindprintError as error:
        sys.stdout.write(f"{error}\n")
        return error.exit_code
    assert timer.seconds is not None, "a run loads its base"
    write_costs(result.run, Costs(timer.seconds, peak_bytes()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
