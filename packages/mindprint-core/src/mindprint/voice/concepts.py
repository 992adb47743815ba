"""Key concepts of a quiz: how many of them an answer mentions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindprint.text.words import words

ENDINGS = ("'s", "ing", "ed", "es", "s", "e")
"""English endings that make no other word, if three letters or more stand before them."""


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

    A concept of several words is found where all of them stand, in any order; a word also with another English ending
    (`turning` for `turns`, `harbours` for `harbour`). That an answer mentions a concept does not mean that what it
    says of it is right. Raises `ValueError` for no concepts, or one without a word.
    """
    if not concepts or not all(words(way) for concept in concepts for way in concept.split("|")):
        raise ValueError("key concepts: give at least one, each with a word")
    spoken = {_stem(word) for word in words(answer)}
    found = [any({_stem(word) for word in words(way)} <= spoken for way in concept.split("|")) for concept in concepts]
    return Coverage(
        tuple(concept for concept, there in zip(concepts, found, strict=True) if there),
        tuple(concept for concept, there in zip(concepts, found, strict=True) if not there),
    )


def _stem(word: str) -> str:
    ending = next((end for end in ENDINGS if word.endswith(end) and len(word) - len(end) >= 3), "")
    return word.removesuffix(ending)
