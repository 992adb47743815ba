"""The scorer `hello`: a measure of a voice by the length of its sentences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Measure
from mindprint.errors import ConfigError
from mindprint.hookspecs import hookimpl


@dataclass(frozen=True)
class SentenceLength:
    """Words a sentence, nearer to the person's mean than to the others'."""

    ends: str
    name: str = "sentence length"

    def fit(self, own: Sequence[str], background: Sequence[str]) -> FittedLength:
        means = [float(np.mean([_words_a_sentence(text, self.ends) for text in texts])) for texts in (own, background)]
        return FittedLength(self.ends, *means)


@dataclass(frozen=True)
class FittedLength:
    """The measure once it knows the person: both means, in words a sentence."""

    ends: str
    person: float
    others: float

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        lengths = np.array([_words_a_sentence(text, self.ends) for text in texts])
        # Positive where a text is nearer to the person's mean: the contract wants higher to be more like the person.
        return np.abs(lengths - self.others) - np.abs(lengths - self.person)


def _words_a_sentence(text: str, ends: str) -> float:
    sentences = [part for part in re.split(f"[{re.escape(ends)}]+", text) if part.strip()]
    return len(text.split()) / max(len(sentences), 1)


@hookimpl
def mindprint_scorers(settings: Mapping[str, object]) -> Sequence[Measure]:
    ends = settings.get("ends", ".!?")
    if set(settings) - {"ends"} or not isinstance(ends, str) or not ends:
        raise ConfigError("voice.scorers.hello: takes `ends`, the characters that end a sentence, and nothing else")
    return [SentenceLength(ends)]
