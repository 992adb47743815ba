"""Charts as inline SVG. The drawing stretches with its box, and its words are HTML next to it, which keeps its size.

Strokes keep their width however the drawing is stretched (`vector-effect`). A dot is a stroke of length 0 with round
ends, so that it stays round. Colours are classes, because the page's style sheet knows light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from mindprint.reports.document import Dot, DotChart, Line, LineChart

WIDTH, HEIGHT = 1000, 300
MOST_BOUNDARIES = 200
"""The most vertical lines. Beyond them only every second, every third, ... is drawn."""


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return about `most` round numbers from `low` to `high`, spaced 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    # The factor 10 always fits, because the power was rounded down, so `next` never runs out.
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    # The small slack keeps a tick that floating point puts just outside of the range.
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 10) for place in range(first, last + 1)]


def line_chart(chart: LineChart) -> str:
    """Return a chart of curves with its scales and its key, as an HTML figure."""
    xs = [*chart.span, *(x for line in chart.lines for x, _ in line.points)]
    ys = [y for line in chart.lines for _, y in line.points]
    across, up = _Scale(min(xs), max(xs), 0, WIDTH), _Scale(*_room(min(ys), max(ys)), HEIGHT, 0)
    drawing = [*_grid(up), *_boundaries(chart.boundaries, across), *(_stroke(line, across, up) for line in chart.lines)]
    left = "".join(f'<span style="top:{100 * up(y) / HEIGHT:.2f}%">{_label(y)}</span>' for y in ticks(up.low, up.high))
    below = "".join(
        f'<span style="left:{100 * across(x) / WIDTH:.2f}%">{_label(x)}</span>' for x in ticks(across.low, across.high)
    )
    return (
        f'<figure class="chart"><figcaption>{escape(chart.title)}</figcaption>{_key(chart.lines)}'
        f'<div class="plot"><div class="left" aria-hidden="true">{left}</div>'
        f"{_svg(chart.title, chart.description, drawing, HEIGHT)}"
        f'<div class="below" aria-hidden="true">{below}</div></div>'
        f'<p class="axis">{escape(chart.x_label)}</p><p class="described">{escape(chart.description)}</p></figure>'
    )


def dot_chart(chart: DotChart) -> str:
    """Return rows of dots with intervals under one scale, as an HTML figure."""
    intervals = [dot.interval for _, dots in chart.rows for dot in dots if dot.interval]
    limits = [limit for interval in intervals for limit in (interval.low, interval.high) if math.isfinite(limit)]
    ends = [chart.low[0], chart.high[0], *limits]
    across = _Scale(*_room(min(ends), max(ends)), 0, WIDTH)
    marks = (chart.low, chart.high)
    names = "".join(
        f'<span style="left:{100 * across(value) / WIDTH:.2f}%">{value:g}<br>{escape(name)}</span>'
        for value, name in marks
    )
    rows = "".join(_dot_row(label, dots, across, [value for value, _ in marks]) for label, dots in chart.rows)
    return (
        f'<figure class="dots"><figcaption>{escape(chart.title)}</figcaption>'
        '<ul class="key"><li><i class="first"></i>tuned model</li><li><i class="third"></i>base model</li></ul>'
        f'<div class="row scale" aria-hidden="true"><span></span><div class="marks">{names}</div></div>{rows}'
        f'<p class="described">{escape(chart.description)}</p></figure>'
    )


class _Scale:
    """A linear map from values to places on the drawing."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high
        self._start = start
        # A range without extent would divide by zero. Its only value then lies at the start.
        self._factor = (end - start) / ((high - low) or 1.0)

    def __call__(self, value: float) -> float:
        return self._start + (value - self.low) * self._factor


def _room(low: float, high: float) -> tuple[float, float]:
    """Return the range with 5 % more at both ends."""
    # A flat curve gets room in proportion to its height, and a flat curve at zero gets a fixed one.
    space = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - space, high + space


def _svg(title: str, description: str, drawing: Sequence[str], height: int) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" preserveAspectRatio="none" role="img">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(drawing)}</svg>"
    )


def _grid(up: _Scale) -> Iterator[str]:
    for y in ticks(up.low, up.high):
        yield f'<path class="grid" d="M0 {up(y):.1f}H{WIDTH}"/>'


def _boundaries(places: Sequence[float], across: _Scale) -> Iterator[str]:
    for x in places[:: 1 + len(places) // MOST_BOUNDARIES]:
        if across.low < x < across.high:
            yield f'<path class="boundary" d="M{across(x):.1f} 0V{HEIGHT}"/>'


def _stroke(line: Line, across: _Scale, up: _Scale) -> str:
    points = [(across(x), up(y)) for x, y in line.points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    # A path of one point draws nothing. A line to itself draws a dot, through its round ends.
    alone = f"L{points[0][0]:.1f} {points[0][1]:.1f}" if len(points) == 1 else ""
    return f'<path class="line {line.tone}" d="M{path}{alone}"/>'


def _key(lines: Sequence[Line]) -> str:
    tones = dict.fromkeys((line.label if line.tone != "undone" else "rolled back", line.tone) for line in lines)
    if len(tones) < 2:
        return ""
    items = "".join(f'<li><i class="{tone}"></i>{escape(label)}</li>' for label, tone in tones)
    return f'<ul class="key">{items}</ul>'


def _dot_row(label: str, dots: Sequence[Dot], across: _Scale, marks: Sequence[float]) -> str:
    known = [(dot, dot.interval) for dot in dots if dot.interval]
    if not known:
        reason = "; ".join(dot.reason for dot in dots if dot.reason)
        return f'<div class="row"><span>{escape(label)}</span><p class="missing">{escape(reason)}</p></div>'
    height = 24
    drawing = [f'<path class="boundary" d="M{across(value):.1f} 0V{height}"/>' for value in marks]
    said = []
    for place, (dot, interval) in enumerate(known):
        y = height * (place + 1) / (len(known) + 1)
        drawing.append(
            f'<path class="line {dot.tone}" d="M{across(interval.low):.1f} {y:.1f}H{across(interval.high):.1f}"/>'
        )
        drawing.append(f'<path class="dot {dot.tone}" d="M{across(interval.value):.1f} {y:.1f}h0"/>')
        said.append(f"{dot.label} {interval.value:.2f}, from {interval.low:.2f} to {interval.high:.2f}")
    return f'<div class="row"><span>{escape(label)}</span>{_svg(label, "; ".join(said), drawing, height)}</div>'


def _label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
