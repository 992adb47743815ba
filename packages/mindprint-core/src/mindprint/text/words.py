"""Texts as the measures read them: with uniform typesetting, and split into words.

Curly or straight quotes, kinds of dashes, line breaks and emphasis marks show the edition or the editor, and not the
writer: two works of one author differ in them. They are made uniform before anything is measured.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache

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
# The letters of scripts without spaces between words, with the marks above and below that belong to the letter before
# them: Thai, Lao, Burmese, Khmer, Japanese syllables, and Chinese characters.
_UNSPACED_LETTERS = (
    "\u0e01-\u0e30\u0e32-\u0e33\u0e40-\u0e46\u0e81-\u0eb0\u0eb2-\u0eb3\u0ebd-\u0ec6"
    "\u1000-\u102a\u103f\u1050-\u1055\u1780-\u17b3\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff"
)
_MARKS = (
    "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece"
    "\u102b-\u103e\u1056-\u1059\u17b4-\u17d3\u3099\u309a\uff9e\uff9f"
)
_UNSPACED = rf"[{_UNSPACED_LETTERS}][{_MARKS}]*"
# `[^\W\d_]` is any letter of Unicode: `\w` without digits and the underscore. An apostrophe or a hyphen between
# letters does not end a word. In a token a hyphen does, because it is counted as punctuation there.
_LETTER = rf"[^\W\d_{_UNSPACED_LETTERS}]"
_WORD = re.compile(rf"{_UNSPACED}|{_LETTER}+(?:['-]{_LETTER}+)*|\d+")
_TOKEN = re.compile(rf"{_UNSPACED}|{_LETTER}+(?:'{_LETTER}+)*|\d+|[^\w\s]")
# Pieces that a passage can be cut between: whatever spaces part, and each letter of a script without spaces, with the
# punctuation after it.
_PIECE = re.compile(rf"\s*(?:{_UNSPACED}(?:(?!{_UNSPACED})[^\w\s])*|(?:(?!{_UNSPACED})\S)+)")
_UNSPACED_LETTER = re.compile(_UNSPACED)


# All measures read the same texts. The bound keeps long texts from filling the memory.
@lru_cache(maxsize=1024)
def plain(text: str) -> str:
    """Return text in NFC with straight quotes, one kind of dash, no emphasis marks and single spaces."""
    # NFC comes first: a combining accent is not a letter to the patterns above, so it would end a word.
    text = unicodedata.normalize("NFC", text).translate(_ALIKE)
    return " ".join(_DASHES.sub(" -- ", text).split())


def words(text: str) -> list[str]:
    """Return the words, case folded, without punctuation. Every count of words in a voice score counts these.

    Chinese, Japanese, Thai and other scripts without spaces are counted by letters, each one a word.
    """
    return _WORD.findall(plain(text).casefold())


def tokens(text: str) -> list[str]:
    """Return the words of a `plain` text as they are written, its numbers, and each sign of punctuation by itself."""
    return _TOKEN.findall(text)


def word_count(texts: Sequence[str]) -> int:
    """Return the number of words in all texts together."""
    return sum(len(words(text)) for text in texts)


def unspaced_share(texts: Sequence[str]) -> float:
    """Return the share of the words that are single letters of a script without spaces."""
    found = [word for text in texts for word in words(text)]
    return sum(_UNSPACED_LETTER.match(word) is not None for word in found) / max(len(found), 1)


def passages(text: str, length: int) -> Iterator[str]:
    """Yield pieces of about `length` words. A rest shorter than half of that is part of the piece before it."""
    pieces = _PIECE.findall(text)
    # Adding 0.5 rounds halves up. Python's `round` would round them to the even number.
    count = max(1, int(len(pieces) / length + 0.5))
    for index in range(count):
        part = pieces[index * length : (index + 1) * length if index + 1 < count else None]
        yield " ".join("".join(part).split())
