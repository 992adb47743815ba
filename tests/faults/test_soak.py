"""Runs, merges and reports in parallel processes on one project, some killed at random: nothing of another is lost.

Only where MINDPRINT_SOAK says how many: `nox -s soak` takes 200.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from mindprint.runs.folder import RunFolder

TASKS = int(os.environ.get("MINDPRINT_SOAK", "0"))
PARALLEL = int(os.environ.get("MINDPRINT_SOAK_PARALLEL", "4"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]


@dataclass
class Task:
    """A command that runs, and the moment at which it is killed, if it is."""

    words: list[str]
    process: subprocess.Popen[str]
    killed_at: float | None
    killed: bool = False


@pytest.fixture
def project(qwen2: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    rows = [{"prompt": f"the water {number}", "completion": f"the river {number}"} for number in range(8)]
    (folder / "data" / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mindprint.yaml").write_text(
        f"model: {{name: {qwen2}}}\nbackend: {{type: mlx, device: cpu}}\ndpo: {{enabled: false}}\n"
        "sft: {steps_per_topic: 20}\ncheckpoints: {every: 2}\nevaluation: {levels: []}\n"
    )
    return folder


def start(words: list[str], killed_at: float | None) -> Task:
    command = [sys.executable, "-m", "mindprint", *words, "--json"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    return Task(words, process, killed_at)


def digests(folder: Path) -> dict[str, str]:
    """Digest every file that only its own process may write; reports are written again on purpose."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("report.html", "report.md", ".lock") and ".mindprint-" not in path.name
    }


@pytest.mark.skipif(not TASKS, reason="MINDPRINT_SOAK is not set")
def test_nothing_of_another_process_is_lost(project: Path, tmp_path: Path) -> None:
    rng = random.Random(16)
    finished: dict[Path, dict[str, str]] = {}
    counts = {"ended": 0, "killed": 0, "resumed": 0, "refused": 0}
    began = time.monotonic()
    keep(start(["train", str(project)], None), finished, counts)
    took = time.monotonic() - began
    runs = [path for path in finished if RunFolder(path).complete]
    waiting = [make_words(rng, project, tmp_path, number, runs) for number in range(TASKS)]
    running: list[Task] = []
    while waiting or running:
        while waiting and len(running) < PARALLEL:
            # Half of them are killed, at any moment of what they take next to each other.
            killed_at = time.monotonic() + rng.uniform(0.1, 0.6 * PARALLEL) * took if rng.random() < 0.5 else None
            running.append(start(waiting.pop(), killed_at))
        for task in list(running):
            if task.killed_at is not None and time.monotonic() > task.killed_at and task.process.poll() is None:
                task.process.kill()
                task.killed = True
            if task.process.poll() is not None:
                running.remove(task)
                keep(task, finished, counts)
        time.sleep(0.05)
    for run in sorted((project / "runs").iterdir()):
        if RunFolder(run).holds_run and not RunFolder(run).complete:
            keep(start(["train", str(run), "--resume"], None), finished, counts)
            counts["resumed"] += 1
    for folder, expected in finished.items():
        assert digests(folder) == expected, f"{folder} is not what its process wrote"
    print(f"{TASKS} commands, {PARALLEL} at a time: {counts}; {len(finished)} folders unchanged")


def make_words(rng: random.Random, project: Path, folder: Path, number: int, runs: list[Path]) -> list[str]:
    kind = rng.choice(["train", "train", "merge", "merge", "report"])
    if kind == "train":
        return ["train", str(project)]
    if kind == "merge":
        # Fewer names than merges: some of them want the same folder.
        return ["merge", str(runs[0]), str(folder / f"merged-{number // 3}"), "--no-verify"]
    return ["report", str(runs[0])]


def keep(task: Task, finished: dict[Path, dict[str, str]], counts: dict[str, int]) -> None:
    """Wait for a command; remember what it made, or check that it had a reason to make nothing."""
    output, messages = task.process.communicate()
    if task.killed:
        counts["killed"] += 1
        return
    if task.process.returncode == 2 and task.words[0] == "merge" and "exists already" in messages:
        counts["refused"] += 1
        return
    assert task.process.returncode == 0, f"{task.words} ended with {task.process.returncode}:\n{messages[-3000:]}"
    counts["ended"] += 1
    if task.words[0] in ("train", "merge"):
        said = json.loads(output)
        made = Path(said["run" if task.words[0] == "train" else "folder"])
        assert made not in finished, f"two commands made {made}"
        finished[made] = digests(made)
