"""Beside every voice score: is it a voice, or the training text again?

A model that recites scores as high as the person. So whatever is scored is also laid beside the text it was trained
on (longest verbatim overlap, share of its word n-grams found there), beside the person's own length, and beside itself
(self-BLEU, Zhu et al. 2018: does it say the same thing to every prompt?).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mindprint.text.words import words
from mindprint.voice.scoring import NotScored

N = 8
"""Words of an n-gram that two texts share by copying rather than by chance."""

RECITED = 0.5
"""An answer is recited if this share of its words, and no fewer than `N`, is one verbatim overlap."""

ALLOWED = 0.1
"""By how much a share may exceed the person's own (who repeats sayings) before it is flagged."""

BLEU_ORDER = 4
BLEU_SAMPLE = 100
"""Answers that self-BLEU compares, evenly chosen of more: each with all others."""

SHORT, LONG = 0.5, 2.0
"""Mean length over the person's beyond which length is flagged."""


@dataclass(frozen=True)
class Overlap:
    """The longest run of words that stands in an answer and, verbatim, in one training text.

    `answer` and `source` are the indices of the two; None where no word is shared.
    """

    words: int
    text: str
    answer: int | None
    source: int | None


@dataclass(frozen=True)
class Copying:
    """Answers beside the training text, the person and themselves.

    `longest` is over all answers. `copy_rate`: share of the answers' words that stand in a verbatim overlap of `N` or
    more words. `recited`: share of answers of which half or more is one overlap. `self_bleu`: mean BLEU-4 of each
    answer against all others, 0 to 1; None for fewer than two answers. `words`: mean length of an answer; `length`: by
    the person's mean. The `person_` figures are those of the held-out text of the person, who repeats too; None without
    such. `flagged` says in words what is wrong; it is empty where nothing is.
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
    """Lay answers beside the training text and the person's own held-out text; `NotScored` if either has no word."""
    split = [words(answer) for answer in answers]
    if not any(split):
        return NotScored(f"all {len(split)} answers are empty" if split else "there are no answers")
    sources = [words(text) for text in training]
    if not any(sources):
        return NotScored("there is no training text to lay the answers beside")
    index = TrainingText(sources)
    own = [spoken for text in person if (spoken := words(text))]
    mine, theirs = _against(index, split), _against(index, own) if own else None
    length = float(np.mean([len(answer) for answer in split]))
    bleu, own_bleu = self_bleu(split), self_bleu(own)
    relative = length / float(np.mean([len(text) for text in own])) if own else None
    return Copying(
        longest=mine.longest,
        copy_rate=mine.copy_rate,
        recited=mine.recited,
        self_bleu=bleu,
        words=length,
        length=relative,
        person_copy_rate=theirs.copy_rate if theirs else None,
        person_recited=theirs.recited if theirs else None,
        person_self_bleu=own_bleu,
        flagged=tuple(_flags(mine, theirs, (bleu, own_bleu), relative)),
    )


# --- overlap with the training text ----------------------------------------------------------------------------------


class TrainingText:
    """A suffix automaton (Blumer et al. 1985) over the words of texts: every run of words that stands in one of them.

    Built in time and memory linear in the words: a few hundred bytes each.
    """

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._link, self._length, self._text = [-1], [0], [-1]
        for index, text in enumerate(texts):
            last = 0
            for word in text:
                last = self._extended(last, word, index)

    def matches(self, answer: Sequence[str]) -> Iterator[tuple[int, int]]:
        """For each word, how long the longest run ending with it is that stands in a text, and in which text."""
        state, length = 0, 0
        for word in answer:
            while state and word not in self._next[state]:
                state = self._link[state]
                length = self._length[state]
            if word in self._next[state]:
                state, length = self._next[state][word], length + 1
            yield length, self._text[state]

    def _extended(self, last: int, word: str, index: int) -> int:
        """The state of all that was read with one more word; of a text begun anew, `last` is 0."""
        known = self._next[last].get(word)
        if known is not None:
            return known if self._length[known] == self._length[last] + 1 else self._split(last, word, known)
        state = self._added({}, 0, self._length[last] + 1, index)
        while last >= 0 and word not in self._next[last]:
            self._next[last][word] = state
            last = self._link[last]
        if last >= 0:
            target = self._next[last][word]
            whole = self._length[target] == self._length[last] + 1
            self._link[state] = target if whole else self._split(last, word, target)
        return state

    def _split(self, last: int, word: str, target: int) -> int:
        """A copy of `target` that is as long as `last` and one word, reached from there on."""
        length = self._length[last] + 1
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
class _Against:
    longest: Overlap
    copy_rate: float
    recited: float


