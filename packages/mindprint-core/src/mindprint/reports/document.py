"""A report as a value: sections of blocks, which `markdown` and `page` each write in their format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mindprint.runs.records import Interval

Tone = Literal["first", "second", "third", "undone", "faint"]
"""The style of a line: `undone` is for steps that were rolled back, `faint` for the values under a smoothed line."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A bulleted list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table. The columns in `numbers` are aligned right."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Line:
    """One line of a chart: points with finite coordinates, in ascending order of x."""

    label: str
    tone: Tone
    points: tuple[Point, ...]


@dataclass(frozen=True)
class LineChart:
    """A chart of lines. It shows at least `span` on the x axis, and a vertical line at each of `boundaries`.

    `description` is the chart in words, for those who cannot see it.
    """

    title: str
    description: str
    x_label: str
    lines: tuple[Line, ...]
    span: tuple[float, float]
    boundaries: tuple[float, ...] = ()


@dataclass(frozen=True)
class Dot:
    """A value with its interval, or None with the reason."""

    label: str
    tone: Tone
    interval: Interval | None
    reason: str = ""


@dataclass(frozen=True)
class DotChart:
    """Rows of dots with intervals on one axis that shows at least `low` to `high`, with names for both ends."""

    title: str
    description: str
    rows: tuple[tuple[str, tuple[Dot, ...]], ...]
    low: tuple[float, str]
    high: tuple[float, str]


@dataclass(frozen=True)
class SideBySide:
    """Texts on one prompt, each under its label."""

    prompt: str
    topic: str
    texts: tuple[tuple[str, str], ...]
    note: str = ""


Block = Paragraph | Bullets | Table | LineChart | DotChart | SideBySide


@dataclass(frozen=True)
class Section:
    """A titled part of a report."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]
