"""Texts as the measures read them: with uniform typesetting, and split into words.

Curly or straight quotes, kinds of dashes, line breaks and emphasis marks show the edition or the editor, and not the
writer: two works of one author differ in them. They are made uniform before anything is measured.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

_ALIKE = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201a": "'",
        "\u201b": "'",
        "\u02bc": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u201e": '"',
        "\u00ab": '"',
        "\u00bb": '"',
        "\u2026": "...",
        "\u2010": "-",
        "\u2011": "-",
        # The soft hyphen and the zero-width space are invisible, and would split a word in two.
        "\u00ad": None,
        "\u200b": None,
        "_": None,
        "*": None,
    }
)
# Plain-text editions write a dash as two hyphens. The spaces around it differ from edition to edition too.
_DASHES = re.compile(r"\s*(?:--+|[\u2012-\u2015])\s*")
# `[^\W\d_]` is any letter of Unicode: `\w` without digits and the underscore. An apostrophe or a hyphen between
# letters does not end a word. In a token a hyphen does, because it is counted as punctuation there.
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*|\d+")
_TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+|[^\w\s]")


def plain(text: str) -> str:
    """Return text in NFC with straight quotes, one kind of dash, no emphasis marks and single spaces."""
    # NFC comes first: a combining accent is not a letter to the patterns above, so it would end a word.
    text = unicodedata.normalize("NFC", text).translate(_ALIKE)
    return " ".join(_DASHES.sub(" -- ", text).split())


def words(text: str) -> list[str]:
    """Return the words, case folded, without punctuation. Every count of words in a voice score counts these."""
    return _WORD.findall(plain(text).casefold())


def tokens(text: str) -> list[str]:
    """Return the words of a `plain` text as they are written, its numbers, and each sign of punctuation by itself."""
    return _TOKEN.findall(text)


def word_count(texts: Sequence[str]) -> int:
    """Return the number of words in all texts together."""
    return sum(len(words(text)) for text in texts)


def passages(text: str, length: int) -> Iterator[str]:
    """Yield pieces of about `length` words. A rest shorter than half of that is part of the piece before it."""
    pieces = text.split()
    # Adding 0.5 rounds halves up. Python's `round` would round them to the even number.
    count = max(1, int(len(pieces) / length + 0.5))
    for index in range(count):
        yield " ".join(pieces[index * length : (index + 1) * length if index + 1 < count else None])
