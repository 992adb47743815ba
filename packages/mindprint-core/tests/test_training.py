"""Whole runs on the toy backend: what they leave, how they stop and continue, and why they stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mindprint
from mindprint.adapter.peft_format import read_adapter
from mindprint.config import load_config
from mindprint.contract import ModelSpec, StepMetrics, TrainingState, Update
from mindprint.errors import (
    BackendError,
    CheckpointError,
    DataError,
    GuardError,
    Interrupted,
    MindprintError,
    ModelError,
    RunError,
)
from mindprint.events import Event, Notice, RunFinished, StageStarted, StepDone
from mindprint.hookspecs import hookimpl
from mindprint.models.folder import base_digest
from mindprint.runs.folder import RunFolder

Project = dict[str, Any]
SFT_STEPS, DPO_STEPS, TOPICS = 4, 3, 2
TOTAL = TOPICS * (SFT_STEPS + DPO_STEPS)


@pytest.fixture
def project(toy: str, toy_model: Path, tmp_path: Path) -> Project:
    """Two topics of five rows and four pairs; an epoch is three SFT steps, so the last step is in the second epoch."""
    data = tmp_path / "data"
    data.mkdir()
    for topic in ("bees", "tides"):
        append(
            data / "sft.jsonl",
            [{"topic": topic, "prompt": f"{topic} {n}?", "completion": "aye " * (n + 1)} for n in range(5)],
        )
        pairs = [
            {"topic": topic, "prompt": f"{n}?", "chosen": "aye, " * n + "aye", "rejected": "yes."} for n in range(4)
        ]
        append(data / "preferences.jsonl", pairs)
    return {
        "model": {"name": str(toy_model)},
        "backend": toy,
        "data": {"path": str(data)},
        "adapter": {"r": 2},
        "sft": {"steps_per_topic": SFT_STEPS, "batch_size": 2, "learning_rate": 1e-2},
        "dpo": {"steps_per_topic": DPO_STEPS, "batch_size": 2, "learning_rate": 1e-2},
        "checkpoints": {"every": 2, "keep": 2},
        "voice": {"answers_per_prompt": 1},
    }


def append(file: Path, rows: list[dict[str, str]]) -> None:
    with file.open("a") as opened:
        opened.writelines(json.dumps(row) + "\n" for row in rows)


def ctrl_c_at(step: int) -> Callable[[Event], None]:
    def press(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return press


def numbers(run: Path) -> list[tuple[Any, ...]]:
    keys = ("topic", "stage", "step", "stage_step", "loss", "grad_norm", "learning_rate", "tokens", "reward_margin")
    return [tuple(line.get(key) for key in keys) for line in RunFolder(run).read_steps()]


def weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_what_a_run_leaves_behind(project: Project, tmp_path: Path) -> None:
    result = mindprint.train(project, run=tmp_path / "run")
    run = tmp_path / "run"
    assert result.run == run and result.adapter == run / "adapter"
    assert [(stage.topic, stage.stage, stage.steps) for stage in result.stages] == [
        ("bees", "sft", 4),
        ("bees", "dpo", 3),
        ("tides", "sft", 4),
        ("tides", "dpo", 3),
    ]
    lines = RunFolder(run).read_steps()
    assert [line["step"] for line in lines] == list(range(1, TOTAL + 1))
    assert all(line["backend"] == "toy" and line["tokens"] > 0 for line in lines)
    assert all(("reward_margin" in line) == (line["stage"] == "dpo") for line in lines)
    # 'keep 2': the end and step 12, which needs the start of its stage (11) and of its topic (7).
    assert sorted(int(path.name) for path in (run / "checkpoints").iterdir()) == [7, 11, 12, 14]
    adapter, base = read_adapter(run / "adapter")
    assert base == project["model"]["name"]
    assert set(adapter.tensors) == {"layers.0.up_proj", "layers.0.down_proj"}
    assert all(factors.b.any() for factors in adapter.tensors.values())
    assert (run / "adapter" / "README.md").read_text().startswith("---\nlibrary_name: peft")
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["rows"] == {"sft": {"bees": 5, "tides": 5}, "preferences": {"bees": 4, "tides": 4}}
    assert manifest["identity"]["base model"] == base_digest(Path(project["model"]["name"]))
    assert not [path for path in run.rglob("*") if path.name.startswith(".") and path.name != ".lock"]


def test_the_runs_own_configuration_runs_it_again(project: Project, tmp_path: Path) -> None:
    mindprint.train(project, run=tmp_path / "first")
    again = mindprint.train(tmp_path / "first" / "config.yaml", run=tmp_path / "second")
    assert numbers(again.run) == numbers(tmp_path / "first")
    assert weights(again.run) == weights(tmp_path / "first")
    assert load_config(tmp_path / "first" / "config.yaml").config.data.path == "../data"


def test_dpo_starts_from_its_own_reference(project: Project, tmp_path: Path) -> None:
    """ln 2 and rewards 0 at the first step of each DPO stage; the reference is not the bare base."""
    mindprint.train(project, run=tmp_path / "run")
    first_steps = [
        line for line in RunFolder(tmp_path / "run").read_steps() if line["stage"] == "dpo" and line["stage_step"] == 1
    ]
    assert len(first_steps) == TOPICS
    for line in first_steps:
        assert line["loss"] == pytest.approx(np.log(2), abs=1e-5)
        assert line["reward_margin"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("step", range(1, TOTAL))
def test_stopped_after_any_step_it_continues_bit_for_bit(project: Project, tmp_path: Path, step: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    mindprint.train(project, run=whole)
    with pytest.raises(Interrupted, match=f"the checkpoint of step {step} is in"):
        mindprint.train(project, run=parts, on_event=ctrl_c_at(step))
    assert len(numbers(parts)) == step
    mindprint.train(project, run=parts, resume=True)
    assert numbers(parts) == numbers(whole)
    assert weights(parts) == weights(whole)


@pytest.mark.parametrize("lines", [1, 5, 9])
def test_killed_it_continues_from_its_last_checkpoint(
    project: Project, toy_site: Path, tmp_path: Path, lines: int
) -> None:
    """kill -9 when metrics.jsonl has N lines. Only steps since the last checkpoint are taken again."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    mindprint.train(project, run=whole)
    kill_when(project, toy_site, killed, lines)
    before = numbers(killed)
    assert lines <= len(before) < TOTAL
    newest = max(int(path.name) for path in (killed / "checkpoints").iterdir() if path.name.isdigit())
    assert newest >= len(before) - 2
    mindprint.train(project, run=killed, resume=True)
    assert numbers(killed) == numbers(whole)
    assert weights(killed) == weights(whole)


