"""Passages: stretches of whole paragraphs of a document, of a length that suits a completion."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mindprint.contract import Block, Document
from mindprint.text.words import words

LEAST, MOST = 60, 250
"""Words of a passage."""

_SPEECH = re.compile(r"^[\"'“„«‘»—–-]")
_SENTENCE = re.compile(r"(?<=[.!?…][\"'”’»)])\s+|(?<=[.!?…])\s+")


@dataclass(frozen=True)
class Passage:
    """A passage: its document, its place among the passages of that document, and its text of whole paragraphs.

    `before` is the text that comes before it under the same heading, empty at the beginning.
    """

    document: str
    place: int
    text: str
    before: str = ""


@dataclass(frozen=True)
class _Piece:
    """A paragraph, or the part of a long one that ends with a sentence."""

    text: str
    words: int
    speech: bool


def cut(document: Document, least: int = LEAST, most: int = MOST) -> Iterator[Passage]:
    """Yield a document's passages of `least` to `most` words, never across a heading.

    A passage ends near the middle of the two bounds, and later if a dialogue would be cut. A paragraph of more than
    `most` words is divided between sentences. Less than `least` words before a heading belong to the passage before
    them if it has room, and are left out otherwise.
    """
    place = 0
    for section in _sections(document.blocks):
        before = ""
        for group in _groups(section, least, most):
            text = "\n\n".join(piece.text for piece in group)
            yield Passage(document.name, place, text, before)
            before, place = text, place + 1


def _sections(blocks: Sequence[Block]) -> Iterator[list[str]]:
    section: list[str] = []
    for block in blocks:
        if block.heading:
            yield section
            section = []
        else:
            section.append(block.text)
    yield section


def _groups(section: Sequence[str], least: int, most: int) -> Iterator[list[_Piece]]:
    """Yield the pieces of each passage of a section."""
    groups: list[list[_Piece]] = []
    group: list[_Piece] = []
    for piece in (piece for text in section for piece in _pieces(text, most)):
        size = _size(group)
        talks_on = bool(group) and group[-1].speech and piece.speech
        full = size >= least and (size + piece.words > most or (size >= (least + most) // 2 and not talks_on))
        if full:
            groups.append(group)
            group = []
        group.append(piece)
    if _size(group) >= least:
        groups.append(group)
    elif groups and _size(groups[-1]) + _size(group) <= most:
        groups[-1] += group
    yield from groups


def _pieces(text: str, most: int) -> Iterator[_Piece]:
    count, speech = len(words(text)), bool(_SPEECH.match(text))
    if count <= most:
        yield _Piece(text, count, speech)
        return
    # As many equal parts as are needed, so that no short one is left at the end.
    limit = count / -(-count // most)
    part: list[str] = []
    size = 0
    for sentence in _SENTENCE.split(text):
        length = len(words(sentence))
        if part and (size >= limit or size + length > most):
            yield _Piece(" ".join(part), size, speech)
            part, size = [], 0
        part.append(sentence)
        size += length
    # A single sentence can be longer than `most`: nobody would want it cut within.
    yield _Piece(" ".join(part), size, speech)


def pieces_within(text: str, most: int) -> list[list[str]]:
    """Return the paragraphs of a passage, each as the pieces of whole sentences with at most about `most` words."""
    return [[piece.text for piece in _pieces(paragraph, most)] for paragraph in text.split("\n\n")]


def _size(group: Sequence[_Piece]) -> int:
    return sum(piece.words for piece in group)
