"""Scores of a model's answers to held-out prompts, next to the base model's and the person's, topic by topic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from mindprint.contract import Float64, Measure
from mindprint.voice.copying import Copying, CopyingMeter
from mindprint.voice.scoring import NotScored, Scale, VoiceReference, VoiceScore, VoiceScorer, fit_scorer


@dataclass(frozen=True)
class HeldOutAnswers:
    """Answers to the same prompts, in one order: the person's own, the base model's, the tuned model's."""

    topics: tuple[str, ...]
    prompts: tuple[str, ...]
    person: tuple[str, ...]
    base: tuple[str, ...]
    tuned: tuple[str, ...]


@dataclass(frozen=True)
class AnswerScores:
    """Scores of the answers to one set of prompts.

    `base` and `person` are near 0 and 1 by definition. How far they are from it shows how wide chance is. `people` is
    other people's text on the same scale, None without a background of people.
    """

    tuned: VoiceScore | NotScored
    base: VoiceScore | NotScored
    person: VoiceScore | NotScored
    copying: Copying | NotScored
    people: VoiceScore | None = None


@dataclass(frozen=True)
class Assessment:
    """Scores of all prompts together, and topic by topic in the order of their first prompt, on one scale."""

    overall: AnswerScores
    topics: Mapping[str, AnswerScores]


@dataclass(frozen=True, eq=False)
class Judge:
    """A voice that was fitted once and calibrated on all held-out prompts, to score answers to any of them.

    There is one scorer where the reference has a background, and otherwise one for each half of the prompts: prompt `i`
    is judged by the scorer `i % len(scorers)`. The models give `draws` answers to each prompt: `base` has all answers
    to the first prompt, then all to the second. `person` has one text for each. `scale` is a `NotScored` with the
    reason where nothing can be scored.
    """

    reference: VoiceReference
    base: tuple[str, ...]
    person: tuple[str, ...]
    scorers: tuple[VoiceScorer, ...]
    scale: Scale | NotScored
    draws: int = 1
    _sides: dict[tuple[int, ...], tuple[VoiceScore | NotScored, VoiceScore | NotScored]] = field(
        default_factory=dict, init=False, repr=False
    )

    def score_answers(
        self, tuned: Sequence[str], places: Sequence[int], reasons: Sequence[str | None] = ()
    ) -> AnswerScores:
        """Score the tuned model's answers to the prompts at `places`, and the other two sides' answers to the same.

        `tuned` has all draws of the first prompt, then all of the second. `reasons` say which of these answers cannot
        count, and why.
        """
        base = [text for place in places for text in self.base[place * self.draws : (place + 1) * self.draws]]
        person = [self.person[place] for place in places]
        several = [place for place in places for _ in range(self.draws)]
        # Neither side's answers ever change, and a run scores the same prompts after each stage, chapter and unit.
        key = tuple(places)
        if key not in self._sides:
            self._sides[key] = self.score(base, several, draws=self.draws), self.score(person, places)
        people = None if isinstance(self.scale, NotScored) else self.scale.people
        # Answers to one prompt are alike, which is not what self-BLEU asks. So copying is measured on the first draw.
        copying = self._copying.measure(tuned[:: self.draws], person)
        scored = self.score(tuned, several, reasons, draws=self.draws)
        return AnswerScores(scored, *self._sides[key], copying, people)

    @cached_property
    def _copying(self) -> CopyingMeter:
        return CopyingMeter(self.reference.own)

    def score(
        self, texts: Sequence[str], places: Sequence[int], reasons: Sequence[str | None] = (), draws: int = 1
    ) -> VoiceScore | NotScored:
        """Score anyone's answers, each to the prompt at its place, with `draws` answers to each prompt."""
        if isinstance(self.scale, NotScored):
            return self.scale
        decided = _decisions(self.scorers, texts, places)
        return self.scale.score_decided(decided, texts, reasons=reasons, draws=draws)


def assess(
    reference: VoiceReference, answers: HeldOutAnswers, *, extra: Sequence[Measure] = (), seed: int = 0
) -> Assessment:
    """Fit, calibrate on all prompts, and score all prompts and each topic. Too little text is a `NotScored`, no error.

    Where the reference has no background, the base model's answers are both background and floor: the answers to one
    half of the prompts are then judged by a fit on the base model's answers to the other half. `extra` are measures
    of plugins.
    """
    judge = fit_judge(reference, answers.base, answers.person, extra=extra, seed=seed)
    places = range(len(answers.topics))
    # Topics share the scale of all prompts: a single topic has too little text to find the ends of a scale.
    by_topic = {topic: [i for i in places if answers.topics[i] == topic] for topic in dict.fromkeys(answers.topics)}
    return Assessment(
        judge.score_answers(answers.tuned, places),
        {
            topic: judge.score_answers([answers.tuned[place] for place in places], places)
            for topic, places in by_topic.items()
        },
    )


def fit_judge(
    reference: VoiceReference,
    base: Sequence[str],
    person: Sequence[str],
    *,
    extra: Sequence[Measure] = (),
    seed: int = 0,
    draws: int = 1,
) -> Judge:
    """Fit on the training text, and calibrate on the base model's and the person's answers to all held-out prompts.

    `base` has `draws` answers to each prompt, in the order of the prompts.
    """
    sides = tuple(base), tuple(person)
    base_places = [place for place in range(len(person)) for _ in range(draws)]
    # A scorer must not be calibrated on the text that it was fitted on. Without another background each half of the
    # base model's answers is the background of the other half.
    halves = 1 if reference.background or reference.people or not base else 2
    scorers: list[VoiceScorer] = []
    for half in range(halves):
        # Prompt i is in half i % 2. All answers to a prompt are in its half, because they are alike.
        other = (text for text, place in zip(base, base_places, strict=True) if place % 2 != half)
        background = reference.background if halves == 1 else tuple(other)
        scorer = fit_scorer(replace(reference, background=background), extra=extra, seed=seed)
        if isinstance(scorer, NotScored):
            return Judge(reference, *sides, (), scorer, draws)
        scorers.append(scorer)
    if not base:
        return Judge(reference, *sides, (), NotScored("there are no prompts"), draws)
    # A scale takes no fit from its scorer, only the kinds of measures and the seed. So either scorer can hold it.
    floor = _decisions(scorers, base, base_places), base
    ceiling = _decisions(scorers, person, range(len(person))), person
    return Judge(reference, *sides, tuple(scorers), scorers[-1].scale(floor, ceiling, draws), draws)


def _decisions(scorers: Sequence[VoiceScorer], texts: Sequence[str], places: Sequence[int]) -> Float64:
    """Return each measure's decision on each text, by the scorer of its prompt's half: `[measures, texts]`."""
    halves = len(scorers)
    decisions = np.full((len(scorers[0].fitted), len(texts)), np.nan)
    for half, scorer in enumerate(scorers):
        judged = [index for index, place in enumerate(places) if place % halves == half]
        decisions[:, judged] = scorer.by_measure([texts[index] for index in judged])
    return decisions
