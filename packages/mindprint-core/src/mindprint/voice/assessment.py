"""All that is said of a model's answers to held-out prompts, together and topic by topic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mindprint.voice.copying import Copying, measure_copying
from mindprint.voice.measures import Float64, Measure
from mindprint.voice.scoring import NotScored, Scale, VoiceReference, VoiceScore, VoiceScorer, fit_scorer

SIDES = ("tuned", "untuned", "person")


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
    judged = _judged(reference, answers, extra, seed)
    topics = dict.fromkeys(answers.topics)
    places = {topic: [i for i, name in enumerate(answers.topics) if name == topic] for topic in topics}
    everything = _assessed(judged, reference, answers, range(len(answers.topics)))
    return Assessment(everything, {topic: _assessed(judged, reference, answers, places[topic]) for topic in topics})


@dataclass(frozen=True, eq=False)
class _Judged:
    """A scale, and what its measures decide on each answer: float64 `[measures, prompts]`."""

    scale: Scale
    tuned: Float64
    untuned: Float64
    person: Float64


def _judged(
    reference: VoiceReference, answers: HeldOutAnswers, extra: Sequence[Measure], seed: int
) -> _Judged | NotScored:
    halves = 1 if reference.background else 2
    found = {side: np.full((0, 0), np.nan) for side in SIDES}
    scorer: VoiceScorer | NotScored = NotScored("there are no prompts")
    for half in range(halves):
        background = reference.background or tuple(answers.untuned[1 - half :: 2])
        scorer = fit_scorer(replace(reference, background=background), extra=extra, seed=seed)
        if isinstance(scorer, NotScored):
            return scorer
        for side in SIDES:
            decided = scorer.by_measure(getattr(answers, side)[half::halves])
            if not half:
                found[side] = np.full((len(decided), len(answers.topics)), np.nan)
            found[side][:, half::halves] = decided
    ends = (found["untuned"], answers.untuned), (found["person"], answers.person)
    scale = scorer if isinstance(scorer, NotScored) else scorer.scale(*ends)
    return scale if isinstance(scale, NotScored) else _Judged(scale, **found)


def _assessed(
    judged: _Judged | NotScored, reference: VoiceReference, answers: HeldOutAnswers, places: Sequence[int]
) -> Assessed:
    texts = {side: [getattr(answers, side)[place] for place in places] for side in SIDES}
    scores = {side: _scored(judged, side, texts[side], places) for side in SIDES}
    return Assessed(**scores, copying=measure_copying(texts["tuned"], reference.own, texts["person"]))


def _scored(
    judged: _Judged | NotScored, side: str, texts: Sequence[str], places: Sequence[int]
) -> VoiceScore | NotScored:
    if isinstance(judged, NotScored):
        return judged
    return judged.scale.score_decided(getattr(judged, side)[:, list(places)], texts)
