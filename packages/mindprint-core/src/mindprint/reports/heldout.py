"""The sections of a report on held-out text: answers side by side, forgetting, copying, preferences, quizzes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from mindprint.reports.advice import forgotten
from mindprint.reports.document import Block, Paragraph, SideBySide, Table
from mindprint.reports.phrases import (
    MISSING,
    NONE,
    change,
    interval,
    listed,
    number,
    percent,
    plural,
    why_missing,
)
from mindprint.runs.reading import RunRecord
from mindprint.runs.records import AnswerRecord, Figures

MOST_ANSWERS = 40
MOST_CHARACTERS = 1500
"""The most answers in a report, and the most characters of each: answers.jsonl has all."""


CUT = ", cut at its limit of tokens"
"""The mark of an answer that did not end by itself: it is not the model that breaks off in the middle."""


def answers(record: RunRecord) -> Iterator[Block]:
    """Yield held-out prompts with the answers of both models and of the person."""
    if not record.answers:
        yield Paragraph(
            "The run kept no answers to held-out prompts (no answers.jsonl): its final evaluation did not run."
        )
        return
    prompts = [answer for answer in record.answers if not answer.quiz and not answer.draw]
    shown = _spread(prompts)
    for answer in shown:
        yield _side_by_side(record, answer)
    more = len(prompts) - len(shown)
    if more > 0:
        yield Paragraph(f"{plural(more, 'more prompt')} with all answers are in answers.jsonl.")


def _spread(answers: Sequence[AnswerRecord]) -> list[AnswerRecord]:
    """Return at most `MOST_ANSWERS`, the same number from each topic if possible, in their order."""
    # The first answer of every topic comes before the second of any.
    turn: Counter[str] = Counter()
    places = []
    for place, answer in enumerate(answers):
        places.append((turn[answer.topic], place))
        turn[answer.topic] += 1
    # The inner sort picks by turn, the outer one restores the order in which the answers were written.
    return [answers[place] for place in sorted(place for _, place in sorted(places)[:MOST_ANSWERS])]


def _side_by_side(record: RunRecord, answer: AnswerRecord) -> SideBySide:
    texts = (
        (f"base model{CUT if 'base' in answer.cut else ''}", answer.base),
        (f"tuned model{CUT if 'tuned' in answer.cut else ''}", answer.tuned),
        ("the person", answer.person),
    )
    note = f"key concepts that the tuned model's answer lacks: {', '.join(answer.missing)}" if answer.missing else ""
    shown = tuple((label, _clipped(text)) for label, text in texts)
    return SideBySide(_clipped(answer.prompt), record.title(answer.topic), shown, note)


def _clipped(text: str) -> str:
    more = len(text) - MOST_CHARACTERS
    shown = text if more <= 0 else f"{text[:MOST_CHARACTERS]} […, {more} more characters]"
    # An empty quote would look like a fault of the report.
    return shown if shown.strip() else "(empty)"


def forgetting(record: RunRecord) -> Iterator[Block]:
    """Yield earlier topics as they were right after their training, and later."""
    rows = [
        (
            f"{evaluation.level} {record.title(evaluation.name)}".strip(),
            record.title(earlier.topic),
            interval(earlier.voice_then),
            interval(earlier.voice_now),
            change(earlier.perplexity_then, earlier.perplexity_now, 1),
        )
        for evaluation in record.evaluations or ()
        for earlier in evaluation.earlier
    ]
    if not rows:
        yield Paragraph(
            "No earlier topic was measured again: that happens at the end of a unit with more than one topic."
        )
        return
    lost = forgotten(record)
    names = listed([record.title(topic.topic) for topic in lost])
    yield Paragraph(
        f"Fell below the interval that it had right after its training: {names}."
        if lost
        else "No topic's voice fell below the interval that it had right after its training."
    )
    header = ("measured after", "topic", "voice then", "voice now", "perplexity, then → now")
    yield Table("Earlier topics, right after their training and later", header, tuple(rows), frozenset({2, 3, 4}))


def _by_topic(record: RunRecord) -> list[tuple[str, Figures]]:
    latest = [(record.title(topic), record.at_the_end(topic) or record.trained(topic)) for topic in record.topics]
    rows = [(title, evaluation.figures) for title, evaluation in latest if evaluation]
    return [*rows, ("all topics", record.final.figures)] if record.final else rows


def copying(record: RunRecord) -> Iterator[Block]:
    """Yield the overlap of answers with the training text, next to the person's own."""
    measured = [(name, figures) for name, figures in _by_topic(record) if figures.copy_rate is not None]
    if not measured:
        yield Paragraph(f"Copying {MISSING}: {_why(record, 'copy_rate')}.")
        return
    # The last row is the one over all topics, where a final evaluation exists.
    overall = measured[-1][1]
    if overall.longest_copy_text:
        yield Paragraph(
            "The longest run of words that is also in the training text: "
            f"{plural(overall.longest_copy or 0, 'word')}, “{_clipped(overall.longest_copy_text)}”."
        )
    rows = tuple(
        (
            name,
            percent(one.copy_rate),
            percent(one.person_copy_rate),
            NONE if one.longest_copy is None else plural(one.longest_copy, "word"),
            percent(one.recited),
            number(one.self_bleu),
            number(one.person_self_bleu),
            number(one.length),
        )
        for name, one in measured
    )
    header = ("topic", "copied words", "the person's copied words", "longest overlap", "recited answers",
              "self-BLEU", "the person's self-BLEU", "length")  # fmt: skip
    yield Table("Overlap with the training text, of the answers with each other, and length over the person's", header,
                rows, frozenset(range(1, 8)))  # fmt: skip


def preferences(record: RunRecord) -> Iterator[Block]:
    """Yield reward accuracies of held-out pairs, and perplexities of held-out text."""
    measured = [
        (title, figures)
        for title, figures in _by_topic(record)
        if (figures.perplexity, figures.reward_accuracy) != (None, None)
    ]
    if not measured:
        yield Paragraph(f"Reward accuracy and perplexity {MISSING}: {_why(record, 'reward_accuracy')}.")
        return
    rows = tuple(
        (
            name,
            str(one.pairs),
            percent(one.reward_accuracy),
            number(one.reward_margin),
            number(one.base_perplexity, 1),
            number(one.perplexity, 1),
        )
        for name, one in measured
    )
    header = ("topic", "pairs", "reward accuracy", "reward margin", "perplexity, base model", "perplexity, tuned model")
    yield Table(
        "Reward accuracy: share of held-out pairs in which training raised the chosen answer more than the rejected "
        "one. Perplexity: of the person's held-out text",
        header, rows, frozenset(range(1, 6)),
    )  # fmt: skip


def quizzes(record: RunRecord) -> Iterator[Block]:
    """Yield the share of key concepts that answers name, and the answers."""
    asked = [(name, figures) for name, figures in _by_topic(record) if figures.questions]
    answers = [answer for answer in record.answers or () if answer.quiz]
    if not asked and not answers:
        yield Paragraph("There were no quizzes (quiz.json in the data).")
        return
    rows = tuple(
        (name, str(one.questions), percent(one.base_concept_coverage), percent(one.concept_coverage))
        for name, one in asked
    )
    if rows:
        header = ("topic", "questions", "base model", "tuned model")
        yield Table("Share of the key concepts that answers name", header, rows, frozenset({1, 2, 3}))
    for answer in _spread(answers):
        yield _side_by_side(record, answer)


def _why(record: RunRecord, name: str) -> str:
    return why_missing(record.final.figures if record.final else None, name)
