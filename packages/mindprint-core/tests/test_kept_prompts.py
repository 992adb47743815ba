"""Caches of texts that were read: the longest shared beginning, and bounds of their memory."""

from __future__ import annotations

import numpy as np
import pytest

from mindprint.kept_prompts import LEAST_SHARED, KeptPrompts, shared_tokens


def text(*tokens: int) -> np.ndarray:
    """Return a text that begins with as many equal tokens as are always read again."""
    return np.array([1] * LEAST_SHARED + list(tokens), np.int32)


@pytest.mark.parametrize(
    ("other", "expected"), [([1, 2, 3], 3), ([1, 2], 2), ([1, 2, 4, 3], 2), ([4, 2, 3], 0), ([], 0)]
)
def test_shared_tokens(other: list[int], expected: int) -> None:
    assert shared_tokens(np.array([1, 2, 3], np.int32), np.array(other, np.int32)) == expected


def test_the_longest_beginning_is_found_and_never_the_last_token() -> None:
    kept: KeptPrompts[str] = KeptPrompts()
    kept.keep(text(5, 6, 7), "long", 1, adapter=True)
    kept.keep(text(5, 8), "other", 1, adapter=True)
    assert kept.find(text(5, 6, 9, 9), adapter=True) == (LEAST_SHARED + 2, "long")
    assert kept.find(text(5, 8, 9), adapter=True) == (LEAST_SHARED + 2, "other")
    assert kept.find(text(5, 6, 7), adapter=True) == (LEAST_SHARED + 2, "long")
    assert kept.find(text(5, 6, 7, 8), adapter=False) is None
    assert kept.find(np.array([1, 2, 3], np.int32), adapter=True) is None


def test_a_conversations_earlier_turns_are_replaced() -> None:
    kept: KeptPrompts[str] = KeptPrompts()
    kept.keep(text(5), "first turn", 3, adapter=True)
    kept.keep(text(5), "of the base", 3, adapter=False)
    kept.keep(text(5, 6, 7), "second turn", 5, adapter=True)
    assert kept.size == 8
    assert kept.find(text(5, 9), adapter=True) == (LEAST_SHARED + 1, "second turn")


def test_texts_and_bytes_are_bounded() -> None:
    kept: KeptPrompts[int] = KeptPrompts(most_texts=2, most_bytes=10)
    for number in range(4):
        kept.keep(text(number, 0), number, 3, adapter=True)
    assert kept.size == 6
    assert kept.find(text(1, 0, 0), adapter=True) == (LEAST_SHARED, 2)
    kept.keep(text(7, 7), 7, 9, adapter=True)
    assert kept.size == 9
    kept.keep(text(8, 8), 8, 11, adapter=True)
    assert kept.find(text(7, 7, 7), adapter=True) == (LEAST_SHARED + 2, 7)
    kept.forget()
    assert kept.size == 0


def test_short_texts_are_not_worth_it() -> None:
    kept: KeptPrompts[int] = KeptPrompts()
    kept.keep(np.arange(LEAST_SHARED - 1, dtype=np.int32), 1, 1, adapter=True)
    assert kept.size == 0
