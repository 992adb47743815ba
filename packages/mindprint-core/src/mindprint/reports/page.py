"""A report as one HTML file, without a script and without anything from the network."""

from __future__ import annotations

from functools import singledispatch
from html import escape
from importlib.resources import files

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
from mindprint.reports.svg import dot_chart, line_chart

_OUTCOMES = {
    "passed": "good",
    "failed": "bad",
    "not evaluated": "unknown",
    "rolled back": "bad",
    "could not be evaluated": "unknown",
}


def as_page(document: Document) -> str:
    """Return the document as HTML, with all of its text escaped."""
    style = files("mindprint.reports").joinpath("page.css").read_text(encoding="utf-8")
    parts = "".join(f'<a href="#{_anchor(section)}">{escape(section.title)}</a>' for section in document.sections)
    sections = "".join(_section(section) for section in document.sections)
    # The policy in the head forbids scripts and requests, so model output cannot act even if escaping had a hole.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{escape(document.title)} · {escape(document.subtitle)}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{escape(document.title)}</h1><p>{escape(document.subtitle)}</p></header>
<nav aria-label="Parts of this report">{parts}</nav>
<main>{sections}</main>
</body>
</html>
"""


def _section(section: Section) -> str:
    blocks = "\n".join(_html(block) for block in section.blocks)
    return f'\n<section id="{_anchor(section)}">\n<h2>{escape(section.title)}</h2>\n{blocks}\n</section>'


def _anchor(section: Section) -> str:
    return "-".join("".join(sign if sign.isalnum() else " " for sign in section.title.lower()).split())


@singledispatch
def _html(block: object) -> str:
    raise TypeError(f"a report holds no {type(block).__name__}")


@_html.register
def _(block: Paragraph) -> str:
    return f"<p>{escape(block.text)}</p>"


@_html.register
def _(block: Bullets) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in block.items)}</ul>"


@_html.register
def _(block: Table) -> str:
    header = "".join(
        f'<th scope="col"{_aligned(block, place)}>{escape(name)}</th>' for place, name in enumerate(block.header)
    )
    head = f"<thead><tr>{header}</tr></thead>" if any(block.header) else ""
    rows = "".join(
        f"<tr>{''.join(_cell(block, place, text) for place, text in enumerate(row))}</tr>" for row in block.rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(block.caption)}" tabindex="0"><table>'
        f"<caption><span>{escape(block.caption)}</span></caption>{head}<tbody>{rows}</tbody></table></div>"
    )


def _cell(table: Table, place: int, text: str) -> str:
    # Only a cell that is an outcome as a whole is coloured, and not every text that contains the word.
    shown = f'<b class="{_OUTCOMES[text]}">{escape(text)}</b>' if text in _OUTCOMES else escape(text)
    return f'<th scope="row">{shown}</th>' if place == 0 else f"<td{_aligned(table, place)}>{shown}</td>"


def _aligned(table: Table, place: int) -> str:
    return ' class="number"' if place in table.numbers else ""


@_html.register
def _(block: LineChart) -> str:
    return line_chart(block)


@_html.register
def _(block: DotChart) -> str:
    return dot_chart(block)


@_html.register
def _(block: SideBySide) -> str:
    texts = "".join(f"<div><h4>{escape(label)}</h4><p>{escape(text)}</p></div>" for label, text in block.texts)
    note = f'<p class="note">{escape(block.note)}</p>' if block.note else ""
    return (
        f'<article><p class="topic">{escape(block.topic)}</p><h3>{escape(block.prompt)}</h3>'
        f'<div class="sides">{texts}</div>{note}</article>'
    )
