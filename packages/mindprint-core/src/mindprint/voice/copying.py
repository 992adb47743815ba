"""Copying: whether answers repeat the training text, or each other.

A model that recites its training text scores as high as the person. So every set of answers is also compared with the
training text (verbatim overlaps), with the length of the person's answers, and with itself (self-BLEU, Zhu et al. 2018,
which finds a model that gives every prompt the same answer).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mindprint.text.words import words
from mindprint.voice.scoring import NotScored

N = 8
"""Words of the shortest overlap that counts as copied: shorter ones occur by chance."""

RECITED = 0.5
"""An answer is recited if one verbatim overlap has this share of its words, and at least `N`."""

ALLOWED = 0.1
"""How far a share may exceed the person's own before it is flagged: people repeat their sayings too."""

BLEU_ORDER = 4
BLEU_SAMPLE = 100
"""Answers for which self-BLEU is computed, each against all others. Of more, evenly spaced ones are taken."""

SHORT, LONG = 0.5, 2.0
"""Limits of the mean length, divided by the person's, beyond which it is flagged."""


@dataclass(frozen=True)
class Overlap:
    """The longest run of words that is in an answer and, verbatim, in one training text.

    `answer` and `source` are the indices of the two, or None if no word is shared.
    """

    words: int
    text: str
    answer: int | None
    source: int | None


@dataclass(frozen=True)
class Copying:
    """Answers compared with the training text, with the person's answers, and with each other.

    `longest` is over all answers. `copy_rate` is the share of the answers' words in a verbatim overlap of `N` words or
    more. `recited` is the share of answers of which half or more is one overlap. `self_bleu` is the mean BLEU-4 of each
    answer against all others, 0 to 1, or None for fewer than two answers. `words` is the mean length of an answer, and
    `length` that divided by the person's. `person_` figures are those of the person's held-out text, or None without
    such text. `flagged` has a sentence for each problem.
    """

    longest: Overlap
    copy_rate: float
    recited: float
    self_bleu: float | None
    words: float
    length: float | None
    person_copy_rate: float | None
    person_recited: float | None
    person_self_bleu: float | None
    flagged: tuple[str, ...]


def measure_copying(answers: Sequence[str], training: Sequence[str], person: Sequence[str] = ()) -> Copying | NotScored:
    """Compare answers with the training text and the person's held-out text.

    Returns `NotScored` if the answers or the training text have no word.
    """
    return CopyingMeter(training).measure(answers, person)


class CopyingMeter:
    """Measurements of copying from one training text, which is read once however many sets of answers are measured."""

    def __init__(self, training: Sequence[str]) -> None:
        self._training = training
        self._person: dict[tuple[str, ...], _Compared | None] = {}

    @cached_property
    def _index(self) -> TrainingText | None:
        sources = [words(text) for text in self._training]
        return TrainingText(sources) if any(sources) else None

    def measure(self, answers: Sequence[str], person: Sequence[str] = ()) -> Copying | NotScored:
        """Compare answers with the training text and the person's held-out text, as `measure_copying` does."""
        split = [words(answer) for answer in answers]
        if not any(split):
            return NotScored(f"all {len(split)} answers are empty" if split else "there are no answers")
        if self._index is None:
            return NotScored("there is no training text to compare the answers with")
        answered, own = _compared(self._index, split), self._compared_person(self._index, person)
        relative = answered.words / own.words if own else None
        return Copying(
            longest=answered.overlaps.longest,
            copy_rate=answered.overlaps.copy_rate,
            recited=answered.overlaps.recited,
            self_bleu=answered.self_bleu,
            words=answered.words,
            length=relative,
            person_copy_rate=own.overlaps.copy_rate if own else None,
            person_recited=own.overlaps.recited if own else None,
            person_self_bleu=own.self_bleu if own else None,
            flagged=tuple(_flags(answered, own, relative)),
        )

    def _compared_person(self, index: TrainingText, person: Sequence[str]) -> _Compared | None:
        # A run measures each topic several times, and the person's text of the topic is the same each time.
        texts = tuple(person)
        if texts not in self._person:
            spoken = [text for text in map(words, texts) if text]
            self._person[texts] = _compared(index, spoken) if spoken else None
        return self._person[texts]


