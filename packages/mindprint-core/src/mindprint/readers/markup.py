"""HTML, and EPUB, which is HTML in an archive."""

from __future__ import annotations

import posixpath
import zipfile
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree as ET

from mindprint.contract import Block, Document
from mindprint.errors import DataError, first_line
from mindprint.hookspecs import hookimpl
from mindprint.readers.encodings import LARGEST_TEXT, decode, read_any_text

HTML = (".html", ".htm", ".xhtml")

SKIPPED = frozenset(
    (
        "script", "style", "nav", "header", "footer", "aside", "form", "noscript", "template", "button", "select",
        "svg", "math", "head", "iframe", "object", "figure", "blockquote", "table", "pre", "code",
    )
)  # fmt: skip
"""Elements whose text is not the writer's prose: navigation, code, tables, and quotations."""

HEADINGS = frozenset(f"h{level}" for level in range(1, 7))
PARAGRAPHS = HEADINGS | {
    "p", "li", "dd", "dt", "div", "section", "article", "main", "body", "tr", "td", "br", "hr", "title", "ul", "ol",
    "dl", "address",
}  # fmt: skip
"""Elements at which a paragraph begins and ends."""

MAIN = ("article", "main")
"""Elements that hold the text of a page, where it has one of them."""

_CONTAINER = "META-INF/container.xml"


@hookimpl
def mindprint_read_documents(path: Path, head: bytes) -> Iterable[Document] | None:
    """Read a page of HTML or a book in EPUB as one document."""
    suffix = path.suffix.lower()
    if not path.is_file():
        return None
    if suffix in HTML:
        return _page(path)
    return _book(path) if suffix == ".epub" and head.startswith(b"PK") else None


def html_blocks(text: str) -> list[Block]:
    """Return the paragraphs and headings of a page: of its `article` or `main` if there is one, else of all of it."""
    page = _Page()
    page.feed(text)
    page.close()
    page.end_block()
    return page.inside or page.blocks


class _Page(HTMLParser):
    """Collects the blocks of a page, and apart those inside of `MAIN`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self.inside: list[Block] = []
        self._text: list[str] = []
        self._skipped: list[str] = []
        self._main = 0
        self._heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag in SKIPPED:
            self.end_block()
            self._skipped.append(tag)
        if tag == "br":
            self._text.append("\n")
        elif tag in PARAGRAPHS:
            self.end_block()
            self._heading = tag in HEADINGS
        if tag == "hr":
            self._add(Block("* * *", heading=True))
        self._main += tag in MAIN

    def handle_endtag(self, tag: str) -> None:
        # Elements that nobody closed end with the one around them.
        if tag in self._skipped:
            del self._skipped[self._skipped.index(tag) :]
        if tag in PARAGRAPHS and tag != "br":
            self.end_block()
            self._heading = False
        if tag in MAIN and self._main:
            self._main -= 1

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            # A line break of the file is a space. Those of `br` come from above.
            self._text.append(" ".join(data.split("\n")))

    def end_block(self) -> None:
        """End the paragraph at this place. Two breaks in a row end one as well, as mail programs write them."""
        text, self._text = "".join(self._text), []
        for part in text.split("\n\n"):
            lines = [" ".join(line.split()) for line in part.split("\n")]
            if words := "\n".join(line for line in lines if line):
                self._add(Block(words, heading=self._heading))

    def _add(self, block: Block) -> None:
        self.blocks.append(block)
        if self._main:
            self.inside.append(block)


def _page(path: Path) -> Iterator[Document]:
    yield Document(str(path), blocks=tuple(html_blocks(read_any_text(path))))


def _book(path: Path) -> Iterator[Document]:
    try:
        with zipfile.ZipFile(path) as archive:
            blocks = tuple(block for text in _chapters(archive, path) for block in html_blocks(text))
    except (zipfile.BadZipFile, KeyError, ET.ParseError, NotImplementedError, RuntimeError, OSError) as error:
        # `RuntimeError` is zipfile's for an encrypted file.
        raise DataError(f"{path}: is not a readable EPUB: {first_line(error)}") from error
    yield Document(str(path), blocks=blocks)


def _chapters(archive: zipfile.ZipFile, path: Path) -> Iterator[str]:
    """Yield the pages of a book in the order of its spine (EPUB 3.3, section 5)."""
    sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    left = LARGEST_TEXT

    def read(name: str) -> bytes:
        nonlocal left
        # Sizes are those that the archive states, which zipfile also enforces: a small archive can hold terabytes.
        left -= sizes[name]
        if left < 0:
            raise DataError(f"{path}: its pages are larger than {LARGEST_TEXT:,} bytes")
        return archive.read(name)

    rootfile = _parsed(read(_CONTAINER)).find(".//{*}rootfile")
    package = rootfile.get("full-path") if rootfile is not None else None
    if package is None:
        raise DataError(f"{path}: is not a readable EPUB: its container names no package")
    book = _parsed(read(package))
    files = {item.get("id"): item.get("href", "") for item in book.iterfind(".//{*}manifest/{*}item")}
    encrypted = _encrypted(read("META-INF/encryption.xml")) if "META-INF/encryption.xml" in sizes else set()
    for reference in book.iterfind(".//{*}spine/{*}itemref"):
        href = files.get(reference.get("idref"))
        # Pages outside of the reading order are notes and covers.
        if href is None or reference.get("linear") == "no":
            continue
        name = posixpath.normpath(posixpath.join(posixpath.dirname(package), unquote(href.partition("#")[0])))
        if name in encrypted:
            raise DataError(f"{path}: is encrypted; remove its copy protection where you may, or leave it out")
        yield decode(read(name), f"{path}#{name}")


def _encrypted(content: bytes) -> set[str]:
    references = _parsed(content).iterfind(".//{*}CipherReference")
    return {unquote(reference.get("URI", "")) for reference in references}


def _parsed(content: bytes) -> ET.Element:
    # Without entities a document cannot grow or name other files.
    if b"<!ENTITY" in content:
        raise ET.ParseError("declares entities")
    return ET.fromstring(content)  # noqa: S314
