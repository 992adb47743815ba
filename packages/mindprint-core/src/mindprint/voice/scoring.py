"""The voice score: how much of a person's way of writing is in a text, between a floor and a ceiling.

    scorer = fit_scorer(VoiceReference(own=training_texts_of_the_person, background=what_others_wrote))
    scale = scorer.calibrated(floor=base_answers, ceiling=held_out_answers_of_the_person)
    scale.score(tuned_answers)  # VoiceScore(value=0.83, low=0.71, high=0.95, words=2931, ...)

0 is the floor, what the base model writes to the same prompts; 1 is the ceiling, what the person wrote there and
nothing was fitted on. A score can lie outside of both. What cannot be scored is a `NotScored` with its reason, never a
number. `docs/voice.md` says what the score can tell and what it cannot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np

from mindprint.contract import Bool, Fitted, Float64, Measure
from mindprint.text.words import passages, word_count
from mindprint.voice.measures import FittedRidge, measures

MIN_FITTED_WORDS = 500
"""What the scorer needs of the person and of the background, each."""

MIN_SCORED_WORDS = 100
"""What a score, a floor and a ceiling need: an interval over less says nothing."""

MAX_PASSAGES = 300
"""Passages fitted of either side, spread evenly over what there is: more change little and cost memory."""

ENOUGH_PASSAGES = 20
"""Passages of either side from which a classifier learns something; longer texts are cut into that many."""

SHORTEST_PASSAGE, LONGEST_PASSAGE = 20, 500
"""Words of a passage: between these, as many as the person's texts have in the middle."""

FOLDS = 5
RESAMPLES = 1000
"""Bootstrap draws behind an interval."""


@dataclass(frozen=True)
class VoiceReference:
    """What a scorer is fitted on. Nothing that is scored later may be in it.

    `own`: what the person wrote and the model was trained on. `background`: what anybody else wrote, best on the same
    subjects: plain answers (`rejected`), answers of the base model, other authors.
    """

    own: tuple[str, ...]
    background: tuple[str, ...]


@dataclass(frozen=True)
class NotScored:
    """Could not be scored, and why. It is no number: it compares with none and counts in no mean."""

    reason: str
    words: int = 0


@dataclass(frozen=True)
class VoiceScore:
    """How much of the person's voice is in some texts.

    `value`: 0 at the floor, 1 at the ceiling; `low` and `high`: its 95 % bootstrap interval over texts, the floor's and
    the ceiling's drawn anew too. `words` and `texts` are those scored; of the texts `empty` have no word and count as
    at the floor. `measures`: each measure by itself on the same scale.
    """

    value: float
    low: float
    high: float
    words: int
    texts: int
    empty: int
    measures: Mapping[str, float]


def fit_scorer(
    reference: VoiceReference, *, extra: Sequence[Measure] = (), passage_words: int | None = None, seed: int = 0
) -> VoiceScorer | NotScored:
    """Fit every measure on the person against the background; `NotScored` where either has too few words.

    `extra` are measures beside the built-in ones, from plugins: reported, never averaged in. `passage_words` is the
    length that texts are cut to; by default as long as the person's texts are.
    """
    for whose, texts in (("of the person's training text", reference.own), ("of background", reference.background)):
        count = word_count(texts)
        if count < MIN_FITTED_WORDS:
            return NotScored(f"{count:,} words {whose}: {MIN_FITTED_WORDS} are needed to fit a voice", count)
    length = passage_words or _passage_length(reference)
    own, background = (_spread(_cut(texts, length)) for texts in (reference.own, reference.background))
    for whose, pieces in (("the person's training text", own), ("the background", background)):
        if len(pieces) < FOLDS:
            return NotScored(f"{whose} makes {len(pieces)} passages of {length} words: {FOLDS} are needed")
    return VoiceScorer(tuple(_standardised(m, own, background) for m in (*measures(), *extra)), length, seed)


End = tuple[Float64, Sequence[str] | None]


@dataclass(frozen=True, eq=False)
class Standardised:
    """A fitted measure in units of its own spread.

    `own` and `background` are the decisions on the fitted passages, each by a fit that had not seen it; the
    background's have mean 0, and the mean of both sides' variances is 1.
    """

    name: str
    built_in: bool
    fitted: Fitted
    centre: float
    spread: float
    own: Float64
    background: Float64

    def __call__(self, texts: Sequence[str]) -> Float64:
        return (self.fitted(texts) - self.centre) / self.spread


