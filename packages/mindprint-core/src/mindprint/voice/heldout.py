"""Held-out rows that an adapter can be measured on, because it was certainly not trained on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mindprint.config import ConfigFile, make_config
from mindprint.data.quizzes import read_quizzes
from mindprint.data.rows import Rows, Text, read_rows
from mindprint.data.split import HeldOut, Split, nearly_trained, prompt_hash, prompts_of, split_rows
from mindprint.runs.folder import RunFolder
from mindprint.runs.opened import Located, read_heldout


@dataclass(frozen=True)
class Scored:
    """Held-out rows, the rows that were trained, and the configuration that both are read by.

    `problems` are quiz questions that cannot be evaluated, and `notes` name rows that were left out. `why_none` says
    why the split holds out nothing, if so.
    """

    file: ConfigFile
    held_out: HeldOut
    train: Rows
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    why_none: str | None = None

    @property
    def empty(self) -> bool:
        return not (self.held_out.pairs or self.held_out.texts or self.held_out.questions)


def read_scored(located: Located, heldout: Path | None = None) -> Scored:
    """Return the rows that an adapter can be measured on. A file `heldout` replaces the pairs of the configuration.

    The data may have changed since the run, so whatever the run wrote down as trained is left out. An adapter that
    lies in no run has no data: it is scored on `heldout` alone, of which nothing is known.
    """
    if located.config is None:
        file = _with_heldout(make_config({"data": {"path": None}}), heldout)
        return Scored(file, HeldOut(read_heldout(file).heldout), Rows((), (), ()))
    quizzes = read_quizzes(located.config)
    split = split_rows(read_rows(located.config), quizzes, located.config.config.data)
    held_out, notes = _candidates(located.config, split, heldout)
    # A split of today's data can differ from the run's. Only the run's own record tells which prompts were trained.
    known, dropped = _untrained(located.config, held_out)
    file = _with_heldout(located.config, heldout)
    return Scored(file, known, split.train, quizzes.problems, (*notes, *_left_out(dropped)), split.nothing_held_out())


def _with_heldout(file: ConfigFile, heldout: Path | None) -> ConfigFile:
    if heldout is None:
        return file
    # Paths of a configuration are relative to its folder. This path is from the command line, and so relative to the
    # working directory.
    data = file.config.data.model_copy(update={"heldout": [str(heldout.resolve())]})
    changed = file.config.model_copy(update={"data": data})
    return ConfigFile(changed, file.folder, str(heldout), records=file.records)


def _candidates(file: ConfigFile, split: Split, heldout: Path | None) -> tuple[HeldOut, tuple[str, ...]]:
    """Return the split's held-out rows, or the pairs of a file without those whose prompt is also a training row's."""
    if heldout is None:
        return split.held_out, ()
    pairs = read_heldout(_with_heldout(file, heldout)).heldout
    # The file need not come from this data, so the split never kept its rows apart from the training rows.
    near = nearly_trained(pairs, split.train, file.config.data)
    kept = tuple(row for row, trained in zip(pairs, near, strict=True) if not trained)
    count = len(pairs) - len(kept)
    notes = (f"{heldout}: {_rows(count)} not scored: training rows ask the same, exactly or nearly",) if count else ()
    return HeldOut(kept, (), split.held_out.questions), notes


def _untrained(file: ConfigFile, held_out: HeldOut) -> tuple[HeldOut, int]:
    """Return the rows whose prompt the run did not record as trained, and the number of the others."""
    trained = RunFolder(file.folder).trained_prompts()

    def new(prompts: Sequence[Text]) -> bool:
        # A conversation has several prompts. If one of them was trained, the row is not new.
        return trained.isdisjoint(prompt_hash(prompt) for prompt in prompts)

    kept = replace(
        held_out,
        pairs=tuple(row for row in held_out.pairs if new([row.prompt])),
        texts=tuple(row for row in held_out.texts if new(prompts_of(row, file.config.data))),
        questions=tuple(question for question in held_out.questions if new([question.question])),
    )
    return kept, _count(held_out) - _count(kept)


def _count(held_out: HeldOut) -> int:
    return len(held_out.pairs) + len(held_out.texts) + len(held_out.questions)


def _left_out(dropped: int) -> Iterator[str]:
    if dropped:
        yield f"{_rows(dropped)} not scored: the data has changed, and the run was trained on the prompt"


def _rows(count: int) -> str:
    return "1 held-out row is" if count == 1 else f"{count} held-out rows are"
