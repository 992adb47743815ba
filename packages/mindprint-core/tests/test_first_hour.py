"""The first hour of a newcomer: the nearest right thing is done, or named in one line with how to do it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Fixtures are used by their names.
from test_cli import SETTINGS, Run, run, voice  # noqa: F401

import mindprint
from mindprint.cli import main
from mindprint.config import load_config, nearest_settings, setting_names
from mindprint.errors import Interrupted
from mindprint.events import CheckpointWritten, Event
from mindprint.runs.folder import RunFolder

SHORT = ["sft.steps_per_topic=2", "dpo.steps_per_topic=2", "evaluation.levels=[]", "generation.max_new_tokens=4"]


@pytest.fixture
def trained(run: Run, voice: str) -> str:  # noqa: F811
    """A project with a complete run."""
    assert run("train", voice, *SHORT).code == 0
    return voice


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian", "voice"], "No such command 'trian'; did you mean 'train'?"),
        (["voice"], "the command comes first: mindprint train voice"),
        (["train", "voice", "--epochs", "1"], "--epochs; settings have no dashes: sft.epochs_per_topic=1"),
        (["train", "voice", "--epochs=1"], "sft.epochs_per_topic=1"),
        (["train", "voice", "--lr", "1e-4"], "sft.learning_rate=1e-4 or dpo.learning_rate=1e-4"),
        (["compare", "voice", "--batch-size", "2"], "sft.batch_size=2 or dpo.batch_size=2"),
        (["train", "voice", "sft.lr=1"], "override 'sft.lr=1': sft.lr: unknown key; did you mean 'learning_rate'?"),
        (["train", "voice", "learning_rate=1"], "did you mean sft.learning_rate or dpo.learning_rate?"),
        (["train", "voice", "lora.rank=1"], "override 'lora.rank=1': lora: unknown key"),
        (["train", "voice", "adapter.rank=1"], "did you mean 'r'?"),
        (["train", "voice", "model=nowhere/at/all"], "nowhere/at/all: "),
        (["train", "voice", "--topic", "nothere"], "topic 'nothere' is in no row; topics are sea, land"),
        (["generate", "voice"], "Missing option '--prompt': mindprint generate voice --prompt "),
        (["generate", "voice", "data.path=x"], "'data.path=x': not a setting of generate, which takes max_new_tokens="),
        (["generate", "nowhere", "Hi"], "nowhere: no such folder"),
        (["train", "base.gguf"], "base.gguf: is a GGUF file"),
        (["train", "voice", "model=base.gguf"], "base.gguf: is a GGUF file"),
        (["generate", "base.gguf", "Hi"], "base.gguf: is a GGUF file"),
        (["eval", "base.gguf"], "base.gguf: is a GGUF file"),
    ],
)  # fmt: skip
def test_25_the_nearest_right_thing_is_named(run: Run, voice: str, arguments: list[str], words: str) -> None:  # noqa: F811
    Path("base.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert words in run(*arguments).error


def test_25_what_the_command_line_gave_is_not_looked_for_in_the_file(run: Run, voice: str) -> None:  # noqa: F811
    for override in ("sft.batch_size=none", "sft.learning_rate=-1", "data.max_length=0", "curriculum.dpo=perhaps"):
        error = run("train", voice, override).error
        assert error.startswith(f"override {override!r}: ") and "line" not in error
    Path("voice/mindprint.yaml").write_text("sft: {batch_size: none}\n")
    assert "voice/mindprint.yaml: line 1: " in run("train", voice, "dpo.batch_size=2").error


def test_25_a_section_is_also_written_as_one_text(tmp_path: Path) -> None:
    (tmp_path / "mindprint.yaml").write_text("model: my-base\ndata: rows\n")
    config = load_config(tmp_path, ["model.revision=main", "data=others"]).config
    assert (config.model.name, config.model.revision, config.data.path) == ("my-base", "main", "others")


def test_25_every_setting_has_a_name_and_is_nearest_to_itself() -> None:
    names = setting_names()
    assert {"sft.learning_rate", "seed", "evaluation.final.voice", "dpo.backend.type"} <= set(names)
    assert len(names) == len(set(names))
    assert nearest_settings("epochs") == ["sft.epochs_per_topic", "dpo.epochs_per_topic"]
    assert nearest_settings("zzzz") == []


def test_25_a_prompt_may_follow_the_project_and_settings_may_follow_it(run: Run, trained: str) -> None:  # noqa: F811
    plain = run("generate", trained, "--prompt", "who?", "--json").json
    assert run("generate", trained, "who?", "--json").json == plain
    short = run("generate", trained, "who?", "generation.max_new_tokens=2", "--json").json
    assert short == run("generate", trained, "--prompt", "who?", "--max-new-tokens", "2", "--json").json
    asked = run("generate", trained, "--prompt", "seed=1", "--json").json
    assert [answered["prompt"] for answered in asked["prompts"]] == ["seed=1"]
    with_path = run("generate", trained, "a=b is this a prompt?", "--json").json
    assert [answered["prompt"] for answered in with_path["prompts"]] == ["a=b is this a prompt?"]


def test_25_json_says_base_and_tuned_and_the_old_word_still_works(run: Run, trained: str) -> None:  # noqa: F811
    answered = run("generate", trained, "who?", "--json").json["prompts"][0]
    assert set(answered) == {"prompt", "base", "tuned", "stop_reasons"}
    assert set(answered["stop_reasons"]) == {"base", "tuned"}
    for only in ("tuned", "adapter"):
        alone = run("generate", trained, "who?", "--only", only, "--json").json["prompts"][0]
        assert (alone["base"], alone["tuned"]) == (None, answered["tuned"])


def test_25_the_base_model_answers_before_any_training(run: Run, voice: str, toy_model: Path) -> None:  # noqa: F811
    untrained = run("generate", voice, "who?", "--only", "base", "--json").json
    assert untrained["prompts"][0]["base"] and untrained["adapter_folder"] is None
    run("train", voice, *SHORT)
    Path("voice/mindprint.yaml").rename("settings.yaml")
    by_run = run("generate", "voice/runs/run-001", "who?", "--only", "base", "--max-new-tokens", "128", "--json").json
    assert by_run["prompts"][0]["base"] == untrained["prompts"][0]["base"]


def test_25_a_merged_model_answers_alone(run: Run, trained: str, toy: str) -> None:  # noqa: F811
    assert run("merge", trained, "merged").code == 0
    merged = run("generate", "merged", "who?", "backend=toy", "--max-new-tokens", "4", "--json")
    assert "merged: is a whole model" in merged.err
    tuned = run("generate", trained, "who?", "--json").json["prompts"][0]["tuned"]
    assert merged.json["prompts"][0]["base"] == tuned
    assert "merged: is a whole model, without an adapter" in run("eval", "merged").error


def test_25_the_report_of_a_project_is_that_of_its_newest_complete_run(run: Run, trained: str) -> None:  # noqa: F811
    said = run("report", trained)
    assert said.out.splitlines()[0] == "voice/runs/run-001/report.md"


def test_25_a_model_where_a_project_was_expected(run: Run, toy_model: Path) -> None:  # noqa: F811
    assert f"`mindprint init FOLDER --model {toy_model}` makes one" in run("train", toy_model).error


def test_25_init_names_a_model_so_that_it_can_be_read(
    run: Run,  # noqa: F811
    toy_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model below this folder is named from the project, any other from the root or from home."""
    (tmp_path / "house").mkdir()
    shutil.copytree(toy_model, "models/toy")
    run("init", "one", "--model", "models/toy")
    run("init", "two", "--model", toy_model)
    monkeypatch.setenv("HOME", str(tmp_path))
    run("init", "three", "--model", "~/models/toy")
    monkeypatch.chdir("house")
    run("init", "../four", "--model", "../models/toy")
    monkeypatch.chdir(tmp_path)
    names = [load_config(project).config.model.name for project in ("one", "two", "three", "four")]
    assert names == ["../models/toy", str(toy_model.resolve()), "~/models/toy", "~/models/toy"]


