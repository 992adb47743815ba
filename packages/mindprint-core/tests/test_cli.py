"""Every command, on the toy backend: what is printed, where, and with which exit code."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mindprint.adapter import merging
from mindprint.cli import COMMANDS, main
from mindprint.cli.settings import project_and_overrides
from mindprint.cli.train import _with_resume_value
from mindprint.config import load_config
from mindprint.plugins.entries import BACKENDS, Plugin, installed
from mindprint.runs.folder import RunFolder

SETTINGS = ["sft.epochs_per_topic=2", "dpo.steps_per_topic=3", "checkpoints.every=2", "generation.max_new_tokens=6"]


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of a wrong input."""
        assert (self.code, self.out) == (2, "")
        (line,) = self.err.splitlines()
        assert line.startswith("mindprint: error: ")
        return line.removeprefix("mindprint: error: ")


Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("train", "voice")`: the command in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str | Path) -> Said:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return invoke


@pytest.fixture
def voice(run: Run, toy: str, toy_model: Path) -> str:
    """A project with two small topics, and the toy model as its base."""
    assert run("init", "voice", "--model", toy_model, "--backend", toy).code == 0
    data = Path("voice/data")
    write_rows(data / "sft.jsonl", [{"prompt": f"{t} {n}?", "completion": f"aye {t}", "topic": t} for t, n in pairs(3)])
    chosen = [{"prompt": f"{t} {n}?", "chosen": "aye", "rejected": "yes", "topic": t} for t, n in pairs(2)]
    write_rows(data / "preferences.jsonl", chosen)
    write_rows(data / "heldout.jsonl", [{**row, "prompt": "who?"} for row in chosen[1:]])
    return "voice"


def pairs(count: int) -> list[tuple[str, int]]:
    return [(topic, number) for topic in ("sea", "land") for number in range(count)]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- the whole way ---------------------------------------------------------------------------------------------------


def test_init_train_generate_eval(run: Run, voice: str) -> None:
    trained = run("train", voice, *SETTINGS)
    assert trained.code == 0
    lines = trained.out.splitlines()
    assert lines[0].split() == ["topic", "stage", "backend", "steps", "loss", "seconds"]
    assert [line.split()[:4] for line in lines[1:5]] == [
        ["sea", "sft", "toy", "2"],
        ["sea", "dpo", "toy", "3"],
        ["land", "sft", "toy", "2"],
        ["land", "dpo", "toy", "3"],
    ]
    assert "0.6931 → " in lines[2]
    assert lines[-3] == "report:  voice/runs/run-001/report.html"
    assert lines[-2:] == ["adapter: voice/runs/run-001/adapter", "try it:  mindprint generate voice --prompt 'who?'"]
    assert "mindprint: backend: toy on cpu, float32\n" in trained.err

    answered = run("generate", voice, "--prompt", "who?")
    assert answered.code == 0
    assert answered.out.startswith("prompt: who?\n\nwithout the adapter:\n")
    assert "\nwith the adapter:\n" in answered.out

    evaluated = run("eval", voice)
    assert evaluated.code == 0
    pairs, answers = evaluated.out.split("\n\n")
    assert [line.split()[:2] for line in pairs.splitlines()[1:]] == [["sea", "1"], ["land", "2"], ["all", "3"]]
    assert [line.split()[0] for line in answers.splitlines()[1:]] == ["all"]
    assert answers.count("not scored") == 2
    assert "warning: 3 held-out rows are also in the training data: not scored\n" in evaluated.err
    assert "the voice could not be scored: " in evaluated.err and "500 are needed to fit a voice" in evaluated.err
    as_json = run("eval", voice, "--json").json
    assert set(as_json["voice"]["overall"]["tuned"]) == {"reason", "words"}
    unanswered = run("eval", voice, "--no-answers", "--json").json
    assert unanswered["figures"]["overall"]["unmeasured"]["voice"] == "no answers were asked for"
    assert {**unanswered, "figures": as_json["figures"]} == {**as_json, "voice": None}
    assert "only 3 held-out pairs, so that one of them moves an accuracy by 33%" in evaluated.err


def test_train_as_json(run: Run, voice: str) -> None:
    said = run("train", voice, *SETTINGS, "--json")
    assert said.code == 0
    result = said.json
    assert set(result) == {"run", "adapter", "stages", "verdicts"}
    assert result["adapter"] == str(Path("voice/runs/run-001/adapter").resolve())
    keys = {"topic", "stage", "backend", "steps", "first_loss", "last_loss", "seconds"}
    assert all(set(stage) == keys for stage in result["stages"])
    assert result["stages"][1]["first_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert [stage["steps"] for stage in result["stages"]] == [2, 3, 2, 3]


def test_generate_and_eval_as_json(run: Run, voice: str) -> None:
    run("train", voice, *SETTINGS, "sft.learning_rate=1e-2")
    adapter = Path("voice/runs/run-001/adapter")
    by_project = run("generate", voice, "--prompt", "who?", "--prompt", "why?", "--json").json
    by_adapter = run("generate", adapter, "--prompt", "who?", "--prompt", "why?", "--json").json
    assert by_project["prompts"] == by_adapter["prompts"]
    assert [answer["prompt"] for answer in by_project["prompts"]] == ["who?", "why?"]
    assert by_project["prompts"][0]["base"] != by_project["prompts"][0]["tuned"]
    assert by_project["prompts"][0]["stop_reasons"] == {"base": "length", "tuned": "length"}
    assert (by_project["backend"], by_project["device"], by_project["dtype"]) == ("toy", "cpu", "float32")

    only = run("generate", voice, "--prompt", "who?", "--only", "base", "--json").json["prompts"][0]
    assert (only["base"], only["tuned"]) == (by_project["prompts"][0]["base"], None)

    evaluation = run("eval", "voice/runs/run-001", "--json").json
    assert evaluation["overall"]["pairs"] == 3
    assert set(evaluation["topics"]) == {"sea", "land"}
    assert evaluation["overall"]["tuned"]["perplexity"] < evaluation["overall"]["base"]["perplexity"]


def test_sampling_follows_its_seed(run: Run, voice: str) -> None:
    run("train", voice, *SETTINGS)

    def answer(seed: str) -> str:
        options = ["--temperature", "1", "--top-p", "0.9", "--seed", seed, "--max-new-tokens", "12", "--json"]
        return str(run("generate", voice, "--prompt", "who?", *options).json["prompts"][0]["tuned"])

    assert answer("1") == answer("1")
    assert answer("1") != answer("2")


def test_a_prompt_from_standard_input(run: Run, voice: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run("train", voice, *SETTINGS)
    (tmp_path / "prompt.txt").write_text("who?\n")
    with (tmp_path / "prompt.txt").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        said = run("generate", voice, "--prompt", "-", "--json")
    assert said.json["prompts"][0]["prompt"] == "who?"


def test_an_adapter_without_its_run_names_its_base(run: Run, voice: str, toy_model: Path) -> None:
    """Moved away from its run, an adapter knows its base only by the name that PEFT's file has."""
    run("train", voice, *SETTINGS)
    shutil.copytree("voice/runs/run-001/adapter", "elsewhere")
    options = ["--prompt", "who?", "--backend", "toy", "--max-new-tokens", "4", "--json"]
    moved = run("generate", "elsewhere", "--model", toy_model, *options).json["prompts"]
    assert moved == run("generate", voice, *options).json["prompts"]
    assert "heldout.jsonl" in run("eval", "elsewhere", "--model", toy_model).error
    heldout = ["--heldout", "voice/data/heldout.jsonl", "--backend", "toy"]
    given = run("eval", "elsewhere", "--model", toy_model, *heldout, "--no-answers")
    assert given.out == run("eval", voice, "--no-answers").out
    unknown = run("eval", "elsewhere", "--model", toy_model, *heldout)
    assert unknown.out.startswith(given.out) and unknown.code == 0
    assert "the voice could not be scored: 0 words of the person's training text" in unknown.err


def test_verify(run: Run, voice: str) -> None:
    run("train", voice, *SETTINGS, "sft.learning_rate=1e-2")
    said = run("verify", voice)
    assert said.code == 0
    assert said.out.splitlines()[0] == "adapter: voice/runs/run-001/adapter"
    assert said.out.splitlines()[-1] == "verified: it does what it did where it was trained"
    config = Path("voice/runs/run-001/adapter/adapter_config.json")
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 8'))
    said = run("verify", "voice/runs/run-001")
    assert said.code == 1
    assert "FAILED  scale: 2 of 2 modules act 0.5 times as strongly as trained (" in said.out
    assert said.out.splitlines()[-1] == "not verified: 1 finding"


def test_merge_is_verified_and_finds_its_adapter_again(run: Run, voice: str) -> None:
    run("train", voice, *SETTINGS)
    said = run("merge", voice, "merged", "--backend", "toy")
    assert (said.code, said.out.splitlines()[0].endswith("changed, everything else is as it was")) == (0, True)
    assert said.out.splitlines()[-1] == "verified: it does what it did where it was trained"
    assert run("verify", "merged", "--backend", "toy").code == 0
    assert run("merge", voice, "merged").error == "merged: exists already; name a new folder"
    again = run("merge", voice, "again", "--no-verify", "--json").json
    assert (len(again["changed"]), again["verified"]) == (2, None)
    assert Path("again/model.safetensors").read_bytes() == Path("merged/model.safetensors").read_bytes()


@pytest.mark.parametrize("options", [("--backend", "toy"), ("--no-verify",)])
def test_a_merge_that_is_the_base_is_not_kept(
    run: Run, voice: str, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("train", voice, *SETTINGS)
    monkeypatch.setattr(merging, "_write_shard", lambda target, shard, *_: shutil.copyfile(shard, target))
    said = run("merge", voice, "merged", *options)
    assert said.code == 1
    assert "merged: was not kept, for the merge does not verify: the merged model is the base" in said.err
    assert sorted(path.name for path in Path().iterdir()) == [voice]


def test_convert_there_and_back(run: Run, voice: str) -> None:
    run("train", voice, *SETTINGS)
    adapter = Path(voice, "runs/run-001/adapter")
    assert run("convert", voice, "mlx", "--to", "mlx-lm").out == "mlx: 2 modules, in the format of mlx-lm\n"
    assert run("convert", "mlx", "peft", "--to", "peft", "--json").json["from"] == "mlx-lm"
    name = "adapter_model.safetensors"
    assert Path("peft", name).read_bytes() == (adapter / name).read_bytes()
    assert run("verify", "mlx", "--backend", "toy").code == 0
    assert run("convert", "mlx", "again", "--to", "mlx-lm").error == "mlx: is in the format of mlx-lm already"
    assert run("convert", "mlx", "peft", "--to", "peft").error == "peft: exists already; name a new folder"


def test_verify_as_json(run: Run, voice: str, toy_model: Path) -> None:
    run("train", voice, *SETTINGS, "sft.learning_rate=1e-2")
    shutil.copytree("voice/runs/run-001/adapter", "moved")
    said = run("verify", "moved", "--backend", "toy", "--model", toy_model, "--json")
    assert (said.code, said.json["ok"], said.json["findings"]) == (0, True, [])
    assert [one["what"] for one in said.json["comparisons"]] == ["base", "base with adapter"]
    tolerance = said.json["comparisons"][0]["tolerance"]
    assert (tolerance["reason"], tolerance["relative"]) == ("rounding of float32", 8 * 2.0**-24)
    # The part that follows a log-prob's own size is added for the log-probs that are shown: some nats each.
    assert 1e-5 < tolerance["mean"] < 1e-5 + 10 * tolerance["relative"]
    assert 1e-4 < tolerance["greatest"] < 1e-4 + 20 * tolerance["relative"]
    Path("moved/fingerprint.json").unlink()
    said = run("verify", "moved", "--backend", "toy", "--model", toy_model)
    assert said.code == 0
    assert "note  no_fingerprint: " in said.out
    assert said.out.splitlines()[-1] == "nothing wrong was found; without a fingerprint that is all that can be said"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("adapter_model.safetensors", b"x" * 100, "adapter_model.safetensors: is not a safetensors file"),
        ("adapter_model.safetensors", None, "adapter_model.safetensors: no such file"),
        ("adapter_config.json", b"{", "adapter_config.json: "),
        ("adapter_config.json", b"{}", "adapter_config.json: "),
        ("fingerprint.json", b"{}", "fingerprint.json: is truncated or edited"),
    ],
)
def test_verify_of_what_cannot_be_read(run: Run, voice: str, file: str, content: bytes | None, words: str) -> None:
    run("train", voice, *SETTINGS)
    path = Path("voice/runs/run-001/adapter", file)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    assert words in run("verify", voice).error


# --- init ------------------------------------------------------------------------------------------------------------


def test_init_writes_what_can_be_loaded(run: Run) -> None:
    said = run("init", "my voice")
    assert said.code == 0
    assert "  mindprint train 'my voice'\n" in said.out
    config = load_config("my voice").config
    assert (config.model.name, config.backend.type) == ("builtin:tiny", "auto")
    assert config.generation.repetition_penalty == 1.0
    names = sorted(path.relative_to("my voice").as_posix() for path in Path("my voice").rglob("*") if path.is_file())
    assert names == [
        "README.md",
        "data/heldout.jsonl",
        "data/preferences.jsonl",
        "data/sft.jsonl",
        "mindprint.yaml",
    ]


def test_init_for_a_large_model(run: Run) -> None:
    said = run("init", "big", "--model", "Qwen/Qwen2.5-7B-Instruct", "--backend", "mlx", "--json")
    assert said.json["next"][0] == "mindprint train big"
    config = load_config("big").config
    assert (config.model.name, config.backend.type) == ("Qwen/Qwen2.5-7B-Instruct", "mlx")
    assert (config.sft.learning_rate, config.dpo.learning_rate) == (3e-4, 5e-6)
    assert config.generation.repetition_penalty == 1.1


def test_init_proposes_no_penalty_to_a_backend_that_may_have_none(run: Run) -> None:
    run("init", "own", "--model", "Qwen/Qwen2.5-7B-Instruct", "--backend", "hello")
    assert load_config("own").config.generation.repetition_penalty == 1.0


def test_init_names_a_model_folder_from_the_project(run: Run, toy_model: Path) -> None:
    shutil.copytree(toy_model, "models/toy")
    run("init", "deep/project", "--model", "models/toy")
    assert load_config("deep/project").config.model.name == "../../models/toy"


def test_init_fills_an_empty_folder_in_place(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone may stand in it: the folder itself must not be replaced."""
    Path("here").mkdir()
    inode = Path("here").stat().st_ino
    monkeypatch.chdir("here")
    assert run("init", ".").code == 0
    assert Path.cwd().stat().st_ino == inode
    assert sorted(path.name for path in Path().iterdir()) == ["README.md", "data", "mindprint.yaml"]


def test_init_refuses_what_is_taken(run: Run) -> None:
    Path("taken").mkdir()
    Path("taken/notes.txt").write_text("mine")
    Path("file").write_text("mine")
    assert run("init", "taken").error == "taken: exists already and is not empty; name a new folder"
    assert run("init", "file").error == "file: is a file; name a new folder"
    assert [path.name for path in Path("taken").iterdir()] == ["notes.txt"]


# --- train -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["voice", "--resume"], ["voice", "--resume=last"]),
        (["--resume", "voice"], ["--resume=last", "voice"]),
        (["voice", "--resume", "latest"], ["voice", "--resume=latest"]),
        (["voice", "--resume", "backend.type=mlx"], ["voice", "--resume=last", "backend.type=mlx"]),
        (["latest", "--resume"], ["latest", "--resume=last"]),
        (["voice", "--resume=latest"], ["voice", "--resume=latest"]),
    ],
)
def test_resume_takes_only_latest(words: list[str], expected: list[str]) -> None:
    assert _with_resume_value(words) == expected


def test_settings_without_a_project_are_for_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b").mkdir()
    assert project_and_overrides(["seed=1"]) == (Path(), ["seed=1"])
    assert project_and_overrides(["a=b", "seed=1"]) == (Path("a=b"), ["seed=1"])
    assert project_and_overrides([]) == (Path(), [])


def test_interrupt_and_resume(run: Run, voice: str) -> None:
    """Ctrl-C after the third step: a checkpoint, a way on, and in the end the adapter of the undisturbed run."""
    whole = run("train", voice, *SETTINGS, "--run", "whole", "--json").json
    append = RunFolder.append_step

    def interrupting(folder: RunFolder, event: Any) -> None:
        append(folder, event)
        if event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "append_step", interrupting)
        stopped = run("train", voice, *SETTINGS)
    assert stopped.code == 130
    assert stopped.err.splitlines()[-1].startswith("mindprint: stopped; the checkpoint of step 3 is in ")
    assert run("generate", voice, "--prompt", "who?").error.startswith(
        "voice/runs/run-001: is not complete; continue with"
    )
    resumed = run("train", "voice/runs/run-001", "--resume", "--json")
    assert resumed.code == 0
    assert ", continuing after step 3" in resumed.err
    names = ("topic", "stage", "steps", "first_loss", "last_loss")
    assert [[s[name] for name in names] for s in resumed.json["stages"]] == [
        [s[name] for name in names] for s in whole["stages"]
    ]
    adapters = [Path(folder, "adapter_model.safetensors") for folder in ("whole/adapter", resumed.json["adapter"])]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_runs_folder_is_a_configuration_too(run: Run, voice: str) -> None:
    run("train", voice, *SETTINGS, "seed=7")
    again = run("train", "voice/runs/run-001", "--json").json
    assert Path(again["run"]).name == "run-002"
    adapters = [Path(f"voice/runs/run-00{n}/adapter/adapter_model.safetensors").read_bytes() for n in (1, 2)]
    assert adapters[0] == adapters[1]


def test_a_named_run_is_used_and_never_overwritten(run: Run, voice: str) -> None:
    first = run("train", voice, *SETTINGS, "--run", "mine")
    assert first.out.splitlines()[-1] == "try it:  mindprint generate mine --prompt 'who?'"
    before = Path("mine/metrics.jsonl").read_text()
    assert "mine: already holds a run" in run("train", voice, *SETTINGS, "--run", "mine").error
    assert Path("mine/metrics.jsonl").read_text() == before


# --- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["No such command 'trian'"]),
        (["train", "--devise", "cpu"], ["No such option", "--devise"]),
        (["train", "voice", "other"], ["'other' is neither an option nor a setting"]),
        (["train", "nowhere"], ["nowhere: no such configuration", "mindprint init"]),
        (["train", "voice", "sft.learning_rte=1"], ["sft.learning_rte: unknown key; did you mean 'learning_rate'?"]),
        (["train", "voice", "--backend", "tpu"], ["backend 'tpu' is not installed", "toy"]),
        (["train", "voice", "backend.device=cuda"], ["backend 'toy' knows no device 'cuda' (usable here: cpu)"]),
        (["train", "voice", "--resume"], ["holds no run to resume"]),
        (["generate", "voice"], ["Missing option '--prompt'"]),
        (["generate", "voice", "--prompt", "who?"], ["voice: has no run yet", "mindprint train voice"]),
        (["generate", "voice/data", "--prompt", "who?"], ["voice/data: is not a project", "or an adapter"]),
        (["generate", "nowhere", "--prompt", "who?"], ["nowhere: no such folder"]),
        (["generate", "voice", "--prompt", " "], ["--prompt: is empty"]),
        (["generate", "voice", "--prompt", "-", "--prompt", "-"], ["can be read once"]),
        (["generate", "voice", "--prompt", "x", "--top-p", "2"], ["--top-p", "2"]),
        (["eval", "voice"], ["voice: has no run yet"]),
    ],
)
def test_one_line_and_nothing_left_behind(run: Run, voice: str, arguments: list[str], words: list[str]) -> None:
    before = sorted(Path().rglob("*"))
    error = run(*arguments).error
    assert all(word in error for word in words), error
    assert sorted(Path().rglob("*")) == before


def test_an_error_as_json(run: Run, voice: str) -> None:
    said = run("train", voice, "sft.learning_rte=1", "--json")
    assert said.code == 2
    assert said.json["error"]["type"] == "ConfigError"
    assert said.json["error"]["message"].endswith("did you mean 'learning_rate'?")
    assert said.json["error"]["exit_code"] == 2
    assert len(said.err.splitlines()) == 1


def test_the_traceback_is_there_for_those_who_want_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINDPRINT_DEBUG", "1")
    with pytest.raises(ValueError, match="no such configuration"):
        run("train", "nowhere")


def test_ctrl_c_outside_a_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mindprint.cli.init.config_text", lambda *_: interrupted(None))
    said = run("init", "voice")
    assert (said.code, said.out, said.err) == (130, "", "mindprint: interrupted\n")
    assert not Path("voice").exists()


def test_a_project_without_held_out_pairs(run: Run, voice: str) -> None:
    run("train", voice, *SETTINGS)
    Path("voice/data/heldout.jsonl").unlink()
    error = run("eval", voice).error
    assert error == (
        "voice: no held-out rows: 6 prompts at 0.1 hold out none; raise data.heldout_fraction or add heldout.jsonl, "
        "or name a file with --heldout"
    )
    assert run("train", voice, *SETTINGS).out.splitlines()[-1] == "try it:  mindprint generate voice --prompt 'sea 0?'"


# --- plugins and doctor ----------------------------------------------------------------------------------------------


def test_help_names_every_command_and_its_options(run: Run) -> None:
    said = run("--help")
    assert all(f"  {name} " in said.out for name in COMMANDS)
    assert run().out == said.out
    for name in COMMANDS:
        shown = run(name, "--help")
        assert (shown.code, shown.err) == (0, "")
        assert "--json" in shown.out


def test_plugins(run: Run, toy: str) -> None:
    assert Plugin(BACKENDS, "toy", "toy_backend", "toy-backend", "1.0") in installed(BACKENDS)
    assert ["backend", "toy", "toy-backend", "1.0", "toy_backend"] in [
        line.split() for line in run("plugins").out.splitlines()
    ]
    (entry,) = [plugin for plugin in run("plugins", "--json").json["plugins"] if plugin["name"] == "toy"]
    assert entry == {
        "name": "toy",
        "kind": "backend",
        "distribution": "toy-backend",
        "version": "1.0",
        "module": "toy_backend",
    }


def test_plugins_checked(run: Run, toy: str) -> None:
    (entry,) = [plugin for plugin in run("plugins", "--check", "--json").json["plugins"] if plugin["name"] == "toy"]
    assert entry["check"]["ok"] is True
    assert entry["check"]["hook_apis"] == [2]
    assert [(d["name"], d["usable"], d["dtypes"]) for d in entry["check"]["devices"]] == [("cpu", True, ["float32"])]
    shown = run("plugins", "--check").out
    can = "affine, fp4, int8, mxfp4, mxfp8, nf4, nvfp4, sampling, streaming"
    assert f"backend toy: works\n  cpu  usable: float32 (auto) [NumPy]\n  hook API 2; can also: {can}\n" in shown


def test_doctor(run: Run, voice: str, toy_model: Path) -> None:
    said = run("doctor", "--backend", "toy", "--model", toy_model, "--config", voice, "--json")
    assert said.code == 0
    checks = [(check["subject"], check["name"], check["ok"]) for check in said.json["checks"]]
    here = "toy on cpu, float32"
    assert checks == [
        ("toy", "loads", True),
        *((here, name, True) for name in ("gradient", "adapter", "loss", "same numbers", "base", "adapter off")),
        ("voice", "configuration", True),
        ("voice", "note", True),
        ("voice", "backend", True),
    ]
    assert "all checks passed" in run("doctor", "--backend", "toy", "--model", toy_model).out


def test_doctor_deep(run: Run, voice: str) -> None:
    """The toy model is untrained, so that its answers may not end: everything else holds."""
    said = run("doctor", "--backend", "toy", "--config", voice, "--deep", "--json")
    deep = [check for check in said.json["checks"] if check["subject"] == "voice on toy, cpu, float32"]
    assert [check["name"] for check in deep][:4] == ["LoRA", "gradient", "adapter", "base"]
    assert {check["name"] for check in deep if not check["ok"]} <= {"generation"}
    assert "--deep follows a project's own model and data" in run("doctor", "--deep").error


def test_doctor_finds_what_is_wrong(run: Run, voice: str, toy_model: Path) -> None:
    Path("voice/data/sft.jsonl").write_text("")
    said = run("doctor", "--backend", "toy", "--model", "builtin:nothing", "--config", voice)
    assert said.code == 1
    assert "toy on cpu, float32  works  FAILED  builtin:nothing: no such built-in model" in said.out
    assert "sft.jsonl: the file is empty" in said.out
    assert "2 of 3 checks failed" in said.out
    assert run("doctor", "--backend", "absent").code == 1


# --- held out --------------------------------------------------------------------------------------------------------


def many_prompts(count: int = 40) -> list[str]:
    return [f"what of the {['ferry', 'harbour', 'garden', 'kettle'][n % 4]} number {n}" for n in range(count)]


@pytest.fixture
def unsplit(run: Run, toy: str, toy_model: Path) -> str:
    """A project of one topic with forty prompts, each as SFT row and as pair, and no held-out file."""
    assert run("init", "voice", "--model", toy_model, "--backend", toy).code == 0
    data = Path("voice/data")
    (data / "heldout.jsonl").unlink()
    write_rows(data / "sft.jsonl", [{"prompt": p, "completion": f"aye {p}"} for p in many_prompts()])
    write_rows(
        data / "preferences.jsonl", [{"prompt": p, "chosen": f"aye, {p}", "rejected": "yes"} for p in many_prompts()]
    )
    return "voice"


def test_held_out_by_the_split(run: Run, unsplit: str) -> None:
    assert run("train", unsplit, *SETTINGS, "data.heldout_fraction=0.2").code == 0
    manifest = json.loads(Path("voice/runs/run-001/manifest.json").read_text())
    shares = manifest["splits"]["topics"]["main"]
    held_out = shares["sft"]["held_out"]
    assert 0 < held_out < 20 and shares["sft"] == {"train": 40 - held_out, "held_out": held_out, "removed": 0}
    assert shares["preferences"] == shares["sft"]
    assert manifest["rows"] == {"sft": {"main": 40 - held_out}, "preferences": {"main": 40 - held_out}}
    assert manifest["splits"]["prompts"] == {"trained": 40 - held_out, "held_out": held_out}
    found = run("eval", unsplit, "--json").json
    assert (found["overall"]["pairs"], found["texts"]["overall"]["texts"]) == (held_out, held_out)
    assert found["texts"]["overall"]["base"] > 1
    shown = run("eval", unsplit, "--no-answers").out.split("\n\n")
    assert shown[1].splitlines()[0].split() == ["topic", "texts", "tokens", "perplexity"]


def test_rows_added_after_the_run_are_scored_and_trained_ones_never(run: Run, unsplit: str) -> None:
    """At 0.2 some prompts are held out; a run that trained on all of them is scored on none of them."""
    run("train", unsplit, *SETTINGS, "data.heldout_fraction=0.0")
    assert "40 prompts at 0 hold out none" in run("eval", unsplit).error
    config = Path("voice/runs/run-001/config.yaml")
    config.write_text(config.read_text().replace("heldout_fraction: 0.0", "heldout_fraction: 0.2"))
    assert run("eval", unsplit).error == (
        "voice: no held-out rows that are not trained on: add heldout.jsonl to the data folder, "
        "or name a file with --heldout"
    )
    new = [{"prompt": p, "chosen": "aye", "rejected": "yes"} for p in ("When is tea?", "WHAT of the ferry number 4?")]
    write_rows(Path("new.jsonl"), new)
    said = run("eval", unsplit, "--heldout", "new.jsonl", "--no-answers", "--json")
    assert said.json["overall"]["pairs"] == 1
    assert "warning: new.jsonl: 1 held-out row is not scored: training rows ask the same" in said.err


def test_a_run_does_not_go_on_with_another_split(run: Run, unsplit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run("train", unsplit, *SETTINGS)
    shutil.rmtree("voice/runs/run-001/adapter")
    said = run("train", unsplit, *SETTINGS, "data.heldout_fraction=0.3", "--resume")
    assert said.code == 2 and "dataset" in said.err
    assert run("train", unsplit, *SETTINGS, "--resume").code == 0


def test_quizzes_are_held_out_and_asked(run: Run, unsplit: str) -> None:
    quiz = [
        {"question": many_prompts()[5] + "?", "reference_answers": ["It is old."], "key_concepts": ["old"]},
        {"question": "Who rang?", "reference_answers": []},
    ]
    Path("voice/data/quiz.json").write_text(json.dumps(quiz))
    trained = run("train", unsplit, *SETTINGS, "data.heldout_fraction=0.0")
    assert "warning: 2 rows are left out of training: the prompt appears" in trained.err
    assert "quiz.json: question 2: has no `reference_answers`: write at least one\n" in trained.err
    said = run("eval", unsplit)
    assert said.code == 2 and said.out.splitlines()[0].split() == [
        "topic", "questions", "base", "concepts", "tuned", "concepts",
    ]  # fmt: skip
    problem = "voice/data/quiz.json: question 2: has no `reference_answers`: write at least one"
    assert said.err.splitlines()[-1] == f"mindprint: warning: not evaluated: {problem}"
    as_json = run("eval", unsplit, "--json")
    assert as_json.code == 2 and as_json.json["not_evaluated"] == [problem]
    assert as_json.json["quiz"]["overall"]["questions"] == 1 and as_json.json["overall"] is None
    Path("voice/data/quiz.json").write_text("[{]")
    assert "quiz.json: line 1: not valid JSON" in run("train", unsplit, *SETTINGS).error


def test_a_failed_topic_is_named_and_the_exit_code_says_so(run: Run, voice: str) -> None:
    said = run("train", voice, *SETTINGS, "evaluation.final.perplexity_ratio=0.001", "--json")
    assert said.code == 1
    assert said.json["verdicts"][-1]["outcome"] == "failed"
    assert "the final evaluation failed: perplexity_ratio" in said.err
    assert (Path(voice) / "runs" / "run-001" / "adapter" / "adapter_model.safetensors").is_file()
    assert "--topic" in run("train", "--help").out
    assert "'rain' is in no row" in run("train", voice, "--topic", "rain").error


def test_a_missing_choice_is_named_with_the_choices_on_one_line(run: Run, voice: str) -> None:
    error = run("convert", voice, "out").error
    assert "Missing option '--to'. Choose from: peft, mlx-lm" in error
    assert "\t" not in error