@dataclass(frozen=True, eq=False)
class VoiceScorer:
    """Measures fitted on one person."""

    fitted: tuple[Standardised, ...]
    passage_words: int
    seed: int = 0

    def decisions(self, texts: Sequence[str]) -> Float64:
        """The combined decision on each text, in no unit: float64 `[texts]`, higher is more like the person.

        NaN for a text without words.
        """
        return self.combined(self.by_measure(texts))

    def by_measure(self, texts: Sequence[str]) -> Float64:
        """Each measure's decision on each text, the mean over its passages: float64 `[measures, texts]`."""
        pieces = [_cut([text], self.passage_words) if word_count([text]) else [] for text in texts]
        flat = [piece for part in pieces for piece in part]
        found = np.full((len(self.fitted), len(texts)), np.nan)
        if not flat:
            return found
        decided = np.stack([measure(flat) for measure in self.fitted])
        starts = np.cumsum([0, *(len(part) for part in pieces)])
        for index, (start, end) in enumerate(pairwise(starts)):
            if end > start:
                found[:, index] = decided[:, start:end].mean(axis=1)
        return found

    def calibrated(self, floor: Sequence[str] | None = None, ceiling: Sequence[str] | None = None) -> Scale | NotScored:
        """Set the ends: from texts that nothing was fitted on, or (None) from the fitted ones, each left out in turn.

        `NotScored` where an end has too few words, or where the two differ by no more than chance.
        """
        return self.scale(
            (np.stack([measure.background for measure in self.fitted]), None)
            if floor is None
            else (self.by_measure(floor), floor),
            (np.stack([measure.own for measure in self.fitted]), None)
            if ceiling is None
            else (self.by_measure(ceiling), ceiling),
        )

    def scale(self, floor: End, ceiling: End) -> Scale | NotScored:
        """`calibrated`, from decisions float64 `[measures, texts]` and the texts that they are on (None: fitted)."""
        for whose, (_, texts) in (("the floor", floor), ("the person's held-out text", ceiling)):
            count = MIN_SCORED_WORDS if texts is None else word_count(texts)
            if count < MIN_SCORED_WORDS:
                return NotScored(f"{whose} has {count} words: {MIN_SCORED_WORDS} are needed", count)
        scale = Scale(self, *(found[:, ~np.isnan(found[0])] for found, _ in (floor, ceiling)))
        low, high = scale.drawn_ends()
        if np.quantile(high - low, 0.025) <= 0:
            return NotScored("the person's held-out text cannot be told from the floor: there is no scale between them")
        return scale

    def combined(self, found: Float64) -> Float64:
        """The mean of the built-in measures: float64 `[measures, texts]` to `[texts]`."""
        built_in = np.array([measure.built_in for measure in self.fitted])
        mean: Float64 = found[built_in].mean(axis=0)
        return mean


