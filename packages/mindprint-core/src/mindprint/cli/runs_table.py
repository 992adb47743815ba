"""The table of `mindprint eval --compare`: runs in columns, their figures in rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from mindprint.cli.output import emit, notice, say, table
from mindprint.contract import STAGES
from mindprint.reports import read_run
from mindprint.reports.phrases import interval, number, percent
from mindprint.reports.side_by_side import RunFigures, RunsCompared, VoiceDifference, compare_runs
from mindprint.runs.records import BASE_DISTANCE, Figures

NOT_EVALUATED = "not evaluated"

NONE = "-"
"""The cell of a figure that a run has under another name."""

FIGURES: dict[str, Callable[[Figures], str]] = {
    # A voice that was not told from people has another name. So each run has a value in one of these rows.
    "voice": lambda one: NONE if one.voice and one.people_missing else interval(one.voice),
    BASE_DISTANCE: lambda one: interval(one.voice) if one.voice and one.people_missing else NONE,
    "other people's voice": lambda one: interval(one.people_voice) if one.people_voice else NONE,
    "base voice": lambda one: interval(one.base_voice),
    "words": lambda one: str(one.words),
    "loops": lambda one: NONE if one.loops is None else percent(one.loops),
    "copied words": lambda one: percent(one.copy_rate),
    "length": lambda one: number(one.length),
    "reward accuracy": lambda one: percent(one.reward_accuracy),
    "perplexity": lambda one: number(one.perplexity, 1),
    # Without questions a share is undefined. A missing value would read as a failed measurement.
    "key concepts": lambda one: percent(one.concept_coverage) if one.questions else "no quizzes",
}


def show_compared(paths: Sequence[Path], *, as_json: bool) -> None:
    """Read the runs and show them side by side. Raises `RunError` for a folder that holds none."""
    if len(paths) < 2:
        raise click.UsageError("--compare takes the folders of two or more runs")
    compared = compare_runs([read_run(path) for path in paths])
    if as_json:
        emit(asdict(compared))
        return
    say(_table(paths, compared))
    for name, values in compared.settings.items():
        say(f"setting {name}: {' | '.join(values)}")
    for difference in compared.differences:
        say(_told(difference))
    for run in compared.runs:
        if run.unmeasured:
            notice(f"{run.run}: {NOT_EVALUATED}: {run.unmeasured}", warning=True)
    for caution in compared.cautions:
        notice(caution, warning=True)


def _table(paths: Sequence[Path], compared: RunsCompared) -> str:
    rows = [(name, *(_cell(run, show) for run in compared.runs)) for name, show in FIGURES.items()]
    # A row that is about no run would only raise questions.
    rows = [row for row in rows if NONE not in row or set(row[1:]) - {NONE, NOT_EVALUATED}]
    rows += [(f"last {stage.upper()} loss", *(number(run.losses.get(stage), 4) if stage in run.losses else "none"
                                              for run in compared.runs)) for stage in STAGES]  # fmt: skip
    rows.append(("seconds", *(f"{run.seconds:.1f}" for run in compared.runs)))
    outcomes = [", ".join(f"{count} {outcome}" for outcome, count in run.topics.items()) for run in compared.runs]
    return table(("", *map(str, paths)), [*rows, ("topics", *outcomes)])


def _cell(run: RunFigures, show: Callable[[Figures], str]) -> str:
    return NOT_EVALUATED if run.figures is None else show(run.figures)


def _told(one: VoiceDifference) -> str:
    if one.difference is None:
        return f"{one.name} of {one.run} against the first: cannot be told: {one.reason}"
    verdict = "more than their intervals" if one.beyond else "within their intervals, so not shown to differ"
    return f"{one.name} of {one.run} against the first: {one.difference:+.2f}, {verdict}"
