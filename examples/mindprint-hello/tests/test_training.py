"""The example as its users meet it: a command writes a base, a project is made, and trained, all from the shell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def mindprint(folder: Path, *words: str) -> str:
    command = [sys.executable, "-m", "mindprint", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_nothing_to_an_adapter(tmp_path: Path) -> None:
    """`mindprint train backend.type=hello`: the loss falls from topic to topic, and within each DPO stage."""
    assert mindprint(tmp_path, "hello", "base") == "a base for the hello backend: base\n"
    mindprint(tmp_path, "init", "voice", "--model", "base")
    settings = (
        "data.max_length=64",
        "sft.learning_rate=1e-2",
        "sft.batch_size=32",
        "dpo.batch_size=32",
        "dpo.learning_rate=1e-3",
    )
    lengths = ("sft.epochs_per_topic=null", "sft.steps_per_topic=6", "dpo.steps_per_topic=4")
    result = json.loads(mindprint(tmp_path, "train", "voice", "backend.type=hello", *settings, *lengths, "--json"))
    assert {stage["backend"] for stage in result["stages"]} == {"hello"}
    assert {stage["stage"] for stage in result["stages"]} == {"sft", "dpo"}
    sft, dpo = ([stage for stage in result["stages"] if stage["stage"] == name] for name in ("sft", "dpo"))
    assert sft[-1]["first_loss"] < sft[0]["first_loss"] - 0.5
    assert all(stage["last_loss"] < stage["first_loss"] for stage in dpo)
    assert (tmp_path / "voice" / "runs" / "run-001" / "adapter" / "adapter_model.safetensors").is_file()


def test_it_is_listed_and_works(tmp_path: Path) -> None:
    listed = json.loads(mindprint(tmp_path, "plugins", "--json"))["plugins"]
    assert {(plugin["kind"], plugin["name"]) for plugin in listed if plugin["distribution"] == "mindprint-hello"} == {
        ("backend", "hello"),
        ("command", "hello"),
    }
    assert "hello" in mindprint(tmp_path, "--help")


def test_a_folder_that_is_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "mindprint", "hello", "."], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "mindprint: error: .: is not empty; name a new folder\n")


def test_it_is_small_enough_to_read() -> None:
    import mindprint_hello.plugin

    assert len(Path(mindprint_hello.plugin.__file__).read_text(encoding="utf-8").splitlines()) < 300
