"""`mindprint compare`: the toy backend under several names, equal, drifting, and everything that cannot be compared."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_samples import MEASURED, write_lines
from toy_base import install_toy

from mindprint.adapter.peft_format import read_adapter
from mindprint.cli import main
from mindprint.contract import AdapterState, LoraConfig, LoraFactors
from mindprint.reports.equivalence import adapter_difference, deviation
from mindprint.runs.costs import COSTS_FILE
from mindprint.runs.records import AnswerRecord, EvaluationRecord, Figures, Interval, as_line

RATE = "update.learning_rate"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` and `two` are the same, `drifting` trains 5 % faster than it is told, and `idle` does not train at all."""
    folder = tmp_path_factory.mktemp("backends")
    for name, factor in {"one": None, "two": None, "drifting": 1.05, "idle": 0.0}.items():
        install_toy(folder, name)
        plugin = folder / f"{name}_backend.py"
        code = plugin.read_text(encoding="utf-8")
        assert RATE in code
        if factor is not None:
            plugin.write_text(code.replace(RATE, f"{factor} * {RATE}"), encoding="utf-8")
    return folder


@pytest.fixture
def project(site: Path, toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of one topic, with the backends importable here and in every process that is started."""
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.syspath_prepend(str(site))
    rows = [{"topic": "bees", "prompt": f"{n}?", "completion": "aye " * (n + 1)} for n in range(5)]
    pairs = [{"topic": "bees", "prompt": f"{n}?", "chosen": "aye, " * n + "aye", "rejected": "yes."} for n in range(4)]
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "sft.jsonl", rows)
    write_lines(tmp_path / "data" / "preferences.jsonl", pairs)
    settings = {
        "model": {"name": str(toy_model)},
        "backend": "one",
        "adapter": {"r": 2},
        "sft": {"steps_per_topic": 4, "batch_size": 2, "learning_rate": 1e-2, "backend": "one"},
        "dpo": {"steps_per_topic": 3, "batch_size": 2, "learning_rate": 1e-2},
    }
    (tmp_path / "mindprint.yaml").write_text(json.dumps(settings), encoding="utf-8")
    return tmp_path


@pytest.fixture
def runs(project: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, Path]:
    """The same run on `one` and on `two`, without any evaluation."""
    made = tuple(project / "made" / name for name in ("one", "two"))
    for run in made:
        assert main(["train", str(project), f"backend.type={run.name}", "sft.backend=null", "--run", str(run)]) == 0
        for name in ("evaluations", "decisions", "answers"):
            (run / f"{name}.jsonl").unlink(missing_ok=True)
    capsys.readouterr()
    return made[0], made[1]


def evaluated(run: Path, figures: Figures, answers: Mapping[str, str]) -> None:
    write_lines(run / "evaluations.jsonl", [as_line(EvaluationRecord("final", "", 7, figures=figures))])
    lines = [as_line(AnswerRecord("bees", prompt, "p", "u", tuned)) for prompt, tuned in answers.items()]
    write_lines(run / "answers.jsonl", lines)


def compared(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, Any]:
    code = main(["compare", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_equal_backends_are_equivalent_and_each_ran_alone(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage ran on the backend asked for, also the one for which the configuration names another."""
    code, found = compared(capsys, project, "--backends", "one,two")
    assert code == 0 and found["equivalent"]
    assert [(one["stage"], len(one["losses"][0]), one["greatest"]) for one in found["stages"]] == [
        ("sft", 4, 0.0), ("dpo", 3, 0.0),
    ]  # fmt: skip
    assert [one["tolerance"] for one in found["stages"]] == [1e-5, 1e-3]
    assert found["adapter"] == {"change": 0.0, "greatest": 0.0}
    page = project / "runs" / "compare-001" / "comparison.html"
    assert found["page"] == str(page)
    assert page.read_text(encoding="utf-8").count('class="line first"') == 2  # the first run's curves: SFT, DPO
    assert "Equivalent in its losses: " in page.read_text(encoding="utf-8")
    for side, name in zip(found["sides"], ("one", "two"), strict=True):
        run = project / "runs" / "compare-001" / name
        assert (side["name"], side["backend"], side["run"]) == (name, name, str(run))
        assert 20 * 2**20 < side["costs"]["peak_bytes"] < 2**30
        assert 0 < side["costs"]["load_seconds"] < 60
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        middle = sorted(line["seconds"] for line in lines if line["stage"] == "dpo")[1]
        assert side["step_seconds"]["dpo"] == middle


def test_a_backend_that_trains_otherwise_is_not_equivalent(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(project), "--backends", "one,drifting"]) == 1
    said = capsys.readouterr().out
    verdict = said.splitlines()[-1]
    assert verdict.startswith("not equivalent: bees, sft: losses deviate by ")
    assert "and 1e-05 is allowed" in verdict
    assert float(said.split("the change differs by ")[1].split()[0]) > 1e-3


