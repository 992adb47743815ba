"""Key concepts of a quiz: how many of them an answer mentions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindprint.voice.words import words

STEM = 5
"""Letters that two words begin with alike, at least, to be forms of one word; with endings of no more than `ENDING`."""

ENDING = 3


@dataclass(frozen=True)
class Coverage:
    """Which key concepts an answer mentions; `share` is those found over all."""

    found: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def share(self) -> float:
        return len(self.found) / (len(self.found) + len(self.missing))


def coverage(answer: str, concepts: Sequence[str]) -> Coverage:
    """Look for each concept in an answer. `tide|ebb` means either.

    A concept of several words is found where all of them stand, in any order; a word also in another form of the same
    stem (`turning` for `turns`, `harbours` for `harbour`). That an answer mentions a concept does not mean that what it
    says of it is right. Raises `ValueError` for no concepts, or one without a word.
    """
    if not concepts or not all(words(way) for concept in concepts for way in concept.split("|")):
        raise ValueError("key concepts: give at least one, each with a word")
    spoken = set(words(answer))
    found = [any(_stands(words(way), spoken) for way in concept.split("|")) for concept in concepts]
    return Coverage(
        tuple(concept for concept, there in zip(concepts, found, strict=True) if there),
        tuple(concept for concept, there in zip(concepts, found, strict=True) if not there),
    )


def _stands(concept: Sequence[str], spoken: set[str]) -> bool:
    return all(word in spoken or any(_one_word(word, other) for other in spoken) for word in concept)


def _one_word(first: str, second: str) -> bool:
    """Whether two words are forms of one: the same but for short endings."""
    shorter = min(len(first), len(second))
    shared = next((i for i in range(shorter) if first[i] != second[i]), shorter)
    plural = {first, second} == {first + "s", first} or {first, second} == {second + "s", second}
    return plural or (shared >= STEM and len(first) - shared <= ENDING and len(second) - shared <= ENDING)
