"""The voice score: how much of a person's way of writing is in a text, on a scale from a floor to a ceiling.

    scorer = fit_scorer(VoiceReference(own=training_texts_of_the_person, background=texts_of_others))
    scale = scorer.calibrated(floor=base_answers, ceiling=held_out_answers_of_the_person)
    scale.score(tuned_answers)  # VoiceScore(value=0.83, low=0.71, high=0.95, words=2931, ...)

0 is the floor, the base model's answers to the same prompts. 1 is the ceiling, the person's own answers, on which
nothing was fitted. A score can be below 0 or above 1. Text that cannot be scored gives a `NotScored` with the reason,
never a number. docs/voice.md has the limits of the score.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from statistics import median

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Bool, Fitted, Float64, Measure
from mindprint.text.words import passages, word_count
from mindprint.voice.gates import EMPTY, NO_GATES, Gates, fit_gates
from mindprint.voice.measures import FittedRidge, Surprise, measures

MIN_FITTED_WORDS = 500
"""Words that a fit needs of the person, and of the background."""

MIN_SCORED_WORDS = 100
"""Words that a score, a floor and a ceiling need: an interval over fewer is too wide to be of use."""

MAX_PASSAGES = 300
"""The most passages to fit of either side, evenly spaced: more change little and cost memory."""

ENOUGH_PASSAGES = 20
"""Passages of either side from which a classifier can learn: longer texts are cut into this many."""

SHORTEST_PASSAGE, LONGEST_PASSAGE = 20, 500
"""Limits of the words of a passage, which otherwise has the median length of the person's texts."""

CERTAINTY = 3.0
"""Log odds at the ends of the scale, about: text like the person's average counts 0.96 before it is placed there.

A straight line would count a caricature more than the person, and the middle between two people as half of one. The
curve is that of a posterior probability.
"""

EVEN_ODDS = 0.45
"""Where the odds are even between the ends. Not halfway, because the ceiling is the person on the subjects of the
reference: on other subjects the person falls further below it than other people rise above the floor.
"""

FOLDS = 5
RESAMPLES = 1000
"""Bootstrap draws behind an interval."""


@dataclass(frozen=True)
class VoiceReference:
    """The texts on which a scorer is fitted. They must not be scored later.

    `own` is text by the person, on which the model was trained. `background` is text by anyone else, preferably on the
    same subjects: plain answers (`rejected`), answers of the base model. `people` is background too: prose of other
    people. Only with it does a score tell the person from people, and not just from the base model.
    """

    own: tuple[str, ...]
    background: tuple[str, ...]
    people: tuple[str, ...] = ()


@dataclass(frozen=True)
class NotScored:
    """The reason for a missing score. It takes the place of a number, and never enters a mean."""

    reason: str
    words: int = 0


@dataclass(frozen=True)
class VoiceScore:
    """The score of some texts: how much of the person's voice is in them.

    `value` is 0 at the floor and 1 at the ceiling. `low` and `high` are its 95 % bootstrap interval over texts, where
    floor and ceiling are drawn again too. `words` and `texts` were scored. `empty` of the texts have no word and count
    as at the floor. So do those that failed a gate: `failed` has the number of texts by reason, the empty ones
    included. `measures` has each measure by itself, on a straight scale.
    """

    value: float
    low: float
    high: float
    words: int
    texts: int
    empty: int
    measures: Mapping[str, float]
    failed: Mapping[str, int] = field(default_factory=dict)


def fit_scorer(
    reference: VoiceReference,
    *,
    extra: Sequence[Measure] = (),
    passage_words: int | None = None,
    seed: int = 0,
    gates: Gates | None = None,
) -> VoiceScorer | NotScored:
    """Fit every measure on the person against the background.

    Args:
        reference: The texts of the person and of the background.
        extra: Measures of plugins. They are reported, and never averaged into the score.
        passage_words: The length to which texts are cut. Default: the median length of the person's texts.
        seed: The seed of the bootstrap draws.
        gates: What an answer must pass for its voice to count. Default: gates fitted on the reference.

    Returns:
        A scorer, or a `NotScored` if the person or the background has too few words.
    """
    every = (*reference.background, *reference.people)
    for whose, texts in (("of the person's training text", reference.own), ("of background", every)):
        count = word_count(texts)
        if count < MIN_FITTED_WORDS:
            needed = f"{MIN_FITTED_WORDS} are needed to fit a voice{_rows_missing(count, texts, MIN_FITTED_WORDS)}"
            return NotScored(f"{count:,} words {whose}: {needed}", count)
    # Frequencies vary more in a short text. So texts to fit and texts to score are cut to the same length.
    length = passage_words or _passage_length(reference)
    # Half of the background at most is not by people, however much of it there is.
    plain, people = (_cut(texts, length) for texts in (reference.background, reference.people))
    most = MAX_PASSAGES // 2 if plain and people else MAX_PASSAGES
    own, plain, people = _spread(_cut(reference.own, length)), _spread(plain, most), _spread(people, most)
    background = plain + people
    for whose, pieces in (("the person's training text", own), ("the background", background)):
        if len(pieces) < FOLDS:
            return NotScored(f"{whose} makes {len(pieces)} passages of {length} words: {FOLDS} are needed")
    fitted = tuple(_standardised(m, own, background) for m in (*measures(), *extra))
    gates = fit_gates(own, background, seed=seed) if gates is None else gates
    return VoiceScorer(fitted, length, seed, gates, len(people))


