"""`mindprint eval --compare`: figures of runs beside each other, and whether a difference is more than chance."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from run_samples import MEASURED, write_lines, write_sample_run

from mindprint.cli import main
from mindprint.runs.records import EvaluationRecord, Interval, as_line


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path, Path]:
    """One that was evaluated (voice 0.83), one better (1.2) with another seed, and one without evaluations."""
    first, better, bare = (write_sample_run(tmp_path / name) for name in ("first", "better", "bare"))
    final = EvaluationRecord("final", "", 240, figures=replace(MEASURED, voice=Interval(1.2, 1.1, 1.3)))
    write_lines(better / "evaluations.jsonl", [as_line(final)])
    config = (better / "config.yaml").read_text(encoding="utf-8")
    (better / "config.yaml").write_text(config.replace("seed: 7", "seed: 8"), encoding="utf-8")
    (bare / "evaluations.jsonl").unlink()
    return first, better, bare


def test_figures_stand_side_by_side(runs: tuple[Path, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--compare", *map(str, runs)]) == 0
    said = capsys.readouterr()
    lines = {line.split("  ")[0]: line for line in said.out.splitlines()}
    assert lines["voice"].split("  ")[1:] != []
    for figure in ("0.83 (0.71 to 0.95)", "1.20 (1.10 to 1.30)", "not evaluated"):
        assert figure in lines["voice"]
    assert "setting seed: 7 | 8 | 7" in lines
    assert f"voice of {runs[1]} against the first: +0.37, more than their intervals" in lines
    assert f"voice of {runs[2]} against the first: cannot be told: no voice was evaluated in {runs[2]}" in lines
    assert f"warning: {runs[2]}: not evaluated: it has no evaluations.jsonl" in said.err


def test_a_distance_from_the_base_model_is_not_called_a_voice(
    runs: tuple[Path, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    far = EvaluationRecord("final", "", 240, figures=replace(MEASURED, people_voice=None))
    write_lines(runs[1] / "evaluations.jsonl", [as_line(far)])
    assert main(["eval", "--compare", *map(str, runs[:2])]) == 0
    lines = {line.split("  ")[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert lines["voice"] == "-" and lines["distance from the base model"] == "0.95)"
    reason = "one run has a voice, and the other a distance from the base model"
    assert f"voice of {runs[1]} against the first: cannot be told: {reason}" in lines
    write_lines(runs[0] / "evaluations.jsonl", [as_line(far)])
    assert main(["eval", "--compare", *map(str, runs[:2])]) == 0
    told = capsys.readouterr().out
    assert f"distance from the base model of {runs[1]} against the first: +0.00" in told
    assert not any(line.startswith("voice") for line in told.splitlines())


def test_json_tells_what_is_missing_apart_from_zero(runs: tuple[Path, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--json", "--compare", *map(str, runs)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [run["figures"] and run["figures"]["voice"]["value"] for run in said["runs"]] == [0.83, 1.2, None]
    assert [one["beyond"] for one in said["differences"]] == [True, None]
    assert said["differences"][0]["difference"] == pytest.approx(0.37)
    assert said["settings"] == {"seed": ["7", "8", "7"]}
    assert said["cautions"] == []


def test_overlapping_intervals_are_no_difference(runs: tuple[Path, ...], capsys: pytest.CaptureFixture[str]) -> None:
    final = EvaluationRecord("final", "", 240, figures=replace(MEASURED, voice=Interval(0.97, 0.94, 1.1)))
    write_lines(runs[1] / "evaluations.jsonl", [as_line(final)])
    assert main(["eval", "--compare", *map(str, runs[:2])]) == 0
    assert "+0.14, within their intervals, so not shown to differ" in capsys.readouterr().out


def test_other_held_out_text_and_other_bases_are_cautioned(
    runs: tuple[Path, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads((runs[1] / "manifest.json").read_text(encoding="utf-8"))
    facts["identity"]["base model"] = "other"
    facts["splits"]["digests"] = {"held_out": "other"}
    (runs[1] / "manifest.json").write_text(json.dumps(facts), encoding="utf-8")
    assert main(["eval", "--compare", *map(str, runs[:2])]) == 0
    err = capsys.readouterr().err
    assert "different bases" in err and "hold out different prompts" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "{first}"], "two or more runs"),
        (["{first}", "{first}"], "one PATH is measured at a time"),
        (["{first}", "generation.seed=1"], "generation.seed=1 is a setting, and eval takes none"),
        (["--compare", "{first}", "{first}/nothing"], "no such folder"),
    ],
)
def test_wrong_input_is_one_line(
    words: list[str], message: str, runs: tuple[Path, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *(word.format(first=runs[0]) for word in words)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err