def test_25_a_tracker_without_its_library_is_not_called_working(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    said = run("plugins", "--check")
    (line,) = [line for line in said.out.splitlines() if line.startswith("tracker wandb: ")]
    assert "works" not in line and "pip install wandb" in line


def _stop_at(step: int) -> Any:
    def press(event: Event) -> None:
        if isinstance(event, CheckpointWritten) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return press


def _interrupted(project: str) -> None:
    with pytest.raises(Interrupted):
        file = load_config(project, [*SHORT, "checkpoints.every=1"])
        mindprint.train(file, on_event=_stop_at(1))


def test_25_a_run_is_resumed_with_its_own_settings(run: Run, voice: str) -> None:  # noqa: F811
    """Whatever its command line was, and whatever the project's file has become since."""
    _interrupted(voice)
    said = run("train", voice, "--resume")
    assert said.code == 0, said.err
    assert "voice/runs/run-001 continues with its own settings" in said.err and "sft.steps_per_topic" in said.err
    assert len(RunFolder(Path("voice/runs/run-001")).read_steps()) == 8


def test_25_settings_that_differ_are_named_with_the_command_that_works(run: Run, voice: str) -> None:  # noqa: F811
    _interrupted(voice)
    error = run("train", voice, "--resume", "sft.learning_rate=1e-2", "seed=3").error
    assert "sft.learning_rate is 0.0003 in the run, 0.01 here" in error and "seed is 0 in the run, 3 here" in error
    assert "mindprint train voice/runs/run-001 --resume" in error
    assert "adapter.r is 8 in the run, 4 here" in run("train", voice, "--resume", "adapter.r=4").error
    # The command that the message names.
    assert run("train", "voice/runs/run-001", "--resume").code == 0


def test_25_an_unfinished_run_is_not_forgotten(run: Run, voice: str) -> None:  # noqa: F811
    _interrupted(voice)
    said = run("train", voice, *SHORT)
    assert said.code == 0
    assert "voice/runs/run-001 is not finished (2 of 8 steps), and this starts another run" in said.err
    assert "mindprint train voice/runs/run-001 --resume" in said.err
    # Once another run is complete there is nothing to say any more.
    assert "is not finished" not in run("train", voice, *SHORT).err


@pytest.mark.parametrize(
    ("words", "at", "expected"),
    [
        ("mindprint tra", 1, ["train"]),
        ("mindprint train voice sft.learn", 3, ["sft.learning_rate="]),
        ("mindprint train voice --res", 3, ["--resume"]),
        ("mindprint generate --max", 2, ["--max-new-tokens"]),
    ],
)
def test_25_the_shell_completes(
    words: str, at: int, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands, options and settings, by click's own protocol, and commands without the import of any of them."""
    monkeypatch.setenv("_MINDPRINT_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(at))
    assert main([]) == 0
    assert [line.partition(",")[2] for line in capsys.readouterr().out.splitlines()] == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_25_each_shell_gets_its_script(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_MINDPRINT_COMPLETE", f"{shell}_source")
    assert main([]) == 0
    script = capsys.readouterr().out
    assert "_MINDPRINT_COMPLETE" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        assert "compopt -o nospace" in script
