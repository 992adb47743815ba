"""A hundred steps of each stage on both backends, and runs that move between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mindprint
from mindprint.adapter.peft_format import read_adapter
from mindprint.errors import Interrupted
from mindprint.events import Event, StepDone
from mindprint.runs.folder import RunFolder
from parity_cases import (
    losses,
    open_model,
    relative_difference,
    take_step,
    trajectory_project,
)

STEPS = 100
SFT_TOLERANCE = 1e-5
DPO_TOLERANCE = 1e-3
RESYNCHRONISED_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def project(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Ragged rows, some longer than `max_length`, micro-batches of 3 in steps of 6, one topic."""
    return trajectory_project(qwen2, tmp_path_factory.mktemp("data"), STEPS)


@pytest.fixture(scope="module")
def runs(project: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """The same run, uninterrupted, on each backend."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: run(project, folder / name, backend=name) for name in ("torch", "mlx")}


def run(
    project: dict[str, Any], path: Path, *, stop_at: int | None = None, resume: bool = False, **changes: Any
) -> RunFolder:
    """Train; with `stop_at`, as if the user pressed Ctrl-C during that step."""
    on_event = press_ctrl_c_at(stop_at) if stop_at else None
    if stop_at:
        with pytest.raises(Interrupted):
            mindprint.train(project, run=path, resume=resume, on_event=on_event, **changes)
    else:
        mindprint.train(project, run=path, resume=resume, **changes)
    return RunFolder(path)


def press_ctrl_c_at(step: int) -> Callable[[Event], None]:
    import os
    import signal

    def press(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return press


def check_curves(first: RunFolder, second: RunFolder) -> None:
    for stage, tolerance in (("sft", SFT_TOLERANCE), ("dpo", DPO_TOLERANCE)):
        expected, actual = losses(first, stage), losses(second, stage)
        assert len(expected) == len(actual) == STEPS
        assert (np.abs(expected - actual) <= tolerance * (1 + np.abs(expected))).all(), stage


@pytest.mark.slow
def test_running_free(runs: dict[str, RunFolder]) -> None:
    check_curves(runs["torch"], runs["mlx"])


@pytest.mark.slow
def test_something_was_learned(runs: dict[str, RunFolder]) -> None:
    """Curves that agree because nothing happens would agree too well."""
    for folder in runs.values():
        assert losses(folder, "sft")[-5:].mean() < losses(folder, "sft")[:5].mean() - 0.5
        assert losses(folder, "dpo")[0] == pytest.approx(np.log(2), abs=1e-5)
        assert losses(folder, "dpo")[-5:].mean() < 0.55


@pytest.mark.slow
def test_the_adapters_are_close(runs: dict[str, RunFolder]) -> None:
    torch, mlx = (read_adapter(folder.adapter)[0] for folder in runs.values())
    assert torch.config == mlx.config
    for site, factors in torch.tensors.items():
        for expected, actual in zip(factors, mlx.tensors[site], strict=True):
            assert relative_difference(expected, actual) < 1e-2, site


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("torch", "mlx"), ("mlx", "torch")])
def test_sft_here_dpo_there_in_one_command(
    project: dict[str, Any], runs: dict[str, RunFolder], tmp_path: Path, first: str, second: str
) -> None:
    stages = {name: {**project[name], "backend": backend} for name, backend in (("sft", first), ("dpo", second))}
    moved = run(project | stages, tmp_path / "run")
    assert {line["stage"]: line["backend"] for line in moved.read_steps()} == {"sft": first, "dpo": second}
    check_curves(runs[first], moved)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("torch", "mlx"), ("mlx", "torch")])
@pytest.mark.parametrize("stop_at", [37, STEPS + 41])
def test_stopped_in_the_middle_and_resumed_on_the_other(
    project: dict[str, Any], runs: dict[str, RunFolder], tmp_path: Path, first: str, second: str, stop_at: int
) -> None:
    run(project, tmp_path / "run", stop_at=stop_at, backend=first)
    moved = run(project, tmp_path / "run", resume=True, backend=second)
    backends = [line["backend"] for line in moved.read_steps()]
    assert backends == [first] * stop_at + [second] * (2 * STEPS - stop_at)
    check_curves(runs[first], moved)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("stop_at", [37, STEPS + 41])
def test_resume_on_the_same_backend_is_bit_for_bit(
    project: dict[str, Any], runs: dict[str, RunFolder], tmp_path: Path, backend: str, stop_at: int
) -> None:
    run(project, tmp_path / "run", stop_at=stop_at, backend=backend)
    check_bit_for_bit(run(project, tmp_path / "run", resume=True, backend=backend), runs[backend])


SMALL_RUN = 4
"""Steps of each stage of the run that is stopped at every one of its step boundaries."""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_stopped_at_every_step_boundary_and_resumed_bit_for_bit(
    qwen2: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, backend: str
) -> None:
    small = trajectory_project(qwen2, tmp_path_factory.mktemp("data"), SMALL_RUN)
    whole = run(small, tmp_path / "whole", backend=backend)
    for stop_at in range(1, 2 * SMALL_RUN):
        stopped = tmp_path / f"stopped-{stop_at}"
        run(small, stopped, stop_at=stop_at, backend=backend)
        check_bit_for_bit(run(small, stopped, resume=True, backend=backend), whole)


def check_bit_for_bit(resumed: RunFolder, whole: RunFolder) -> None:
    for stage in ("sft", "dpo"):
        assert losses(resumed, stage).tolist() == losses(whole, stage).tolist()
    weights = "adapter_model.safetensors"
    assert (resumed.adapter / weights).read_bytes() == (whole.adapter / weights).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_resynchronised_before_every_step(qwen2: Path, stage: str) -> None:
    """Both restore one state, then step: the difference of a single step, at a hundred places of a trajectory."""
    torch, mlx = open_model("torch", qwen2), open_model("mlx", qwen2)
    for step in range(STEPS):
        mlx.restore(torch.save())
        first, second = (take_step(each, stage, step) for each in (torch, mlx))
        assert first.loss == pytest.approx(second.loss, abs=RESYNCHRONISED_TOLERANCE * (1 + first.loss)), step