def test_killed_before_its_first_checkpoint_it_starts_over(project: Project, tmp_path: Path) -> None:
    """The lock is a run's first file: with nothing else there, there is nothing to lose."""
    mindprint.train(project, run=tmp_path / "whole")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    with pytest.raises(RunError, match="already holds a run; choose another --run, or continue it with --resume"):
        mindprint.train(project, run=run)
    mindprint.train(project, run=run, resume=True)
    assert numbers(run) == numbers(tmp_path / "whole")
    assert weights(run) == weights(tmp_path / "whole")


def kill_when(project: Project, toy_site: Path, run: Path, lines: int) -> None:
    code = (
        "import json, sys, time, mindprint\n"
        "from mindprint.events import StepDone\n"
        "slow = lambda event: time.sleep(0.05) if isinstance(event, StepDone) else None\n"
        "mindprint.train(json.loads(sys.argv[1]), run=sys.argv[2], on_event=slow)\n"
    )
    # In front of the sources that this process uses.
    path = os.pathsep.join(filter(None, [str(toy_site), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(project), str(run)], env={**os.environ, "PYTHONPATH": path}
    )
    deadline = time.monotonic() + 60
    while len(RunFolder(run).read_steps()) < lines and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()


def test_a_second_run_may_not_write_into_the_first(project: Project, tmp_path: Path) -> None:
    mindprint.train(project, run=tmp_path / "run")
    with pytest.raises(RunError, match="already holds a run; choose another --run, or continue it with --resume"):
        mindprint.train(project, run=tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").touch()
    with pytest.raises(RunError, match="already holds something else"):
        mindprint.train(project, run=tmp_path / "other")


def test_nothing_to_resume(project: Project, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run to resume"):
        mindprint.train(project, run=tmp_path / "run", resume=True)
    mindprint.train(project, run=tmp_path / "run")
    with pytest.raises(RunError, match="is complete already"):
        mindprint.train(project, run=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            {"adapter": {"alpha": 3.0}},
            r"adapter configuration is another one: adapter.alpha is 16.0 in the run, 3.0 here",
        ),
        (
            {"sft": {"learning_rate": 1e-3}},
            r"training configuration is another one: sft.learning_rate is .* 0.001 here",
        ),
        ({"seed": 1}, r"training configuration is another one: seed is 0 in the run, 1 here"),
        ({"data": {"max_length": 12}}, r"dataset is another one: data.max_length is 1024 in the run, 12 here"),
    ],
)
def test_a_checkpoint_of_something_else(project: Project, tmp_path: Path, change: Project, part: str) -> None:
    stopped(project, tmp_path / "run", 5)
    with pytest.raises(CheckpointError, match=part):
        mindprint.train(project, run=tmp_path / "run", resume=True, **change)


def test_a_checkpoint_of_another_base(project: Project, tmp_path: Path) -> None:
    from toy_base import write_toy_model

    stopped(project, tmp_path / "run", 5)
    other = write_toy_model(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="the base model is another one: model.name is "):
        mindprint.train(project, run=tmp_path / "run", resume=True, model={"name": str(other)})


def test_checkpoints_may_be_written_at_another_pace_after_resuming(project: Project, tmp_path: Path) -> None:
    mindprint.train(project, run=tmp_path / "whole")
    stopped(project, tmp_path / "run", 5)
    mindprint.train(project, run=tmp_path / "run", resume=True, checkpoints={"every": 1})
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def stopped(project: Project, run: Path, step: int) -> None:
    with pytest.raises(Interrupted):
        mindprint.train(project, run=run, on_event=ctrl_c_at(step))


def test_a_damaged_checkpoint_is_refused_and_latest_passes_over_it(project: Project, tmp_path: Path) -> None:
    mindprint.train(project, run=tmp_path / "whole")
    run = tmp_path / "run"
    stopped(project, run, 6)
    damaged = run / "checkpoints" / "000006" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="optimizer.safetensors: is truncated or edited"):
        mindprint.train(project, run=run, resume=True)
    events: list[Event] = []
    mindprint.train(project, run=run, resume="latest", on_event=events.append)
    assert any(isinstance(event, Notice) and event.warning and "000006" in event.message for event in events)
    assert numbers(run) == numbers(tmp_path / "whole")
    assert weights(run) == weights(tmp_path / "whole")


