"""The documents of one person, among those of others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mindprint.contract import Document
from mindprint.errors import DataError
from mindprint.text.words import words

SHOWN = 12
"""Names that a message lists."""


def person_in(documents: Sequence[Document], author: str | None) -> frozenset[str]:
    """Return the names in the documents that mean the person.

    A name means `author` if it has every word of it: `Ada` means `Ada Lovelace <ada@example.org>`. Without `author`
    the only name in all mails is the person's. Raises `DataError`, listing the names, if none fits, or if it is needed.
    """
    counts = _names(documents)
    if not counts:
        return frozenset()
    if author is None:
        in_chats = any(document.turns for document in documents if _named_turns(document))
        if len(counts) == 1 and not in_chats:
            return frozenset(counts)
        raise DataError(f"there are texts of {len(counts)} people: say who you are with --author; {_listed(counts)}")
    wanted = set(words(author))
    if not wanted:
        raise DataError("--author is empty: give the name as it is in the files")
    meant = frozenset(name for name in counts if wanted <= set(words(name)) or author.casefold() in name.casefold())
    if not meant:
        raise DataError(f"--author {author!r} is in none of the mails and chats; {_listed(counts)}")
    return meant


def is_own(document: Document, person: frozenset[str]) -> bool:
    """Return whether the person wrote the document. One that names nobody is taken for theirs."""
    return document.author is None or document.author in person


def _names(documents: Sequence[Document]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for document in documents:
        if document.author is not None:
            counts[document.author] += 1
        counts.update(turn.author for turn in document.turns if turn.author is not None and _named_turns(document))
    return counts


def _named_turns(document: Document) -> bool:
    # An export of talks with a model has the person's turns without a name.
    return all(turn.author is not None for turn in document.turns)


def _listed(counts: Counter[str]) -> str:
    names = ", ".join(f"{name} ({count})" for name, count in counts.most_common(SHOWN))
    return f"the names found: {names}" + (f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else "")
