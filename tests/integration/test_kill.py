"""kill -9 at random moments of each stage, then `--resume`: the run ends bit for bit where the uninterrupted one did.

Three moments a stage and backend in CI; `nox -s soak` sets MINDPRINT_KILLS=20 and prints what was lost each time.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mindprint
from mindprint.cli import main
from mindprint.plugins.backend import load_backend
from mindprint.runs.folder import RunFolder
from parity_cases import WORDS

KILLS = int(os.environ.get("MINDPRINT_KILLS", "3"))
STEPS = {"sft": 14, "dpo": 14}
EVERY = 5


@pytest.fixture(scope="module")
def project(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    rng = random.Random(1)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))

    rows = {
        "sft": [{"prompt": text(), "completion": text()} for _ in range(20)],
        "preferences": [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(20)],
    }
    (folder / "data").mkdir()
    for name, content in rows.items():
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "mindprint.yaml").write_text(
        f"model: {{name: {qwen2}}}\n"
        "backend: {device: cpu, dtype: float32}\n"
        f"sft: {{steps_per_topic: {STEPS['sft']}, learning_rate: 1e-2}}\n"
        f"dpo: {{steps_per_topic: {STEPS['dpo']}, learning_rate: 1e-3}}\n"
        f"checkpoints: {{every: {EVERY}}}\n"
        "generation: {max_new_tokens: 8}\n"
    )
    return folder


def test_processes_multiply_with_the_same_library() -> None:
    """Bit for bit holds between this process, whatever its tests have imported, and the commands it starts."""
    code = "from mindprint.plugins.backend import load_backend; print(load_backend('mlx').info.libraries['blas'])"
    started = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert load_backend("mlx").info.libraries["blas"] == started.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_killed_at_random_moments(project: Path, backend: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    mindprint.train(project, run=whole, backend={"type": backend})
    rng = random.Random(backend)
    lost = {"sft": [], "dpo": []}
    for stage, first in (("sft", 0), ("dpo", STEPS["sft"])):
        for kill in range(KILLS):
            run = tmp_path / f"{stage}-{kill}"
            done = kill_after(train(project, backend, run), RunFolder(run), first + rng.randrange(STEPS[stage]), rng)
            kept = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
            assert 0 <= done - kept <= EVERY, "a checkpoint is missing"
            lost[stage].append(done - kept)
            resume(project, backend, run, as_command=kill == 0)
            assert numbers(run) == numbers(whole)
            assert weights(run) == weights(whole)
    print(
        f"{backend}: {KILLS} kills a stage, steps taken again: {lost}; every run ended bit for bit like the whole one"
    )


def train(project: Path, backend: str, run: Path) -> subprocess.Popen[bytes]:
    """The command, as a user gives it."""
    words = ["train", str(project), f"backend.type={backend}", "--run", str(run)]
    command = [sys.executable, "-m", "mindprint", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def resume(project: Path, backend: str, run: Path, *, as_command: bool) -> None:
    """Resume in this process, as a command or as a program does."""
    if as_command:
        assert main(["train", str(project), f"backend.type={backend}", "--run", str(run), "--resume"]) == 0
    else:
        mindprint.train(project, run=run, resume=True, backend={"type": backend})


def kill_after(process: subprocess.Popen[bytes], run: RunFolder, lines: int, rng: random.Random) -> int:
    """Kill the process some moment after so many steps; returns how many lines metrics.jsonl has then."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (run.checkpoints / "000000").is_dir():
        time.sleep(0.001)
    while time.monotonic() < deadline and len(run.read_steps()) < lines:
        time.sleep(0.001)
    time.sleep(rng.random() * 0.02)
    process.kill()
    process.wait()
    assert not run.complete, "it was over before it was killed"
    return len(run.read_steps())


def numbers(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in RunFolder(run).read_steps()]


def weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()
