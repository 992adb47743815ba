"""Evaluation while a run trains: shown, once, stoppable, and off with one switch."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

# The fixture is used by its name.
from test_course import SFT, TOPICS, Project, answers, project, steps, train, weights  # noqa: F401

import mindprint
from mindprint.api.progress import Lines
from mindprint.curriculum.policy import idle_settings
from mindprint.errors import Interrupted
from mindprint.events import Evaluated, Evaluating, Event, Notice, StageFinished, StepDone
from mindprint.hookspecs import hookimpl
from mindprint.runs.folder import RunFolder
from mindprint.runs.records import EvaluationRecord
from mindprint.runs.results import stage_results

EVERYWHERE: dict[str, Any] = {"evaluation": {"levels": ["topic", "chapter", "unit", "final"]}}


class Rows:
    """Counts the prompts and the batches of pairs that the tuned model responds to."""

    def __init__(self) -> None:
        self.prompts = 0
        self.batches = 0

    @hookimpl(wrapper=True)
    def mindprint_generate(self, prompts: Any, adapter: bool) -> Any:
        self.prompts += len(prompts) if adapter else 0
        return (yield)

    @hookimpl(wrapper=True)
    def mindprint_log_probs(self, adapter: bool) -> Any:
        self.batches += adapter
        return (yield)


def test_23_an_adapter_is_evaluated_once_however_many_levels_end_with_it(project: Project, tmp_path: Path) -> None:  # noqa: F811
    """Line 23: the last topic ends a chapter, the unit and the run, and its rows are answered once.

    The end of the run has all prompts answered a second time, with the settings of `generation`, to count loops.
    """
    rows = Rows()
    mindprint.train(project | EVERYWHERE, run=tmp_path / "run", observers=[rows])
    # After each of three topics its two prompts, after the first chapter the other topic's, at the end two topics'.
    assert rows.prompts == 2 + (2 + 2) + (2 + 4) + 6
    written = RunFolder(tmp_path / "run").evaluations()
    counted = [(record.level, record.name) for record in written if record.figures.loops is not None]
    assert counted == [*(("topic", topic) for topic in TOPICS), ("final", "")]


def test_23_the_progress_names_the_topic_and_counts_its_rows(project: Project, tmp_path: Path) -> None:  # noqa: F811
    heard: list[Event] = []
    mindprint.train(project | EVERYWHERE, run=tmp_path / "run", on_event=heard.append)
    progress = [event for event in heard if isinstance(event, Evaluating)]
    assert (progress[0].level, progress[0].name, progress[0].done) == ("topic", TOPICS[0], 0)
    # The base model reads and answers everything once: two pairs and two prompts of three topics, then one topic's.
    assert progress[0].total == 6 + 6 + 2 + 2
    ends = [event for event in progress if event.done == event.total]
    assert [event.name for event in ends] == [*TOPICS[:2], "u1/c1", TOPICS[2], "u1", ""]


def test_23_each_figure_is_printed_once(project: Project, tmp_path: Path) -> None:  # noqa: F811
    written: list[str] = []
    lines = Lines(written.append)
    mindprint.train(project | EVERYWHERE, run=tmp_path / "run", on_event=lines)
    evaluated = [line.partition(": evaluated ")[2].partition(":")[0] for line in written if ": evaluated " in line]
    # The chapter c2 has one topic, and the run's last evaluation is that of its only unit.
    assert evaluated == [
        f"{TOPICS[0]} after dpo", f"{TOPICS[1]} after dpo", "chapter u1/c1", f"{TOPICS[2]} after dpo", "unit u1",
        TOPICS[0], TOPICS[1],
    ]  # fmt: skip


def test_23_a_verdict_is_printed_though_its_figures_were() -> None:
    written: list[str] = []
    lines = Lines(written.append)
    for record in (EvaluationRecord("topic", "sea", 5), EvaluationRecord("final", "", 5, outcome="passed")):
        lines(Evaluated(record))
    assert [line.partition(": voice")[0] for line in written] == [
        "mindprint: evaluated sea",
        "mindprint: evaluated at the end: passed",
    ]


def test_23_a_long_evaluation_says_how_long_it_still_takes() -> None:
    written: list[str] = []
    now = [0.0]
    lines = Lines(written.append, lambda: now[0])
    for done in range(0, 41, 10):
        lines(Evaluating("topic", "sea", done, 40))
        now[0] += 12
    assert written[0] == "mindprint: evaluating sea: 10/40, about 36 s left"
    assert written[-1] == "mindprint: evaluating sea: 40/40"


@pytest.mark.parametrize("levels", [[], ["final"]])
def test_23_the_levels_are_the_only_switch(project: Project, tmp_path: Path, levels: list[str]) -> None:  # noqa: F811
    """Whatever else would evaluate is named before training: thresholds, roll-back, retries and the gate."""
    rows, heard = Rows(), list[Event]()
    config = project | {
        "evaluation": {"levels": levels, "topic": {"perplexity_ratio": 0.001}},
        "curriculum": {"roll_back": True, "retries": 1, "dpo": 0.5},
    }
    result = mindprint.train(config, run=tmp_path / "run", observers=[rows], on_event=heard.append)
    # Six prompts, once for the voice and once for the loops.
    assert rows.prompts == (12 if levels else 0)
    assert {record.step for record in RunFolder(result.run).evaluations()} == ({15} if levels else set())
    (warning,) = [event.message for event in heard if isinstance(event, Notice) and "have no effect" in event.message]
    for name in ("evaluation.topic", "curriculum.roll_back", "curriculum.retries", "curriculum.dpo=0.5"):
        assert name in warning
    first = next(place for place, event in enumerate(heard) if isinstance(event, StepDone))
    assert any(isinstance(event, Notice) and event.message == warning for event in heard[:first])


def test_23_settings_that_have_their_effect_are_not_named(project: Project) -> None:  # noqa: F811
    everywhere = {"levels": ["topic", "final"], "topic": {"voice": 0.5}}
    for evaluation in ({"topic": {"voice": 0.5}}, everywhere):
        config = project | {"evaluation": evaluation, "curriculum": {"retries": 1, "roll_back": True}}
        assert idle_settings(mindprint.load_config(config).config) is None


@pytest.mark.parametrize("level", ["topic", "chapter", "final"])
def test_23_a_stop_ends_an_evaluation_and_nothing_is_lost(project: Project, tmp_path: Path, level: str) -> None:  # noqa: F811
    """The stage is not trained again, and the run that continues is the run that was never stopped."""
    # The rows of a chapter that is the whole run are all known at its end: nothing of it is left to stop.
    levels = {"evaluation": {"levels": ["topic", level, "final"]}}
    whole = train(project, tmp_path / "whole", **levels)
    batches: list[int] = []

    def press(event: Event) -> None:
        if isinstance(event, Evaluating) and event.level == level and not batches:
            os.kill(os.getpid(), signal.SIGTERM)
            batches.append(event.done)
        elif isinstance(event, Evaluating) and batches:
            batches.append(event.done)

    with pytest.raises(Interrupted, match="--resume"):
        mindprint.train(project | levels, run=tmp_path / "run", on_event=press)
    assert len(batches) == 1
    trained: list[Event] = []
    mindprint.train(project | levels, run=tmp_path / "run", resume=True, on_event=trained.append)
    taken = [event.step for event in trained if isinstance(event, StepDone)]
    assert taken == list(range(RunFolder(tmp_path / "run").read_steps()[-1]["step"] + 1 - len(taken), 16))
    assert not taken or (taken[0] - 1) % (SFT + 2) == 0
    assert weights(tmp_path / "run") == weights(whole.run) and steps(tmp_path / "run") == steps(whole.run)
    for name in ("evaluations.jsonl", "answers.jsonl"):
        assert (tmp_path / "run" / name).read_text() == (whole.run / name).read_text()


def test_23_a_stop_is_acknowledged_at_once(
    project: Project,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said_before_the_step_ended: list[bool] = []

    class Press:
        @hookimpl(wrapper=True)
        def mindprint_sft_step(self) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            said_before_the_step_ended.append("stopping after this step or batch" in capsys.readouterr().err)
            return (yield)

    with pytest.raises(Interrupted):
        mindprint.train(project, run=tmp_path / "run", observers=[Press()], progress=True)
    assert said_before_the_step_ended == [True]


def test_23_the_seconds_of_a_stage_are_those_of_the_table(project: Project, tmp_path: Path) -> None:  # noqa: F811
    heard: list[Event] = []
    result = mindprint.train(project, run=tmp_path / "run", on_event=heard.append)
    told = [event.seconds for event in heard if isinstance(event, StageFinished)]
    assert told == [stage.seconds for stage in stage_results(RunFolder(result.run))]


def test_23_a_long_run_says_how_long_it_takes(project: Project, tmp_path: Path) -> None:  # noqa: F811
    heard: list[Event] = []

    def slow(event: Event) -> None:
        heard.append(event)
        if isinstance(event, StepDone):
            object.__setattr__(event, "seconds", 300.0)  # as if the step had taken five minutes

    mindprint.train(project, run=tmp_path / "run", on_event=slow)
    (estimate,) = [event.message for event in heard if isinstance(event, Notice) and "will take about" in event.message]
    assert estimate.startswith("the remaining 12 steps will take about ")
    place = next(n for n, event in enumerate(heard) if isinstance(event, Notice) and event.message == estimate)
    assert sum(isinstance(event, StepDone) for event in heard[:place]) == 3


def test_24_every_held_out_pair_is_read_and_some_prompts_are_answered(project: Project, tmp_path: Path) -> None:  # noqa: F811
    """Line 24: `prompts_per_topic` bounds the answers and not the pairs, and the line says what the share is of."""
    written: list[str] = []
    one = {"evaluation": {"prompts_per_topic": 1}}
    result = mindprint.train(project | one, run=tmp_path / "run", on_event=Lines(written.append))
    figures = RunFolder(result.run).evaluations()[-1].figures
    assert (figures.prompts, figures.pairs) == (3, 6)
    (line,) = [line for line in written if "evaluated at the end" in line]
    assert "reward accuracy " in line and "(share of 6 held-out pairs whose chosen answer gained more)" in line


def test_26_a_run_records_which_answers_were_cut(project: Project, tmp_path: Path) -> None:  # noqa: F811
    config = project | {"evaluation": {"levels": ["final"]}, "generation": {"max_new_tokens": 2}}
    result = mindprint.train(config, run=tmp_path / "run")
    assert {answer.cut for answer in answers(result.run)} == {("base", "tuned")}
