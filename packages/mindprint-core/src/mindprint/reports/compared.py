"""A comparison of two runs as an HTML page: both loss curves, their deviation at each step, costs, and answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from mindprint import atomic
from mindprint.contract import STAGES
from mindprint.reports.content import STEP
from mindprint.reports.curves import MOST_POINTS, thinned
from mindprint.reports.document import (
    Block,
    Document,
    Line,
    LineChart,
    Paragraph,
    Point,
    Section,
    SideBySide,
    Table,
    Tone,
)
from mindprint.reports.equivalence import Comparison, StageCurves, deviation
from mindprint.reports.heldout import MOST_ANSWERS
from mindprint.reports.page import as_page

TONES: tuple[Tone, Tone] = ("first", "third")


def write_comparison(folder: Path, comparison: Comparison, tables: Sequence[Table], verdict: str) -> Path:
    """Write `comparison.html` into a folder, with the tables and the verdict that the command prints."""
    page = folder / "comparison.html"
    atomic.write_text(page, as_page(_document(comparison, tables, verdict)))
    return page


def _document(comparison: Comparison, tables: Sequence[Table], verdict: str) -> Document:
    names = " and ".join(side.name for side in comparison.sides)
    sections = (
        Section("Are they equivalent?", (Paragraph(f"{verdict[0].upper()}{verdict[1:]}."), *tables)),
        Section("Learning curves", tuple(_curves(comparison))),
        Section("Answers", tuple(_answers(comparison))),
    )
    return Document(f"{names}, compared", f"{len(comparison.stages)} stages", sections)


def _curves(comparison: Comparison) -> Iterator[Block]:
    for name in STAGES:
        stages = [stage for stage in comparison.stages if stage.stage == name]
        if not stages:
            continue
        # The axis spans the whole stage, also where the first or last losses are not finite and thus not drawn.
        ends = (float(stages[0].first_step), float(stages[-1].first_step + len(stages[-1].losses[0]) - 1))
        # A border lies between two steps, so that it never hides a point.
        borders = tuple(stage.first_step - 0.5 for stage in stages[1:])
        # All topics share one chart. Its points are divided by steps, so that long topics keep their shape.
        share = MOST_POINTS / max(1, sum(len(stage.losses[0]) for stage in stages))
        losses = tuple(
            _line(stage, stage.losses[place], side.name, tone, share)
            for place, (side, tone) in enumerate(zip(comparison.sides, TONES, strict=True))
            for stage in stages
        )
        apart = tuple(_line(stage, _deviations(stage), "deviation", "second", share) for stage in stages)
        worst = max(stage.greatest for stage in stages)
        # SVG scales need at least one finite value. A stage without any has no chart.
        if any(line.points for line in losses):
            both = "The losses of both runs. Where you see only one line, they are the same."
            yield _chart(f"{name.upper()} loss", both, losses, ends, borders)
            greatest = f"|a - b| / (1 + a) at every step, {worst:.1e} at most."
            yield _chart(f"{name.upper()} loss: deviation", greatest, apart, ends, borders)


def _chart(
    title: str, description: str, lines: Sequence[Line], span: tuple[float, float], borders: tuple[float, ...]
) -> LineChart:
    drawn = tuple(line for line in lines if line.points)
    return LineChart(title, description, STEP, drawn, span, borders)


def _line(stage: StageCurves, values: Sequence[float], label: str, tone: Tone, share: float) -> Line:
    points: list[Point] = [
        (float(stage.first_step + place), value) for place, value in enumerate(values) if math.isfinite(value)
    ]
    return Line(label, tone, tuple(thinned(points, max(2, int(share * len(points))))))


def _deviations(stage: StageCurves) -> list[float]:
    return [deviation([one], [other]) for one, other in zip(*stage.losses, strict=True)]


def _answers(comparison: Comparison) -> Iterator[Block]:
    if comparison.answers is None:
        yield Paragraph("Not compared: a run kept none (no answers.jsonl).")
        return
    same = sum(answer.identical for answer in comparison.answers)
    yield Paragraph(f"{same} of {len(comparison.answers)} are the same, word for word. Those that differ come first.")
    # Sorting by a bool puts False first and is stable, so differing answers lead and keep their order.
    for answer in sorted(comparison.answers, key=lambda answer: answer.identical)[:MOST_ANSWERS]:
        texts = tuple((side.name, text) for side, text in zip(comparison.sides, answer.texts, strict=True))
        yield SideBySide(answer.prompt, "the same" if answer.identical else "not the same", texts)
