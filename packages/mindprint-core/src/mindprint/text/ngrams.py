"""N-grams of characters, or of words and punctuation, as 64-bit keys that NumPy counts.

Keys are hashes. Two n-grams share a key with a probability of 1 in 2^64, and their counts would then be added.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from mindprint.text.words import plain, tokens

UInt64 = NDArray[np.uint64]
Float32 = NDArray[np.float32]

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_FINISH = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(29)

RUN = 4
"""Words of a run whose repetitions are counted."""

LOOPED = 0.3
"""Share of a text's runs that occur before in it, from which on it is a loop. People stay below 0.05."""


def characters(text: str) -> UInt64:
    """Return a symbol per character of the plain text, with a space before and after: uint64 `[characters + 2]`."""
    # UTF-32 has one 32-bit number per character, so NumPy reads the text without a loop.
    return np.frombuffer(f" {plain(text)} ".encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)


# Each measure reads every text, and one with folds several times.
@lru_cache(maxsize=1024)
def word_tokens(text: str) -> UInt64:
    """Return a symbol per word (case folded) or sign of punctuation, the same in every process: uint64 `[tokens]`.

    The array cannot be written to, because all callers share it.
    """
    symbols = word_symbols(tokens(plain(text).casefold()))
    symbols.setflags(write=False)
    return symbols


def word_symbols(words: Sequence[str]) -> UInt64:
    """Return a symbol per word, the same in every process: uint64 `[words]`."""
    return np.array([_symbol(word) for word in words], dtype=np.uint64)


def grams(symbols: UInt64, lowest: int, highest: int) -> list[UInt64]:
    """Return the keys of all n-grams of `lowest` to `highest` symbols: an array `[symbols - n + 1]` for each n."""
    keys: list[UInt64] = []
    hashed = np.zeros(len(symbols), dtype=np.uint64)
    for n in range(1, highest + 1):
        # Each order extends the n-grams of the order below, except the last, which has no symbol after it.
        hashed = _extended(hashed[: max(len(symbols) - n + 1, 0)], symbols[n - 1 :])
        if n >= lowest:
            keys.append(hashed)
    return keys


def joined(symbols: UInt64, lowest: int, highest: int) -> UInt64:
    """Return the keys of `grams` of all orders in one array."""
    return np.concatenate(grams(symbols, lowest, highest))


def document_frequencies(documents: Sequence[UInt64], at_least: int, most: int) -> tuple[UInt64, NDArray[np.int64]]:
    """Return the keys that at least `at_least` documents have, sorted, and the number of those documents.

    Of more than `most` keys the most common are kept.
    """
    # A key that a document has twice counts once: the frequency is of documents.
    keys, counts = np.unique(np.concatenate([np.unique(document) for document in documents]), return_counts=True)
    kept = np.flatnonzero(counts >= at_least)
    if len(kept) > most:
        # The stable sort takes equally common keys in their own order, so the choice is the same on each platform.
        # `lookup` bisects the vocabulary, hence the second sort.
        kept = np.sort(kept[np.argsort(-counts[kept], kind="stable")[:most]])
    return keys[kept], counts[kept]


def count_matrix(documents: Sequence[UInt64], vocabulary: UInt64) -> Float32:
    """Return the count of each key of the sorted vocabulary in each document: float32 `[documents, vocabulary]`."""
    counts = np.zeros((len(documents), len(vocabulary)), dtype=np.float32)
    for row, document in enumerate(documents):
        places, known = lookup(vocabulary, document)
        counts[row] = np.bincount(places[known], minlength=len(vocabulary))
    return counts


def lookup(vocabulary: UInt64, keys: UInt64) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the place of each key in the sorted vocabulary, and whether the vocabulary has it."""
    # A key beyond the last one has no place. It gets the last place, and the comparison then rejects it.
    places = np.minimum(np.searchsorted(vocabulary, keys), max(len(vocabulary) - 1, 0))
    known = vocabulary[places] == keys if len(vocabulary) else np.zeros(len(keys), dtype=np.bool_)
    return places, known


def _extended(hashed: UInt64, symbols: UInt64) -> UInt64:
    """Return hashes of n-grams from those of their first n - 1 symbols. uint64 arithmetic wraps around."""
    # A multiplication, a shift and another multiplication spread each symbol over all bits, as in SplitMix64.
    mixed = (hashed + np.uint64(1)) * _FACTOR
    return ((mixed ^ (mixed >> _SHIFT)) + symbols) * _FINISH


# Texts say the same words again and again. The bound keeps a long run from filling the memory.
@lru_cache(maxsize=2**16)
def _symbol(token: str) -> int:
    # Python's `hash` of a string differs from process to process.
    return int.from_bytes(blake2b(token.encode(), digest_size=8).digest(), "little")


def repeated_share(text: Sequence[str]) -> float:
    """Return the share of a text's runs of `RUN` words that it had before."""
    runs = list(zip(*(text[start:] for start in range(RUN)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def is_loop(text: Sequence[str]) -> bool:
    """Return whether a text, given as its words, says the same again and again."""
    return repeated_share(text) > LOOPED
