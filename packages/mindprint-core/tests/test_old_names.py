"""Files of older versions are read by the names that they were written with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_samples import BEES, HARBOUR, MEASURED, write_sample_run

from mindprint.config import load_config, make_config
from mindprint.errors import ConfigError
from mindprint.reports import read_run
from mindprint.runs.records import OLD_FIGURES, AnswerRecord, EvaluationRecord, answer_from, as_line, evaluation_from

NOTE = "evaluation.unit.preference_accuracy is now evaluation.unit.reward_accuracy; the old name is still read"


def as_before(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line of evaluations.jsonl as older versions wrote it."""
    old = {new: old for old, new in OLD_FIGURES.items()}
    figures = {old.get(name, name): value for name, value in line["figures"].items()}
    figures["unmeasured"] = {old.get(name, name): why for name, why in figures["unmeasured"].items()}
    return line | {"figures": figures}


def test_evaluations_of_older_runs_are_read() -> None:
    figures = replace(MEASURED, reward_margin=None, unmeasured={"reward_margin": "there are no held-out pairs"})
    record = EvaluationRecord("final", "", 240, figures=figures)
    line = as_before(json.loads(json.dumps(as_line(record))))
    assert {"preference_accuracy", "untuned_voice", "untuned_perplexity"} <= set(line["figures"])
    assert set(line["figures"]["unmeasured"]) == {"preference_margin"}
    assert evaluation_from(line) == record


def test_answers_of_older_runs_are_read() -> None:
    record = AnswerRecord(BEES, "What do bees eat?", "Honey.", "Sugar.", "Honey, mind you.", quiz=True)
    line = json.loads(json.dumps(as_line(record)))
    line["untuned"] = line.pop("base")
    assert answer_from(line) == record


def test_a_whole_older_run_is_read(tmp_path: Path) -> None:
    run = write_sample_run(tmp_path / "run-001")
    new = read_run(run)
    lines = [as_before(json.loads(line)) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = (run / "answers.jsonl").read_text().replace('"base"', '"untuned"')
    (run / "answers.jsonl").write_text(answers)
    old = read_run(run)
    assert old.broken == ()
    assert (old.evaluations, old.answers) == (new.evaluations, new.answers)
    assert old.outcome(HARBOUR) == "passed"


def test_trackers_read_figures_by_their_old_names() -> None:
    for old, new in OLD_FIGURES.items():
        assert getattr(MEASURED, old) == getattr(MEASURED, new)


def test_a_threshold_by_its_old_name_is_read_with_a_note(tmp_path: Path) -> None:
    file = tmp_path / "mindprint.yaml"
    file.write_text("evaluation:\n  unit: {voice: 0.2, preference_accuracy: 0.7}\n")
    read = load_config(file)
    assert read.config.evaluation.unit.reward_accuracy == 0.7
    assert read.config.evaluation.unit.voice == 0.2
    assert read.notes == (f"{file}: {NOTE}",)
    given = load_config(file, ["evaluation.unit.reward_accuracy=0.8"])
    assert given.config.evaluation.unit.reward_accuracy == 0.8


def test_an_override_by_the_old_name_is_read_with_a_note() -> None:
    made = make_config({}, overrides=["evaluation.unit.preference_accuracy=0.7"])
    assert made.config.evaluation.unit.reward_accuracy == 0.7
    assert made.notes == (f"override: {NOTE}",)
    assert make_config({"evaluation": {"unit": {"reward_accuracy": 0.5}}}).notes == ()


def test_both_names_at_once_are_refused() -> None:
    both = {"evaluation": {"unit": {"reward_accuracy": 0.5, "preference_accuracy": 0.5}}}
    with pytest.raises(ConfigError, match="both are given: remove one of them"):
        make_config(both)
