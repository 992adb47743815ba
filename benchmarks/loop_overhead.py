"""What core adds to a backend's bare step: batches, guards, metrics, checkpoints.

    python benchmarks/loop_overhead.py [--backend torch]

Trains `builtin:tiny` on the sample curriculum through `mindprint.train`, timing every hook from outside (an observer
that wraps the step hooks), and compares the time inside the steps with the time of the stages around them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Generator
from importlib.resources import files
from pathlib import Path
from time import perf_counter
from typing import Any

import pluggy

import mindprint
from mindprint.events import Event, StageFinished, StepDone

wrapper = pluggy.HookimplMarker("mindprint")


class Clock:
    """Wraps the two step hooks and adds up how long they take."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0

    def _timed(self) -> Generator[None, Any, Any]:
        started = perf_counter()
        try:
            return (yield)
        finally:
            self.seconds += perf_counter() - started
            self.calls += 1

    @wrapper(wrapper=True)
    def mindprint_sft_step(self) -> Generator[None, Any, Any]:
        return (yield from self._timed())

    @wrapper(wrapper=True)
    def mindprint_dpo_step(self) -> Generator[None, Any, Any]:
        return (yield from self._timed())


def main() -> None:
    """Print the time inside and outside the steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="torch")
    backend = parser.parse_args().backend
    clock = Clock()
    steps, stages = 0.0, 0.0

    def add(event: Event) -> None:
        nonlocal steps, stages
        if isinstance(event, StepDone):
            steps += event.seconds
        if isinstance(event, StageFinished):
            stages += event.seconds

    config = {
        "backend": backend,
        "data": {"path": str(files("mindprint").joinpath("resources", "curriculum"))},
        "sft": {"steps_per_topic": 40},
        "dpo": {"steps_per_topic": 40},
    }
    with tempfile.TemporaryDirectory() as folder:
        mindprint.train(config, run=Path(folder) / "run", on_event=add, observers=[clock])
    milliseconds = 1000 * clock.seconds / clock.calls
    print(f"{backend}: {clock.calls} steps of builtin:tiny, {milliseconds:.1f} ms each in the backend")
    print(f"  core around a step (batches, checks of the step): {100 * (steps / clock.seconds - 1):5.1f} % of it")
    print(f"  core around a stage (reference, checkpoints, guards): {100 * (stages / clock.seconds - 1):5.1f} % of it")


if __name__ == "__main__":
    main()
