"""Key concepts of a quiz, and the share of them that an answer mentions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindprint.text.words import words

# `es` is before `s`, because `_stem` removes the first ending that fits.
ENDINGS = ("'s", "ing", "ed", "es", "s", "e")
"""English endings that are ignored if three letters or more come before them."""


@dataclass(frozen=True)
class Coverage:
    """Key concepts that an answer mentions, and those that it lacks."""

    found: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def share(self) -> float:
        """Return the number of concepts found divided by the number of all."""
        return len(self.found) / (len(self.found) + len(self.missing))


def coverage(answer: str, concepts: Sequence[str]) -> Coverage:
    """Look for each concept in an answer. `tide|ebb` means either.

    A concept of several words is found if the answer has all of them, in any order. Other English endings count too
    (`turning` for `turns`, `harbours` for `harbour`). An answer can mention a concept and still be wrong about it.
    Raises `ValueError` for no concepts, or for one without a word.
    """
    # A concept without a word would be mentioned by any answer: the empty set is a subset of every set.
    if not concepts or not all(words(way) for concept in concepts for way in concept.split("|")):
        raise ValueError("key concepts: give at least one, each with a word")
    spoken = {_stem(word) for word in words(answer)}
    mentioned = [
        any({_stem(word) for word in words(way)} <= spoken for way in concept.split("|")) for concept in concepts
    ]
    return Coverage(
        tuple(concept for concept, there in zip(concepts, mentioned, strict=True) if there),
        tuple(concept for concept, there in zip(concepts, mentioned, strict=True) if not there),
    )


def _stem(word: str) -> str:
    # Without the limit of three letters `sing` would lose its `ing`, and `red` would become `r`.
    ending = next((end for end in ENDINGS if word.endswith(end) and len(word) - len(end) >= 3), "")
    return word.removesuffix(ending)
