"""Runs, merges and reports in parallel processes on one project, some killed at random: nothing of another is lost.

Only where MINDPRINT_SOAK says how many: `nox -s soak` takes 200. The backend is the toy one of core's tests, because it
starts in a second and computes in NumPy: files, locks and kills are the same on every backend.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mindprint.runs.folder import RunFolder

sys.path.insert(0, str(Path(__file__).parents[2] / "packages" / "mindprint-core" / "tests"))

from toy_base import install_toy, write_toy_model

TASKS = int(os.environ["MINDPRINT_SOAK"])
PARALLEL = int(os.environ.get("MINDPRINT_SOAK_PARALLEL", "4"))
STEPS, EVERY = 120, 3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]

STARTED = re.compile(r"^mindprint: run (.+): \d+ steps(?:, continuing after step (\d+))?$", re.MULTILINE)


@dataclass
class Task:
    """A command that runs, and the event after which it is killed, if it is.

    `checkpoints` is the number of checkpoints that a run writes before it is killed. A kill at one of its files meets
    the run in the middle of its work on any machine, which a kill at a time does not.
    """

    words: list[str]
    process: subprocess.Popen[bytes]
    output: Path
    messages: Path
    checkpoints: int | None = None
    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)
    killed: bool = False

    def kill_if_due(self) -> None:
        due = self.seconds is not None and time.monotonic() - self.started > self.seconds
        if self.checkpoints is not None and (run := self.run):
            due = last_step(run) >= self.checkpoints * EVERY
        if due and self.process.poll() is None:
            self.process.kill()
            self.killed = True

    @property
    def started_line(self) -> re.Match[str] | None:
        return STARTED.search(self.messages.read_text(encoding="utf-8"))

    @property
    def run(self) -> Path | None:
        line = self.started_line
        return Path(line[1]) if line else None


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    site = install_toy(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    rows = [{"prompt": f"the water {number}", "completion": f"the river {number}"} for number in range(8)]
    (folder / "data" / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mindprint.yaml").write_text(
        f"model: {{name: {write_toy_model(tmp_path / 'base')}}}\nbackend: toy\ndpo: {{enabled: false}}\n"
        f"adapter: {{r: 2}}\nsft: {{steps_per_topic: {STEPS}, batch_size: 2, learning_rate: 1e-2}}\n"
        f"checkpoints: {{every: {EVERY}}}\nevaluation: {{levels: []}}\n"
    )
    return folder


class Soak:
    """The commands of one soak, and everything that must still be there when they are done."""

    def __init__(self, project: Path, folder: Path) -> None:
        self.project = project
        self.folder = folder
        self.rng = random.Random(16)
        self.counts: Counter[str] = Counter()
        self.finished: dict[Path, dict[str, str]] = {}
        self.running: list[Task] = []
        self.adapter = b""
        """Of the first run. Every other run has the same configuration, so it must end with the same bits."""
        self.took = 1.0
        """Seconds of the first run, which ran alone."""

    def start(self, words: list[str], *, may_die: bool = True) -> Task:
        number = self.counts["started"]
        self.counts["started"] += 1
        output, messages = (self.folder / f"{number}.{name}" for name in ("out", "err"))
        with output.open("wb") as out, messages.open("wb") as err:
            process = subprocess.Popen([sys.executable, "-m", "mindprint", *words, "--json"], stdout=out, stderr=err)
        task = Task(words, process, output, messages)
        # Half are killed. Most of the runs at one of their checkpoints, the others at any moment of what they take when
        # they run next to each other.
        if may_die and self.rng.random() < 0.5:
            if words[0] == "train" and self.rng.random() < 0.8:
                task.checkpoints = self.rng.randrange(1, STEPS // EVERY - 1)
            else:
                task.seconds = self.rng.uniform(0.05, 0.5 * PARALLEL) * self.took
        self.running.append(task)
        return task

    def wait_for_slot(self, most: int) -> None:
        """Kill what is due and collect what has ended, until at most `most` commands run."""
        while True:
            for task in list(self.running):
                task.kill_if_due()
                if task.process.poll() is not None:
                    self.running.remove(task)
                    self.collect(task)
            if len(self.running) <= most:
                return
            time.sleep(0.01)

    def collect(self, task: Task) -> None:
        """Remember what a command made, or check that it had a reason to make nothing."""
        messages = task.messages.read_text(encoding="utf-8")
        if (line := task.started_line) and line[2] not in (None, "0"):
            self.counts["resumed from a checkpoint"] += 1
        if task.killed:
            self.counts["killed"] += 1
            if task.words[0] == "train" and task.run and last_step(task.run):
                self.counts["killed after a checkpoint"] += 1
            return
        # A run that does not say its folder yet can be taken for one that was killed. Its lock refuses the second.
        refusal = "exists already" if task.words[0] == "merge" else "another process is training this run"
        if (
            task.process.returncode == 2
            and refusal in messages
            and (task.words[0] == "merge" or "--resume" in task.words)
        ):
            self.counts["refused"] += 1
            return
        assert task.process.returncode == 0, f"{task.words} ended with {task.process.returncode}:\n{messages[-3000:]}"
        self.counts["ended"] += 1
        if task.words[0] not in ("train", "merge"):
            return
        made = Path(json.loads(task.output.read_bytes())["run" if task.words[0] == "train" else "folder"])
        assert made not in self.finished, f"two commands made {made}"
        self.finished[made] = digests(made)
        if task.words[0] == "train":
            adapter = (made / "adapter" / "adapter_model.safetensors").read_bytes()
            self.adapter = self.adapter or adapter
            assert adapter == self.adapter, f"{made} is not what a run without kills is"
            assert [step["step"] for step in RunFolder(made).read_steps()] == list(range(1, STEPS + 1))

    def words(self, number: int) -> list[str]:
        """Draw a command: a new run, the resumption of a killed one, a merge, or a report."""
        kind = self.rng.choice(["train", "resume", "resume", "merge", "merge", "report"])
        if kind == "resume" and (resumable := self.resumable()):
            return ["train", str(self.rng.choice(resumable)), "--resume"]
        finished = sorted(run for run in self.finished if run.parent == self.project / "runs")
        if kind == "merge":
            # Fewer names than merges: some of them want the same folder.
            return ["merge", str(finished[0]), str(self.folder / f"merged-{number // 3}"), "--no-verify"]
        return ["report", str(finished[0])] if kind == "report" else ["train", str(self.project)]

    def resumable(self) -> list[Path]:
        """Return the runs that were killed and that nobody continues at the moment."""
        busy = {task.run for task in self.running} | {Path(task.words[1]) for task in self.running}
        runs = sorted((self.project / "runs").iterdir())
        return [run for run in runs if run not in busy and RunFolder(run).holds_run and not RunFolder(run).complete]


def last_step(run: Path) -> int:
    """Return the step of a run's last checkpoint, 0 for none."""
    folder = run / "checkpoints"
    return (
        max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0) if folder.exists() else 0
    )


