"""N-grams of anything as 64-bit keys, counted with NumPy: of characters, or of words and punctuation.

Keys are hashes; that two n-grams share one is as likely as 1 in 2^64 a pair, and would add one count to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from mindprint.text.words import plain, tokens

UInt64 = NDArray[np.uint64]
Float32 = NDArray[np.float32]

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_FINISH = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(29)


def characters(text: str) -> UInt64:
    """One symbol a character of the plain text, a space before and after: uint64 `[characters + 2]`."""
    return np.frombuffer(f" {plain(text)} ".encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)


def word_tokens(text: str) -> UInt64:
    """One symbol a word (case folded) or sign of punctuation: uint64 `[tokens]`; the same in every process."""
    return np.array([_symbol(token) for token in tokens(plain(text).casefold())], dtype=np.uint64)


def grams(symbols: UInt64, lowest: int, highest: int) -> list[UInt64]:
    """The keys of all n-grams from `lowest` to `highest` symbols: an array `[symbols - n + 1]` for each n."""
    keys: list[UInt64] = []
    hashed = np.zeros(len(symbols), dtype=np.uint64)
    for n in range(1, highest + 1):
        hashed = _extended(hashed[: max(len(symbols) - n + 1, 0)], symbols[n - 1 :])
        if n >= lowest:
            keys.append(hashed)
    return keys


def joined(symbols: UInt64, lowest: int, highest: int) -> UInt64:
    """`grams` of all orders in one array."""
    return np.concatenate(grams(symbols, lowest, highest))


def document_frequencies(documents: Sequence[UInt64], at_least: int, most: int) -> tuple[UInt64, NDArray[np.int64]]:
    """The keys that stand in at least `at_least` documents, sorted, and in how many; at most the `most` commonest."""
    keys, counts = np.unique(np.concatenate([np.unique(document) for document in documents]), return_counts=True)
    kept = np.flatnonzero(counts >= at_least)
    if len(kept) > most:
        kept = np.sort(kept[np.argsort(-counts[kept], kind="stable")[:most]])
    return keys[kept], counts[kept]


def count_matrix(documents: Sequence[UInt64], vocabulary: UInt64) -> Float32:
    """How often each key of the (sorted) vocabulary stands in each document: float32 `[documents, vocabulary]`."""
    counts = np.zeros((len(documents), len(vocabulary)), dtype=np.float32)
    for row, document in enumerate(documents):
        places, found = lookup(vocabulary, document)
        counts[row] = np.bincount(places[found], minlength=len(vocabulary))
    return counts


def lookup(vocabulary: UInt64, keys: UInt64) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The place of each key in the sorted vocabulary, and whether it is there at all."""
    places = np.minimum(np.searchsorted(vocabulary, keys), max(len(vocabulary) - 1, 0))
    found = vocabulary[places] == keys if len(vocabulary) else np.zeros(len(keys), dtype=np.bool_)
    return places, found


def _extended(hashed: UInt64, symbols: UInt64) -> UInt64:
    """Hashes of n-grams from those of their first n - 1 symbols; uint64 arithmetic wraps around."""
    mixed = (hashed + np.uint64(1)) * _FACTOR
    return ((mixed ^ (mixed >> _SHIFT)) + symbols) * _FINISH


def _symbol(token: str) -> int:
    return int.from_bytes(blake2b(token.encode(), digest_size=8).digest(), "little")