def test_without_a_voice_only_losses_are_spoken_of(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--runs", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    assert "the voice could not be scored (there was no evaluation), so nothing is said of it" in said
    assert said.count("not scored") == 2 and said.count("not recorded") == 4
    evaluated(runs[0], MEASURED, {})
    evaluated(runs[1], Figures(unmeasured={"voice": "all answers are empty"}), {})
    assert main(["compare", "--runs", *map(str, runs)]) == 0
    assert "the voice could not be scored (all answers are empty)" in capsys.readouterr().out


@pytest.mark.parametrize(("other", "equivalent"), [(0.87, True), (0.79, True), (0.90, False), (0.70, False)])
def test_voices_within_a_twentieth_of_the_scale_are_equivalent(
    other: float, equivalent: bool, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for run, voice in zip(runs, (0.83, other), strict=True):
        evaluated(run, replace(MEASURED, voice=Interval(voice, voice - 0.1, voice + 0.1)), {})
    code, found = compared(capsys, "--runs", *runs)
    assert (code, found["equivalent"]) == (0 if equivalent else 1, equivalent)
    assert found["voice_difference"] == pytest.approx(other - 0.83)
    assert bool(found["beyond"]) != equivalent


def test_answers_stand_side_by_side(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(runs[0], MEASURED, {"a?": "same", "b?": "left\x1b[2J", "c?": "only here"})
    evaluated(runs[1], MEASURED, {"a?": "same", "b?": "right"})
    assert main(["compare", "--runs", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    assert "answers: 1 of 2 identical, word for word" in said
    assert "  b?\n    one: left [2J\n    two: right\n" in said


def test_a_retry_that_only_one_side_made_is_named(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    retried = [line | {"step": line["step"] + 7, "attempt": 2} for line in lines]
    write_lines(runs[1] / "metrics.jsonl", [*lines, *retried])
    code, found = compared(capsys, "--runs", *runs)
    assert code == 1
    assert sorted(found["beyond"]) == [
        "bees, dpo, attempt 2: 0 steps against 3", "bees, sft, attempt 2: 0 steps against 4",
    ]  # fmt: skip


def test_a_loss_that_is_no_number_is_not_equivalent(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        write_lines(run / "metrics.jsonl", [line | {"loss": math.nan} for line in lines])
    assert main(["compare", "--runs", *map(str, runs)]) == 1
    assert "not equivalent: bees, sft: losses deviate by inf" in capsys.readouterr().out


def test_a_reduced_dtype_has_no_tolerance(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads((runs[1] / "manifest.json").read_text(encoding="utf-8"))
    facts["stages"] = [stage | {"dtype": "bfloat16"} for stage in facts["stages"]]
    (runs[1] / "manifest.json").write_text(json.dumps(facts), encoding="utf-8")
    code, found = compared(capsys, "--runs", *runs)
    assert (code, found["beyond"]) == (1, ["computed in bfloat16: the tolerances hold for backend.dtype=float32"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backends", "one"], "name two different backends"),
        (["--backends", "one,one"], "name two different backends"),
        (["--backends", "one,two,drifting"], "name two different backends"),
        (["--backends", "one,nothing"], "backend 'nothing' is not installed"),
        ([], "give either --backends A,B to train, or --runs RUN RUN"),
        (["--runs", "here", "there"], "--runs takes no CONFIG"),
        (["--backends", "one,two", "sft.steps=3"], "unknown key"),
        (["--backends", "one,two", "data.path=nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_trains_nothing(
    words: list[str], message: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(project), *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err
    assert not (project / "runs").exists()


def test_what_fails_in_its_own_process_is_told_here(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The toy backend has no dropout, which it says only when the adapter is injected."""
    assert main(["compare", str(project), "--backends", "one,two", "adapter.dropout=0.1"]) == 2
    assert "failed: backend 'hello' has no dropout: set adapter.dropout=0" in capfd.readouterr().err.splitlines()[-1]


def test_a_guard_that_stops_a_run_is_a_failed_check(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(project), "--backends", "idle,two"]) == 1
    assert "compare-001/idle failed: " in capfd.readouterr().err.splitlines()[-1]


def test_runs_of_other_things_are_refused(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads((runs[1] / "manifest.json").read_text(encoding="utf-8"))
    facts["identity"] |= {"dataset": "other", "base model": "other"}
    (runs[1] / "manifest.json").write_text(json.dumps(facts), encoding="utf-8")
    assert main(["compare", "--runs", *map(str, runs)]) == 2
    assert "differ in base model and dataset" in capsys.readouterr().err


def test_a_run_that_is_not_complete_is_refused(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    (runs[0] / "adapter").rename(runs[0] / "elsewhere")
    assert main(["compare", "--runs", *map(str, runs)]) == 2
    assert "is not complete; continue it with" in capsys.readouterr().err


def test_costs_that_cannot_be_read_are_named(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    (runs[0] / COSTS_FILE).write_text("[]", encoding="utf-8")
    assert main(["compare", "--runs", *map(str, runs)]) == 2
    assert "costs.json: cannot be read" in capsys.readouterr().err


def test_deviation_is_relative_to_one_and_the_first_loss() -> None:
    """|3 - 3.5| / 4 = 0.125 is the greatest; |1 - 1.1| / 2 = 0.05."""
    assert deviation([1.0, 3.0], [1.1, 3.5]) == 0.125
    assert deviation([], []) == 0.0
    assert deviation([1.0, math.inf], [1.0, math.inf]) == math.inf


def test_adapter_difference_is_that_of_the_change() -> None:
    """Scale 2. B A is [[3, 4]] and [[3, 4.5]]: 2 * 0.5 over 2 * 5 is 0.1; as factors b = [[1]], a differs by 0.5.

    The same change from factors that differ (b doubled, a halved) is no change at all.
    """
    config = LoraConfig(r=1, alpha=2.0, target_modules=("q",))

    def adapter(a: list[float], b: float) -> AdapterState:
        return AdapterState(config, {"q": LoraFactors(np.float32([a]), np.float32([[b]]))})

    first = adapter([3, 4], 1)
    found = adapter_difference(first, adapter([3, 4.5], 1))
    assert (found.change, found.greatest) == (pytest.approx(0.1), 0.5)
    same = adapter_difference(first, adapter([1.5, 2], 2))
    assert (same.change, same.greatest) == (0.0, 2.0)
    nothing = adapter([3, 4], 0)
    assert adapter_difference(nothing, nothing).change == 0.0
    assert adapter_difference(nothing, first).change == math.inf


def test_the_adapters_difference_is_read_from_the_runs(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    states = [read_adapter(run / "adapter")[0] for run in runs]
    _, found = compared(capsys, "--runs", *runs)
    assert found["adapter"]["change"] == adapter_difference(*states).change == 0.0


def test_peak_memory_counts_what_was_given_back() -> None:
    code = """
import numpy as np
from mindprint.runs.costs import peak_bytes
before = peak_bytes()
np.ones(200 * 2**17).sum()  # 200 MiB, freed at once
print((peak_bytes() - before) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert 190 < float(done.stdout) < 230
