"""All that is said of a model's answers to held-out prompts, together and topic by topic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mindprint.voice.copying import Copying
from mindprint.voice.scoring import NotScored, VoiceReference, VoiceScore


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


def assess(reference: VoiceReference, answers: HeldOutAnswers, *, seed: int = 0) -> Assessment:
    """Fit, calibrate on all prompts, score all and each topic. Never raises for want of text: see `NotScored`."""
    raise NotImplementedError
