"""The voice score on writers made for it: does it tell them apart, are 0 and 1 where they should be, does it say no?"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import pytest
from voice_samples import writer

from mindprint.contract import Float64
from mindprint.voice.assessment import HeldOutAnswers, assess
from mindprint.voice.copying import Copying
from mindprint.voice.scoring import NotScored, Scale, VoiceReference, VoiceScore, VoiceScorer, fit_scorer

WORDS = 60
OWN = writer(1, 60, WORDS)
OTHERS = [text for number in (2, 3, 4) for text in writer(number, 40, WORDS)]
REFERENCE = VoiceReference(tuple(OWN[:30]), tuple(OTHERS[::2]))
HELD_OUT, HELD_OUT_OTHERS = OWN[30:], OTHERS[1::2]


@cache
def scorer() -> VoiceScorer:
    found = fit_scorer(REFERENCE)
    assert isinstance(found, VoiceScorer)
    return found


@cache
def scale() -> Scale:
    found = scorer().calibrated(HELD_OUT_OTHERS[::2], HELD_OUT[::2])
    assert isinstance(found, Scale)
    return found


def score(found: VoiceScore | NotScored) -> VoiceScore:
    assert isinstance(found, VoiceScore)
    return found


def auc(positive: Float64, negative: Float64) -> float:
    return float((positive[:, None] > negative).mean())


def test_it_tells_writers_apart_and_better_than_chance_alone() -> None:
    fitted = scorer()
    assert auc(fitted.decisions(HELD_OUT), fitted.decisions(HELD_OUT_OTHERS)) > 0.95
    strangers = fit_scorer(VoiceReference(tuple(OTHERS[0:40:2]), tuple(OTHERS[1:40:2])))
    assert isinstance(strangers, VoiceScorer)
    same = writer(2, 80, WORDS)
    assert 0.3 < auc(strangers.decisions(same[:40]), strangers.decisions(same[40:])) < 0.7


def test_text_that_set_no_end_scores_one_and_nought() -> None:
    # The standard error of 15 texts is about the tolerance. Both the ends and the scored texts are more here.
    more = writer(1, 150, WORDS)
    ends = scorer().calibrated(HELD_OUT_OTHERS[::2], more[::2])
    assert isinstance(ends, Scale)
    own, others = score(ends.score(more[1::2])), score(ends.score(HELD_OUT_OTHERS[1::2]))
    assert own.value == pytest.approx(1, abs=0.15) and own.low < 1 < own.high
    assert others.value == pytest.approx(0, abs=0.15) and others.low < 0 < others.high
    assert set(own.measures) == {"characters", "words", "delta", "surprise", "phrases"}
    assert (own.texts, own.words, own.empty) == (75, 75 * WORDS, 0)


def test_fitted_text_left_out_in_turn_is_as_good_an_end() -> None:
    ends = scorer().calibrated()
    assert isinstance(ends, Scale)
    assert score(ends.score(HELD_OUT)).value == pytest.approx(1, abs=0.2)
    assert score(ends.score(HELD_OUT_OTHERS)).value == pytest.approx(0, abs=0.2)


def test_half_the_answers_in_the_voice_is_half_the_score() -> None:
    ends = scale()
    mine, theirs = HELD_OUT[::2], HELD_OUT_OTHERS[::2][:15]
    both = score(ends.score([*mine, *theirs])).value
    assert both == pytest.approx((1 + score(ends.score(theirs)).value) / 2, abs=1e-6)


def test_empty_answers_count_as_at_the_floor() -> None:
    found = score(scale().score([*HELD_OUT[::2], *[""] * 15]))
    assert found.value == pytest.approx(0.5, abs=1e-6)
    assert (found.texts, found.empty) == (30, 15)


def test_the_ends_score_nought_and_one_exactly_and_every_time() -> None:
    first, again = (score(found().score(HELD_OUT_OTHERS[::2])) for found in (scale, scale.__wrapped__))
    assert first == again
    assert first.value == pytest.approx(0, abs=1e-12)
    assert score(scale().score(HELD_OUT[::2])).value == pytest.approx(1)


def test_an_interval_narrows_with_the_square_root_of_the_texts() -> None:
    ends = scale()
    few = [score(ends.score(HELD_OUT_OTHERS[start : start + 6])) for start in range(0, 54, 6)]
    all_of_them = score(ends.score(HELD_OUT_OTHERS[:54]))
    assert float(np.mean([one.high - one.low for one in few])) > 1.5 * (all_of_them.high - all_of_them.low)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ([], "there are no answers"),
        (["", " \n"], "all 2 answers are empty"),
        (["?!"], "all 1 answers are empty"),
        (["a few words"], "3 words in 1 answers: 100 are needed"),
    ],
)
def test_what_cannot_be_scored_says_why(texts: list[str], reason: str) -> None:
    found = scale().score(texts)
    assert isinstance(found, NotScored) and found.reason == reason


def test_too_little_to_fit_or_to_calibrate_is_no_number() -> None:
    found = fit_scorer(VoiceReference(("a few words",), REFERENCE.background))
    assert isinstance(found, NotScored) and found.words == 3 and "of the person's training text" in found.reason
    found = fit_scorer(VoiceReference(REFERENCE.own, ()))
    assert isinstance(found, NotScored) and "0 words of background" in found.reason
    found = fit_scorer(VoiceReference((" ".join(OWN),), REFERENCE.background), passage_words=1000)
    assert isinstance(found, NotScored) and "makes 4 passages of 1000 words: 5 are needed" in found.reason
    short = scorer().calibrated(["three words here"], HELD_OUT)
    assert isinstance(short, NotScored) and short.reason == "the floor has 3 words: 100 are needed (about 33 more rows)"


def test_long_texts_are_cut_into_enough_passages() -> None:
    found = fit_scorer(VoiceReference((" ".join(OWN[:30]),), (" ".join(HELD_OUT_OTHERS),)))
    assert isinstance(found, VoiceScorer) and found.passage_words == 30 * WORDS // 20
    assert auc(found.decisions(HELD_OUT), found.decisions(OTHERS[::2])) > 0.9


def test_a_floor_that_writes_like_the_person_leaves_no_scale() -> None:
    found = scorer().calibrated(HELD_OUT[::2], HELD_OUT[1::2])
    assert isinstance(found, NotScored) and "cannot be told from the floor" in found.reason


@dataclass(frozen=True)
class Shouting:
    """A measure of a plugin: capitals."""

    name: str = "shouting"

    def fit(self, own: list[str], background: list[str]):
        return lambda texts: np.array([sum(sign.isupper() for sign in text) for text in texts], float)


def test_a_plugins_measure_is_shown_and_not_averaged_in() -> None:
    plain = scale().score(HELD_OUT[1::2])
    fitted = fit_scorer(REFERENCE, extra=[Shouting()])
    assert isinstance(fitted, VoiceScorer)
    ends = fitted.calibrated(HELD_OUT_OTHERS[::2], [text.upper() for text in HELD_OUT[::2]])
    assert isinstance(ends, Scale)
    assert score(ends.score([text.upper() for text in HELD_OUT[1::2]])).measures["shouting"] > 0.8
    without_capitals = fitted.calibrated(HELD_OUT_OTHERS[::2], HELD_OUT[::2])
    assert isinstance(without_capitals, Scale)
    again = score(without_capitals.score(HELD_OUT[1::2]))
    assert again.value == score(plain).value
    assert again.measures["shouting"] == 0  # ends that coincide are no scale


# --- answers to held-out prompts -------------------------------------------------------------------------------------


def held_out_answers(tuned: list[str]) -> HeldOutAnswers:
    topics = tuple("ab"[index % 2] for index in range(30))
    prompts = tuple(f"prompt {index}" for index in range(30))
    return HeldOutAnswers(topics, prompts, tuple(HELD_OUT), tuple(HELD_OUT_OTHERS[:30]), tuple(tuned))


def test_an_assessment_scores_all_and_each_topic_on_one_scale() -> None:
    half = [
        mine if index % 4 < 2 else theirs
        for index, (mine, theirs) in enumerate(zip(HELD_OUT, OTHERS[1:60:2], strict=True))
    ]
    found = assess(REFERENCE, held_out_answers(half))
    overall, topics = score(found.overall.tuned), [score(topic.tuned) for topic in found.topics.values()]
    assert overall.value == pytest.approx(0.5, abs=0.1)
    assert overall.value == pytest.approx(np.mean([topic.value for topic in topics]))
    assert (score(found.overall.base).value, score(found.overall.person).value) == (
        pytest.approx(0),
        pytest.approx(1),
    )
    assert list(found.topics) == ["a", "b"] and [topic.texts for topic in topics] == [15, 15]


def test_without_background_the_base_models_answers_are_judged_by_a_fit_on_the_other_half() -> None:
    """An adapter that does nothing scores 0, though its answers are those of the background."""
    alone = VoiceReference(REFERENCE.own, ())
    nothing = assess(alone, held_out_answers(HELD_OUT_OTHERS[:30]))
    assert score(nothing.overall.tuned).value == pytest.approx(0, abs=1e-12)
    voice = assess(alone, held_out_answers(HELD_OUT[15:] + HELD_OUT[:15]))
    assert score(voice.overall.tuned).value == pytest.approx(1, abs=0.1)


def test_a_topic_with_too_little_text_says_so_and_the_rest_is_scored() -> None:
    answers = held_out_answers(list(HELD_OUT))
    found = assess(REFERENCE, HeldOutAnswers(("c", *answers.topics[1:]), *(getattr(answers, side) for side in
                   ("prompts", "person", "base", "tuned"))))  # fmt: skip
    assert isinstance(found.topics["c"].tuned, NotScored) and found.topics["c"].tuned.words == WORDS
    assert isinstance(found.topics["b"].tuned, VoiceScore) and isinstance(found.overall.tuned, VoiceScore)


# --- the sample curriculum -------------------------------------------------------------------------------------------


def rows(name: str) -> list[dict[str, str]]:
    text = files("mindprint").joinpath("resources", "curriculum", name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def curriculum() -> VoiceReference:
    own = [row["completion"] for row in rows("sft.jsonl")] + [row["chosen"] for row in rows("preferences.jsonl")]
    return VoiceReference(tuple(own), tuple(row["rejected"] for row in rows("preferences.jsonl")))


def test_a_model_that_recites_is_flagged_not_praised() -> None:
    """It scores as the person does, for it is her text; what stands beside the score says so."""
    reference, held_out = curriculum(), rows("heldout.jsonl")
    columns = [[row[name] for row in held_out] for name in ("topic", "prompt", "chosen", "rejected")]
    for tuned, flagged in ((reference.own[: len(held_out)], True), (tuple(columns[2]), False)):
        found = assess(reference, HeldOutAnswers(*(tuple(column) for column in columns), tuned)).overall
        assert score(found.tuned).value > 0.9
        assert isinstance(found.copying, Copying)
        assert any("recites training text" in flag for flag in found.copying.flagged) is flagged
        assert found.copying.recited == (1 if flagged else 0)


def test_on_the_sample_curriculum_held_out_text_scores_one_and_plain_answers_nought() -> None:
    fitted = fit_scorer(curriculum())
    assert isinstance(fitted, VoiceScorer)
    held_out = rows("heldout.jsonl")
    halves = [held_out[::2], held_out[1::2]]
    for ends, tested in (halves, halves[::-1]):
        on = fitted.calibrated([row["rejected"] for row in ends], [row["chosen"] for row in ends])
        assert isinstance(on, Scale)
        assert score(on.score([row["chosen"] for row in tested])).value == pytest.approx(1, abs=0.1)
        assert score(on.score([row["rejected"] for row in tested])).value == pytest.approx(0, abs=0.1)
