"""Bytes of a text file in an unknown encoding."""

from __future__ import annotations

import codecs
from pathlib import Path

from mindprint.errors import DataError
from mindprint.input_files import read_bytes

HEAD = 4096
"""Bytes of a file that a reader sees before it is asked to read it."""

LARGEST_TEXT = 2**26
"""Bytes of the largest text that is read: ten million words. Larger files are logs or data."""

SAMPLE = 2**16
"""Bytes by which an encoding is guessed."""

_MARKS = (
    # UTF-32's mark begins with that of UTF-16, so it is looked for first.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_any_text(path: Path) -> str:
    """Read a text file in whichever encoding it is. Raises `DataError` for one that is too large or no text."""
    try:
        content = read_bytes(path, LARGEST_TEXT)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return decode(content, path)


def decode(content: bytes, name: object) -> str:
    """Return the text of bytes: as their mark says, else as UTF-8, else in the encoding that fits best.

    Raises `DataError`, naming `name`, for bytes that are no text.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content.decode(encoding, errors="replace")
    # NUL is in no text of a file, but for UTF-16 without a mark, which nearly every Latin letter gives away.
    if b"\0" in content[:HEAD]:
        raise DataError(f"{name}: is not a text")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        pass
    import charset_normalizer  # noqa: PLC0415 (most files are UTF-8)

    # The bytes that are not ASCII decide, and a long text may begin without one.
    first = next(index for index, byte in enumerate(content) if byte > 127)
    best = charset_normalizer.from_bytes(content[max(0, first - SAMPLE // 2) : first + SAMPLE // 2]).best()
    if best is None:
        raise DataError(f"{name}: is not a text in any known encoding")
    return content.decode(best.encoding, errors="replace")


def is_text(head: bytes) -> bool:
    """Return whether the beginning of a file may be a text."""
    return not head.startswith(_BINARY) and (b"\0" not in head or head.startswith(_MARKED))


_MARKED = tuple(mark for mark, _ in _MARKS)
_BINARY = (b"%PDF", b"PK\x03\x04", b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"\x1f\x8b", b"\x7fELF", b"{\\rtf", b"%!PS")
