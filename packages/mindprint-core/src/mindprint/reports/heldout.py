"""What held-out text showed: answers side by side, forgetting, copying, preferences, quizzes."""

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
"""Of answers, how many and how much of each stand in a report; answers.jsonl has all."""


def answers(record: RunRecord) -> Iterator[Block]:
    if not record.answers:
        yield Paragraph(
            "The run kept no answers to held-out prompts (no answers.jsonl): its final evaluation did not run."
        )
        return
    shown = _spread([one for one in record.answers if not one.quiz])
    for one in shown:
        yield _side_by_side(record, one)
    more = sum(not one.quiz for one in record.answers) - len(shown)
    if more > 0:
        yield Paragraph(f"{plural(more, 'more prompt')} with all answers are in answers.jsonl.")


def _spread(answers: Sequence[AnswerRecord]) -> list[AnswerRecord]:
    """As many as may be shown, from every topic alike, in their order."""
    turn: Counter[str] = Counter()
    places = []
    for place, one in enumerate(answers):
        places.append((turn[one.topic], place))
        turn[one.topic] += 1
    return [answers[place] for place in sorted(place for _, place in sorted(places)[:MOST_ANSWERS])]


def _side_by_side(record: RunRecord, one: AnswerRecord) -> SideBySide:
    texts = (("base model", one.base), ("tuned model", one.tuned), ("the person", one.person))
    note = f"key concepts that the answer lacks: {', '.join(one.missing)}" if one.missing else ""
    return SideBySide(_clipped(one.prompt), record.title(one.topic), tuple((n, _clipped(t)) for n, t in texts), note)


def _clipped(text: str) -> str:
    more = len(text) - MOST_CHARACTERS
    shown = text if more <= 0 else f"{text[:MOST_CHARACTERS]} […, {more} more characters]"
    return shown if shown.strip() else "(empty)"


# --- forgetting, copying, preferences, quizzes -----------------------------------------------------------------------


def forgetting(record: RunRecord) -> Iterator[Block]:
    rows = [
        (
            f"{one.level} {record.title(one.name)}".strip(),
            record.title(then.topic),
            interval(then.voice_then),
            interval(then.voice_now),
            change(then.perplexity_then, then.perplexity_now, 1),
        )
        for one in record.evaluations or ()
        for then in one.earlier
    ]
    if not rows:
        yield Paragraph("No earlier topic was looked at again: that happens at the end of a unit with more than one.")
        return
    lost = forgotten(record)
    names = listed([record.title(one.topic) for one in lost])
    yield Paragraph(
        f"Fell below its own interval since it was trained: {names}."
        if lost
        else "No topic's voice fell below the interval that it had right after its training."
    )
    header = ("looked at after", "topic", "voice then", "voice now", "perplexity, then → now")
    yield Table("Earlier topics, right after their training and later", header, tuple(rows), frozenset({2, 3, 4}))


def _by_topic(record: RunRecord) -> list[tuple[str, Figures]]:
    found = [(record.title(topic), record.at_the_end(topic) or record.trained(topic)) for topic in record.topics]
    rows = [(name, one.figures) for name, one in found if one]
    return [*rows, ("all topics", record.final.figures)] if record.final else rows


def copying(record: RunRecord) -> Iterator[Block]:
    measured = [(name, figures) for name, figures in _by_topic(record) if figures.copy_rate is not None]
    if not measured:
        yield Paragraph(f"Copying {MISSING}: {_why(record, 'copy_rate')}.")
        return
    overall = measured[-1][1]
    if overall.longest_copy_text:
        yield Paragraph(
            "The longest run of words that stands in the training text as well: "
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
    header = ("topic", "copied words", "of the person's", "longest overlap", "recited answers", "self-BLEU",
              "of the person's", "length")  # fmt: skip
    yield Table("Overlap with the training text, of the answers with each other, and length over the person's", header,
                rows, frozenset(range(1, 8)))  # fmt: skip


def preferences(record: RunRecord) -> Iterator[Block]:
    measured = [(n, f) for n, f in _by_topic(record) if (f.perplexity, f.reward_accuracy) != (None, None)]
    if not measured:
        yield Paragraph(f"Preference accuracy and perplexity {MISSING}: {_why(record, 'reward_accuracy')}.")
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
    header = ("topic", "pairs", "chosen gained", "by, nats", "perplexity before", "after")
    yield Table(
        "Held-out pairs: how often, and by how much, training raised the chosen answer over the rejected one; and how "
        "surprising the person's held-out text is",
        header, rows, frozenset(range(1, 6)),
    )  # fmt: skip


def quizzes(record: RunRecord) -> Iterator[Block]:
    asked = [(name, figures) for name, figures in _by_topic(record) if figures.questions]
    answers = [one for one in record.answers or () if one.quiz]
    if not asked and not answers:
        yield Paragraph("There were no quizzes (quiz.json in the data).")
        return
    rows = tuple(
        (name, str(one.questions), percent(one.base_concept_coverage), percent(one.concept_coverage))
        for name, one in asked
    )
    if rows:
        header = ("topic", "questions", "before", "after")
        yield Table("Share of the key concepts that answers name", header, rows, frozenset({1, 2, 3}))
    for one in _spread(answers):
        yield _side_by_side(record, one)


def _why(record: RunRecord, name: str) -> str:
    return why_missing(record.final.figures if record.final else None, name)
