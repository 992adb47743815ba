"""Trackers: loaded when the configuration names them, and what they write is read back by the tools they write for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mindprint.errors import PluginError
from mindprint.plugins import TRACKERS, installed, load_trackers

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


def test_a_tracker_that_is_not_there() -> None:
    with pytest.raises(PluginError, match=r"tracker 'mlflow' is not installed \(installed: .*tensorboard.*\)"):
        load_trackers(["mlflow"])


def test_a_tracker_whose_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(PluginError, match=r"tracker 'wandb' \(mindprint-core .*\) cannot start: .*pip install wandb"):
        load_trackers(["wandb"])