class TrainingText:
    """A suffix automaton (Blumer et al. 1985) over the words of texts, which knows every run of words in any of them.

    It is built in time and memory linear in the number of words, at a few hundred bytes per word. Each state represents
    the runs of words that end at the same places. `_next` leads from a state to the next by a word, `_length` is the
    longest run of a state, and `_link` leads to the state of the longest suffix that occurs in more places.
    """

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        self._next: list[dict[str, int]] = [{}]
        # The root has no suffix. Its link of -1 ends the walks along the links when a word is added.
        self._link, self._length, self._text = [-1], [0], [-1]
        for index, text in enumerate(texts):
            # Each text starts at the root, so that no run of words crosses from one text to the next.
            last = 0
            for word in text:
                last = self._extended(last, word, index)

    def matches(self, answer: Sequence[str]) -> Iterator[tuple[int, int]]:
        """Yield for each word the length of the longest run ending with it that a text has, and the text's index."""
        state, length = 0, 0
        for word in answer:
            # Shorten the run from its front, one suffix link at a time, until it can be continued with this word.
            while state and word not in self._next[state]:
                state = self._link[state]
                length = self._length[state]
            if word in self._next[state]:
                state, length = self._next[state][word], length + 1
            yield length, self._text[state]

    def _extended(self, last: int, word: str, index: int) -> int:
        """Add a word after the state `last`, which is 0 at the start of a text, and return the new state."""
        known = self._next[last].get(word)
        # Another text has this run already. Its state can be used if it represents no longer run.
        if known is not None:
            return known if self._length[known] == self._length[last] + 1 else self._split(last, word, known)
        state = self._added({}, 0, self._length[last] + 1, index)
        # The suffixes that lack this word are followed by it only here, so all of them lead to the new state. The first
        # that has the word decides the new state's link.
        while last >= 0 and word not in self._next[last]:
            self._next[last][word] = state
            last = self._link[last]
        if last >= 0:
            target = self._next[last][word]
            whole = self._length[target] == self._length[last] + 1
            self._link[state] = target if whole else self._split(last, word, target)
        return state

    def _split(self, last: int, word: str, target: int) -> int:
        """Copy `target` for the runs that are one word longer than `last`'s, and return the copy."""
        length = self._length[last] + 1
        # The shorter runs of `target` now end in one place more than its longer runs. A state has one set of places, so
        # the shorter runs need another.
        copy = self._added(dict(self._next[target]), self._link[target], length, self._text[target])
        self._link[target] = copy
        while last >= 0 and self._next[last].get(word) == target:
            self._next[last][word] = copy
            last = self._link[last]
        return copy

    def _added(self, following: dict[str, int], link: int, length: int, index: int) -> int:
        self._next.append(following)
        self._link.append(link)
        self._length.append(length)
        self._text.append(index)
        return len(self._next) - 1


@dataclass(frozen=True)
class _Overlaps:
    """Verbatim overlaps of a set of texts with the training text."""

    longest: Overlap
    copy_rate: float
    recited: float


@dataclass(frozen=True)
class _Compared:
    """A set of texts compared with the training text and with itself. `words` is the mean length of a text."""

    overlaps: _Overlaps
    self_bleu: float | None
    words: float


def _compared(training: TrainingText, texts: Sequence[Sequence[str]]) -> _Compared:
    return _Compared(_overlaps(training, texts), self_bleu(texts), float(np.mean([len(text) for text in texts])))


def _overlaps(training: TrainingText, answers: Sequence[Sequence[str]]) -> _Overlaps:
    longest = Overlap(0, "", None, None)
    copied = recited = 0
    for index, answer in enumerate(answers):
        ends = list(training.matches(answer))
        most = max((length for length, _ in ends), default=0)
        if most > longest.words:
            end = next(place for place, (length, _) in enumerate(ends) if length == most)
            longest = Overlap(most, " ".join(answer[end + 1 - most : end + 1]), index, ends[end][1])
        copied += _covered(length for length, _ in ends)
        # A greeting can be most of a short answer by chance, so the overlap must have `N` words as well.
        recited += most >= max(N, RECITED * len(answer))
    return _Overlaps(longest, copied / sum(len(answer) for answer in answers), recited / len(answers))


