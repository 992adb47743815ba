"""The voice score: how much of a person's way of writing is in a text, between a floor and a ceiling.

    scorer = fit_scorer(VoiceReference(own=training_texts_of_the_person, background=what_others_wrote))
    scale = scorer.calibrated(floor=untuned_answers, ceiling=held_out_answers_of_the_person)
    scale.score(tuned_answers)  # VoiceScore(value=0.83, low=0.71, high=0.95, words=2931, ...)

0 is the floor, what the untuned model writes to the same prompts; 1 is the ceiling, what the person wrote there and
nothing was fitted on. A score can lie outside of both. What cannot be scored is a `NotScored` with its reason, never a
number. `docs/voice.md` says what the score can tell and what it cannot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

MIN_FITTED_WORDS = 500
"""What the scorer needs of the person and of the background, each."""

MIN_SCORED_WORDS = 100
"""What a score, a floor and a ceiling need: an interval over less says nothing."""

RESAMPLES = 1000
"""Bootstrap draws behind an interval."""


@dataclass(frozen=True)
class VoiceReference:
    """What a scorer is fitted on. Nothing that is scored later may be in it.

    `own`: what the person wrote and the model was trained on. `background`: what anybody else wrote, best on the same
    subjects: plain answers (`rejected`), answers of the untuned model, other authors.
    """

    own: tuple[str, ...]
    background: tuple[str, ...]


@dataclass(frozen=True)
class NotScored:
    """Could not be scored, and why. It is no number: it compares with none and counts in no mean."""

    reason: str
    words: int = 0


@dataclass(frozen=True)
class Ends:
    """The two ends of a scale: mean scores, and the words and texts behind them."""

    floor: float
    ceiling: float
    floor_words: int
    ceiling_words: int


@dataclass(frozen=True)
class VoiceScore:
    """`value`: 0 at the floor, 1 at the ceiling; `low` and `high`: its 95 % bootstrap interval over texts, with the
    floor and the ceiling drawn anew too. `words` and `texts` are those scored (empty answers are `empty`, and count as
    at the floor: see `Scale.score`). `measures`: each measure by itself, on the same scale.
    """

    value: float
    low: float
    high: float
    words: int
    texts: int
    empty: int
    measures: Mapping[str, float]


def fit_scorer(reference: VoiceReference, *, seed: int = 0) -> VoiceScorer | NotScored:
    """Fit every measure on the person against the background; `NotScored` where either has too few words."""
    raise NotImplementedError


class VoiceScorer:
    """Measures fitted on one person."""

    def decisions(self, texts: Sequence[str]) -> Float64:
        """The combined score of each text, not calibrated: `[texts]`, higher is more like the person."""
        raise NotImplementedError

    def calibrated(
        self, floor: Sequence[str] | None = None, ceiling: Sequence[str] | None = None
    ) -> Scale | NotScored:
        """Set the ends: from texts that nothing was fitted on, or (None) by leaving out one fitted text at a time.

        `NotScored` where an end has too few words, or the two do not differ by more than chance.
        """
        raise NotImplementedError


class Scale:
    """A fitted scorer with its two ends."""

    ends: Ends

    def score(self, texts: Sequence[str]) -> VoiceScore | NotScored:
        """Score texts together, one by one weighted by nothing: each answer counts once."""
        raise NotImplementedError
