"""Answers that are drawn for a voice: how many, by which seeds, and which of them count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from voice_samples import writer

from mindprint.contract import Generation, Int32, Sampling, TokenBatch
from mindprint.plugins.ranks import Ranks
from mindprint.voice.assessment import fit_judge
from mindprint.voice.fluency import NOT_FLUENT, fit_fluency
from mindprint.voice.responses import MOST_DRAWS, HeldOutTokens, Responses
from mindprint.voice.scoring import NotScored, VoiceReference, VoiceScore

TOPICS = ("tides", "bees", "tides")
SAMPLING = Sampling(5, (1,), temperature=0.8, top_p=0.95, seed=7)
USUAL = Sampling(9, (1,), seed=3, repetition_penalty=1.1)


@dataclass
class Model:
    """A model in memory whose answers name their seed. It writes down the calls that it receives."""

    capabilities: frozenset[str] = frozenset({"sampling"})
    calls: list[tuple[int, float, bool]] = field(default_factory=list)
    model: Any = None
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def backend(self) -> Any:
        return self

    @property
    def info(self) -> Any:
        return SimpleNamespace(capabilities=self.capabilities)

    def generate(
        self, _: object, prompts: Sequence[Int32], sampling: Sampling, *, adapter: bool
    ) -> tuple[Generation, ...]:
        self.calls += [(sampling.seed, sampling.temperature, adapter)] * len(prompts)
        made = (np.array([int(prompt[0]), sampling.seed], np.int32) for prompt in prompts)
        return tuple(Generation(tokens, "stop") for tokens in made)

    def log_probs(self, _: object, batch: TokenBatch, *, adapter: bool) -> np.ndarray:
        assert not adapter
        return np.where(batch.loss_mask, -1.5, 0.0).astype(np.float32)


def responses(memory: Model, draws_needed: int = 2) -> Responses:
    tokenizer: Any = SimpleNamespace(pad_id=0, answer_text=lambda ids, _: " ".join(map(str, ids)))
    rows = tuple((topic, np.array([10 + place], np.int32)) for place, topic in enumerate(TOPICS))
    held_out = HeldOutTokens(rows, rows[:1], (), ())
    made: Any = memory
    return Responses(
        made, tokenizer, held_out, SAMPLING, usual=USUAL, draws=2, draws_needed=lambda _: draws_needed, reuse=False
    )


def collect(memory: Model, draws_needed: int = 2, *, usual: bool = False) -> Responses:
    made = responses(memory, draws_needed)
    made.collect(TOPICS, answers=True, usual=usual, on_rows=lambda *_: None)
    return made


def test_each_draw_has_its_seed_and_questions_are_greedy() -> None:
    memory = Model()
    made = collect(memory)
    assert sorted(memory.calls) == sorted(
        (seed, temperature, adapter)
        for adapter in (False, True)
        for seed, temperature in [(7, 0.0), *[(7, 0.8)] * 3, *[(8, 0.8)] * 3]
    )
    assert [answer.text for answer in made.answers([2, 0], adapter=True)] == ["12 7", "12 8", "10 7", "10 8"]
    assert {answer.base_log_prob for answer in made.answers([0, 1, 2], adapter=True)} == {-1.5}
    assert {answer.base_log_prob for answer in made.answers([0], adapter=False)} == {None}


@pytest.mark.parametrize(("needed", "draws"), [(1, 2), (5, 5), (MOST_DRAWS, MOST_DRAWS), (MOST_DRAWS + 1, 2)])
def test_more_is_asked_for_where_it_gives_enough_words(needed: int, draws: int) -> None:
    memory = Model()
    made = collect(memory, needed)
    assert made.draws == draws and len(made.answers([0], adapter=True)) == draws
    assert len(memory.calls) == 2 * (3 * draws + 1)


def test_a_backend_that_does_not_sample_answers_once() -> None:
    memory = Model(capabilities=frozenset())
    made = collect(memory)
    assert made.draws == 1 and {temperature for _, temperature, _ in memory.calls} == {0.0}


def test_some_prompts_are_answered_as_generate_does() -> None:
    """Each of three prompts once by each model, and only where that is asked for and the backend knows the settings."""
    memory = Model(capabilities=frozenset({"sampling", "filters"}))
    made = collect(memory, usual=True)
    assert sorted(call for call in memory.calls if call[0] == USUAL.seed) == [
        (3, 0.0, adapter) for adapter in (False, True) for _ in TOPICS
    ]
    assert [answer.text for answer in made.usual_answers([0, 2], adapter=True)] == ["10 3", "12 3"]
    assert collect(memory).usual_answers([0, 1, 2], adapter=True) == ()
    assert collect(Model(), usual=True).usual_answers([0, 1, 2], adapter=False) == ()


def test_fluency_has_a_lower_limit_only() -> None:
    gate = fit_fluency(np.array([-3.0, -3.4, -2.6]))
    assert gate.limit == pytest.approx(-3.0 - 3 * np.std([3.0, 3.4, 2.6]))
    assert fit_fluency(np.array([-3.0, -3.0])).limit == -3.5
    assert (gate.reason(-9.0), gate.reason(-0.1), gate.reason(None)) == (NOT_FLUENT, None, None)


OWN, OTHERS = writer(1, 60, 60), writer(2, 60, 60)


def test_answers_to_one_prompt_are_one_witness() -> None:
    """Each answer twice gives the same score and the same interval: it adds no prompt."""
    reference = VoiceReference(tuple(OWN[:20]), tuple(OTHERS[:20]))
    base, person, tuned = OTHERS[20:40], OWN[20:40], [*OWN[40:50], *OTHERS[50:]]
    once = fit_judge(reference, base, person).score_answers(tuned, range(20))
    again = fit_judge(reference, [text for text in base for _ in "ab"], person, draws=2).score_answers(
        [text for text in tuned for _ in "ab"], range(20)
    )
    for side in ("tuned", "base", "person"):
        first, second = getattr(once, side), getattr(again, side)
        assert isinstance(first, VoiceScore) and isinstance(second, VoiceScore)
        assert (second.value, second.low, second.high) == pytest.approx((first.value, first.low, first.high))
    assert again.copying == once.copying


def test_without_pairs_the_base_models_answers_are_background_and_floor() -> None:
    base = [text for text in OTHERS[:20] for _ in "ab"]
    judge = fit_judge(VoiceReference(tuple(OWN[:20]), ()), base, OWN[20:40], draws=2)
    assert len(judge.scorers) == 2
    scored = judge.score_answers([text for text in OWN[40:50] for _ in "ab"], range(10))
    assert isinstance(scored.tuned, VoiceScore) and scored.tuned.value > 0.7


def test_answers_that_are_not_fluent_are_at_the_floor() -> None:
    judge = fit_judge(VoiceReference(tuple(OWN[:20]), tuple(OTHERS[:20])), OTHERS[20:40], OWN[20:40])
    scored = judge.score_answers(OWN[40:60], range(20), [NOT_FLUENT] * 10 + [None] * 10).tuned
    assert isinstance(scored, VoiceScore) and scored.failed == {NOT_FLUENT: 10} and 0.3 < scored.value < 0.6


def test_too_few_words_say_how_many_rows_are_missing() -> None:
    judge = fit_judge(VoiceReference(tuple(OWN[:2]), tuple(OTHERS[:20])), OTHERS[20:40], OWN[20:40])
    assert isinstance(judge.scale, NotScored)
    assert (
        judge.scale.reason
        == "120 words of the person's training text: 500 are needed to fit a voice (about 7 more rows)"
    )
