"""The commands as a user types them, on both real backends: whole runs, interrupted runs, and every wrong input."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindprint.cli import main
from random_models import save_tokenizer

SETTINGS = ("sft.epochs_per_topic=2", "sft.learning_rate=1e-2", "dpo.steps_per_topic=4", "checkpoints.every=2")
BACKENDS = ("torch", "mlx")


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Said]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command in this process and a folder of its own; what libraries print below Python is seen too."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str | Path) -> Said:
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Said(code, captured.out, captured.err)

    return invoke


@pytest.fixture
def voice(run: Run, qwen2: Path) -> str:
    """A project with two small topics on a random Qwen2."""
    assert run("init", "voice", "--model", qwen2).code == 0
    write_project(Path("voice"))
    return "voice"


def write_project(folder: Path) -> None:
    """Give a project that `init` made its two topics."""
    data = folder / "data"
    topics = [(topic, number) for topic in ("sea", "land") for number in range(4)]
    rows = [{"prompt": f"{t} {n}?", "completion": f"aye, the {t}", "topic": t} for t, n in topics]
    wanted = [{"prompt": f"{t} {n}?", "chosen": f"aye, {t}", "rejected": "yes", "topic": t} for t, n in topics]
    write_rows(data / "sft.jsonl", rows)
    write_rows(data / "preferences.jsonl", wanted)
    write_rows(data / "heldout.jsonl", [{**row, "prompt": f"what of the {row['topic']}?"} for row in wanted[::4]])
    config = folder / "mindprint.yaml"
    written = config.read_text(encoding="utf-8")
    # `init` writes a section for models that may repeat themselves.
    written += "" if "\ngeneration:" in written else "\ngeneration:\n"
    # A random model never stops by itself.
    config.write_text(re.sub(r"(?m)^generation:.*$", r"\g<0>\n  max_new_tokens: 16", written), encoding="utf-8")


Whole = Callable[..., Path]
"""Returns the folder of a run with the settings that it is given."""


@pytest.fixture(scope="module")
def whole(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Runs that nothing disturbed, each trained once for all tests of this module: they only read it, or copy it."""
    folder = tmp_path_factory.mktemp("whole")
    project = folder / "voice"
    assert main(["init", str(project), "--model", str(qwen2)]) == 0
    write_project(project)

    @cache
    def trained(*settings: str) -> Path:
        run = folder / f"run-{len(list(folder.iterdir()))}"
        assert main(["train", str(project), *settings, "--run", str(run)]) == 0
        return run

    return trained


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_train_generate_eval_on_both(run: Run, voice: str) -> None:
    """Only `backend.type` differs: the curves agree, and each adapter says the same on either backend."""
    trained = {name: run("train", voice, *SETTINGS, f"backend.type={name}", "--json") for name in BACKENDS}
    assert [said.code for said in trained.values()] == [0, 0]
    stages = {name: said.json["stages"] for name, said in trained.items()}
    assert [(s["topic"], s["stage"], s["steps"]) for s in stages["torch"]] == [
        ("sea", "sft", 2),
        ("sea", "dpo", 4),
        ("land", "sft", 2),
        ("land", "dpo", 4),
    ]
    for mine, theirs in zip(stages["torch"], stages["mlx"], strict=True):
        assert (mine["backend"], theirs["backend"]) == BACKENDS
        for loss in ("first_loss", "last_loss"):
            assert mine[loss] == pytest.approx(theirs[loss], abs=1e-4)

    prompt = ("--prompt", "what of the sea?", "--max-new-tokens", "8", "--json")
    for said in trained.values():
        answers = [
            run("generate", said.json["adapter"], *prompt, "--backend", name).json["prompts"] for name in BACKENDS
        ]
        assert answers[0] == answers[1]
        measured = [run("eval", said.json["run"], "--json", "--backend", name).json["overall"] for name in BACKENDS]
        assert measured[0]["tuned"]["perplexity"] == pytest.approx(measured[1]["tuned"]["perplexity"], rel=1e-4)
        assert measured[0]["tuned"]["perplexity"] < measured[0]["base"]["perplexity"]
        assert measured[0]["reward_margin"] == pytest.approx(measured[1]["reward_margin"], abs=1e-3)


