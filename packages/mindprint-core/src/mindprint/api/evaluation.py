"""Measure the voice of a trained adapter on held-out text."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from mindprint.api.evaluation_tables import EvaluateResult
from mindprint.api.generation import source_of
from mindprint.api.options import Notices, OnNotice, backend_section
from mindprint.api.training import Records, with_rows
from mindprint.errors import DataError
from mindprint.models.token_ids import check_token_ids, held_out_ids
from mindprint.plugins.scoring import load_scorers
from mindprint.runs.opened import Located, locate_adapter, open_adapter
from mindprint.voice.answers import training_voice
from mindprint.voice.background import read_background
from mindprint.voice.evaluation import evaluate as evaluate_heldout
from mindprint.voice.heldout import read_scored


def evaluate(
    path: str | PathLike[str],
    *,
    heldout: str | PathLike[str] | None = None,
    rows: Records | None = None,
    answers: bool = True,
    backend: str | None = None,
    device: str | None = None,
    model: str | None = None,
    on_notice: OnNotice | None = None,
) -> EvaluateResult:
    """Measure the voice on held-out text, with the base model and with the tuned model.

    Held out are the pairs of `data.heldout`, the rows that the split kept from training, and the questions of quizzes.
    Nothing is measured on trained rows.

    Args:
        path: A project (its newest complete run), the folder of a run, or the folder of an adapter.
        heldout: A file with pairs to measure with. Default: the project's.
        rows: The rows that were passed to `train`, for a run that was trained on rows from memory.
        answers: Let the model answer, and score the voice of its answers.
        backend: `torch`, `mlx`, or any installed backend. Default: the run's.
        device: `cpu`, `cuda`, `mps`, `metal`. Default: the run's.
        model: Where the base model is, if not where the run or the adapter says.
        on_notice: Receives messages about the work as they come.

    Returns:
        An `EvaluateResult` with the figures of held-out pairs, texts, voice and quizzes, each over all rows and by
        topic.

    Raises:
        DataError: There are no held-out rows, or the rows of a run that was trained from memory are missing.
        MindprintError: The adapter or its base model cannot be found, read or loaded.

    Example:
        >>> result = mindprint.evaluate("my-voice", answers=False)
        >>> 0 <= result.pairs.overall.reward_accuracy <= 1
        True
        >>> result.pairs.overall.tuned.perplexity > 1
        True
    """
    notices = Notices(on_notice)
    located = locate_adapter(path)
    # Rows from memory are not kept in the run, so the split can only be read again with them.
    if rows is not None and located.config is not None:
        located = Located(located.adapter, with_rows(located.config, rows))
    scored = read_scored(located, None if heldout is None else Path(heldout))
    # Checked before the base is loaded, which can take minutes.
    if scored.empty:
        why = scored.why_none or "no held-out rows that are not trained on: add heldout.jsonl to the data folder"
        raise DataError(f"{path}: {why}, or name a file with --heldout")
    # Before the model too: a background that has your own text in it would make every figure wrong.
    people = read_background(scored.file, training_voice(scored.train).own)
    for note in scored.notes:
        notices(note, warning=True)
    with open_adapter(path, backend_section(backend, device), model=model, notice=notices) as opened:
        held_out = held_out_ids(scored.held_out, opened.tokenizer, scored.file.config.data)
        # All ids are checked before the first is computed, because a GPU fails late and without a name.
        check_token_ids(held_out, opened.base, opened.tokenizer)
        evaluation = evaluate_heldout(
            opened,
            opened.tokenizer,
            scored.held_out,
            scored.train,
            scored.file.config,
            extra=load_scorers(scored.file.config.voice.scorers),
            answers=answers,
            people=people,
        )
        source = source_of(opened)
    for note in evaluation.notes:
        notices(note, warning=True)
    return EvaluateResult(
        source,
        evaluation.pairs,
        evaluation.texts,
        evaluation.voice,
        evaluation.quiz,
        evaluation.figures,
        evaluation.topics,
        tuple(scored.problems),
        notices.heard,
    )
