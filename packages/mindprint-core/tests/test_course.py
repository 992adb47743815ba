"""A run through its curriculum, on the toy backend: gates, retries, roll-backs, verdicts, and the same course again."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mindprint
from mindprint.contract import Generation
from mindprint.errors import ConfigError, DataError, Interrupted
from mindprint.events import Decided, Event, Notice, StepDone
from mindprint.hookspecs import hookimpl
from mindprint.runs.folder import RunFolder
from mindprint.runs.records import AnswerRecord, answer_from
from mindprint.runs.results import Verdict

Project = dict[str, Any]
TOPICS = ("u1/c1/bees", "u1/c1/tides", "u1/c2/moon")
SFT, DPO = 3, 2
HELD_OUT = "aye aye"


@pytest.fixture
def project(toy: str, toy_model: Path, tmp_path: Path) -> Project:
    """Three topics in two chapters of a unit, three SFT and two DPO steps each, two held-out pairs each."""
    data = tmp_path / "data"
    data.mkdir()
    for name, count in {"sft": 6, "preferences": 4, "heldout": 2}.items():
        with (data / f"{name}.jsonl").open("w") as file:
            for topic in TOPICS:
                file.writelines(json.dumps(row(name, topic, n)) + "\n" for n in range(count))
    return {
        "model": {"name": str(toy_model)},
        "backend": toy,
        "data": {"path": str(data)},
        "adapter": {"r": 2},
        "sft": {"steps_per_topic": SFT, "batch_size": 2, "learning_rate": 1e-2},
        "dpo": {"steps_per_topic": DPO, "batch_size": 2, "learning_rate": 1e-2},
        "checkpoints": {"every": 2},
        "generation": {"max_new_tokens": 12},
        "voice": {"answers_per_prompt": 1},
    }


def row(name: str, topic: str, n: int) -> dict[str, str]:
    asked = {"topic": topic, "prompt": f"{name} {topic} {n}?"}
    if name == "sft":
        return asked | {"completion": "aye " * (n + 2)}
    return asked | {"chosen": f"{HELD_OUT if name == 'heldout' else 'aye'} aye", "rejected": "no"}


def train(project: Project, run: Path, **sections: Any) -> mindprint.RunResult:
    return mindprint.train(project | sections, run=run)


def steps(run: Path) -> list[tuple[str, str, int | None, bool]]:
    """Topic, stage, attempt and whether it was undone, of each optimizer step."""
    lines = RunFolder(run).read_steps()
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [(line["topic"], line["stage"], line.get("attempt"), line.get("rolled_back", False)) for line in lines]


def decisions(run: Path) -> list[tuple[str, str, str | None]]:
    return [(past.topic, past.decision, past.stage) for past in RunFolder(run).decisions()]


def weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def answers(run: Path) -> list[AnswerRecord]:
    return [answer_from(json.loads(line)) for line in (run / "answers.jsonl").read_text().splitlines()]


class Silenced:
    """Answers of the adapter become empty while `when` says so."""

    def __init__(self, when: Callable[[], bool]) -> None:
        self.when = when

    @hookimpl(wrapper=True)
    def mindprint_generate(self, prompts: Any, adapter: bool) -> Any:
        made = yield
        return [Generation(np.zeros(0, np.int32), "stop") for _ in prompts] if adapter and self.when() else made


def test_by_default_everything_is_trained_and_evaluated_at_the_end(project: Project, tmp_path: Path) -> None:
    result = train(project, tmp_path / "run")
    assert steps(result.run) == [
        (topic, stage, None, False) for topic in TOPICS for stage in ["sft"] * SFT + ["dpo"] * DPO
    ]
    assert decisions(result.run) == [] and result.verdicts == ()
    records = RunFolder(result.run).evaluations()
    assert [(record.level, record.name, record.stage, record.outcome) for record in records] == [
        *(("topic", topic, None, "measured") for topic in TOPICS),
        ("final", "", None, "measured"),
    ]
    final = records[-1].figures
    assert (final.prompts, final.pairs) == (6, 6)
    # Six short answers: nobody's voice, and said so.
    assert final.voice is None and "500 are needed" in final.unmeasured["voice"]
    assert 0 < (final.perplexity or 0) < (final.base_perplexity or 0)
    assert [(answer.topic, answer.person) for answer in answers(result.run)] == [
        (topic, f"{HELD_OUT} aye") for topic in TOPICS for _ in range(2)
    ]
    manifest = json.loads((result.run / "manifest.json").read_text())
    assert list(manifest["curriculum"]["topics"]) == list(TOPICS)


def test_a_topic_that_fails_is_tried_again_and_named(project: Project, tmp_path: Path) -> None:
    evaluation = {"topic": {"perplexity_ratio": 0.001}}
    result = train(project, tmp_path / "run", evaluation=evaluation, curriculum={"retries": 1}, dpo={"enabled": False})
    assert steps(result.run) == [
        (topic, "sft", attempt, attempt is None) for topic in TOPICS for attempt in [None] * SFT + [2] * SFT
    ]
    assert decisions(result.run) == [(topic, kind, None) for topic in TOPICS for kind in ("retry", "fail")]
    assert [past.change for past in RunFolder(result.run).decisions()] == [{"learning_rate": 0.5}, None] * 3
    lines = RunFolder(result.run).read_steps()
    assert [line["learning_rate"] for line in lines[: 2 * SFT]] == [1e-2] * SFT + [5e-3] * SFT
    # The second attempt begins where the first began: its first loss is the same.
    assert lines[0]["loss"] == lines[SFT]["loss"] and lines[1]["loss"] != lines[SFT + 1]["loss"]
    assert [(verdict.level, verdict.name, verdict.outcome) for verdict in result.failed] == [
        ("topic", t, "failed") for t in TOPICS
    ]
    assert "perplexity_ratio" in result.failed[0].why and "at most 0.001 wanted" in result.failed[0].why
    assert [stage.steps for stage in result.stages] == [SFT] * 3


def test_a_failure_can_end_the_run(project: Project, tmp_path: Path) -> None:
    sections = {"evaluation": {"chapter": {"reward_accuracy": 1.0, "perplexity_ratio": 0.001}}}
    result = train(project, tmp_path / "run", **sections, curriculum={"stop_after": "chapter"})
    assert {topic for topic, *_ in steps(result.run)} == {"u1/c1/bees", "u1/c1/tides"}
    assert decisions(result.run) == [("u1/c1/tides", "stop", None)]
    assert [(verdict.level, verdict.name, verdict.outcome) for verdict in result.failed] == [
        ("chapter", "u1/c1", "failed")
    ]
    assert (result.adapter / "adapter_model.safetensors").is_file()


def test_what_cannot_be_evaluated_is_neither_failed_nor_zero(project: Project, tmp_path: Path) -> None:
    evaluation = {"final": {"voice": 0.0}, "topic": {"voice": 0.0}}
    result = train(project, tmp_path / "run", evaluation=evaluation, curriculum={"retries": 3})
    assert [decision for _, decision, _ in decisions(result.run)] == ["not evaluated"] * 3
    assert [verdict.outcome for verdict in result.verdicts] == ["not evaluated"] * 4
    assert result.not_evaluated == result.verdicts and result.failed == ()
    assert str(result.verdicts[-1]).startswith("the final evaluation could not be evaluated: voice: ")
    assert result.verdicts[0] == Verdict("topic", TOPICS[0], "not evaluated", result.verdicts[0].why)


def test_without_dpo_a_run_is_that_of_sft_alone(project: Project, tmp_path: Path) -> None:
    never = train(project, tmp_path / "never", curriculum={"dpo": "never"})
    alone = train(project, tmp_path / "alone", dpo=project["dpo"] | {"enabled": False})
    assert decisions(never.run) == [(topic, "skip", "dpo") for topic in TOPICS]
    assert {stage for _, stage, *_ in steps(never.run)} == {"sft"}
    assert weights(never.run) == weights(alone.run)


def test_a_gate_that_cannot_be_evaluated_lets_dpo_run(project: Project, tmp_path: Path) -> None:
    gated = train(project, tmp_path / "gated", curriculum={"dpo": 0.5})
    always = train(project, tmp_path / "always")
    assert decisions(gated.run) == [(topic, "train", "dpo") for topic in TOPICS]
    assert "could not be evaluated" in RunFolder(gated.run).decisions()[0].why
    assert weights(gated.run) == weights(always.run)


def test_a_collapsed_stage_is_undone(project: Project, tmp_path: Path) -> None:
    """The last topic's DPO silences the model: the run ends with what that stage began with."""
    last: list[Event] = []

    def watch(event: Event) -> None:
        if isinstance(event, StepDone | Decided):
            last.append(event)

    def silent() -> bool:
        return isinstance(last[-1], StepDone) and (last[-1].topic, last[-1].stage) == (TOPICS[-1], "dpo")

    gentle = {name: project[name] | {"learning_rate": 1e-5} for name in ("sft", "dpo")}
    config = project | gentle | {"curriculum": {"roll_back": True}}
    result = mindprint.train(config, run=tmp_path / "run", on_event=watch, observers=[Silenced(silent)])
    assert decisions(result.run) == [(TOPICS[-1], "roll back", "dpo")]
    assert [undone for *_, undone in steps(result.run)] == [False] * (3 * SFT + 2 * DPO) + [True] * DPO
    decision = RunFolder(result.run).decisions()[0]
    assert (decision.first_step, decision.last_step) == (14, 15) and "100% of the answers are empty" in decision.why
    start = result.run / "checkpoints" / "000013" / "adapter_model.safetensors"
    assert weights(result.run) == start.read_bytes()
    assert [stage.stage for stage in result.stages] == ["sft", "dpo", "sft", "dpo", "sft"]
    assert result.failed == ()