def _covered(lengths: Iterable[int]) -> int:
    """Count the words in runs of `N` words or more, from the length of the longest run that ends with each word."""
    # `upto` is the end of the words counted so far: runs overlap, and a word counts once.
    covered, upto = 0, 0
    for end, length in enumerate(lengths, 1):
        if length >= N:
            covered += end - max(upto, end - length)
            upto = end
    return covered


def self_bleu(answers: Sequence[Sequence[str]]) -> float | None:
    """Return the mean BLEU-4 (Papineni et al. 2002) of each answer against all others.

    None for fewer than two answers with a word.
    """
    spoken = [answer for answer in answers if answer]
    if len(spoken) < 2:
        return None
    counts = [[Counter(_ngrams(answer, n)) for answer in spoken] for n in range(1, BLEU_ORDER + 1)]
    best = [_two_greatest(order) for order in counts]
    step = max(1, len(spoken) // BLEU_SAMPLE)
    return float(np.mean([_bleu(spoken, index, counts, best) for index in range(0, len(spoken), step)]))


Gram = tuple[str, ...]
Greatest = tuple[int, int, int]  # the greatest count of an n-gram in one answer, whose it is, and the next greatest


def _bleu(
    answers: Sequence[Sequence[str]],
    index: int,
    counts: Sequence[Sequence[Counter[Gram]]],
    best: Sequence[Mapping[Gram, Greatest]],
) -> float:
    """Return the BLEU of one answer against all others.

    BLEU = exp(mean of ln p_n + min(0, 1 - r / c)), with the clipped precisions p_n of orders 1 to 4 (or fewer, for an
    answer of fewer words), the answer's length c and the nearest length r of another answer (Papineni et al. 2002).
    """
    logs = []
    for order, greatest in zip(counts, best, strict=True):
        own = order[index]
        if not own:
            break
        clipped = sum(min(count, _of_others(greatest[gram], index)) for gram, count in own.items())
        # The geometric mean is 0 if one precision is. No smoothing is applied.
        if not clipped:
            return 0.0
        logs.append(math.log(clipped / own.total()))
    length = len(answers[index])
    others = (len(answer) for other, answer in enumerate(answers) if other != index)
    # Of two lengths that are equally near the shorter is taken, so that the order of the answers does not matter.
    nearest = min(others, key=lambda other: (abs(other - length), other))
    return math.exp(sum(logs) / len(logs) + min(0.0, 1 - nearest / length))


def _of_others(greatest: Greatest, index: int) -> int:
    most, whose, next_most = greatest
    return next_most if whose == index else most


def _two_greatest(counts: Sequence[Counter[Gram]]) -> dict[Gram, Greatest]:
    # With the two greatest counts, the greatest among all other answers is known without a pass over all pairs.
    greatest: dict[Gram, Greatest] = {}
    for index, counter in enumerate(counts):
        for gram, count in counter.items():
            most, whose, next_most = greatest.get(gram, (0, -1, 0))
            greatest[gram] = (count, index, most) if count > most else (most, whose, max(next_most, count))
    return greatest


def _ngrams(words: Sequence[str], n: int) -> Iterator[Gram]:
    # The slices get shorter by a word each, and the last n-gram is where the shortest ends.
    return zip(*(words[start:] for start in range(n)), strict=False)


def _flags(answers: _Compared, person: _Compared | None, length: float | None) -> Iterator[str]:
    recited, copy_rate = answers.overlaps.recited, answers.overlaps.copy_rate
    own_recited, own_rate = (person.overlaps.recited, person.overlaps.copy_rate) if person else (0.0, 0.0)
    if recited > own_recited + ALLOWED or copy_rate > own_rate + 2 * ALLOWED:
        yield (
            f"recites training text: {recited:.0%} of the answers (the person: {own_recited:.0%}), "
            f"{copy_rate:.0%} of their words (the person: {own_rate:.0%})"
        )
    own_bleu = person.self_bleu if person else None
    if answers.self_bleu is not None and answers.self_bleu > (own_bleu or 0.0) + 2 * ALLOWED:
        of_person = f" (the person: {own_bleu:.2f})" if own_bleu else ""
        yield f"answers repeat each other: self-BLEU {answers.self_bleu:.2f}{of_person}"
    if length is not None and not SHORT <= length <= LONG:
        yield f"answers are {length:.2f} times as long as the person's"
