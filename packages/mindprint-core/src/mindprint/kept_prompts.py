"""Caches of texts that a model has read, kept for the next turn of a conversation: which of them are kept, and found.

A chat sends its whole history with each turn. Its next prompt begins with the last one and its answer, whose keys and
values a backend has just computed. Backends keep a few of them with the loaded model (`KeptPrompts`), where a caller
listens to tokens: that is a conversation. An evaluation does not listen, and depends on nothing that was asked before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from mindprint.contract import Int32

Kept = TypeVar("Kept")

MOST_TEXTS = 8
"""The most texts that are kept: as many as `serve` answers together."""

MOST_BYTES = 512 * 2**20
"""The most bytes that their caches take."""

LEAST_SHARED = 16
"""Fewer tokens than this are read again: to fetch them from a cache saves nothing."""


@dataclass(frozen=True)
class _Text(Generic[Kept]):
    tokens: Int32
    adapter: bool
    cache: Kept
    size: int


class KeptPrompts(Generic[Kept]):
    """The caches of the last texts, of one model with its present weights. Backends forget them when weights change."""

    def __init__(self, most_texts: int = MOST_TEXTS, most_bytes: int = MOST_BYTES) -> None:
        self._most_texts = most_texts
        self._most_bytes = most_bytes
        self._texts: list[_Text[Kept]] = []

    @property
    def size(self) -> int:
        """The bytes that the kept caches take."""
        return sum(text.size for text in self._texts)

    def find(self, prompt: Int32, *, adapter: bool) -> tuple[int, Kept] | None:
        """Return how many of a prompt's first tokens the best cache holds, and that cache. None if it saves nothing.

        The last token of a prompt is never among them, because its logits are needed.
        """
        shared = [(shared_tokens(text.tokens, prompt[:-1]), text) for text in self._texts if text.adapter == adapter]
        length, best = max(shared, key=lambda pair: pair[0], default=(0, None))
        return None if best is None or length < LEAST_SHARED else (length, best.cache)

    def keep(self, tokens: Int32, cache: Kept, size: int, *, adapter: bool) -> None:
        """Keep the cache of a text, int32 `[T]`, which takes `size` bytes. The oldest ones make room for it."""
        if size > self._most_bytes or len(tokens) < LEAST_SHARED:
            return
        # A conversation's earlier turns are the beginning of this text. They would only take room.
        self._texts = [
            text
            for text in self._texts
            if text.adapter != adapter or shared_tokens(text.tokens, tokens) < len(text.tokens)
        ]
        self._texts.append(_Text(tokens, adapter, cache, size))
        while len(self._texts) > self._most_texts or self.size > self._most_bytes:
            del self._texts[0]

    def forget(self) -> None:
        """Forget all of them, because the weights change."""
        self._texts.clear()


def shared_tokens(text: Int32, other: Int32) -> int:
    """Return the number of tokens with which both texts begin."""
    length = min(len(text), len(other))
    unlike = np.flatnonzero(text[:length] != other[:length])
    return int(unlike[0]) if len(unlike) else length
