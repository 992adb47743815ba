"""The time that core adds to a backend's bare step: batches, guards, metrics, checkpoints.

    python benchmarks/loop_overhead.py [--backend torch] [--model FOLDER] [--steps 100]

Trains on the sample curriculum through `mindprint.train`, timing each hook from outside (an observer that wraps it) and
each guard, and compares them with the time inside the steps. A stage has as many steps as DPO has by default, since
some guards act once a stage.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable, Generator
from importlib.resources import files
from pathlib import Path
from time import perf_counter
from typing import Any

import pluggy

import mindprint
from mindprint.events import Event, StageFinished, StepDone
from mindprint.training import guards

wrapper = pluggy.HookimplMarker("mindprint")

SAVES_OF_THE_UPDATE_GUARD = 2
"""`check_first_update` compares the adapter before and after the first update of a stage."""


class Clock:
    """A sum of the time of each kind of work, and of how often it was done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def add(self, kind: str, seconds: float) -> None:
        self.seconds[kind] += seconds
        self.calls[kind] += 1

    def mean(self, kind: str) -> float:
        return self.seconds[kind] / max(self.calls[kind], 1)

    def timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            started = perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.add(kind, perf_counter() - started)

        return call

    # A hook wrapper around each hook: it sees the time of the backend alone.
    def _wrapped(self, kind: str) -> Generator[None, Any, Any]:
        started = perf_counter()
        try:
            return (yield)
        finally:
            self.add(kind, perf_counter() - started)

    @wrapper(wrapper=True)
    def mindprint_sft_step(self) -> Generator[None, Any, Any]:
        return (yield from self._wrapped("step"))

    @wrapper(wrapper=True)
    def mindprint_dpo_step(self) -> Generator[None, Any, Any]:
        return (yield from self._wrapped("step"))

    @wrapper(wrapper=True)
    def mindprint_base_digest(self) -> Generator[None, Any, Any]:
        return (yield from self._wrapped("guard"))

    @wrapper(wrapper=True)
    def mindprint_save(self) -> Generator[None, Any, Any]:
        return (yield from self._wrapped("save"))


def main() -> None:
    """Print the time inside and outside the steps, and that of the guards."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--steps", type=int, default=100, help="of each stage of each topic")
    arguments = parser.parse_args()
    clock = Clock()
    # Guards are functions of core's, not hooks: they are timed by replacing them in their module.
    for name in [name for name in vars(guards) if name.startswith("check_")]:
        setattr(guards, name, clock.timed("guard", getattr(guards, name)))
    steps, stages, count = 0.0, 0.0, 0

    def add(event: Event) -> None:
        nonlocal steps, stages, count
        if isinstance(event, StepDone):
            steps += event.seconds
        if isinstance(event, StageFinished):
            stages, count = stages + event.seconds, count + 1

    config = {
        "model": {"name": arguments.model},
        "backend": arguments.backend,
        "data": {"path": str(files("mindprint").joinpath("resources", "curriculum"))},
        "sft": {"steps_per_topic": arguments.steps},
        "dpo": {"steps_per_topic": arguments.steps},
    }
    with tempfile.TemporaryDirectory() as folder:
        mindprint.train(config, run=Path(folder) / "run", on_event=add, observers=[clock])
    # The saves of the update guard are hooks: they are counted in, and the saves of checkpoints are not.
    bare = clock.seconds["step"]
    guarded = clock.seconds["guard"] + SAVES_OF_THE_UPDATE_GUARD * count * clock.mean("save")
    print(
        f"{arguments.backend}, {arguments.model}: {clock.calls['step']} steps in {count} stages, "
        f"{1000 * clock.mean('step'):.1f} ms each in the backend; in addition, as a share of it"
    )
    print(f"  core around a step (batches, checks of the step): {100 * (steps / bare - 1):5.2f} %")
    print(f"  core around a stage (reference, checkpoints, guards): {100 * (stages / bare - 1):5.2f} %")
    print(f"  guards, all of them, once a step and once a stage: {100 * guarded / bare:5.2f} %")


if __name__ == "__main__":
    main()
