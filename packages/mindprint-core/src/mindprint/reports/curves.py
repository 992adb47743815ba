"""Curves of a run from the steps of metrics.jsonl, thinned so that a picture of 100,000 steps stays small."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from mindprint.contract import StageName
from mindprint.reports.document import Line, Point, Tone
from mindprint.runs.reading import RunRecord, Step

MOST_POINTS = 3000
"""Points of one curve in a chart. Beyond them each bucket of neighbouring steps keeps its lowest and its highest."""


def curves(
    record: RunRecord, stage: StageName, value: Callable[[Step], float | None], label: str, tone: Tone
) -> tuple[Line, ...]:
    """Return one line for each stage that was trained, with separate lines for undone steps. x is the run's step."""
    steps = [step for step in record.steps if step.stage == stage]
    # Every line gets the same share of its points, so that equal stretches of steps stay equally detailed.
    share = MOST_POINTS / max(1, len(steps))
    lines = []
    for undone, group in _strokes(steps):
        measured = [(step.step, value(step)) for step in group]
        # One value that is not finite would break the whole path of the SVG.
        points = [(float(step), found) for step, found in measured if found is not None and math.isfinite(found)]
        # A line needs two points to be visible, however small its share is.
        kept = thinned(points, max(2, int(share * len(points))))
        if kept:
            lines.append(Line(f"{label}, rolled back" if undone else label, "undone" if undone else tone, tuple(kept)))
    return tuple(lines)


def boundaries(record: RunRecord) -> tuple[float, ...]:
    """Return the places where another stage, topic or attempt starts, half a step before its first step."""
    changes = []
    for before, after in zip(record.steps, record.steps[1:], strict=False):
        if before.stretch != after.stretch:
            # A border halfway between two steps never covers a point of either.
            changes.append((before.step + after.step) / 2)
    return tuple(changes)


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Return about `most` points: the lowest and the highest of each bucket, in order, and both ends.

    The extremes are kept because a reader looks for them in a loss curve: spikes must not vanish.
    """
    if len(points) <= most:
        return list(points)
    inner = points[1:-1]
    # Each bucket keeps two points, so it must be twice as long as one point's share.
    size = max(1, math.ceil(2 * len(inner) / max(1, most - 2)))
    kept = [points[0]]
    for start in range(0, len(inner), size):
        bucket = inner[start : start + size]
        # The set drops the second point where the lowest is also the highest, as in a flat bucket of one.
        ends = {min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])}
        kept.extend(sorted(ends))
    return [*kept, points[-1]]


def _strokes(steps: Sequence[Step]) -> Iterator[tuple[bool, list[Step]]]:
    for key, group in groupby(steps, key=lambda step: step.stretch):
        yield key[-1], list(group)
