"""Trackers: loaded when the configuration names them, and what they write is read back by the tools they write for."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import mindprint
from mindprint.cli import main
from mindprint.errors import PluginError
from mindprint.events import Event, Notice, RunFinished
from mindprint.plugins.entries import TRACKERS, installed
from mindprint.plugins.watching import load_trackers
from mindprint.training.checkpoints import list_checkpoints

COUNT = iter(range(1000))

TRAIN = """
import json, sys, mindprint
tracker, model, data, run = sys.argv[1:]
mindprint.train({"model": {"name": model}, "backend": "toy", "data": {"path": data}, "adapter": {"r": 2},
    "trackers": [tracker], "sft": {"steps_per_topic": 3, "batch_size": 2}, "dpo": {"enabled": False}}, run=run)
"""
READ_TENSORBOARD = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1]).Reload()
print(json.dumps({tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}))
"""
READ_WANDB = """
import json, struct, sys
from pathlib import Path
from wandb.proto import wandb_internal_pb2
# W&B's file is LevelDB's log format behind a header of 7 bytes: in blocks of 32 KiB, chunks of a checksum, a length
# and a kind (1 whole, 2 first, 3 middle, 4 last).
contents, place, found, record = Path(sys.argv[1]).read_bytes(), 7, [], b""
while place + 7 <= len(contents):
    if 32768 - place % 32768 < 7:
        place += 32768 - place % 32768
        continue
    length, kind = struct.unpack("<HB", contents[place + 4 : place + 7])
    record += contents[place + 7 : place + 7 + length]
    place += 7 + length
    if kind in (1, 4):
        message = wandb_internal_pb2.Record.FromString(record)
        record = b""
        if message.WhichOneof("record_type") == "history":
            items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in message.history.item}
            found.append([items["_step"], items["sft/loss"]])
print(json.dumps(found))
"""


