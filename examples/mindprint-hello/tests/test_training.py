"""The example as its users meet it: a command writes a base, a project is made, and trained, all from the shell."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mindprint.errors import ConfigError
from mindprint.plugins.scoring import load_scorers


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
        "curriculum.roll_back=false",  # a model of 64 features that sees one byte at a time can only repeat itself
    )
    lengths = ("sft.epochs_per_topic=null", "sft.steps_per_topic=6", "dpo.steps_per_topic=4")
    # NumPy generates a token at a time, and a base without training never ends an answer.
    short = ("evaluation.levels=[final]", "evaluation.prompts_per_topic=1", "generation.max_new_tokens=16")
    words = ("train", "voice", "backend.type=hello", *settings, *lengths, *short, "--json")
    result = json.loads(mindprint(tmp_path, *words))
    assert {stage["backend"] for stage in result["stages"]} == {"hello"}
    assert {stage["stage"] for stage in result["stages"]} == {"sft", "dpo"}
    sft, dpo = ([stage for stage in result["stages"] if stage["stage"] == name] for name in ("sft", "dpo"))
    assert sft[-1]["first_loss"] < sft[0]["first_loss"] - 0.5
    assert all(stage["last_loss"] < stage["first_loss"] for stage in dpo)
    assert (tmp_path / "voice" / "runs" / "run-001" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("page", ["examples/mindprint-hello/README.md", "docs/write-a-backend.md"])
def test_the_commands_of_the_pages_run(page: str, tmp_path: Path) -> None:
    """As written; the project that `init` makes is made short."""
    text = (Path(__file__).parents[3] / page).read_text(encoding="utf-8")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"(?m)^ *mindprint (.+)$", text)]
    assert [words[0] for words in commands] == ["hello", "init", "train"]
    for words in commands:
        mindprint(tmp_path, *words)
        if words[0] == "init":
            config = tmp_path / words[1] / "mindprint.yaml"
            short = re.sub(r"(epochs|steps)_per_topic: \d+", "steps_per_topic: 1", config.read_text(encoding="utf-8"))
            short = short.replace("prompts_per_topic: 8", "prompts_per_topic: 1")
            short = short.replace("\ncurriculum:\n", "\ncurriculum:\n  max_topics: 2\n")
            # `init` writes a section for backends that are known to have a repetition penalty.
            section = "" if "\ngeneration:" in short else "\ngeneration:\n"
            short = re.sub(r"(?m)^generation:.*$", r"\g<0>\n  max_new_tokens: 16", short + section)
            assert "max_topics" in short
            config.write_text(
                f"{short}\ndata: {{max_length: 64}}\n" if "\ndata:" not in short else short, encoding="utf-8"
            )
    assert list(tmp_path.glob("*/runs/run-001/adapter/adapter_model.safetensors"))


def test_its_scorer_is_shown_next_to_the_score(tmp_path: Path) -> None:
    """Named by the configuration, `eval` shows it on the score's own scale, where the person's text is 1."""
    mindprint(tmp_path, "hello", "base")
    mindprint(tmp_path, "init", "voice", "--model", "base")
    lengths = (
        "sft.epochs_per_topic=null",
        "sft.steps_per_topic=1",
        "dpo.steps_per_topic=1",
        "generation.max_new_tokens=24",
        "evaluation.levels=[]",  # `eval` below asks for everything
    )
    settings = ("data.max_length=64", "backend.type=hello", "voice.scorers={hello: {}}")
    mindprint(tmp_path, "train", "voice", *settings, *lengths)
    voice = json.loads(mindprint(tmp_path, "eval", "voice", "--json"))["voice"]
    measures = {side: voice["overall"][side]["measures"] for side in ("base", "person")}
    assert set(measures["person"]) > {"sentence length"}
    assert measures["base"]["sentence length"] == pytest.approx(0, abs=1e-9)
    assert measures["person"]["sentence length"] == pytest.approx(1)


def test_its_scorer_tells_long_sentences_from_short_ones() -> None:
    """By hand: the person writes 4 words a sentence, others 2. 4 words: |4 - 2| - |4 - 4| = 2; 2 words: 0 - 2 = -2.

    With `;` as the end of a sentence the person writes 2, others 1, and the text 4: |4 - 1| - |4 - 2| = 1.
    """
    (measure,) = load_scorers({"hello": {}})
    fitted = measure.fit(["one two three four. a b c d!"], ["one two. a b."])
    assert fitted(["aye aye aye aye.", "aye aye.", "a b c. a b c?"]).tolist() == [2, -2, 0]
    (measure,) = load_scorers({"hello": {"ends": ";"}})
    assert measure.fit(["a b; c d"], ["a; b"])(["a b. c d"]).tolist() == [1]


def test_its_scorers_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"voice\.scorers\.hello: takes `ends`"):
        load_scorers({"hello": {"end": "."}})


def test_it_is_listed_and_works(tmp_path: Path) -> None:
    listed = json.loads(mindprint(tmp_path, "plugins", "--json"))["plugins"]
    assert {(plugin["kind"], plugin["name"]) for plugin in listed if plugin["distribution"] == "mindprint-hello"} == {
        ("backend", "hello"),
        ("scorer", "hello"),
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
