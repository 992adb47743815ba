"""The result of a comparison, and its tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mindprint.api.results import Result, Table
from mindprint.contract import STAGES, StageName
from mindprint.printing import printable
from mindprint.reports import document
from mindprint.reports.equivalence import (
    Comparison,
    Side,
    StageCurves,
)
from mindprint.reports.phrases import interval
from mindprint.tolerances import FREE_TOLERANCE, SFT_TOLERANCE, VOICE_TOLERANCE

SHOWN_ANSWERS = 3
"""Differing answers that are printed in full."""

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class CompareResult(Result):
    """Two runs compared, returned by `mindprint.compare`.

    Attributes:
        comparison: Everything that was compared, with all figures.
        equivalent: Whether the runs are equivalent.
        verdict: The same in words.
        page: A page with both loss curves, or None where nothing was trained.
    """

    comparison: Comparison
    page: Path | None = None

    @property
    def equivalent(self) -> bool:
        """True if losses and voice agree within their tolerances."""
        return self.comparison.equivalent

    @property
    def verdict(self) -> str:
        """The outcome in one line."""
        comparison = self.comparison
        if not comparison.equivalent:
            return "not equivalent: " + "; ".join(comparison.beyond)
        losses = (
            f"losses agree within {SFT_TOLERANCE:.0e} (SFT) and {FREE_TOLERANCE:.0e} (from the first preference "
            "step on)"
        )
        # No score is not agreement, so the verdict limits itself to the losses.
        if comparison.voice_difference is None:
            why = next(side.voice_missing for side in comparison.sides if side.voice is None)
            return (
                f"equivalent in its losses: {losses}; the voice could not be scored ({why}), so nothing is said of it"
            )
        difference = abs(comparison.voice_difference)
        name = comparison.sides[0].voice_name
        return f"equivalent: {losses}; the scores of {name} differ by {difference:.3f} of {VOICE_TOLERANCE} allowed"

    def blocks(self) -> Iterator[Table | str]:
        """Yield costs and voice, losses by stage, adapter and answers, and the verdict."""
        for shown in self.document_tables():
            yield Table(shown.header, shown.rows, sorted(shown.numbers))
        adapter = self.comparison.adapter
        differences = (
            f"adapter: the change differs by {adapter.change:.1e} (relative Frobenius norm), "
            f"an element by {adapter.greatest:.1e} at most"
        )
        lines = [
            differences,
            *self._answer_lines(),
            *([f"curves: {self.page}"] if self.page else []),
        ]
        yield "\n".join(lines)
        yield self.verdict

    def document_tables(self) -> tuple[document.Table, document.Table]:
        """Return the tables of costs and of losses, as a report takes them."""
        names = [side.name for side in self.comparison.sides]
        header = ("topic", "stage", "steps", *(f"loss on {name}" for name in names), "greatest deviation", "allowed")
        stages = tuple(_stage_row(stage) for stage in self.comparison.stages)
        title = "Losses, stage by stage; deviations are |a - b| / (1 + a)"
        return (
            document.Table("Costs, and the voice", ("", *names), tuple(self._cost_rows()), frozenset({1, 2})),
            document.Table(title, header, stages, frozenset({2, 5, 6})),
        )

    def _cost_rows(self) -> Iterator[tuple[str, ...]]:
        sides = self.comparison.sides
        costs = [side.costs for side in sides]
        yield (
            "load the base, seconds",
            *(f"{cost.load_seconds:.2f}" if cost else NOT_RECORDED for cost in costs),
        )
        for stage in STAGES:
            if any(stage in side.step_seconds for side in sides):
                yield (f"{stage.upper()} step, median ms", *(_milliseconds(side, stage) for side in sides))
        yield ("peak memory, MiB", *(f"{cost.peak_bytes / 2**20:.0f}" if cost else NOT_RECORDED for cost in costs))
        yield (sides[0].voice_name, *(interval(side.voice) if side.voice else "not scored" for side in sides))

    def _answer_lines(self) -> Iterator[str]:
        answers = self.comparison.answers
        if answers is None:
            yield "answers: not compared: a run kept none (no answers.jsonl)"
            return
        differing = [answer for answer in answers if not answer.identical]
        yield f"answers: {len(answers) - len(differing)} of {len(answers)} identical, word for word"
        for answer in differing[:SHOWN_ANSWERS]:
            yield f"\n  {printable(answer.prompt)}"
            for side, text in zip(self.comparison.sides, answer.texts, strict=True):
                yield f"    {side.name}: {printable(text)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict, the tolerances, all figures and the page."""
        tolerances = {"sft": SFT_TOLERANCE, "free": FREE_TOLERANCE, "voice": VOICE_TOLERANCE}
        figures = asdict(self.comparison)
        return {
            "equivalent": self.equivalent,
            "tolerances": tolerances,
            **figures,
            "page": self.page and str(self.page),
        }


def _milliseconds(side: Side, stage: StageName) -> str:
    return f"{1000 * side.step_seconds[stage]:.1f}" if stage in side.step_seconds else "no step"


def _stage_row(stage: StageCurves) -> tuple[str, ...]:
    curves = (f"{losses[0]:.4f} → {losses[-1]:.4f}" for losses in stage.losses)
    attempt = f", attempt {stage.attempt}" if stage.attempt > 1 else ""
    name = stage.stage + attempt + (", rolled back" if stage.undone else "")
    return (stage.topic, name, str(len(stage.losses[0])), *curves, f"{stage.greatest:.1e}", f"{stage.tolerance:.0e}")
