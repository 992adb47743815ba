"""Word documents (DOCX) and PDF, through python-docx and pypdf: the extra `[documents]`."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from mindprint.contract import Block, Document
from mindprint.errors import DataError, first_line
from mindprint.hookspecs import hookimpl
from mindprint.input_files import LARGEST_FILE
from mindprint.readers.text import plain_blocks

EXTRA = 'pip install "mindprint-core[documents]"'

REPEATED = 0.3
"""Share of the pages from which on a first or last line is a running title."""


@hookimpl
def mindprint_read_documents(path: Path, head: bytes) -> Iterable[Document] | None:
    """Read a Word document or a PDF as one document."""
    if not path.is_file():
        return None
    suffix = path.suffix.lower()
    if suffix == ".docx" and head.startswith(b"PK"):
        return _word(path)
    # A Word document with a password is in the container of old Word files.
    if suffix in (".docx", ".doc") and head.startswith(b"\xd0\xcf\x11\xe0"):
        raise DataError(
            f"{path}: is encrypted, or in the format of Word before 2007; save it as .docx without password"
        )
    return _pdf(path) if head.startswith(b"%PDF") else None


def _word(path: Path) -> Iterator[Document]:
    docx = _library("docx", path)
    _refuse_large(path)
    try:
        paragraphs = docx.Document(str(path)).paragraphs
        # A style that is missing in the file has no name.
        blocks = [
            Block(
                " ".join(paragraph.text.split()), heading=str(paragraph.style.name or "").startswith(("Head", "Title"))
            )
            for paragraph in paragraphs
            if paragraph.text.strip()
        ]
    except Exception as error:  # the library raises errors of zipfile, of lxml, and its own
        raise DataError(f"{path}: is not a readable Word document: {first_line(error)}") from error
    yield Document(str(path), blocks=tuple(blocks))


def _pdf(path: Path) -> Iterator[Document]:
    pypdf = _library("pypdf", path)
    _refuse_large(path)
    # The library tells a logger about each flaw of a file. What matters of them is in the error below.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        reader = pypdf.PdfReader(path)
        locked = reader.is_encrypted and not reader.decrypt("")
        pages = [] if locked else [page.extract_text().split("\n") for page in reader.pages]
    except Exception as error:  # a broken file leads anywhere in pypdf
        raise DataError(f"{path}: is not a readable PDF: {first_line(error)}") from error
    if locked:
        raise DataError(f"{path}: is encrypted; save it without a password")
    if not any(line.strip() for line in chain.from_iterable(pages)):
        raise DataError(f"{path}: holds no text, only images; recognise its text first (OCR)")
    yield Document(str(path), blocks=tuple(_pdf_blocks(pages)))


def _pdf_blocks(pages: list[list[str]]) -> Iterator[Block]:
    """Yield the paragraphs of pages of lines, without page numbers and running titles.

    PDF has no paragraphs. One ends where a line that ends a sentence is much shorter than the page is wide.
    """
    edges = Counter(_edge(line) for page in pages for line in {page[0], page[-1]} if page)
    running = {edge for edge, count in edges.items() if count >= max(3, REPEATED * len(pages))}
    lines = [line.strip() for page in pages for line in page if _edge(line) not in running]
    width = sorted(map(len, lines))[int(0.9 * len(lines))] if lines else 0
    paragraphs: list[str] = []
    for line in lines:
        paragraphs.append(line)
        if not line or (len(line) < 0.8 * width and re.search(r"[.!?…\"'”’»:]$", line)):
            paragraphs.append("")
    yield from plain_blocks("\n".join(paragraphs))


def _edge(line: str) -> str:
    # Page numbers differ, and the words around them do not.
    return re.sub(r"\d+", "0", line.strip())


def _refuse_large(path: Path) -> None:
    if path.stat().st_size > LARGEST_FILE:
        raise DataError(f"{path}: is larger than {LARGEST_FILE:,} bytes")


def _library(name: str, path: Path) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise DataError(f"{path}: needs a library to be read: {EXTRA}") from error
