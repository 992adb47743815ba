"""Texts as the measures read them: without what a typesetter chose, and in words.

Curly or straight quotes, kinds of dashes, line breaks and emphasis marks tell the edition or the editor, not the
writer; two works of one author differ in them. They are made alike before anything is measured.
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
        "\u00ad": None,
        "\u200b": None,
        "_": None,
        "*": None,
    }
)
_DASHES = re.compile(r"\s*(?:--+|[\u2012-\u2015])\s*")
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*|\d+")
_TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+|[^\w\s]")


def plain(text: str) -> str:
    """NFC, straight quotes, one kind of dash, no emphasis marks, single spaces."""
    text = unicodedata.normalize("NFC", text).translate(_ALIKE)
    return " ".join(_DASHES.sub(" -- ", text).split())


def words(text: str) -> list[str]:
    """The words, case folded, without punctuation; what "words" counts everywhere in a voice score."""
    return _WORD.findall(plain(text).casefold())


def tokens(text: str) -> list[str]:
    """Words as they are written, numbers, and each sign of punctuation by itself; of a `plain` text."""
    return _TOKEN.findall(text)


def word_count(texts: Sequence[str]) -> int:
    """Words in all of them together."""
    return sum(len(words(text)) for text in texts)


def passages(text: str, length: int) -> Iterator[str]:
    """Pieces of about `length` words (separated by spaces); a last one shorter than half goes to the one before."""
    pieces = text.split()
    count = max(1, int(len(pieces) / length + 0.5))
    for index in range(count):
        yield " ".join(pieces[index * length : (index + 1) * length if index + 1 < count else None])