@pytest.mark.parametrize(("trained", "verified"), [BACKENDS, BACKENDS[::-1]])
def test_a_fingerprint_holds_on_the_other_backend(run: Run, voice: str, trained: str, verified: str) -> None:
    done = run("train", voice, *SETTINGS, f"backend.type={trained}", "--json").json
    said = run("verify", voice, "--backend", verified, "--json")
    assert said.code == 0, said.json
    assert (said.json["ok"], said.json["findings"], said.json["backend"]) == (True, [], verified)
    assert said.json["effect"]["found"] == pytest.approx(said.json["effect"]["recorded"], abs=1e-5)
    factors = load_file(Path(done["adapter"], "adapter_model.safetensors"))
    save_file(
        {name: values / 2 for name, values in factors.items()}, Path(done["adapter"], "adapter_model.safetensors")
    )
    said = run("verify", voice, "--backend", verified, "--json")
    (finding,) = said.json["findings"]
    assert (said.code, finding["code"], finding["factor"]) == (1, "scale", pytest.approx(0.25))


def test_a_run_in_bfloat16_is_measured_in_float32_too(run: Run, voice: str) -> None:
    done = run("train", voice, *SETTINGS, "backend.type=torch", "backend.dtype=bfloat16", "--json").json
    recorded = json.loads(Path(done["adapter"], "fingerprint.json").read_text())
    assert [one["dtype"] for one in recorded["measurements"]] == ["bfloat16", "float32"]
    assert run("verify", voice, "--backend", "mlx").code == 0
    coarse = run("verify", voice, "--dtype", "bfloat16", "--json")
    reason = "rounding of bfloat16 through 3 layers of width 64"
    assert (coarse.code, coarse.json["comparisons"][0]["tolerance"]["reason"]) == (0, reason)


def test_a_run_that_was_resumed_at_its_very_end_has_a_fingerprint(run: Run, voice: str) -> None:
    """Killed after the last checkpoint: nothing is trained any more, the adapter is written and measured."""
    done = run("train", voice, *SETTINGS, "backend.type=torch", "--json").json
    before = Path(done["adapter"], "fingerprint.json").read_text()
    shutil.rmtree(done["adapter"])
    assert run("train", done["run"], "--resume").code == 0
    assert Path(done["adapter"], "fingerprint.json").read_text() == before


@pytest.mark.parametrize("name", BACKENDS)
def test_doctor_deep(run: Run, voice: str, name: str) -> None:
    """A random model need not end its answers; everything else holds."""
    said = run("doctor", "--backend", name, "--config", voice, "--deep", "--json")
    deep = {check["name"]: check for check in said.json["checks"] if check["subject"].startswith("voice on")}
    assert {"LoRA", "gradient", "adapter", "base", "generation", "save and load", "merge"} <= deep.keys()
    assert {check_name for check_name, check in deep.items() if not check["ok"]} <= {"generation"}


@pytest.mark.parametrize("name", BACKENDS)
def test_doctor(run: Run, voice: str, name: str) -> None:
    said = run("doctor", "--backend", name, "--config", voice, "--json")
    assert said.code == 0, said.out
    assert {"gradient", "adapter", "loss", "same numbers", "base", "adapter off"} <= {
        check["name"] for check in said.json["checks"]
    }


def test_plugins_checked(run: Run) -> None:
    checked = {plugin["name"]: plugin["check"] for plugin in run("plugins", "--check", "--json").json["plugins"]}
    assert all(checked[name]["ok"] for name in BACKENDS)
    assert all("cpu" in [device["name"] for device in checked[name]["devices"]] for name in BACKENDS)


def test_an_mlx_run_imports_no_torch(voice: str) -> None:
    code = "import sys; from mindprint.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", voice, *SETTINGS, "backend.type=mlx"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "False"


# --- interrupted runs ------------------------------------------------------------------------------------------------


