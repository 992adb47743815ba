"""`mindprint compare`: one configuration on two backends, or two runs of it, and whether they are equivalent."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mindprint.cli.measured_run import train_measured
from mindprint.cli.output import emit, json_option, notice, say, table
from mindprint.cli.train import project_and_overrides
from mindprint.config import load_config
from mindprint.contract import STAGES, StageName
from mindprint.errors import BackendError
from mindprint.plugins.loading import canonical_name, find_backend
from mindprint.reports import read_run
from mindprint.reports.compared import write_comparison
from mindprint.reports.document import Table
from mindprint.reports.equivalence import (
    FREE_TOLERANCE,
    SFT_TOLERANCE,
    VOICE_TOLERANCE,
    Comparison,
    Side,
    StageCurves,
    compare,
)
from mindprint.reports.phrases import interval
from mindprint.training.prepare import prepare

SHOWN = 3
"""Answers that differ, of which the words are shown."""

NOT_RECORDED = "not recorded"


@click.command("compare", short_help="Are two backends' runs equivalent?")
@click.argument("config", metavar="[CONFIG] [KEY=VALUE]...", nargs=-1)
@click.option("--backends", metavar="A,B", help="Train CONFIG on both, each in a process of its own.")
@click.option(
    "--runs", nargs=2, metavar="RUN RUN", type=click.Path(path_type=Path), help="Take these runs; nothing is trained."
)
@json_option
def command(*, config: tuple[str, ...], backends: str | None, runs: tuple[Path, Path] | None, as_json: bool) -> int:
    """Train one configuration on two backends, or take two runs of it, and say whether they are equivalent.

    They are if every loss agrees within the tolerances of docs/numerics.md (|a - b| / (1 + a): 1e-5 in SFT, 1e-3 from
    the first preference step on) and the voice scores, where there are such, within 0.05 of the scale. Exit code 0 if
    so, 1 if not.
    """
    if (backends is None) == (runs is None):
        raise click.UsageError("give either --backends A,B to train, or --runs RUN RUN to take what is there")
    if runs is not None and config:
        raise click.UsageError("--runs takes no CONFIG: each run has its own")
    paths = runs if runs is not None else _train(config, _two(backends or ""))
    found = compare(*(read_run(path) for path in paths))
    page = None if runs is not None else write_comparison(paths[0].parent, found, _tables(found), _verdict(found))
    if as_json:
        emit({**_as_values(found), "page": page and str(page)})
    else:
        _show(found, page)
    return 0 if found.equivalent else 1


def _two(backends: str) -> tuple[str, str]:
    names = [canonical_name(name.strip()) for name in backends.split(",") if name.strip()]
    if len(names) != 2 or names[0] == names[1]:
        raise BackendError(f"--backends {backends!r}: name two different backends, such as torch,mlx")
    for name in names:
        find_backend(name)
    return names[0], names[1]


def _train(words: Sequence[str], backends: tuple[str, str]) -> tuple[Path, Path]:
    """One run after the other under `runs/compare-NNN/`, every stage of it on the one backend."""
    path, overrides = project_and_overrides(words)
    file = load_config(path, overrides)
    prepare(file)  # what is wrong with the data is said before anything is trained
    folder = _new_folder(file.folder / "runs")
    for name in backends:
        notice(f"training on {name}: {folder / name}")
        everywhere = (f"backend.type={name}", "sft.backend=null", "dpo.backend=null")
        train_measured(path, [*overrides, *everywhere], folder / name)
    return folder / backends[0], folder / backends[1]


def _new_folder(parent: Path) -> Path:
    entries = parent.iterdir() if parent.is_dir() else ()
    taken = [int(found[1]) for path in entries if (found := re.fullmatch(r"compare-(\d+)", path.name))]
    return parent / f"compare-{max(taken, default=0) + 1:03d}"


# --- showing ---------------------------------------------------------------------------------------------------------


def _show(found: Comparison, page: Path | None) -> None:
    for shown in _tables(found):
        say(table(shown.header, shown.rows, numbers=sorted(shown.numbers)) + "\n")
    say(
        f"adapter: the change differs by {found.adapter.change:.1e} (relative Frobenius norm), "
        f"an element by {found.adapter.greatest:.1e} at most"
    )
    for line in _told_answers(found):
        say(line)
    if page:
        say(f"curves: {page}")
    say("\n" + _verdict(found))


def _tables(found: Comparison) -> tuple[Table, Table]:
    names = [side.name for side in found.sides]
    header = ("topic", "stage", "steps", *(f"loss on {name}" for name in names), "greatest deviation", "allowed")
    stages = tuple(_stage_row(one) for one in found.stages)
    return (
        Table("Costs, and the voice", ("", *names), tuple(_rows(found)), frozenset({1, 2})),
        Table("Losses, stage by stage; deviations are |a - b| / (1 + a)", header, stages, frozenset({2, 5, 6})),
    )


def _rows(found: Comparison) -> Iterator[tuple[str, ...]]:
    sides = found.sides
    costs = [side.costs for side in sides]
    yield ("load the base, seconds", *(f"{one.load_seconds:.2f}" if one else NOT_RECORDED for one in costs))
    for stage in STAGES:
        if any(stage in side.step_seconds for side in sides):
            yield (f"{stage.upper()} step, median ms", *(_milliseconds(side, stage) for side in sides))
    yield ("peak memory, MiB", *(f"{one.peak_bytes / 2**20:.0f}" if one else NOT_RECORDED for one in costs))
    yield ("voice", *(interval(side.voice) if side.voice else "not scored" for side in sides))


def _milliseconds(side: Side, stage: StageName) -> str:
    return f"{1000 * side.step_seconds[stage]:.1f}" if stage in side.step_seconds else "no step"


def _stage_row(one: StageCurves) -> tuple[str, ...]:
    curves = (f"{losses[0]:.4f} → {losses[-1]:.4f}" for losses in one.losses)
    name = one.stage + (f", attempt {one.attempt}" if one.attempt > 1 else "") + (", rolled back" if one.undone else "")
    return (one.topic, name, str(len(one.losses[0])), *curves, f"{one.greatest:.1e}", f"{one.tolerance:.0e}")


def _told_answers(found: Comparison) -> Iterator[str]:
    if found.answers is None:
        yield "answers: not compared: a run kept none (no answers.jsonl)"
        return
    differing = [one for one in found.answers if not one.identical]
    yield f"answers: {len(found.answers) - len(differing)} of {len(found.answers)} identical, word for word"
    for one in differing[:SHOWN]:
        yield f"\n  {_line(one.prompt)}"
        for side, text in zip(found.sides, one.texts, strict=True):
            yield f"    {side.name}: {_line(text)}"


def _line(text: str) -> str:
    """Text as a terminal may have it, on one line."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _verdict(found: Comparison) -> str:
    if not found.equivalent:
        return "not equivalent: " + "; ".join(found.beyond)
    losses = (
        f"losses agree within {SFT_TOLERANCE:.0e} (SFT) and {FREE_TOLERANCE:.0e} (from the first preference step on)"
    )
    if found.voice_difference is None:
        why = next(side.voice_missing for side in found.sides if side.voice is None)
        return f"equivalent in its losses: {losses}; the voice could not be scored ({why}), so nothing is said of it"
    return (
        f"equivalent: {losses}; voice scores differ by {abs(found.voice_difference):.3f} of {VOICE_TOLERANCE} allowed"
    )


def _as_values(found: Comparison) -> dict[str, Any]:
    tolerances = {"sft": SFT_TOLERANCE, "free": FREE_TOLERANCE, "voice": VOICE_TOLERANCE}
    return {"equivalent": found.equivalent, "tolerances": tolerances, **asdict(found)}