def digests(folder: Path) -> dict[str, str]:
    """Digest every file that only its own process may write; reports are written again on purpose."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("report.html", "report.md", ".lock") and ".mindprint-" not in path.name
    }


def test_nothing_of_another_process_is_lost(project: Path, tmp_path: Path) -> None:
    soak = Soak(project, tmp_path)
    began = time.monotonic()
    soak.start(["train", str(project)], may_die=False)
    soak.wait_for_slot(0)
    soak.took = time.monotonic() - began
    for number in range(TASKS):
        soak.wait_for_slot(PARALLEL - 1)
        soak.start(soak.words(number))
    soak.wait_for_slot(0)
    for run in soak.resumable():
        soak.wait_for_slot(PARALLEL - 1)
        soak.start(["train", str(run), "--resume"], may_die=False)
    soak.wait_for_slot(0)
    for folder, expected in soak.finished.items():
        assert digests(folder) == expected, f"{folder} is not what its process wrote"
    assert not soak.resumable()
    left = [path for path in (project / "runs").rglob("*") if ".mindprint-" in path.name and path.parent.name != "runs"]
    print(f"\n{TASKS} commands, {PARALLEL} at a time, {time.monotonic() - began:.0f} s: {dict(soak.counts)}")
    print(f"{len(soak.finished)} folders unchanged, {len(left)} temporary names of killed commands left")
    # Without these the soak would prove nothing about resuming.
    assert soak.counts["killed after a checkpoint"] >= TASKS // 20
    assert soak.counts["resumed from a checkpoint"] >= TASKS // 20
