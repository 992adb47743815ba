"""A run in a separate process, so that the memory measured is that of one backend alone.

As a program, `python -m mindprint.api.measured_run RUN` reads a configuration as JSON from standard input, trains
into RUN and writes its `costs.json`. `train_measured` starts it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

from mindprint.api.progress import STOPPING, show_progress
from mindprint.config import ConfigFile, make_config
from mindprint.errors import GuardError, MindprintError, RunError
from mindprint.events import Notice
from mindprint.runs.costs import Costs, LoadTimer, peak_bytes, write_costs
from mindprint.training.run import train


def train_measured(file: ConfigFile, run: Path) -> None:
    """Train into `run`, with its `costs.json`, in a separate process. Progress goes to standard error.

    Raises `GuardError` where a guard stopped it and else `RunError`, with that process's own message.
    """
    # Unset values are left out, so that the other process can tell a chosen value from a default.
    values = file.config.model_dump(mode="json", exclude_unset=True)
    handed = json.dumps({"values": values, "folder": str(file.folder), "source": file.source})
    command = [sys.executable, "-m", "mindprint.api.measured_run", str(run)]
    # Standard output carries the error only. Progress is inherited through standard error and stays visible.
    done = subprocess.run(command, input=handed, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 (our own program)
    if done.returncode:
        message = done.stdout.strip() or f"its process ended with exit code {done.returncode}"
        # A crash can have the same exit code as a guard, but it leaves no message.
        guarded = done.stdout and done.returncode == GuardError.exit_code
        raise (GuardError if guarded else RunError)(f"training into {run} failed: {message}")


def main(arguments: Sequence[str]) -> int:
    """Train in this process. Write a deliberate error to standard output, for the process that asked."""
    (run,) = arguments
    handed = json.load(sys.stdin)
    timer = LoadTimer()
    try:
        file = replace(make_config(handed["values"], Path(handed["folder"])), source=handed["source"])
        # A library that prints would otherwise mix its text with the error message.
        with redirect_stdout(sys.stderr), show_progress() as show:
            stopping = Notice(STOPPING)
            result = train(file, run=run, on_event=show, on_stop=lambda: show(stopping), observers=[timer])
    except MindprintError as error:
        sys.stdout.write(f"{error}\n")
        return error.exit_code
    assert timer.seconds is not None, "a run loads its base model"
    # Memory is read last, when the peak of the whole training is known.
    write_costs(result.run, Costs(timer.seconds, peak_bytes()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
