"""Key concepts of a quiz: how many of them an answer mentions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Coverage:
    """Which key concepts an answer mentions; `share` is found over all."""

    found: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def share(self) -> float:
        return len(self.found) / (len(self.found) + len(self.missing))


def coverage(answer: str, concepts: Sequence[str]) -> Coverage:
    """Look for each concept as whole words, case folded; `a|b` means either. `concepts` must not be empty.

    A concept stands in the answer also in another inflection of the same stem, and if its words stand apart.
    """
    raise NotImplementedError
