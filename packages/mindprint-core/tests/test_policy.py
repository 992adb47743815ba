"""What follows from figures: outcomes, gates and collapses, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mindprint.config import CurriculumConfig, Thresholds, make_config
from mindprint.contract import Generation
from mindprint.curriculum.policy import collapsed, dpo_runs, judged
from mindprint.errors import ConfigError
from mindprint.runs.records import Figures, Interval

PEOPLE = Interval(0.1, 0.0, 0.2)
HALF = Figures(
    voice=Interval(0.5, 0.3, 0.7),
    people_voice=PEOPLE,
    copy_rate=0.2,
    reward_accuracy=0.75,
    perplexity=8.0,
    base_perplexity=10.0,
    unmeasured={"concept_coverage": "there is no quiz"},
)


def said(*tokens: int, stopped: bool = True) -> Generation:
    return Generation(np.array(tokens, np.int32), "stop" if stopped else "length")


@pytest.mark.parametrize(
    ("thresholds", "outcome", "reasons"),
    [
        ({}, "measured", ()),
        ({"voice": 0.5}, "passed", ()),
        ({"voice": 0.51}, "failed", ("voice 0.50, at least 0.51 wanted",)),
        ({"copy_rate": 0.2, "perplexity_ratio": 0.8}, "passed", ()),
        ({"copy_rate": 0.1}, "failed", ("copy_rate 0.20, at most 0.1 wanted",)),
        ({"perplexity_ratio": 0.7}, "failed", ("perplexity_ratio 0.80, at most 0.7 wanted",)),
        ({"concept_coverage": 0.0}, "not evaluated", ("concept_coverage: there is no quiz",)),
        (
            {"concept_coverage": 0.0, "reward_accuracy": 0.8},
            "failed",
            ("reward_accuracy 0.75, at least 0.8 wanted", "concept_coverage: there is no quiz"),
        ),
    ],
)
def test_thresholds(thresholds: dict[str, float], outcome: str, reasons: tuple[str, ...]) -> None:
    assert judged(Thresholds(**thresholds), HALF) == (outcome, reasons)


def test_a_figure_that_is_missing_is_not_zero() -> None:
    outcome, reasons = judged(Thresholds(voice=-1.0, copy_rate=1.0), Figures(unmeasured={"voice": "12 words"}))
    assert outcome == "not evaluated"
    assert reasons == ("voice: 12 words", "copy_rate: was not measured")


@pytest.mark.parametrize(
    ("tuned", "base", "outcome"),
    [
        (np.inf, 10.0, "failed"),
        (10.0, np.inf, "passed"),
        (np.inf, np.inf, "not evaluated"),
        (None, None, "not evaluated"),
    ],
)
def test_a_perplexity_beyond_a_float_is_not_better(tuned: float | None, base: float | None, outcome: str) -> None:
    figures = Figures(perplexity=tuned, base_perplexity=base)
    assert judged(Thresholds(perplexity_ratio=1.0), figures)[0] == outcome


@pytest.mark.parametrize(
    ("gate", "voice", "runs"),
    [("always", None, True), ("never", 0.1, False), (0.5, 0.49, True), (0.5, 0.5, False), (0.5, None, True)],
)
def test_the_gate(gate: float | str, voice: float | None, runs: bool) -> None:
    figures = Figures(voice=None if voice is None else Interval(voice, voice, voice), people_voice=PEOPLE)
    found, why = dpo_runs(CurriculumConfig.model_validate({"dpo": gate}), figures)
    assert found == runs and why


def test_no_verdict_rests_on_a_distance_from_the_base_model() -> None:
    figures = Figures(voice=Interval(-0.4, -0.6, -0.1))
    outcome, reasons = judged(Thresholds(voice=-0.5), figures)
    assert outcome == "not evaluated"
    assert reasons == ("voice: without voice.background it is only the distance from the base model",)
    runs, why = dpo_runs(CurriculumConfig.model_validate({"dpo": -0.5}), figures)
    assert runs and "voice.background" in why
    assert collapsed(figures, LIVELY, LIVELY) == ()
    assert figures.voice_name == "distance from the base model"


LIVELY = [said(1, 2, 3, 4, 5, 6, 7, 8, 9), said(3, 1, 4, 1, 5, 9, 2, 6)]


def test_what_has_collapsed() -> None:
    assert collapsed(HALF, LIVELY, LIVELY) == ()
    assert collapsed(Figures(), [said(), said(), said(1, 2)], LIVELY) == ("67% of the answers are empty",)
    assert collapsed(Figures(), [said(*[7] * 20)] * 2, LIVELY) == ("100% of the answers are one repeated token",)
    assert collapsed(Figures(), [said(*[7] * 20)] * 2, [said(*[3] * 20)] * 2) == ()
    assert collapsed(Figures(), [said()] * 2, [said()] * 2) == ()
    endless = [said(1, 2, 3, 4, stopped=False)] * 2
    assert collapsed(Figures(), endless, LIVELY) == ()
    broken = Figures(no_text={"repeats itself": 2})
    assert collapsed(broken, endless, LIVELY) == ("100% of the answers are not text (repeats itself: 2)",)
    assert collapsed(replace(broken, base_no_text={"repeats itself": 2}), endless, LIVELY) == ()
    assert collapsed(Figures(), endless, endless) == ()
    worse = Figures(voice=Interval(-0.4, -0.6, -0.1), people_voice=PEOPLE)
    assert collapsed(worse, LIVELY, LIVELY) == ("the voice is below the base model's: -0.40",)
    assert collapsed(Figures(voice=Interval(-0.1, -0.3, 0.1)), LIVELY, LIVELY) == ()
    assert collapsed(Figures(), [], []) == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"evaluation": {"topic": {"voice": 3}}}, "evaluation.topic.voice: .*less than or equal to 2, found 3"),
        ({"evaluation": {"final": {"copy_rate": 1.5}}}, "evaluation.final.copy_rate"),
        ({"evaluation": {"topic": {"voise": 0.5}}}, "did you mean 'voice'?"),
        ({"evaluation": {"levels": ["lesson"]}}, "evaluation.levels"),
        ({"curriculum": {"retries": 1}}, "curriculum.retries needs a threshold to fail"),
        ({"curriculum": {"stop_after": "unit"}}, "set a threshold to fail under evaluation.unit"),
        ({"curriculum": {"dpo": "sometimes"}}, "curriculum.dpo: is always, never, or a number, found 'sometimes'"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(values)
