"""Synthetic writers: the same content words, other function words, at other rates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CONTENT = [f"{a}{b}{c}" for a in ("lam", "ter", "gol", "rin", "mos") for b in "aeiou" for c in ("t", "ld", "sh", "ck")]
FUNCTION = [
    "the",
    "a",
    "and",
    "but",
    "so",
    "of",
    "to",
    "in",
    "it",
    "was",
    "that",
    "for",
    "with",
    "as",
    "at",
    "which",
    "when",
    "then",
    "had",
    "not",
]
SIGNS = [".", ",", ";", "?"]


def writer(number: int, texts: int, words: int, *, sharpness: float = 0.6) -> list[str]:
    """Texts of one writer, whose rates of function words and signs depend on `number` alone."""
    style = np.random.default_rng([number, 0])
    rates = [style.dirichlet(np.full(len(part), 1 / sharpness)) for part in (FUNCTION, SIGNS)]
    rng = np.random.default_rng([number, texts, words, 1])
    return [_text(rng, rates, words) for _ in range(texts)]


def _text(rng: np.random.Generator, rates: Sequence[np.ndarray], words: int) -> str:
    out: list[str] = []
    while len(out) < words:
        out += [str(rng.choice(FUNCTION, p=rates[0])), str(rng.choice(CONTENT))]
        if rng.random() < 0.2:
            out[-1] += str(rng.choice(SIGNS, p=rates[1]))
    return " ".join(out[:words])
