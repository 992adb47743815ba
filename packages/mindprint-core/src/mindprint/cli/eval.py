"""`mindprint eval`: the voice on held-out pairs and in answers to their prompts, before and after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import click

from mindprint.cli.generate import backend_section, where
from mindprint.cli.output import emit, json_option, notice, say, table
from mindprint.cli.runs_table import show_compared
from mindprint.data.quizzes import Question
from mindprint.data.render import PreferenceExample, Rendered, SftExample, render_preferences, render_sft
from mindprint.errors import DataError
from mindprint.plugins.loading import load_scorers
from mindprint.reports.phrases import interval
from mindprint.runs.opened import OpenedAdapter, locate_adapter, open_adapter
from mindprint.voice.answers import answer_held_out, asked_of, reference_of, unread
from mindprint.voice.assessment import Assessed, Assessment, assess
from mindprint.voice.copying import Copying
from mindprint.voice.evaluation import (
    Evaluation,
    Measured,
    Read,
    TextEvaluation,
    evaluate_heldout,
    evaluate_texts,
)
from mindprint.voice.heldout import Scored, read_scored
from mindprint.voice.quizzing import Covered, QuizEvaluation, evaluate_quiz
from mindprint.voice.scoring import NotScored, VoiceScore

HEADER = ("topic", "pairs", "prefers chosen", "a token", "margin", "perplexity", "reward accuracy")


@click.command("eval", short_help="Measure the voice.")
@click.argument("paths", metavar="[PATH]", nargs=-1, type=click.Path(path_type=Path))
@click.option("--compare", is_flag=True, help="Show the figures of two or more runs, given as PATHs, side by side.")
@click.option("--heldout", type=click.Path(path_type=Path), help="Pairs to measure with; default: the project's.")
@click.option("--backend", help="auto, torch, mlx, ...; default: the run's.")
@click.option("--device", help="auto, cpu, cuda, mps, metal; default: the run's.")
@click.option("--model", help="Where the base model is, if not where the run or the adapter says.")
@click.option("--answers/--no-answers", default=True, show_default=True, help="Let it answer, and score the voice.")
@json_option
def command(
    *,
    paths: tuple[Path, ...],
    compare: bool,
    heldout: Path | None,
    backend: str | None,
    device: str | None,
    model: str | None,
    answers: bool,
    as_json: bool,
) -> int:
    """Measure the voice on held-out text, before and after training.

    PATH is a project (its newest complete run), the folder of a run, or that of an adapter. Held out are the pairs of
    data.heldout, what the split kept from training, and the questions of quizzes; nothing is measured on what was
    trained.

    `prefers chosen` is the share of pairs whose chosen answer is the more probable as a whole, `a token` on the mean of
    its tokens; margins are log p(chosen) - log p(rejected) in nats, perplexity is that of the chosen answers. `reward
    accuracy` is the share of pairs in which training raised the chosen answer more than the rejected one.

    `voice` is that of the model's own answers to the held-out prompts, where 0 is the untuned model and 1 the person's
    held-out answers, with its 95 % interval; docs/voice.md says what it can tell. What cannot be scored says
    why. `concepts` is the share of a quiz's key concepts that the answers mention.

    With --compare nothing is computed: the figures are those that each run's own final evaluation found.
    """
    if compare:
        show_compared(paths, as_json=as_json)
        return 0
    if len(paths) > 1:
        raise click.UsageError("one PATH is measured at a time; --compare shows runs side by side")
    path = paths[0] if paths else Path()
    scored = read_scored(locate_adapter(path), heldout)
    if scored.empty:
        why = scored.why_none or "no held-out rows that are not trained on: add heldout.jsonl to the data folder"
        raise DataError(f"{path}: {why}, or name a file with --heldout")
    for note in scored.notes:
        notice(note, warning=True)
    with open_adapter(path, backend_section(backend, device), model=model, notice=notice) as opened:
        evaluation, texts = _read(opened, scored)
        assessment = _assess(opened, scored) if answers else None
        quiz = _ask(opened, scored.held_out.questions) if answers else None
        facts = where(opened)
    if as_json:
        parts = {"texts": texts, "voice": assessment, "quiz": quiz}
        measured = asdict(evaluation) if evaluation else {"overall": None, "topics": {}}
        found = {name: asdict(part) if part else None for name, part in parts.items()}
        emit({**facts, **measured, **found, "not_evaluated": list(scored.problems)})
    else:
        _show_all(evaluation, texts, assessment, quiz)
    for problem in scored.problems:
        notice(f"not evaluated: {problem}", warning=True)
    return DataError.exit_code if scored.problems else 0


def _read(opened: OpenedAdapter, scored: Scored) -> tuple[Evaluation | None, TextEvaluation | None]:
    """Let both models read the held-out pairs, and the held-out texts that are no pairs."""
    data, tokenizer = scored.file.config.data, opened.tokenizer
    pairs = _noted(render_preferences(scored.held_out.pairs, tokenizer, data))
    texts = _noted(render_sft(scored.held_out.texts, tokenizer, data))
    measured = (
        evaluate_heldout(opened.backend, opened.model, pairs.examples, tokenizer.pad_id) if pairs.examples else None
    )
    read = evaluate_texts(opened.backend, opened.model, texts.examples, tokenizer.pad_id) if texts.examples else None
    return measured, read


Example = TypeVar("Example", SftExample, PreferenceExample)


def _noted(rendered: Rendered[Example]) -> Rendered[Example]:
    for note in rendered.notes if rendered.examples else ():
        notice(note)
    return rendered


def _assess(opened: OpenedAdapter, scored: Scored) -> Assessment | None:
    """Score the model's answers to held-out prompts, by the training text that the adapter's run knows.

    An adapter that lies in no run has none: then nothing is scored, and it says so.
    """
    extra = load_scorers(scored.file.config.voice.scorers)
    reference, asked = reference_of(scored.train), asked_of(scored.held_out)
    kept = unread(asked, reference)
    if len(kept) < len(asked):
        notice(f"{len(asked) - len(kept)} held-out rows stand in the training data: not scored", warning=True)
    if not asked:
        notice("no held-out row has a prompt to answer: the voice is not scored", warning=True)
        return None
    return assess(reference, answer_held_out(opened, kept), extra=extra, seed=scored.file.config.seed)


def _ask(opened: OpenedAdapter, questions: Sequence[Question]) -> QuizEvaluation | None:
    if not questions:
        return None
    asked = [question.question for question in questions]
    untuned, tuned = ([answer.text for answer in opened.answer(asked, adapter=side)] for side in (False, True))
    return evaluate_quiz(questions, untuned, tuned)


def _show_all(
    evaluation: Evaluation | None,
    texts: TextEvaluation | None,
    assessment: Assessment | None,
    quiz: QuizEvaluation | None,
) -> None:
    blocks: list[Callable[[], None]] = []
    if evaluation:
        blocks.append(partial(_show, evaluation))
    if texts:
        blocks.append(partial(_show_texts, texts))
    if assessment:
        blocks.append(partial(_show_voice, assessment))
    if quiz:
        blocks.append(partial(_show_quiz, quiz))
    for index, show in enumerate(blocks):
        if index:
            say()
        show()


def _show_texts(evaluation: TextEvaluation) -> None:
    rows = [_text_row(topic, read) for topic, read in [*evaluation.topics.items(), ("all", evaluation.overall)]]
    say(table(("topic", "texts", "tokens", "perplexity"), rows, numbers=range(1, 4)))


def _text_row(topic: str, read: Read) -> tuple[str, ...]:
    return (topic, str(read.texts), str(read.tokens), f"{read.base:.1f} → {read.adapter:.1f}")


def _show_quiz(quiz: QuizEvaluation) -> None:
    rows = [_quiz_row(topic, covered) for topic, covered in [*quiz.topics.items(), ("all", quiz.overall)]]
    say(table(("topic", "questions", "concepts untuned", "concepts tuned"), rows, numbers=range(1, 4)))


def _quiz_row(topic: str, covered: Covered) -> tuple[str, ...]:
    sides = (f"{side:.0%}" if isinstance(side, float) else side.reason for side in (covered.untuned, covered.tuned))
    return (topic, str(covered.questions), *sides)


def _show(evaluation: Evaluation) -> None:
    rows = [_row(topic, measured) for topic, measured in evaluation.topics.items()]
    say(table(HEADER, [*rows, _row("all", evaluation.overall)], numbers=range(1, len(HEADER))))
    if evaluation.overall.few:
        notice(f"{_few(evaluation.overall.pairs)}: read these figures as hints", warning=True)


def _few(pairs: int) -> str:
    return f"only {pairs} held-out pairs, so that one of them moves an accuracy by {1 / pairs:.0%}"


def _row(topic: str, measured: Measured) -> tuple[str, ...]:
    base, adapter = measured.base, measured.adapter
    return (
        topic,
        str(measured.pairs),
        f"{base.prefers_chosen:.0%} → {adapter.prefers_chosen:.0%}",
        f"{base.prefers_chosen_per_token:.0%} → {adapter.prefers_chosen_per_token:.0%}",
        f"{base.margin:+.1f} → {adapter.margin:+.1f}",
        f"{base.perplexity:.1f} → {adapter.perplexity:.1f}",
        f"{measured.reward_accuracy:.0%}",
    )


VOICE_HEADER = ("topic", "answers", "words", "voice untuned", "voice tuned", "copied", "longest copy", "length")


def _show_voice(assessment: Assessment) -> None:
    rows = [*assessment.topics.items(), ("all", assessment.overall)]
    say(table(VOICE_HEADER, [_voice_row(*row) for row in rows], numbers=range(1, len(VOICE_HEADER))))
    if isinstance(assessment.overall.tuned, NotScored):
        notice(f"the voice could not be scored: {assessment.overall.tuned.reason}", warning=True)
    for flag in getattr(assessment.overall.copying, "flagged", ()):
        notice(f"tuned model: {flag}", warning=True)


def _voice_row(topic: str, assessed: Assessed) -> tuple[str, ...]:
    tuned, copying = assessed.tuned, assessed.copying
    counts = (str(tuned.texts), str(tuned.words)) if isinstance(tuned, VoiceScore) else ("-", str(tuned.words))
    copied = ("-", "-", "-")
    if isinstance(copying, Copying):
        length = "-" if copying.length is None else f"{copying.length:.2f}"
        copied = (f"{copying.copy_rate:.0%}", f"{copying.longest.words} words", length)
    return (topic, *counts, _interval(assessed.untuned), _interval(tuned), *copied)


def _interval(score: VoiceScore | NotScored) -> str:
    return "not scored" if isinstance(score, NotScored) else interval(score)