@dataclass(frozen=True, eq=False)
class Scale:
    """A fitted scorer with its two ends: what each measure decides on the texts there, float64 `[measures, texts]`."""

    scorer: VoiceScorer
    floor: Float64
    ceiling: Float64

    def score(self, texts: Sequence[str]) -> VoiceScore | NotScored:
        """Score texts together: the mean over texts, each counting once; one without a word counts as at the floor.

        `NotScored` where there is no text, none has a word, or all have too few together.
        """
        return self.score_decided(self.scorer.by_measure(texts), texts)

    def score_decided(self, found: Float64, texts: Sequence[str]) -> VoiceScore | NotScored:
        """The same of texts on which the measures have decided already: `found` is float64 `[measures, texts]`."""
        count = word_count(texts)
        empty = np.isnan(found[0])
        if empty.all():
            return NotScored(f"all {len(texts)} answers are empty" if texts else "there are no answers")
        if count < MIN_SCORED_WORDS:
            return NotScored(f"{count} words in {len(texts)} answers: {MIN_SCORED_WORDS} are needed", count)
        floor, ceiling = self.floor.mean(axis=1, keepdims=True), self.ceiling.mean(axis=1, keepdims=True)
        found = np.where(empty, floor, found)
        shares = (found - floor).mean(axis=1) / _away_from_zero((ceiling - floor)[:, 0])
        draws = self._drawn_values(found, empty)
        return VoiceScore(
            value=self._value(found),
            low=float(np.quantile(draws, 0.025)),
            high=float(np.quantile(draws, 0.975)),
            words=count,
            texts=len(texts),
            empty=int(empty.sum()),
            measures={m.name: float(share) for m, share in zip(self.scorer.fitted, shares, strict=True)},
        )

    def drawn_ends(self) -> tuple[Float64, Float64]:
        """Bootstrap means of the floor and of the ceiling, `[RESAMPLES]` each; the same draws at every call."""
        rng = np.random.default_rng([self.scorer.seed, 0])
        floor, ceiling = (_resampled(self.scorer.combined(end), rng) for end in (self.floor, self.ceiling))
        return floor.mean(axis=1), ceiling.mean(axis=1)

    def _value(self, found: Float64) -> float:
        text, floor, ceiling = (float(self.scorer.combined(end).mean()) for end in (found, self.floor, self.ceiling))
        return (text - floor) / (ceiling - floor)

    def _drawn_values(self, found: Float64, empty: Bool) -> Float64:
        floor, ceiling = self.drawn_ends()
        rng = np.random.default_rng([self.scorer.seed, 1])
        above = self.scorer.combined(found)[:, None]
        picks = rng.integers(0, len(above), (RESAMPLES, len(above)))
        drawn = np.where(empty[picks], floor[:, None], above[picks, 0]).mean(axis=1)
        values: Float64 = (drawn - floor) / _away_from_zero(ceiling - floor)
        return values


def _standardised(measure: Measure, own: Sequence[str], background: Sequence[str]) -> Standardised:
    fitted = measure.fit(own, background)
    decided = fitted.learned.left_out if isinstance(fitted, FittedRidge) else _by_folds(measure, own, background)
    person, others = decided[: len(own)], decided[len(own) :]
    centre = float(others.mean())
    spread = float(np.sqrt((person.var() + others.var()) / 2)) or 1.0
    built_in = any(measure is one for one in measures())
    return Standardised(
        measure.name, built_in, fitted, centre, spread, (person - centre) / spread, (others - centre) / spread
    )


def _by_folds(measure: Measure, own: Sequence[str], background: Sequence[str]) -> Float64:
    """Decisions on all texts, own first, each by a fit without its fifth of them."""
    person, others = np.empty(len(own)), np.empty(len(background))
    for fold in range(FOLDS):
        part = slice(fold, None, FOLDS)
        fitted = measure.fit(_without(own, fold), _without(background, fold))
        person[part], others[part] = fitted(own[part]), fitted(background[part])
    return np.concatenate([person, others])


def _without(texts: Sequence[str], fold: int) -> list[str]:
    return [text for index, text in enumerate(texts) if index % FOLDS != fold]


def _cut(texts: Sequence[str], length: int) -> list[str]:
    return [passage for text in texts if word_count([text]) for passage in passages(text, length)]


def _spread(texts: list[str]) -> list[str]:
    """At most `MAX_PASSAGES` of them, evenly."""
    if len(texts) <= MAX_PASSAGES:
        return texts
    return [texts[index * len(texts) // MAX_PASSAGES] for index in range(MAX_PASSAGES)]


def _passage_length(reference: VoiceReference) -> int:
    """As the person's texts are, in the middle; shorter where either side would make too few passages of that."""
    typical = int(median(word_count([text]) for text in reference.own if text.strip()))
    least = min(word_count(reference.own), word_count(reference.background))
    return min(max(min(typical, least // ENOUGH_PASSAGES), SHORTEST_PASSAGE), LONGEST_PASSAGE)


def _resampled(values: Float64, rng: np.random.Generator) -> Float64:
    """`RESAMPLES` draws with replacement: `[texts]` to `[RESAMPLES, texts]`."""
    drawn: Float64 = values[rng.integers(0, len(values), (RESAMPLES, len(values)))]
    return drawn


def _away_from_zero(values: Float64) -> Float64:
    """A measure (or a draw) whose ends coincide has no scale: infinitely small, not infinitely large, shares."""
    return np.where(np.abs(values) < 1e-9, np.inf, values)
