"""The loss curve of a run as a small inline SVG, for a notebook."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

from mindprint.events import StepDone
from mindprint.reports.curves import thinned

WIDTH, HEIGHT, MARGIN = 640, 180, 44
# A notebook stores the picture in its file, so it is thinned more than the report's.
MOST_POINTS = 800
# An inline picture cannot use the style sheet of the report, so the colours are literal.
COLOURS = {"sft": "#2a6fb0", "dpo": "#b0552a"}


def loss_curve_svg(steps: Sequence[StepDone]) -> str:
    """Draw the losses of all stages over the run's steps. Return an empty text where nothing can be drawn."""
    drawn = [step for step in steps if math.isfinite(step.loss)]
    if len(drawn) < 2:
        return ""
    first, last = drawn[0].step, drawn[-1].step
    highest = max(step.loss for step in drawn)
    # Losses start at zero, so that a small fall does not look like a great one. A negative loss extends the scale.
    lowest = min(0.0, *(step.loss for step in drawn))

    def x_of(step: float) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * (step - first) / max(1, last - first)

    def y_of(loss: float) -> float:
        # A flat curve at zero would divide by zero.
        return HEIGHT - MARGIN / 2 - (HEIGHT - MARGIN) * (loss - lowest) / ((highest - lowest) or 1.0)

    def strokes() -> Iterator[str]:
        # Stages are separate strokes. A line between two topics would look like a jump of the loss.
        for (_, stage, _), stretch in groupby(drawn, key=lambda step: (step.topic, step.stage, step.attempt)):
            points = thinned([(float(step.step), step.loss) for step in stretch], MOST_POINTS)
            # A stage of one step is a dot: a stroke of no length, with round ends.
            path = "L".join(
                f"{x_of(step):.1f} {y_of(loss):.1f}" for step, loss in points * (2 if len(points) == 1 else 1)
            )
            yield (f'<path d="M{path}" fill="none" stroke="{COLOURS[stage]}" stroke-width="2" stroke-linecap="round"/>')

    def labels() -> Iterator[str]:
        for loss in (highest, lowest):
            yield _label(MARGIN - 6, y_of(loss) + 4, f"{loss:.2f}", "end")
        for step in (first, last):
            yield _label(x_of(step), HEIGHT - 4, f"{step}", "middle")
        stages = dict.fromkeys(step.stage for step in drawn)
        # The labels are set from the right edge inwards, so the last stage comes first.
        for place, stage in enumerate(reversed(stages)):
            yield _label(WIDTH - MARGIN - 60 * place, 14, stage.upper(), "end", COLOURS[stage])

    title = f"loss of {len(drawn)} steps, from {drawn[0].loss:.4f} to {drawn[-1].loss:.4f}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'style="max-width:100%;height:auto"><title>{escape(title)}</title>{"".join([*strokes(), *labels()])}</svg>'
    )


def _label(x: float, y: float, text: str, anchor: str, colour: str = "currentColor") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" '
        f'font-family="sans-serif" font-size="12">{escape(text)}</text>'
    )
