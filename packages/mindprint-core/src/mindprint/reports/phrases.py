"""Figures as text. A figure that could not be evaluated is words, and never a number."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mindprint.runs.records import Figures, Interval
from mindprint.voice.scoring import VoiceScore

MISSING = "could not be evaluated"
NONE = "–"


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with fixed digits."""
    if value is None:
        return MISSING
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def percent(value: float | None) -> str:
    """Return a share as a whole percentage."""
    return MISSING if value is None else f"{value:.0%}"


def interval(value: Interval | VoiceScore | None) -> str:
    """Return a value with its 95 % interval in brackets."""
    if value is None:
        return MISSING
    return f"{value.value:.2f} ({value.low:.2f} to {value.high:.2f})"


def change(before: float | None, after: float | None, digits: int = 2) -> str:
    """Return `before → after`."""
    return f"{number(before, digits)} → {number(after, digits)}" if (before, after) != (None, None) else MISSING


def plural(count: int, one: str, many: str | None = None) -> str:
    """Return a count with its noun: `3 topics`, `1 topic`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return the names, or the first of them and the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def why_missing(figures: Figures | None, name: str) -> str:
    """Return the reason why a figure is None, in the evaluation's words."""
    if figures is None:
        return "there was no evaluation"
    return figures.unmeasured.get(name) or "no reason was recorded"