LONG = ("sft.learning_rate=1e-3", "dpo.steps_per_topic=20", "checkpoints.every=5")


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKENDS)
def test_ctrl_c_then_resume(run: Run, voice: str, name: str, whole: Whole) -> None:
    stopped = _stopped_by(signal.SIGINT, voice, f"backend.type={name}")
    assert stopped.code == 130
    assert stopped.err.splitlines()[-1].startswith("mindprint: stopped; the checkpoint of step ")
    assert "Traceback" not in stopped.err
    way_on = stopped.err.splitlines()[-1].partition("continue with: mindprint ")[2]
    resumed = run(*shlex.split(way_on))
    assert resumed.code == 0, resumed.err
    undisturbed = whole(*LONG, f"backend.type={name}")
    mine, theirs = (
        load_file(folder / "adapter/adapter_model.safetensors") for folder in (Path("stopped"), undisturbed)
    )
    assert all(np.array_equal(mine[key], theirs[key]) for key in theirs)
    steps = [json.loads(line)["step"] for line in Path("stopped/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_stop_on_torch_and_go_on_with_mlx(run: Run, voice: str, whole: Whole) -> None:
    assert _stopped_by(signal.SIGINT, voice, "backend.type=torch").code == 130
    resumed = run("train", voice, *LONG, "--run", "stopped", "--resume", "backend.type=mlx")
    assert resumed.code == 0
    assert "mindprint: resuming on mlx what torch trained so far" in resumed.err
    runs = (Path("stopped"), whole(*LONG, "backend.type=torch"))
    last, expected = (json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"] for run in runs)
    assert last == pytest.approx(expected, rel=1e-3)


def _stopped_by(number: signal.Signals, voice: str, *settings: str) -> Said:
    """Train into `stopped` and send a signal after some steps."""
    command = [sys.executable, "-m", "mindprint", "train", voice, *LONG, *settings, "--run", "stopped"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        _wait_for(Path("stopped/metrics.jsonl"), lines=12)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    return Said(process.returncode, out, err)


def _wait_for(file: Path, lines: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not file.exists() or len(file.read_text().splitlines()) < lines:
        assert time.monotonic() < deadline, f"{file} has not {lines} lines after {seconds} s"
        time.sleep(0.02)


def test_a_tokenizer_without_chat_template(run: Run, voice: str, qwen2: Path) -> None:
    model = _copied(qwen2)
    save_tokenizer(model, template=None)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    said = run("train", voice, *SETTINGS, "model.name=../model")
    assert said.code == 0
    assert said.err.count("mindprint: the tokenizer has no chat template: rows are written as `User: …`") == 1


def test_rows_longer_than_max_length_are_counted(run: Run, voice: str) -> None:
    with Path("voice/data/sft.jsonl").open("a") as file:
        file.writelines(
            json.dumps({"prompt": "sea?", "completion": "aye " * 200, "topic": "sea"}) + "\n" for _ in range(3)
        )
    said = run("train", voice, *SETTINGS, "data.max_length=64")
    assert said.code == 0
    (line,) = [line for line in said.err.splitlines() if "max_length" in line]
    assert "3" in line


def test_a_number_written_3e_4_is_one(run: Run, voice: str) -> None:
    config = Path("voice/mindprint.yaml")
    config.write_text(config.read_text().replace("learning_rate: 3e-4", "learning_rate: 1E-3"))
    said = run("train", voice, "dpo.enabled=false", "sft.epochs_per_topic=1", "--run", "r", "--json")
    assert said.code == 0
    assert json.loads(Path("r/metrics.jsonl").read_text().splitlines()[0])["learning_rate"] == 1e-3


# --- wrong input -----------------------------------------------------------------------------------------------------


def _setting(old: str, new: str) -> Callable[[], None]:
    def change() -> None:
        config = Path("voice/mindprint.yaml")
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new))

    return change


def _data(name: str, text: str) -> Callable[[], object]:
    return lambda: Path("voice/data", name).write_text(text)


def _run_in_place() -> None:
    Path("voice/runs/mine").mkdir(parents=True)
    Path("voice/runs/mine/manifest.json").touch()


def _appended(name: str, row: Mapping[str, Any]) -> Callable[[], None]:
    def change() -> None:
        with Path("voice/data", name).open("a") as file:
            file.write(json.dumps(row) + "\n")

    return change


def _without_model_file(*names: str) -> Callable[[], None]:
    def change() -> None:
        model = _copied(Path(_model_name()))
        for name in names:
            (model / name).unlink(missing_ok=True)
        _setting(_model_name(), "../model")()

    return change


def _copied(model: Path) -> Path:
    return Path(shutil.copytree(model if model.is_absolute() else Path("voice") / model, "model", dirs_exist_ok=True))


def _model_name() -> str:
    line = next(line for line in Path("voice/mindprint.yaml").read_text().splitlines() if line.startswith("  name:"))
    return line.partition('"')[2].partition('"')[0]


def _nothing() -> None:
    pass


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

WRONG: dict[str, tuple[Callable[[], object], tuple[str, ...], tuple[str, ...]]] = {
    "an unknown key": (
        _setting("learning_rate: 3e-4", "learning_rte: 3e-4"),
        (),
        ("voice/mindprint.yaml: line 23: sft.learning_rte: unknown key; did you mean 'learning_rate'?",),
    ),
    "an unknown section": (_setting("sft:", "stf:"), (), ("stf: unknown key; did you mean 'sft'?",)),
    "a wrong type": (
        _setting("learning_rate: 3e-4", "learning_rate: fast"),
        (),
        ("line 23: sft.learning_rate", "number", "'fast'"),
    ),
    "a wrong choice": (_nothing, ("dpo.loss=sigmoyd",), ("dpo.loss", "sigmoyd")),
    "broken YAML": (_setting("model:", "model: ["), (), ("voice/mindprint.yaml: line ",)),
    "no data folder": (lambda: shutil.rmtree("voice/data"), (), ("voice/data: no such data folder",)),
    "no data file": (lambda: Path("voice/data/sft.jsonl").unlink(), (), ("voice/data/sft.jsonl: no such file",)),
    "an empty file": (_data("sft.jsonl", ""), (), ("voice/data/sft.jsonl: the file is empty",)),
    "no JSON": (_data("sft.jsonl", "prompt: hello\n"), (), ("voice/data/sft.jsonl: line 1: not valid JSON",)),
    "a row without its fields": (
        _appended("sft.jsonl", {"prompt": "sea?", "topic": "sea"}),
        (),
        ("voice/data/sft.jsonl: line 9: ", "completion"),
    ),
    "an empty completion": (
        _appended("sft.jsonl", {"prompt": "sea?", "completion": "", "topic": "sea"}),
        (),
        ("voice/data/sft.jsonl: line 9: ", "completion", "empty"),
    ),
    "an empty answer": (
        _appended("preferences.jsonl", {"prompt": "sea?", "chosen": " ", "rejected": "yes", "topic": "sea"}),
        (),
        ("voice/data/preferences.jsonl: line 9: ", "chosen", "empty"),
    ),
    "a topic without rows": (
        _appended("preferences.jsonl", {"prompt": "sky?", "chosen": "aye", "rejected": "yes", "topic": "sky"}),
        (),
        ("topic 'sky'", "SFT rows"),
    ),
    "prompts that swallow their completions": (_nothing, ("data.max_length=5",), ("topic 'sea'", "max_length")),
    "no such model folder": (_nothing, ("model.name=./nowhere",), ("nowhere: no such folder",)),
    "a model without tokenizer": (_without_model_file(*TOKENIZER_FILES), (), ("model: has no tokenizer",)),
    "a model without weights": (_without_model_file("model.safetensors"), (), ("model: has no weights",)),
    "a model without config": (_without_model_file("config.json"), (), ("no config.json",)),
    "a backend that is not installed": (
        _nothing,
        ("backend.type=jax",),
        ("backend 'jax' is not installed (installed: mlx, torch)",),
    ),
    "a device that is not there": (_nothing, ("backend.type=torch", "backend.device=mps"), ("device 'mps'",)),
    "a device of the other backend": (
        _nothing,
        ("backend.type=mlx", "backend.device=tpu"),
        ("backend 'mlx' knows no device 'tpu'", "usable here"),
    ),
    "a run folder in use": (
        _run_in_place,
        ("--run", "voice/runs/mine"),
        ("voice/runs/mine: already holds a run", "--resume"),
    ),
    "a run folder with something else": (
        _nothing,
        ("--run", "voice/data"),
        ("voice/data: already holds something else",),
    ),
    "a run folder under a file": (_nothing, ("--run", "voice/README.md/run"), ("voice/README.md",)),
    "a run folder that cannot be written": (_nothing, ("--run", "/proc/mindprint-run"), ("/proc/mindprint-run",)),
    "nothing to resume": (_nothing, ("--resume",), ("voice/runs: holds no run to resume",)),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(run: Run, voice: str, case: str) -> None:
    """Exit code 2, one line on standard error that names the thing, and nothing left behind."""
    change, arguments, words = WRONG[case]
    change()
    before = _everything()
    said = run("train", voice, *arguments)
    assert (said.code, said.out) == (2, "")
    (line,) = said.err.splitlines()
    assert line.startswith("mindprint: error: ")
    assert all(word in line for word in words), line
    assert _everything() == before


def test_a_module_that_is_not_there(run: Run, voice: str) -> None:
    """Known only once the model is loaded, so the backend that loads it has been named by then."""
    before = _everything()
    said = run("train", voice, "adapter.target_modules=[q_prj]")
    assert (said.code, said.out) == (2, "")
    *notices, error = said.err.splitlines()
    assert not [line for line in notices if "error" in line]
    assert error == (
        "mindprint: error: adapter.target_modules: no module of this base is called 'q_prj'; did you mean 'q_proj'?"
    )
    assert _everything() == before


def test_a_full_disk(run: Run, voice: str) -> None:
    """No file can grow beyond 20 kB: the run's settings can be written, its first checkpoint cannot."""
    before = _everything()
    command = [sys.executable, "-m", "mindprint", "train", voice, *SETTINGS, "backend.type=mlx"]
    limited = ["prlimit", "--fsize=20000", *command]
    done = subprocess.run(limited, check=False, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    assert (done.returncode, done.stdout) == (2, "")
    error = done.stderr.splitlines()[-1]
    assert error.startswith("mindprint: error: ")
    assert "cannot be written" in error
    assert "File too large" in error
    assert _everything() == before


def _changed_base() -> None:
    from safetensors.numpy import save_file

    model = _copied(Path(_model_name()))
    weights = load_file(model / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, model / "model.safetensors", metadata={"format": "pt"})


OTHER: dict[str, tuple[Callable[[], object], tuple[str, ...], str]] = {
    "another base": (_changed_base, ("model.name=../model",), "the base model is another one: model.name is "),
    "another dataset": (
        _appended("sft.jsonl", {"prompt": "sea?", "completion": "aye", "topic": "sea"}),
        (),
        "was made with another dataset than this configuration has",
    ),
    "another adapter": (
        _nothing,
        ("adapter.r=4",),
        "the adapter configuration is another one: adapter.r is ",
    ),
    "another learning rate": (
        _nothing,
        ("sft.learning_rate=1e-4",),
        "the training configuration is another one: sft.learning_rate is 0.01 in the run, 0.0001 here",
    ),
}


@pytest.fixture
def stopped(voice: str, whole: Whole, capfd: pytest.CaptureFixture[str]) -> str:
    """A run of the project that was stopped: a whole one without its adapter."""
    shutil.copytree(whole(*SETTINGS, "backend.type=torch"), "stopped")
    shutil.rmtree("stopped/adapter")
    capfd.readouterr()  # the output of its training, if this is the first test that needs it
    return "stopped"


@pytest.mark.parametrize("case", OTHER)
def test_a_checkpoint_of_another_run(run: Run, stopped: str, case: str) -> None:
    change, arguments, words = OTHER[case]
    change()
    before = _everything()
    said = run("train", "voice", *SETTINGS, "backend.type=torch", "--run", stopped, "--resume", *arguments)
    assert (said.code, said.out) == (2, "")
    (line,) = said.err.splitlines()
    assert words in line
    assert _everything() == before


def test_a_truncated_checkpoint(run: Run, stopped: str) -> None:
    newest = max(Path(stopped, "checkpoints").iterdir())
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    resume = ("train", "voice", *SETTINGS, "backend.type=torch", "--run", stopped, "--resume")
    said = run(*resume)
    assert said.code == 2
    (line,) = said.err.splitlines()
    assert f"{newest.name}/adapter_model.safetensors: is truncated or edited" in line
    latest = run(*resume, "latest")
    assert latest.code == 0
    assert "mindprint: warning: passed over: " in latest.err


def _everything() -> dict[str, bytes | None]:
    """Every file and folder below the working folder, with its content."""
    paths = [Path(folder, name) for folder, folders, files in os.walk(".") for name in (*folders, *files)]
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}
