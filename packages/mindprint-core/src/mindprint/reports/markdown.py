"""A report as Markdown. A chart becomes the sentence that describes it, and text of users never becomes markup."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import singledispatch

from mindprint.reports.document import (
    Bullets,
    Document,
    DotChart,
    LineChart,
    Paragraph,
    Section,
    SideBySide,
    Table,
)


def as_markdown(document: Document) -> str:
    """Return the document as CommonMark with tables."""
    head = f"# {escaped(document.title)}\n\n{escaped(document.subtitle)}\n"
    return "\n".join([head, *(_section(section) for section in document.sections)])


def escaped(text: str) -> str:
    """Return text on one line, escaped so that Markdown shows it as it is."""
    # Line breaks are removed first: a table row or a heading ends at the first one.
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", " ".join(text.split()))


def _section(section: Section) -> str:
    return f"## {escaped(section.title)}\n\n" + "\n".join(_markdown(block) for block in section.blocks)


@singledispatch
def _markdown(block: object) -> str:
    raise TypeError(f"a report holds no {type(block).__name__}")


@_markdown.register
def _(block: Paragraph) -> str:
    return f"{escaped(block.text)}\n"


@_markdown.register
def _(block: Bullets) -> str:
    return "".join(f"- {escaped(item)}\n" for item in block.items)


@_markdown.register
def _(block: Table) -> str:
    rules = ["--:" if place in block.numbers else "---" for place in range(len(block.header))]
    rows = [map(escaped, block.header), rules, *(map(escaped, row) for row in block.rows)]
    return f"{escaped(block.caption)}:\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


@_markdown.register(LineChart)
@_markdown.register(DotChart)
def _(block: LineChart | DotChart) -> str:
    return f"**{escaped(block.title)}.** {escaped(block.description)}\n"


@_markdown.register
def _(block: SideBySide) -> str:
    return "\n".join(_sides(block)) + "\n"


def _sides(block: SideBySide) -> Iterator[str]:
    yield f"### {escaped(block.prompt)}\n\n{escaped(block.topic)}\n"
    for label, text in block.texts:
        # Every line gets its mark, because an empty line without one would end the quote.
        quoted = "\n".join(f"> {escaped(line)}" for line in text.splitlines())
        yield f"{label}:\n\n{quoted}\n"
    if block.note:
        yield f"{escaped(block.note)}\n"
