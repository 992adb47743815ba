"""The lexicon: phrases that a person uses, phrases that she never uses, and things that she never confuses.

A scorer plugin that is part of core: `voice.scorers: {lexicon: {wanted: [...], unwanted: [...], distinctions: [...]}}`.
It measures a list that somebody wrote beforehand, so it is shown next to the voice score and never averaged into it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field, ValidationError, field_validator

from mindprint.config import Section
from mindprint.contract import Fitted, Float64, Measure
from mindprint.errors import ConfigError
from mindprint.hookspecs import hookimpl
from mindprint.text.words import plain, words

# Contractions are listed whole, because `words` does not split a word at an apostrophe.
NEGATIONS = frozenset(
    [
        "not",
        "no",
        "never",
        "nor",
        "neither",
        "none",
        "without",
        "cannot",
        "can't",
        "won't",
        "don't",
        "doesn't",
        "didn't",
        "isn't",
        "aren't",
        "wasn't",
        "weren't",
        "wouldn't",
        "shouldn't",
        "couldn't",
        "hasn't",
        "haven't",
        "hadn't",
        "hardly",
    ]
)
REACH = 4
"""A negation this many words before a phrase, in the same clause, negates it (NegEx, Chapman et al. 2001, has five)."""

LINKS = frozenset(["is", "are", "was", "were", "be", "means", "mean", "equals", "called"])
"""Words by which a clause says that one thing is another."""

# `plain` writes every dash as two hyphens. `but` begins a clause too: a negation before it does not reach beyond it.
_CLAUSE = re.compile(r"[.!?;:,()\"]|--|\bbut\b", re.IGNORECASE)


class LexiconConfig(Section):
    """Settings under `voice.scorers.lexicon`. Case and punctuation do not matter."""

    wanted: list[str] = Field([], description="Phrases of the person.")
    unwanted: list[str] = Field([], description="Phrases that she never uses.")
    distinctions: list[list[str]] = Field([], description="Pairs of things that are never called one another.")

    @field_validator("wanted", "unwanted")
    @classmethod
    def _words(cls, phrases: list[str]) -> list[str]:
        if empty := [phrase for phrase in phrases if not words(phrase)]:
            raise ValueError(f"{empty[0]!r} has no word")
        # Clauses are searched one by one, so a phrase with such a sign in it would never be found.
        if cut := [phrase for phrase in phrases if _CLAUSE.search(plain(phrase))]:
            raise ValueError(f"{cut[0]!r} spans clauses: give each part as a phrase")
        return phrases

    @field_validator("distinctions")
    @classmethod
    def _pairs(cls, pairs: list[list[str]]) -> list[list[str]]:
        for pair in pairs:
            if len(pair) != 2 or not all(words(side) for side in pair) or words(pair[0]) == words(pair[1]):
                raise ValueError(f"{pair!r} is not a pair of two different phrases")
        return pairs


@dataclass(frozen=True)
class Finding:
    """Occurrences of the lexicon in a text: each phrase as often as it occurs without a negation."""

    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]
    confused: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Lexicon:
    """Phrases wanted and unwanted, and pairs never to be confused."""

    wanted: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    distinctions: tuple[tuple[str, str], ...] = ()
    name: str = "lexicon"

    def find(self, text: str) -> Finding:
        """Search each clause of a text. A negated phrase (`never say X`) does not count.

        A pair is confused if a clause says that one is the other (`a tide is a current`) and does not deny it. A phrase
        that begins with a negation itself (`never you`) counts.
        """
        clauses = [words(clause) for clause in _CLAUSE.split(plain(text))]
        return Finding(
            tuple(phrase for phrase in self.wanted for clause in clauses for _ in _used(words(phrase), clause)),
            tuple(phrase for phrase in self.unwanted for clause in clauses for _ in _used(words(phrase), clause)),
            tuple(
                pair
                for pair in self.distinctions
                for clause in clauses
                if _confused(words(pair[0]), words(pair[1]), clause)
            ),
        )

    def fit(self, own: Sequence[str], background: Sequence[str]) -> Fitted:  # noqa: ARG002 (nothing to learn)
        """Return the measure: wanted phrases less unwanted ones and confusions, per hundred words."""

        def decide(texts: Sequence[str]) -> Float64:
            return np.array([self._rate(text) for text in texts], dtype=np.float64)

        return decide

    def _rate(self, text: str) -> float:
        finding = self.find(text)
        balance = len(finding.wanted) - len(finding.unwanted) - len(finding.confused)
        # An answer without a word has nothing to count. Dividing by 1 gives it 0.
        return 100 * balance / max(len(words(text)), 1)


@hookimpl
def mindprint_scorers(settings: Mapping[str, object]) -> Sequence[Measure]:
    """Return the lexicon of the settings. Raises `ConfigError` naming a wrong one."""
    try:
        config = LexiconConfig.model_validate(settings)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(["voice.scorers.lexicon", *(str(part) for part in problem["loc"])])
        raise ConfigError(f"{where}: {problem['msg']}") from error
    pairs = tuple((first, second) for first, second in config.distinctions)
    return [Lexicon(tuple(config.wanted), tuple(config.unwanted), pairs)]


def _used(phrase: Sequence[str], clause: Sequence[str]) -> Iterator[int]:
    """Yield the places of a phrase in a clause that have no negation before them."""
    for start in _places(phrase, clause):
        # The words of the phrase itself are not searched, so that `never you` does not negate itself.
        if NEGATIONS.isdisjoint(clause[max(0, start - REACH) : start]):
            yield start


def _places(phrase: Sequence[str], clause: Sequence[str]) -> list[int]:
    size = len(phrase)
    return [start for start in range(len(clause) - size + 1) if list(clause[start : start + size]) == list(phrase)]


def _confused(first: Sequence[str], second: Sequence[str], clause: Sequence[str]) -> bool:
    """Return whether a clause says, without denial, that one is the other, in either order."""
    for subject, predicate in ((first, second), (second, first)):
        for start in _places(subject, clause):
            for end in _places(predicate, clause):
                between = clause[start + len(subject) : end]
                denied = not NEGATIONS.isdisjoint([*clause[max(0, start - REACH) : start], *between])
                # The slice is empty if the phrases overlap or come in the other order. Phrases that are far apart are
                # more likely to be about different things.
                if 0 < len(between) <= REACH and not LINKS.isdisjoint(between) and not denied:
                    return True
    return False