def test_the_reference_is_kept_and_belongs_to_its_key(project: Project, tmp_path: Path) -> None:
    stopped(project, tmp_path / "run", SFT_STEPS + 1)
    references = tmp_path / "run" / "references"
    first = references / "0001.safetensors"
    (references / "0003.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(GuardError, match="0003.safetensors: belongs to another base, adapter, data or template"):
        mindprint.train(project, run=tmp_path / "run", resume=True)


def test_a_lost_reference_is_computed_again_from_the_stages_start(project: Project, tmp_path: Path) -> None:
    mindprint.train(project, run=tmp_path / "whole")
    stopped(project, tmp_path / "run", SFT_STEPS + 2)
    (tmp_path / "run" / "references" / "0001.safetensors").unlink()
    mindprint.train(project, run=tmp_path / "run", resume=True)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def on_policy(project: Project, iterations: int = 1) -> Project:
    return {**project, "dpo": {**project["dpo"], "pairs": "on_policy", "iterations": iterations}}


def policy_answers(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "on_policy").iterdir()}


def test_the_policy_answers_the_prompts_of_its_pairs_as_each_stage_begins(project: Project, tmp_path: Path) -> None:
    given, own = tmp_path / "given", tmp_path / "own"
    mindprint.train(project, run=given)
    result = mindprint.train(on_policy(project, iterations=2), run=own)
    assert [(stage.topic, stage.stage, stage.steps) for stage in result.stages] == [
        ("bees", "sft", SFT_STEPS),
        ("bees", "dpo", 2 * DPO_STEPS),
        ("tides", "sft", SFT_STEPS),
        ("tides", "dpo", 2 * DPO_STEPS),
    ]
    files = {name: json.loads(content) for name, content in policy_answers(own).items()}
    # Stages 0 and 3 are the topics' SFT, and each iteration of DPO has its own answers.
    assert sorted(files) == ["0001.json", "0002.json", "0004.json", "0005.json"]
    assert all(len(file["answers"]) == 4 for file in files.values())
    assert len({file["key"] for file in files.values()}) == 4
    first = numbers(given)[:SFT_STEPS], numbers(own)[:SFT_STEPS]
    assert first[0] == first[1]
    assert numbers(own)[SFT_STEPS] != numbers(given)[SFT_STEPS]
    starts = [line for line in RunFolder(own).read_steps() if line["stage"] == "dpo" and line["stage_step"] == 1]
    assert [line["loss"] for line in starts] == pytest.approx([np.log(2)] * 4, abs=1e-5)


