"""Curves of a run from the steps of metrics.jsonl, thinned so that a picture of 100,000 steps stays small."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby, pairwise

from mindprint.contract import StageName
from mindprint.reports.document import Line, Point, Tone
from mindprint.runs.reading import RunRecord, Step

MOST_POINTS = 3000
"""Points of one curve in a chart. Beyond them each bucket of neighbouring steps keeps its lowest and its highest."""


SMOOTHED_FROM = 12
"""Points from which a line is smoothed. Fewer are read as they are."""

MOST_SMOOTHED = 51
"""Steps of the longest window of a smoothed line."""


def curves(
    record: RunRecord,
    stage: StageName,
    value: Callable[[Step], float | None],
    label: str,
    tone: Tone,
    *,
    each_step: bool = True,
) -> tuple[Line, ...]:
    """Return one line for each stretch of a stage that was trained, with separate lines for undone steps.

    x counts the steps of this stage alone, so that no other stage leaves a gap. A long line is smoothed, and with
    `each_step` the values themselves are faint behind it.
    """
    steps = [step for step in record.steps if step.stage == stage]
    # Every line gets the same share of its points, so that equal stretches of steps stay equally detailed.
    share = MOST_POINTS / max(1, len(steps))
    faint, lines, first = [], [], 1
    for undone, group in _strokes(steps):
        measured = [(place, value(step)) for place, step in enumerate(group, first)]
        first += len(group)
        # One value that is not finite would break the whole path of the SVG.
        points = [(float(place), found) for place, found in measured if found is not None and math.isfinite(found)]
        # A line needs two points to be visible, however small its share is.
        most = max(2, int(share * len(points)))
        kept = thinned(points, most)
        if not kept:
            continue
        if undone or len(points) < SMOOTHED_FROM:
            lines.append(Line(f"{label}, rolled back" if undone else label, "undone" if undone else tone, tuple(kept)))
            continue
        if each_step:
            faint.append(Line("each step", "faint", tuple(kept)))
        lines.append(Line(label, tone, tuple(thinned(smoothed(points), most))))
    # What is drawn first is behind.
    return (*faint, *lines)


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Return the running mean of the values, over about a tenth of the line on either side together.

    The window shrinks towards both ends and stays symmetric, so that a steady slope stays where it is.
    """
    half = min(MOST_SMOOTHED, max(3, len(points) // 10)) // 2
    sums = [0.0, *accumulate(y for _, y in points)]
    result = []
    for place, (x, _) in enumerate(points):
        reach = min(half, place, len(points) - 1 - place)
        result.append((x, (sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1)))
    return result


def boundaries(record: RunRecord, stage: StageName) -> tuple[float, ...]:
    """Return the places where another topic or attempt starts, half a step before its first step of this stage."""
    steps = [step for step in record.steps if step.stage == stage]
    # A border halfway between two steps never covers a point of either.
    pairs = enumerate(pairwise(steps), 1)
    return tuple(place + 0.5 for place, (before, after) in pairs if before.stretch != after.stretch)


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
