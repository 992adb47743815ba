"""Plain text and Markdown. Texts of Project Gutenberg are read without its licence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

from mindprint.contract import Block, Document
from mindprint.hookspecs import hookimpl
from mindprint.readers.encodings import is_text, read_any_text

PLAIN = (".txt", ".text", "")
MARKDOWN = (".md", ".markdown", ".mdown", ".mkd")

VERSE = 45
"""Characters of a mean line below which the lines of a paragraph are verse, and keep their breaks."""

HEADING_WORDS = 12

_GUTENBERG_START = re.compile(r"^\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG.*$", re.IGNORECASE | re.MULTILINE)
_GUTENBERG_END = re.compile(
    r"^(?:\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG|End of (?:the )?Project Gutenberg).*$",
    re.IGNORECASE | re.MULTILINE,
)
_CREDITS = re.compile(
    r"(?:Produced by|E-text prepared by|Transcribed from|\[Transcriber|Transcriber's note)", re.IGNORECASE
)
_NUMBERED = re.compile(
    r"(?:chapter|part|book|volume|letter|act|scene|canto|kapitel|teil|buch|chapitre|partie|livre|cap[ií]tulo|parte)\b"
    r"|\d+\.(?:\s|$)",
    re.IGNORECASE,
)
_ROMAN = re.compile(r"[IVXLC]+(?:\.(?:\s|$)|$)")
_ENDS_SENTENCE = re.compile(r"[.!?,;:…\"'”’»)]\s*$")
_ILLUSTRATION = re.compile(r"\[(?:Illustration|Footnote|Sidenote)[^\]]*\]")
_RULE = re.compile(r"[\s*_\-–—#~=.·•]+")
_FRONT_MATTER = re.compile(r"\A(?:---\n.*?\n(?:---|\.\.\.)|\+\+\+\n.*?\n\+\+\+)[ \t]*(?:\n|\Z)", re.DOTALL)


@hookimpl
def mindprint_read_documents(path: Path, head: bytes) -> Iterable[Document] | None:
    """Read a text or a Markdown file as one document."""
    suffix = path.suffix.lower()
    if not path.is_file() or suffix not in PLAIN + MARKDOWN or not is_text(head):
        return None
    return _documents(path, markdown=suffix in MARKDOWN)


def _documents(path: Path, *, markdown: bool) -> Iterator[Document]:
    text = read_any_text(path)
    yield Document(str(path), blocks=tuple(markdown_blocks(text) if markdown else plain_blocks(text)))


def plain_blocks(text: str) -> Iterator[Block]:
    """Yield the paragraphs and headings of a plain text.

    Paragraphs are set apart by empty lines. A text without any has one paragraph a line.
    """
    text, from_gutenberg = _without_gutenberg(text.replace("\r\n", "\n").replace("\r", "\n"))
    text = _ILLUSTRATION.sub("", text)
    parts = re.split(r"\n[ \t]*\n\s*", text.strip("\n"))
    if len(parts) == 1 and "\n" in text.strip():
        parts = text.split("\n")
    credits_end = 12 if from_gutenberg else 0
    for number, part in enumerate(parts):
        lines = [line.strip() for line in part.split("\n") if line.strip()]
        if not lines or (number < credits_end and _CREDITS.match(lines[0])):
            continue
        yield Block(_joined(lines), heading=_is_heading(lines))


def markdown_blocks(text: str) -> Iterator[Block]:
    """Yield the paragraphs, list items and headings of Markdown (CommonMark), without code, quotes and HTML."""
    from markdown_it import MarkdownIt  # noqa: PLC0415 (only for Markdown)

    quoted = heading = 0
    for token in MarkdownIt("commonmark").parse(_FRONT_MATTER.sub("", text)):
        # A quotation is somebody else's text.
        quoted += token.nesting if token.type.startswith("blockquote") else 0
        heading += token.nesting if token.type.startswith("heading") else 0
        if token.type == "hr":
            yield Block("* * *", heading=True)
        if token.type != "inline" or quoted:
            continue
        words = "".join(_inline(child.type, child.content) for child in token.children or ())
        if words.strip():
            yield Block(" ".join(words.split()), heading=heading > 0)


def _inline(kind: str, content: str) -> str:
    """Return the text of a part of a line: an image's description and HTML are not text."""
    if kind in ("softbreak", "hardbreak"):
        return " "
    return content if kind in ("text", "text_special", "code_inline") else ""


def _without_gutenberg(text: str) -> tuple[str, bool]:
    """Return a text without Project Gutenberg's header and licence, and whether it had them."""
    start, end = _GUTENBERG_START.search(text), _GUTENBERG_END.search(text)
    if start:
        text = text[start.end() : end.start() if end and end.start() > start.end() else None]
    elif end:
        text = text[: end.start()]
    return text, bool(start or end)


def _joined(lines: list[str]) -> str:
    verse = len(lines) > 2 and sum(map(len, lines)) < VERSE * len(lines)
    if verse:
        return "\n".join(lines)
    # A hyphen at the end of a line divides a word if a small letter follows it.
    words = lines[0]
    for before, line in pairwise(lines):
        divided = before.endswith("-") and not before.endswith("--") and line[0].islower()
        # The hyphen stays: `well-` and `known` are as common as a divided word, and wrapping does not divide.
        words += line if divided else f" {line}"
    return words


def _is_heading(lines: list[str]) -> bool:
    text = " ".join(lines)
    if _RULE.fullmatch(text):
        return True
    if len(text.split()) > HEADING_WORDS or len(lines) > 3:
        return False
    if any(map(str.isalpha, text)) and text == text.upper() and text != text.lower():
        return True
    numbered = _NUMBERED.match(text) or _ROMAN.match(text)
    return bool(numbered) and not _ENDS_SENTENCE.search(text.rstrip(".")) and len(lines) <= 2
