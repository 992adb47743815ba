"""All that is said of a model's answers to held-out prompts, together and topic by topic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mindprint.contract import Float64, Measure
from mindprint.voice.copying import Copying, measure_copying
from mindprint.voice.scoring import NotScored, Scale, VoiceReference, VoiceScore, VoiceScorer, fit_scorer


@dataclass(frozen=True)
class HeldOutAnswers:
    """Answers to the same prompts, in one order: the person's own, the untuned model's, the tuned model's."""

    topics: tuple[str, ...]
    prompts: tuple[str, ...]
    person: tuple[str, ...]
    untuned: tuple[str, ...]
    tuned: tuple[str, ...]


@dataclass(frozen=True)
class Assessed:
    """One set of prompts. `untuned` and `person` show how wide chance is: they lie about 0 and 1."""

    tuned: VoiceScore | NotScored
    untuned: VoiceScore | NotScored
    person: VoiceScore | NotScored
    copying: Copying | NotScored


@dataclass(frozen=True)
class Assessment:
    """All prompts together, and topic by topic in the order of their first prompt, on one scale."""

    overall: Assessed
    topics: Mapping[str, Assessed]


def assess(
    reference: VoiceReference, answers: HeldOutAnswers, *, extra: Sequence[Measure] = (), seed: int = 0
) -> Assessment:
    """Fit, calibrate on all prompts, score all and each topic. Never raises for want of text: see `NotScored`.

    Where the reference has no background, the untuned model's answers are both background and floor: the answers to one
    half of the prompts are then judged by a fit on the untuned model's answers to the other half. `extra` are measures
    of plugins.
    """
    judge = fit_judge(reference, answers.untuned, answers.person, extra=extra, seed=seed)
    topics = dict.fromkeys(answers.topics)
    places = {topic: [i for i, name in enumerate(answers.topics) if name == topic] for topic in topics}

    def assessed(chosen: Sequence[int]) -> Assessed:
        return judge.assessed([answers.tuned[place] for place in chosen], chosen)

    everything = assessed(range(len(answers.topics)))
    return Assessment(everything, {topic: assessed(places[topic]) for topic in topics})


@dataclass(frozen=True, eq=False)
class Judge:
    """A voice fitted once and calibrated on all held-out prompts, to score answers to any of them.

    A scorer a half of the prompts (one for all, where there is a background): prompt `i` belongs to half `i % halves`.
    `scale` is why nothing can be scored where nothing can.
    """

    reference: VoiceReference
    untuned: tuple[str, ...]
    person: tuple[str, ...]
    scorers: tuple[VoiceScorer, ...]
    scale: Scale | NotScored

    def assessed(self, tuned: Sequence[str], places: Sequence[int]) -> Assessed:
        """The tuned model's answers to the prompts at `places`, the other two sides' beside them."""
        untuned, person = ([side[place] for place in places] for side in (self.untuned, self.person))
        return Assessed(
            tuned=self.score(tuned, places),
            untuned=self.score(untuned, places),
            person=self.score(person, places),
            copying=measure_copying(tuned, self.reference.own, person),
        )

    def score(self, texts: Sequence[str], places: Sequence[int]) -> VoiceScore | NotScored:
        """Anybody's answers to the prompts at `places`."""
        if isinstance(self.scale, NotScored):
            return self.scale
        return self.scale.score_decided(_decided(self.scorers, texts, places), texts)


def fit_judge(
    reference: VoiceReference,
    untuned: Sequence[str],
    person: Sequence[str],
    *,
    extra: Sequence[Measure] = (),
    seed: int = 0,
) -> Judge:
    """Fit on the training text, calibrate on the untuned model's and the person's answers to all held-out prompts."""
    sides = tuple(untuned), tuple(person)
    halves = 1 if reference.background or not untuned else 2
    scorers: list[VoiceScorer] = []
    for half in range(halves):
        background = reference.background or tuple(untuned[1 - half :: 2])
        scorer = fit_scorer(replace(reference, background=background), extra=extra, seed=seed)
        if isinstance(scorer, NotScored):
            return Judge(reference, *sides, (), scorer)
        scorers.append(scorer)
    if not untuned:
        return Judge(reference, *sides, (), NotScored("there are no prompts"))
    everything = range(len(untuned))
    ends = [(_decided(scorers, texts, everything), texts) for texts in sides]
    return Judge(reference, *sides, tuple(scorers), scorers[-1].scale(ends[0], ends[1]))


def _decided(scorers: Sequence[VoiceScorer], texts: Sequence[str], places: Sequence[int]) -> Float64:
    """What each measure decides on each text, by the scorer of its prompt's half: float64 `[measures, texts]`."""
    halves = len(scorers)
    found = np.full((len(scorers[0].fitted), len(texts)), np.nan)
    for half, scorer in enumerate(scorers):
        mine = [index for index, place in enumerate(places) if place % halves == half]
        found[:, mine] = scorer.by_measure([texts[index] for index in mine])
    return found
