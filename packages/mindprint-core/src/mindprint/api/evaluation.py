"""Measure the voice of a trained adapter on held-out text."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TypeVar

from mindprint.api.evaluation_tables import EvaluateResult
from mindprint.api.generation import source_of
from mindprint.api.options import Notices, OnNotice, backend_section
from mindprint.api.training import Records
from mindprint.data.memory import check_records
from mindprint.data.render import PreferenceExample, Rendered, SftExample, render_preferences, render_sft
from mindprint.errors import DataError
from mindprint.plugins.scoring import load_scorers
from mindprint.runs.opened import Located, OpenedAdapter, locate_adapter, open_adapter
from mindprint.voice.answers import answer_held_out, asked_of, reference_of, unread
from mindprint.voice.assessment import Assessment, assess
from mindprint.voice.evaluation import Evaluation, TextEvaluation, evaluate_heldout, evaluate_texts
from mindprint.voice.heldout import Scored, read_scored
from mindprint.voice.quizzing import QuizEvaluation, evaluate_quiz


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
    """Measure the voice on held-out text, before and after training.

    Held out are the pairs of `data.heldout`, the rows that the split kept from training, and the questions of quizzes.
    Nothing is measured on what was trained.

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
        >>> result.pairs.overall.adapter.perplexity > 1
        True
    """
    notices = Notices(on_notice)
    located = locate_adapter(path)
    if rows is not None and located.config is not None:
        located = Located(located.adapter, replace(located.config, records=check_records(rows)))
    scored = read_scored(located, None if heldout is None else Path(heldout))
    if scored.empty:
        why = scored.why_none or "no held-out rows that are not trained on: add heldout.jsonl to the data folder"
        raise DataError(f"{path}: {why}, or name a file with --heldout")
    for note in scored.notes:
        notices(note, warning=True)
    with open_adapter(path, backend_section(backend, device), model=model, notice=notices) as opened:
        pairs, texts = _read_both(opened, scored, notices)
        voice = _assess_voice(opened, scored, notices) if answers else None
        quiz = _ask_quiz(opened, scored) if answers else None
        source = source_of(opened)
    return EvaluateResult(source, pairs, texts, voice, quiz, tuple(scored.problems), notices.heard)


def _read_both(
    opened: OpenedAdapter, scored: Scored, notices: Notices
) -> tuple[Evaluation | None, TextEvaluation | None]:
    """Let both models read the held-out pairs, and the held-out texts that are not pairs."""
    data, tokenizer = scored.file.config.data, opened.tokenizer
    pairs = _noted(render_preferences(scored.held_out.pairs, tokenizer, data), notices)
    texts = _noted(render_sft(scored.held_out.texts, tokenizer, data), notices)
    backend, model = opened.backend, opened.model
    return (
        evaluate_heldout(backend, model, pairs.examples, tokenizer.pad_id) if pairs.examples else None,
        evaluate_texts(backend, model, texts.examples, tokenizer.pad_id) if texts.examples else None,
    )


Example = TypeVar("Example", SftExample, PreferenceExample)


def _noted(rendered: Rendered[Example], notices: Notices) -> Rendered[Example]:
    for note in rendered.notes if rendered.examples else ():
        notices(note)
    return rendered


def _assess_voice(opened: OpenedAdapter, scored: Scored, notices: Notices) -> Assessment | None:
    """Score the model's answers to held-out prompts, by the training text that the adapter's run knows.

    An adapter outside a run has no such text. Then nothing is scored, and the result says so.
    """
    extra = load_scorers(scored.file.config.voice.scorers)
    reference, asked = reference_of(scored.train), asked_of(scored.held_out)
    kept = unread(asked, reference)
    if len(kept) < len(asked):
        notices(f"{len(asked) - len(kept)} held-out rows stand in the training data: not scored", warning=True)
    if not asked:
        notices("no held-out row has a prompt to answer: the voice is not scored", warning=True)
        return None
    return assess(reference, answer_held_out(opened, kept), extra=extra, seed=scored.file.config.seed)


def _ask_quiz(opened: OpenedAdapter, scored: Scored) -> QuizEvaluation | None:
    questions = scored.held_out.questions
    if not questions:
        return None
    asked = [question.question for question in questions]
    base, tuned = ([answer.text for answer in opened.answer(asked, adapter=side)] for side in (False, True))
    return evaluate_quiz(questions, base, tuned)
