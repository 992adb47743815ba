"""The line of a file on which a part of a document is: readers join lines, so it is searched for in the file."""

from __future__ import annotations

import re
from bisect import bisect_right
from pathlib import Path

from mindprint.errors import DataError
from mindprint.input_files import read_bytes
from mindprint.readers.encodings import HEAD, LARGEST_TEXT, is_text, read_any_text

CONTEXT = 3
"""Words before a part that must be there too, where they are: the same address may be in a file many times."""

_MESSAGE = re.compile(r"(?m)^From ")
_HEADERS_END = re.compile(r"\r?\n\r?\n")


class Places:
    """The files of documents, each read once."""

    def __init__(self) -> None:
        self._files: dict[Path, _File | None] = {}

    def line(self, document: str, text: str, start: int, end: int) -> int | None:
        """Return the line of `text[start:end]` in the document's file, from 1.

        None where the file does not have these letters in this order: it is packed, as DOCX is, or encoded, as some
        mails are.
        """
        path, place = _file_of(document)
        if path not in self._files:
            # One file at a time is in memory: the documents of a file follow each other.
            self._files = {path: _read(path)}
        file = self._files[path]
        if file is None:
            return None
        thing, before = text[start:end].split(), text[:start].split()[-CONTEXT:]
        return file.line([*before, *thing], len(before), place) or file.line(thing, 0, place)


class _File:
    """The text of a file, with the beginnings of its lines and of its messages."""

    def __init__(self, path: Path, text: str) -> None:
        self._text = text
        self._lines = [0, *(match.end() for match in re.finditer("\n", text))]
        self._at = 0
        self._is_mail = path.suffix.lower() == ".eml" or path.parent.name in ("cur", "new")
        self._messages = [match.start() for match in _MESSAGE.finditer(text)] if text.startswith("From ") else []

    def line(self, words: list[str], before: int, place: str) -> int | None:
        # Words that the reader joined by a space may be on two lines of the file.
        parts = [re.escape(word) for word in words]
        pattern = re.compile(r"\s+".join([*parts[:before], f"({parts[before]}", *parts[before + 1 :]]) + ")")
        first = self._first(place)
        # From the last one on, because things are asked for in their order.
        match = pattern.search(self._text, max(first, self._at)) or pattern.search(self._text, first)
        if match is None:
            return None
        self._at = match.end()
        return bisect_right(self._lines, match.start(1))

    def _first(self, place: str) -> int:
        """Return where the document may begin: a mail's headers are not its text."""
        start = 0
        if self._messages and place.isdigit() and int(place) <= len(self._messages):
            start = self._messages[int(place) - 1]
        if self._messages or self._is_mail:
            end = _HEADERS_END.search(self._text, start)
            start = end.end() if end else start
        return start


def _file_of(document: str) -> tuple[Path, str]:
    """Return the file of a document, and its place in it."""
    if Path(document).is_file():
        return Path(document), ""
    name, _, place = document.partition("#") if not Path(document).exists() else (document, "", "")
    # The name of a file may have a `#`, and so may the place.
    while not Path(name).exists() and "#" in place:
        more, _, place = place.partition("#")
        name = f"{name}#{more}"
    if Path(name).is_dir():
        for folder in ("cur", "new"):
            for path in (Path(name) / folder).glob(f"{place.split(':')[0]}*"):
                return path, ""
    return Path(name), place


def _read(path: Path) -> _File | None:
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
        if not is_text(head):
            return None
        # A mailbox has messages in many encodings: bytes that are none of UTF-8 match no letter.
        mail = head.startswith(b"From ") or path.suffix.lower() == ".eml"
        text = read_bytes(path, LARGEST_TEXT).decode("utf-8", "replace") if mail else read_any_text(path)
    except (OSError, DataError):
        return None
    return _File(path, text)