def test_without_the_setting_a_collapse_is_a_warning(project: Project, tmp_path: Path) -> None:
    heard: list[Event] = []
    silenced = Silenced(lambda: True)
    result = mindprint.train(project, run=tmp_path / "run", on_event=heard.append, observers=[silenced])
    warnings = [event.message for event in heard if isinstance(event, Notice) and event.warning]
    assert any("100% of the answers are empty" in words and "roll_back" in words for words in warnings)
    assert result.failed == () and decisions(result.run) == []
    assert weights(result.run) == weights(train(project, tmp_path / "other").run)


def test_earlier_topics_are_measured_again_at_the_end_of_a_unit(project: Project, tmp_path: Path) -> None:
    result = train(project, tmp_path / "run", evaluation={"levels": ["topic", "unit"]})
    records = RunFolder(result.run).evaluations()
    unit = next(record for record in records if record.level == "unit")
    assert [topic.topic for topic in unit.earlier] == list(TOPICS[:-1])
    then = {record.name: record.figures.perplexity for record in records if record.level == "topic"}
    assert [topic.perplexity_then for topic in unit.earlier] == [then[topic] for topic in TOPICS[:-1]]
    assert all(topic.perplexity_now != topic.perplexity_then for topic in unit.earlier)


def test_only_the_topics_that_are_asked_for(project: Project, tmp_path: Path) -> None:
    chosen = train(project, tmp_path / "chosen", curriculum={"topics": ["u1/c2", TOPICS[0]]})
    assert list(dict.fromkeys(topic for topic, *_ in steps(chosen.run))) == [TOPICS[0], TOPICS[2]]
    first = train(project, tmp_path / "first", curriculum={"max_topics": 1})
    assert {topic for topic, *_ in steps(first.run)} == {TOPICS[0]}
    with pytest.raises(DataError, match="topic 'u1/c1/bee' is in no row"):
        train(project, tmp_path / "none", curriculum={"topics": ["u1/c1/bee"]})
    with pytest.raises(ConfigError, match="max_topics"):
        train(project, tmp_path / "none", curriculum={"max_topics": 0})


