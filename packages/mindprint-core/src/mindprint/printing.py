"""Tables and lines, as plain text for a terminal and as HTML for a notebook, from the standard library alone."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any, TextIO

PROGRAM = "mindprint"

# Control characters but tab and line feed, line and paragraph separators, marks that turn the direction of writing, and
# halves of surrogate pairs.
_STEERING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_CELL = "padding:0.2em 0.8em;vertical-align:top;"
_FIGURE = f"{_CELL}text-align:right;white-space:nowrap"
_WORDS = f"{_CELL}text-align:left;white-space:pre-wrap"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[int] = ()) -> str:
    """Align columns as plain text. The columns in `numbers` are set flush right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[int] = ()) -> str:
    """Write a table as HTML with every cell escaped. Line breaks in a cell are kept."""

    def row(tag: str, cells: Sequence[str]) -> str:
        styles = (_FIGURE if column in numbers else _WORDS for column in range(len(cells)))
        written = (f'<{tag} style="{style}">{escape(cell)}</{tag}>' for style, cell in zip(styles, cells, strict=True))
        return f"<tr>{''.join(written)}</tr>"

    body = "".join(row("td", cells) for cells in rows)
    style = "border-collapse:collapse;margin:0.6em 0"
    return f'<table style="{style}"><thead>{row("th", header)}</thead><tbody>{body}</tbody></table>'


def html_text(text: str, *, warning: bool = False) -> str:
    """Write lines as one HTML paragraph, escaped, with their line breaks."""
    colour = "color:#a15c00;" if warning else ""
    return f'<p style="{colour}margin:0.4em 0;white-space:pre-wrap">{escape(text)}</p>'


def printable(text: str, *, lines: bool = False) -> str:
    """Replace control characters, because a model's words must not move the cursor. `lines` keeps line breaks."""
    if lines:
        return "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)
    return "".join(sign if sign.isprintable() else " " for sign in text)


def visible(text: str) -> str:
    r"""Write out what would steer a terminal instead of being shown: `\x1b` for an escape character.

    File names, messages of a template and the contents of files come from others. Line breaks and tabs stay. Signs that
    turn the direction of writing are written out too, and so is half a surrogate pair, which no encoding takes.
    """
    return _STEERING.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)


def short_path(path: Path) -> str:
    """Write a path relative to the working directory where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


class LossyStream:
    """A text stream that drops what cannot be written: a closed terminal must not end the work that it shows.

    Characters that the encoding lacks are replaced. Everything else is passed to the stream.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if self._stream is not None:
            with suppress(OSError, ValueError):  # ValueError: the stream is closed
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:
                    encoding = self._stream.encoding or "ascii"
                    self._stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            with suppress(OSError, ValueError):
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        # Libraries that print ask a stream for more, such as `isatty` or `encoding`.
        return getattr(self._stream, name)


def tell(text: str) -> None:
    """Write a line about the work on standard error, after everything that was printed before it.

    A line that cannot be written is dropped.
    """
    LossyStream(sys.stdout).flush()  # what fails here is reported when standard output is flushed for good
    stream = LossyStream(sys.stderr)
    stream.write(visible(text) + "\n")
    stream.flush()