def _against(training: TrainingText, answers: Sequence[Sequence[str]]) -> _Against:
    longest = Overlap(0, "", None, None)
    copied = recited = 0
    for index, answer in enumerate(answers):
        ends = list(training.matches(answer))
        most = max((length for length, _ in ends), default=0)
        if most > longest.words:
            end = next(place for place, (length, _) in enumerate(ends) if length == most)
            longest = Overlap(most, " ".join(answer[end + 1 - most : end + 1]), index, ends[end][1])
        copied += _covered(length for length, _ in ends)
        recited += most >= max(N, RECITED * len(answer))
    return _Against(longest, copied / sum(len(answer) for answer in answers), recited / len(answers))


def _covered(lengths: Iterable[int]) -> int:
    """Words in a run of `N` or more, from the longest run ending with each."""
    covered, upto = 0, 0
    for end, length in enumerate(lengths, 1):
        if length >= N:
            covered += end - max(upto, end - length)
            upto = end
    return covered


# --- self-BLEU -------------------------------------------------------------------------------------------------------


def self_bleu(answers: Sequence[Sequence[str]]) -> float | None:
    """Mean BLEU-4 (Papineni et al. 2002) of each answer against all others; None for fewer than two with a word."""
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
    """Clipped precisions of orders 1 to 4 (or as many as the answer has words), brevity against the nearest length."""
    logs = []
    for order, greatest in zip(counts, best, strict=True):
        mine = order[index]
        if not mine:
            break
        clipped = sum(min(count, _of_others(greatest[gram], index)) for gram, count in mine.items())
        if not clipped:
            return 0.0
        logs.append(math.log(clipped / mine.total()))
    length = len(answers[index])
    others = (len(answer) for other, answer in enumerate(answers) if other != index)
    nearest = min(others, key=lambda other: (abs(other - length), other))
    return math.exp(sum(logs) / len(logs) + min(0.0, 1 - nearest / length))


def _of_others(greatest: Greatest, index: int) -> int:
    most, whose, next_most = greatest
    return next_most if whose == index else most


def _two_greatest(counts: Sequence[Counter[Gram]]) -> dict[Gram, Greatest]:
    found: dict[Gram, Greatest] = {}
    for index, counter in enumerate(counts):
        for gram, count in counter.items():
            most, whose, next_most = found.get(gram, (0, -1, 0))
            found[gram] = (count, index, most) if count > most else (most, whose, max(next_most, count))
    return found


def _ngrams(words: Sequence[str], n: int) -> Iterator[Gram]:
    return zip(*(words[start:] for start in range(n)), strict=False)


# --- what is wrong ---------------------------------------------------------------------------------------------------


def _flags(
    answers: _Against, person: _Against | None, bleu: tuple[float | None, float | None], length: float | None
) -> Iterator[str]:
    own_recited, own_rate = (person.recited, person.copy_rate) if person else (0.0, 0.0)
    if answers.recited > own_recited + ALLOWED or answers.copy_rate > own_rate + 2 * ALLOWED:
        yield (
            f"recites training text: {answers.recited:.0%} of the answers (the person: {own_recited:.0%}), "
            f"{answers.copy_rate:.0%} of their words (the person: {own_rate:.0%})"
        )
    mine, own = bleu
    if mine is not None and mine > (own or 0.0) + 2 * ALLOWED:
        yield f"answers repeat each other: self-BLEU {mine:.2f}" + (f" (the person: {own:.2f})" if own else "")
    if length is not None and not SHORT <= length <= LONG:
        yield f"answers are {length:.2f} times as long as the person's"