@pytest.mark.parametrize("stop", range(1, 3 * 2 * (SFT + DPO) + 1, 2))
def test_a_run_that_was_ended_takes_the_same_course(
    project: Project, tmp_path: Path, stop: int, eventful: Path
) -> None:
    config = project | eventful_settings()

    def press(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        mindprint.train(config, run=tmp_path / "run", on_event=press)
    except Interrupted:
        mindprint.train(config, run=tmp_path / "run", resume=True)
    run = tmp_path / "run"
    assert weights(run) == weights(eventful)
    assert steps(run) == steps(eventful)
    for name in ("decisions.jsonl", "evaluations.jsonl", "answers.jsonl"):
        assert (run / name).read_text() == (eventful / name).read_text()


def eventful_settings() -> Project:
    """Every topic fails once and is tried again, with its DPO."""
    return {
        "evaluation": {"levels": ["topic", "chapter", "unit", "final"], "topic": {"perplexity_ratio": 0.001}},
        "curriculum": {"retries": 1, "dpo": 0.5, "roll_back": True},
    }


@pytest.fixture
def eventful(project: Project, tmp_path: Path) -> Path:
    """A whole run in which much happens."""
    return train(project, tmp_path / "whole", **eventful_settings()).run


def test_quizzes_are_asked_and_one_without_rows_is_named(project: Project, tmp_path: Path) -> None:
    for topic in (TOPICS[0], "u9/stars"):
        folder = tmp_path / "data" / topic
        folder.mkdir(parents=True)
        question = {"question": f"What of {topic}?", "reference_answers": ["Aye."], "key_concepts": ["honey"]}
        (folder / "quiz.json").write_text(json.dumps([question]))
    heard: list[Event] = []
    result = mindprint.train(project, run=tmp_path / "run", on_event=heard.append)
    warnings = [event.message for event in heard if isinstance(event, Notice) and event.warning]
    assert any("the quiz of topic 'u9/stars' is not asked while training" in words for words in warnings)
    final = RunFolder(result.run).evaluations()[-1].figures
    assert (final.questions, final.concept_coverage) == (1, 0.0)
    quizzed = [answer for answer in answers(result.run) if answer.quiz]
    assert [(answer.topic, answer.person, answer.missing) for answer in quizzed] == [(TOPICS[0], "Aye.", ("honey",))]


def test_a_report_that_cannot_be_written_is_a_warning(project: Project, tmp_path: Path) -> None:
    heard: list[Event] = []

    def take_its_place(event: Event) -> None:
        heard.append(event)
        if isinstance(event, StepDone) and event.step == 1:
            (tmp_path / "run" / "report.html").mkdir()

    result = mindprint.train(project, run=tmp_path / "run", on_event=take_its_place)
    assert (result.adapter / "adapter_model.safetensors").is_file()
    warnings = [event.message for event in heard if isinstance(event, Notice) and event.warning]
    assert any(words.startswith("no report: ") and "mindprint report" in words for words in warnings)
