"""Beside every voice score: is it a voice, or the training text again?

A model that recites scores as high as the person. So whatever is scored is also laid beside the text it was trained
on (longest verbatim overlap, share of its word n-grams found there), beside the person's own length, and beside itself
(self-BLEU: does it say the same thing to every prompt?).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindprint.voice.scoring import NotScored


@dataclass(frozen=True)
class Overlap:
    """The longest run of words that stands in an answer and, verbatim, in one training text."""

    words: int
    text: str
    answer: int  # index of the answer
    source: int  # index of the training text


@dataclass(frozen=True)
class Copying:
    """`longest`: over all answers. `copy_rate`: share of the answers' word `n`-grams found in a training text.
    `person_copy_rate`: the same of the person's held-out text, what anyone repeats of themselves; None without such.
    `recited`: share of answers most of whose words lie in one verbatim overlap. `self_bleu` and `person_self_bleu`:
    mean BLEU of each answer against the others, 0 to 1. `length`: mean words of an answer over the person's mean.
    `flagged`: what is wrong in words, empty where nothing is.
    """

    longest: Overlap
    n: int
    copy_rate: float
    person_copy_rate: float | None
    recited: float
    self_bleu: float
    person_self_bleu: float | None
    words: float
    length: float | None
    flagged: tuple[str, ...]


def measure_copying(answers: Sequence[str], training: Sequence[str], person: Sequence[str] = ()) -> Copying | NotScored:
    """Lay answers beside the training text and the person's own held-out text; `NotScored` if all are empty."""
    raise NotImplementedError