End = tuple[Float64, Sequence[str] | None]


@dataclass(frozen=True, eq=False)
class Standardised:
    """A fitted measure in units of its standard deviation, so that measures can be averaged.

    `own` and `background` are the decisions on the fitted passages, each made by a fit without that passage. The
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
    """Measures fitted on one person. `people` of the last background passages are prose of other people."""

    fitted: tuple[Standardised, ...]
    passage_words: int
    seed: int = 0
    gates: Gates = NO_GATES
    people: int = 0

    def decisions(self, texts: Sequence[str]) -> Float64:
        """Return the combined decision on each text, float64 `[texts]`: higher is more like the person.

        It has no unit, and is NaN for a text without words.
        """
        return self.combined(self.by_measure(texts))

    def by_measure(self, texts: Sequence[str]) -> Float64:
        """Return each measure's decision on each text, the mean over its passages: float64 `[measures, texts]`."""
        pieces = [_cut([text], self.passage_words) if word_count([text]) else [] for text in texts]
        flat = [piece for part in pieces for piece in part]
        decisions = np.full((len(self.fitted), len(texts)), np.nan)
        if not flat:
            return decisions
        # Each measure sees all passages in one call, so that an embedding model can work in batches.
        decided = np.stack([measure(flat) for measure in self.fitted])
        starts = np.cumsum([0, *(len(part) for part in pieces)])
        for index, (start, end) in enumerate(pairwise(starts)):
            if end > start:
                # A long text has more passages and the same weight, because the bootstrap draws texts.
                decisions[:, index] = decided[:, start:end].mean(axis=1)
        return decisions

    def calibrated(self, floor: Sequence[str] | None = None, ceiling: Sequence[str] | None = None) -> Scale | NotScored:
        """Return a scale between two ends: texts on which nothing was fitted, or the fitted ones, each left out (None).

        Returns `NotScored` if an end has too few words, or if the two differ by no more than chance.
        """
        return self.scale(
            (np.stack([measure.background for measure in self.fitted]), None)
            if floor is None
            else (self.by_measure(floor), floor),
            (np.stack([measure.own for measure in self.fitted]), None)
            if ceiling is None
            else (self.by_measure(ceiling), ceiling),
        )

    def scale(self, floor: End, ceiling: End, draws: int = 1) -> Scale | NotScored:
        """Return the scale of `calibrated`, from decisions `[measures, texts]` and their texts (None: the fitted).

        The floor has `draws` texts for each prompt, in the order of the prompts.
        """
        for whose, (_, texts) in (("the floor", floor), ("the person's held-out text", ceiling)):
            if texts is not None and (count := word_count(texts)) < MIN_SCORED_WORDS:
                missing = _rows_missing(count, texts, MIN_SCORED_WORDS)
                return NotScored(f"{whose} has {count} words: {MIN_SCORED_WORDS} are needed{missing}", count)
        # All measures are NaN for the same texts, those without a word, so the first measure shows which.
        low, high = (~np.isnan(found[0]) for found, _ in (floor, ceiling))
        prompts = np.flatnonzero(low) // draws
        scale = Scale(self, floor[0][:, low], ceiling[0][:, high], prompts)
        lows, highs = scale.drawn_ends()
        # The ceiling must be above the floor in 97.5 % of the draws: else a score would divide by chance. Where it is
        # below, the curve between them would fall, and its draws would look right.
        if scale.length <= 0 or np.quantile(highs - lows, 0.025) <= 0:
            return NotScored(
                "the person's held-out text cannot be told from the floor, so there is not a scale between them"
            )
        return scale

    def combined(self, found: Float64) -> Float64:
        """Return the mean of the built-in measures: float64 `[measures, texts]` to `[texts]`."""
        built_in = np.array([measure.built_in for measure in self.fitted])
        mean: Float64 = found[built_in].mean(axis=0)
        return mean