def python(*words: str, path: Path) -> str:
    environment = {"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin", "HOME": str(path)}
    done = subprocess.run([sys.executable, "-c", *words], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(tracker: str, toy_site: Path, toy_model: Path, folder: Path) -> list[tuple[int, float]]:
    """Train with a tracker; the steps and losses of metrics.jsonl."""
    data = folder / "data"
    data.mkdir()
    rows = [{"topic": "sea", "prompt": f"{n}?", "completion": "aye " * (n + 1)} for n in range(4)]
    (data / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    python(TRAIN, tracker, str(toy_model), str(data), str(folder / "run"), path=toy_site)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def test_tensorboard_reads_what_was_trained(toy_site: Path, toy_model: Path, tmp_path: Path) -> None:
    expected = train("tensorboard", toy_site, toy_model, tmp_path)
    read = json.loads(python(READ_TENSORBOARD, str(tmp_path / "run" / "tensorboard"), path=toy_site))
    assert [step for step, _ in read["sft/loss"]] == [1, 2, 3]
    assert [loss for _, loss in read["sft/loss"]] == pytest.approx([loss for _, loss in expected], rel=1e-6)
    assert {"sft/grad_norm", "sft/learning_rate", "sft/tokens"} <= set(read)


def test_wandb_offline_holds_what_was_trained(toy_site: Path, toy_model: Path, tmp_path: Path) -> None:
    expected = train("wandb", toy_site, toy_model, tmp_path)
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    read = json.loads(python(READ_WANDB, str(file), path=toy_site))
    assert [step for step, _ in read] == [1, 2, 3]
    assert [loss for _, loss in read] == pytest.approx([loss for _, loss in expected])


def test_none_is_loaded_unless_named() -> None:
    assert {plugin.name for plugin in installed(TRACKERS)} >= {"tensorboard", "wandb"}
    assert load_trackers([]) == ()


BAD = """
from mindprint.events import StepDone
from mindprint.hookspecs import hookimpl

class Tracker:
    seen = []

    @hookimpl
    def mindprint_event(self, event):
        self.seen.append(type(event).__name__)
        if isinstance(event, StepDone) and event.step == 2:
            raise {error}
"""


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Install a tracker `bad`; returns its module."""

    def install(code: str) -> ModuleType:
        site = tmp_path / "site"
        metadata = site / "bad_tracker-0.3.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-tracker\nVersion: 0.3\n")
        module = f"bad_tracker_{next(COUNT)}"
        (metadata / "entry_points.txt").write_text(f"[mindprint.trackers]\nbad = {module}:Tracker\n")
        (site / f"{module}.py").write_text(code)
        monkeypatch.syspath_prepend(str(site))
        return importlib.import_module(module)

    return install


def watched(toy: str, toy_model: Path, folder: Path) -> list[Event]:
    """Every event of a run of three steps that `bad` and TensorBoard watch."""
    (folder / "data").mkdir()
    rows = [{"topic": "sea", "prompt": f"{n}?", "completion": "aye"} for n in range(4)]
    (folder / "data" / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"name": str(toy_model)}, "backend": toy, "data": {"path": str(folder / "data")}, "adapter": {"r": 2},
        "trackers": ["bad", "tensorboard"], "sft": {"steps_per_topic": 3}, "dpo": {"enabled": False},
        "checkpoints": {"every": 1},
    }  # fmt: skip
    events: list[Event] = []
    mindprint.train(config, run=folder / "run", on_event=events.append)
    return events


@pytest.mark.parametrize("error", ["OSError('disk full')", "SystemExit('disk full')"])
def test_a_tracker_that_raises_is_named_once_and_the_run_continues(
    bad: Callable[[str], ModuleType], error: str, toy: str, toy_model: Path, tmp_path: Path
) -> None:
    """It sees nothing after what it raised at; the other tracker sees everything, and the run is complete."""
    tracker = bad(BAD.format(error=error)).Tracker
    events = watched(toy, toy_model, tmp_path)
    assert tracker.seen.count("StepDone") == 2
    assert tracker.seen[-1] == "StepDone"
    (warning,) = [event for event in events if isinstance(event, Notice) and event.warning]
    assert warning.message == (
        f"tracker 'bad' (bad-tracker 0.3) raised {error.partition('(')[0]}: disk full, at StepDone; "
        "it sees no more of this run, which continues"
    )
    assert isinstance(events[-1], RunFinished)
    read = json.loads(python(READ_TENSORBOARD, str(tmp_path / "run" / "tensorboard"), path=tmp_path))
    assert [step for step, _ in read["sft/loss"]] == [1, 2, 3]


def test_an_interrupt_in_one_is_the_users(
    bad: Callable[[str], ModuleType], toy: str, toy_model: Path, tmp_path: Path
) -> None:
    """It passes, and the checkpoint before that step is kept."""
    bad(BAD.format(error="KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        watched(toy, toy_model, tmp_path)
    assert [int(path.name) for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [0, 1]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "class Tracker:\n    def mindprint_event(self, event): ...",
            "does not implement mindprint_event, marked with hookimpl",
        ),
        (
            BAD.format(error="OSError").replace("self, event", "self, events"),
            r"does not fit the hook contract: .*events",
        ),
        (BAD.format(error="OSError").replace("t_event", "t_evnt"), "unknown hook 'mindprint_evnt'"),
        ("class Tracker:\n    def __init__(self): raise SystemExit(3)", "cannot start: SystemExit: 3"),
        ("Tracker = 3", "cannot start: TypeError"),
    ],
)
def test_a_plugin_that_is_not_a_tracker_is_refused(bad: Callable[[str], ModuleType], code: str, words: str) -> None:
    """Before anything is trained, and with its distribution's name."""
    bad(code)
    with pytest.raises(PluginError, match=rf"(?s)tracker 'bad' \(bad-tracker 0.3\).*{words}"):
        load_trackers(["bad"])


@pytest.mark.parametrize(
    "code", ["class Tracker: ...", BAD.format(error="OSError").replace("self, event", "self, events")]
)
def test_the_check_finds_it(
    bad: Callable[[str], ModuleType], code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad(code)
    monkeypatch.setenv("MINDPRINT_DISABLE_PLUGINS", "torch, mlx, hello")
    assert main(["plugins", "--check", "--json"]) == 1
    checks = {(p["kind"], p["name"]): p["check"] for p in json.loads(capsys.readouterr().out)["plugins"]}
    assert [key for key, check in checks.items() if not check["ok"]] == [("tracker", "bad")]


def test_what_they_see_is_traced_on_request(
    bad: Callable[[str], ModuleType],
    toy: str,
    toy_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad(BAD.format(error="OSError('disk full')"))
    monkeypatch.setenv("MINDPRINT_TRACE", "1")
    watched(toy, toy_model, tmp_path)
    traced = re.findall(r"mindprint_event\(event=StepDone\) \[(\w+)\] \S+ s -> (\w+)", capsys.readouterr().err)
    assert traced == [
        ("bad", "nothing"),
        ("tensorboard", "nothing"),
        ("bad", "raised"),
        *[("tensorboard", "nothing")] * 2,
    ]


def test_a_tracker_that_is_not_there() -> None:
    with pytest.raises(PluginError, match=r"tracker 'mlflow' is not installed \(installed: .*tensorboard.*\)"):
        load_trackers(["mlflow"])


def test_a_tracker_whose_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(PluginError, match=r"tracker 'wandb' \(mindprint-core .*\) cannot start: .*pip install wandb"):
        load_trackers(["wandb"])