def test_killed_on_policy_it_reads_its_answers_and_continues_to_the_same_bytes(
    project: Project, toy_site: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    mindprint.train(on_policy(project, iterations=2), run=whole)
    kill_when(on_policy(project, iterations=2), toy_site, killed, SFT_STEPS + DPO_STEPS + 1)
    mindprint.train(on_policy(project, iterations=2), run=killed, resume=True)
    assert numbers(killed) == numbers(whole)
    assert weights(killed) == weights(whole)
    assert policy_answers(killed) == policy_answers(whole)


def test_answers_that_are_lost_are_made_again_and_those_of_another_stage_refused(
    project: Project, tmp_path: Path
) -> None:
    mindprint.train(on_policy(project), run=tmp_path / "whole")
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        mindprint.train(on_policy(project), run=run, on_event=ctrl_c_at(SFT_STEPS + 2))
    file = run / "on_policy" / "0001.json"
    content = file.read_text()
    file.unlink()
    (run / "on_policy" / "0003.json").write_text(content)
    with pytest.raises(GuardError, match="0003.json: belongs to another base, adapter, data or template"):
        mindprint.train(on_policy(project), run=run, resume=True)
    (run / "on_policy" / "0003.json").unlink()
    mindprint.train(on_policy(project), run=run, resume=True)
    assert numbers(run) == numbers(tmp_path / "whole")
    assert policy_answers(run) == policy_answers(tmp_path / "whole")


def test_iterations_need_new_answers(project: Project) -> None:
    with pytest.raises(MindprintError, match="iterations needs pairs: on_policy"):
        mindprint.train({**project, "dpo": {"iterations": 2}})


def test_observers_see_what_the_caller_sees(project: Project, tmp_path: Path) -> None:
    class Watcher:
        def __init__(self) -> None:
            self.events: list[Event] = []

        @hookimpl
        def mindprint_event(self, event: Event) -> None:
            self.events.append(event)

    watcher, events = Watcher(), list[Event]()
    mindprint.train(project, run=tmp_path / "run", on_event=events.append, observers=[watcher])
    assert watcher.events == events
    assert isinstance(events[-1], RunFinished)
    assert [event.stage for event in events if isinstance(event, StageStarted)] == ["sft", "dpo", "sft", "dpo"]


def test_gradient_checkpointing_is_asked_for_by_backend_section_and_may_change_on_resume(
    project: Project, tmp_path: Path
) -> None:
    asked: list[tuple[str, bool]] = []

    class Watcher:
        @hookimpl(wrapper=True)
        def mindprint_sft_step(self, update: Update) -> Any:
            asked.append(("sft", update.gradient_checkpointing))
            return (yield)

        @hookimpl(wrapper=True)
        def mindprint_dpo_step(self, update: Update) -> Any:
            asked.append(("dpo", update.gradient_checkpointing))
            return (yield)

    toy, run = project["backend"], tmp_path / "run"
    for_dpo = {"backend": {"type": toy, "gradient_checkpointing": True}}
    with pytest.raises(Interrupted):
        mindprint.train(project, run=run, dpo=for_dpo, observers=[Watcher()], on_event=ctrl_c_at(SFT_STEPS + 1))
    assert asked == [("sft", False)] * SFT_STEPS + [("dpo", True)]
    mindprint.train(project, run=run, resume=True, observers=[Watcher()])
    assert set(asked[SFT_STEPS + 1 :]) == {("sft", False), ("dpo", False)}


def test_a_topic_without_pairs_is_refused_before_anything_is_written(project: Project, tmp_path: Path) -> None:
    append(Path(project["data"]["path"]) / "sft.jsonl", [{"topic": "clocks", "prompt": "tick?", "completion": "tock"}])
    with pytest.raises(DataError, match="clocks"):
        mindprint.train(project, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_the_backend_cannot_load_leaves_nothing(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(spec: ModelSpec) -> None:
        raise ModelError(f"{spec.path}: not with this backend")

    import toy_backend

    monkeypatch.setattr(toy_backend, "mindprint_load_model", hookimpl(refuse))
    with pytest.raises(ModelError, match="not with this backend"):
        mindprint.train(project, run=tmp_path / "runs" / "one")
    assert not (tmp_path / "runs").exists()


def broken(monkeypatch: pytest.MonkeyPatch, hook: str, change: Callable[..., Any]) -> None:
    """Let a hook of the toy backend do its work and then `change` what comes of it."""
    import toy_backend

    honest = getattr(toy_backend, hook)

    def wrong(**arguments: Any) -> Any:
        return change(honest(**arguments), **arguments)

    wrong_signature = {
        "mindprint_sft_step": lambda model, batches, update: wrong(model=model, batches=batches, update=update),
        "mindprint_dpo_step": lambda model, batches, loss, update: wrong(
            model=model, batches=batches, loss=loss, update=update
        ),
        "mindprint_save": lambda model: wrong(model=model),
        "mindprint_inject_adapter": lambda model, adapter: wrong(model=model, adapter=adapter),
    }
    monkeypatch.setattr(toy_backend, hook, hookimpl(wrong_signature[hook]))


def not_finite(metrics: StepMetrics, **_: Any) -> StepMetrics:
    return replace(metrics, loss=float("nan"))


def larger_loss(metrics: StepMetrics, **_: Any) -> StepMetrics:
    return replace(metrics, loss=1.3 * metrics.loss)


def no_gradient(metrics: StepMetrics, **_: Any) -> StepMetrics:
    return replace(metrics, grad_norm=0.0)


def turned_sign(metrics: StepMetrics, **_: Any) -> StepMetrics:
    return replace(metrics, loss=-metrics.loss)


def wrong_reference(metrics: StepMetrics, **_: Any) -> StepMetrics:
    assert metrics.chosen_log_probs is not None
    return replace(metrics, chosen_log_probs=metrics.chosen_log_probs - 1)


def trained_base(metrics: StepMetrics, *, model: Any, **_: Any) -> StepMetrics:
    model.weights["lm_head"] = model.weights["lm_head"] + np.float32(1e-6)
    return metrics


def more_than_the_adapter(facts: Any, **_: Any) -> Any:
    return replace(facts, trainable_elements=facts.trainable_elements + 1)


@pytest.mark.parametrize(
    ("hook", "change", "words"),
    [
        ("mindprint_sft_step", not_finite, "loss nan .* not finite; the batch was .*sft.jsonl: line"),
        ("mindprint_sft_step", no_gradient, "gradient is exactly zero"),
        ("mindprint_sft_step", larger_loss, "^backend 'toy': mindprint_sft_step returned a loss of .* own log-probs"),
        ("mindprint_sft_step", trained_base, "base model's weights changed"),
        ("mindprint_dpo_step", turned_sign, "it trains another objective"),
        ("mindprint_dpo_step", wrong_reference, "the reference is not the adapter this stage starts from"),
        ("mindprint_inject_adapter", more_than_the_adapter, "would train .* elements, the configuration implies"),
    ],
)
def test_a_run_stops_before_it_corrupts(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hook: str, change: Callable[..., Any], words: str
) -> None:
    broken(monkeypatch, hook, change)
    with pytest.raises(GuardError, match=words):
        mindprint.train(project, run=tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()


def test_an_update_that_changes_nothing(project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[TrainingState] = []

    def always_the_first(state: TrainingState, **_: Any) -> TrainingState:
        seen.append(state)
        return seen[0]

    broken(monkeypatch, "mindprint_save", always_the_first)
    with pytest.raises(GuardError, match="left the adapter as it was"):
        mindprint.train(project, run=tmp_path / "run")


def test_an_error_in_the_middle_leaves_the_last_checkpoint(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mindprint.train(project, run=tmp_path / "whole")
    with monkeypatch.context() as patch:
        broken(patch, "mindprint_dpo_step", raise_in_the_middle)
        with pytest.raises(BackendError, match="dpo_step raised ZeroDivisionError.*the last checkpoint is kept"):
            mindprint.train(project, run=tmp_path / "run")
    mindprint.train(project, run=tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def raise_in_the_middle(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError


def test_every_deliberate_error_is_a_mindprint_error() -> None:
    assert issubclass(GuardError, MindprintError) and GuardError.exit_code == 1
    assert issubclass(Interrupted, MindprintError) and Interrupted.exit_code == 130