@dataclass(frozen=True, eq=False)
class Scale:
    """A fitted scorer with its two ends: each measure's decisions on the texts there, float64 `[measures, texts]`.

    `floor_prompts` are the prompts that the floor's texts answer, int64 `[texts]`.
    """

    scorer: VoiceScorer
    floor: Float64
    ceiling: Float64
    floor_prompts: NDArray[np.int64]

    def score(self, texts: Sequence[str]) -> VoiceScore | NotScored:
        """Score texts together: the mean over texts, where one without a word counts as at the floor.

        Returns `NotScored` if there are no texts, if none has a word, or if all together have too few.
        """
        return self.score_decided(self.scorer.by_measure(texts), texts)

    def score_decided(
        self, found: Float64, texts: Sequence[str], *, reasons: Sequence[str | None] = (), draws: int = 1
    ) -> VoiceScore | NotScored:
        """Score texts on which the measures have decided already: `found` is float64 `[measures, texts]`.

        `reasons` say which texts cannot count, for a reason that the text alone does not show. There are `draws` texts
        for each prompt, in the order of the prompts.
        """
        count = word_count(texts)
        empty = np.isnan(found[0])
        if empty.all():
            return NotScored(f"all {len(texts)} answers are empty" if texts else "there are no answers")
        if count < MIN_SCORED_WORDS:
            return NotScored(f"{count} words in {len(texts)} answers: {MIN_SCORED_WORDS} are needed", count)
        by_gates = self.scorer.gates.reasons(texts)
        # A gate of texts names the fault more exactly than the fluency of a model does, so it comes first.
        reasons = [gate or given for gate, given in zip(by_gates, reasons or [None] * len(texts), strict=True)]
        failed = empty | np.array([reason is not None for reason in reasons])
        floor, ceiling = self.floor.mean(axis=1, keepdims=True), self.ceiling.mean(axis=1, keepdims=True)
        # Without these answers the mean would reward a model that is silent, or loops, wherever its voice fails.
        shares = np.where(failed, 0, found - floor).mean(axis=1) / _away_from_zero((ceiling - floor)[:, 0])
        shown = np.where(failed, self._end_values[0], self.values(found))
        scores = self._drawn_scores(shown, failed, np.arange(len(texts)) // draws)
        low_end, high_end = self._end_values
        return VoiceScore(
            value=(float(shown.mean()) - low_end) / (high_end - low_end),
            low=float(np.quantile(scores, 0.025)),
            high=float(np.quantile(scores, 0.975)),
            words=count,
            texts=len(texts),
            empty=int(empty.sum()),
            measures={m.name: float(share) for m, share in zip(self.scorer.fitted, shares, strict=True)},
            failed=dict(Counter(reason or EMPTY for reason, fails in zip(reasons, failed, strict=True) if fails)),
        )

    @cached_property
    def people(self) -> VoiceScore | None:
        """Return the score of the other people of the background, each passage by a fit without it; None without any.

        It shows the place of a person who is not the one.
        """
        count = self.scorer.people
        if not count:
            return None
        found = np.stack([measure.background[-count:] for measure in self.scorer.fitted])
        shown, kept = self.values(found), np.zeros(count, dtype=np.bool_)
        low_end, high_end = self._end_values
        scores = self._drawn_scores(shown, kept, np.arange(count))
        floor, ceiling = self.floor.mean(axis=1), self.ceiling.mean(axis=1)
        shares = (found.mean(axis=1) - floor) / _away_from_zero(ceiling - floor)
        return VoiceScore(
            value=(float(shown.mean()) - low_end) / (high_end - low_end),
            low=float(np.quantile(scores, 0.025)),
            high=float(np.quantile(scores, 0.975)),
            words=count * self.scorer.passage_words,
            texts=count,
            empty=0,
            measures={m.name: float(share) for m, share in zip(self.scorer.fitted, shares, strict=True)},
        )

    @cached_property
    def _end_means(self) -> tuple[float, float]:
        floor, ceiling = (float(self.scorer.combined(end).mean()) for end in (self.floor, self.ceiling))
        return floor, ceiling

    @property
    def length(self) -> float:
        """Return the ceiling's mean decision less the floor's, before the curve."""
        floor, ceiling = self._end_means
        return ceiling - floor

    @cached_property
    def _end_values(self) -> tuple[float, float]:
        floor, ceiling = (float(self.values(end).mean()) for end in (self.floor, self.ceiling))
        return floor, ceiling

    def values(self, found: Float64) -> Float64:
        """Return how far each text reads as the person's, between 0 and 1: float64 `[measures, texts]` to `[texts]`."""
        floor, _ = self._end_means
        place = (self.scorer.combined(found) - floor) / float(_away_from_zero(np.array(self.length)))
        shares: Float64 = 1 / (1 + np.exp(-2 * self._certainty * (np.clip(place, -10, 10) - EVEN_ODDS)))
        return shares

    @cached_property
    def _certainty(self) -> float:
        """Return the log odds at the ends of the scale: those of two normal distributions, at most `CERTAINTY`."""
        floor, ceiling = (float(self.scorer.combined(end).var()) for end in (self.floor, self.ceiling))
        # The log odds at either mean of two normals with one variance are d'² / 2 (Green & Swets 1966).
        return min(CERTAINTY, self.length**2 / max(floor + ceiling, 1e-12))

    def drawn_ends(self) -> tuple[Float64, Float64]:
        """Return bootstrap means of floor and ceiling, `[RESAMPLES]` each, with the same draws at every call."""
        # The ends have a random stream for themselves, so all scores on a scale use the same drawn ends.
        rng = np.random.default_rng([self.scorer.seed, 0])
        floor = _resampled(_means(self.values(self.floor), self.floor_prompts), rng)
        ceiling = _resampled(self.values(self.ceiling), rng)
        return floor.mean(axis=1), ceiling.mean(axis=1)

    def _drawn_scores(self, values: Float64, failed: Bool, prompts: NDArray[np.int64]) -> Float64:
        floor, ceiling = self.drawn_ends()
        # Several answers to one prompt are alike. So prompts are drawn and not answers (a cluster bootstrap, Davison &
        # Hinkley 1997, section 3.8), else the interval would be too narrow.
        passed, at_floor = _means(np.where(failed, 0, values), prompts), _means(failed.astype(np.float64), prompts)
        rng = np.random.default_rng([self.scorer.seed, 1])
        picks = rng.integers(0, len(passed), (RESAMPLES, len(passed)))
        # A failed text is at the floor of its draw, so that it counts as 0 in each draw and not only on average.
        drawn = (passed[picks] + at_floor[picks] * floor[:, None]).mean(axis=1)
        scores: Float64 = (drawn - floor) / _away_from_zero(ceiling - floor)
        return scores


def _standardised(measure: Measure, own: Sequence[str], background: Sequence[str]) -> Standardised:
    fitted = measure.fit(own, background)
    # A fit is too sure of the passages that it has seen, so each is decided by a fit without it. A ridge classifier
    # has those decisions already, and a model of symbols counts once for all folds. Any other measure is fitted again
    # for each fold.
    if isinstance(fitted, FittedRidge):
        decided = fitted.learned.left_out
    elif isinstance(measure, Surprise):
        decided = measure.left_out(own, background, FOLDS)
    else:
        decided = _by_folds(measure, own, background)
    person, others = decided[: len(own)], decided[len(own) :]
    centre = float(others.mean())
    # A measure that gives all passages one number has no spread. Divided by 1 it stays at 0.
    spread = float(np.sqrt((person.var() + others.var()) / 2)) or 1.0
    # By identity and not by name: a plugin's measure may have the name of a built-in one.
    built_in = any(measure is known for known in measures())
    return Standardised(
        measure.name, built_in, fitted, centre, spread, (person - centre) / spread, (others - centre) / spread
    )


def _by_folds(measure: Measure, own: Sequence[str], background: Sequence[str]) -> Float64:
    """Return decisions on all texts, own first, each by a fit without that text's fifth of them."""
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


def _spread(texts: list[str], most: int = MAX_PASSAGES) -> list[str]:
    """Return at most `most` of them, evenly spaced."""
    if len(texts) <= most:
        return texts
    return [texts[index * len(texts) // most] for index in range(most)]


def _passage_length(reference: VoiceReference) -> int:
    """Return the median length of the person's texts, or less if a side would make too few passages of it."""
    typical = int(median(word_count([text]) for text in reference.own if text.strip()))
    least = min(word_count(reference.own), word_count((*reference.background, *reference.people)))
    return min(max(min(typical, least // ENOUGH_PASSAGES), SHORTEST_PASSAGE), LONGEST_PASSAGE)


def _resampled(values: Float64, rng: np.random.Generator) -> Float64:
    """Return `RESAMPLES` draws with replacement: `[texts]` to `[RESAMPLES, texts]`."""
    drawn: Float64 = values[rng.integers(0, len(values), (RESAMPLES, len(values)))]
    return drawn


def _means(values: Float64, prompts: NDArray[np.int64]) -> Float64:
    """Return the mean over the texts of each prompt: `[texts]` to `[prompts that have texts]`."""
    _, place, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    means: Float64 = np.bincount(place, weights=values) / counts
    return means


def _rows_missing(count: int, texts: Sequence[str], needed: int) -> str:
    """Return how many more rows with texts of their mean length are needed, as the end of a sentence."""
    if not count:
        return ""
    rows = math.ceil((needed - count) * len(texts) / count)
    return f" (about {rows} more {'row' if rows == 1 else 'rows'})"


def _away_from_zero(values: Float64) -> Float64:
    """Replace lengths near 0 by infinity, so that a measure whose ends coincide gives shares of 0."""
    return np.where(np.abs(values) < 1e-9, np.inf, values)
