"""A quiz, asked before and after training: how many of the key concepts the answers mention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindprint.data.quizzes import Question
from mindprint.voice.concepts import coverage
from mindprint.voice.scoring import NotScored


@dataclass(frozen=True)
class Answered:
    """One question with the untuned and the tuned model's answer, and the share of key concepts in each.

    The shares are None for a question without key concepts.
    """

    topic: str
    question: str
    reference_answers: tuple[str, ...]
    untuned: str
    tuned: str
    untuned_coverage: float | None
    tuned_coverage: float | None


@dataclass(frozen=True)
class Covered:
    """The mean share of key concepts over the questions that have them; an empty answer mentions none."""

    questions: int
    untuned: float | NotScored
    tuned: float | NotScored


@dataclass(frozen=True)
class QuizEvaluation:
    """All questions together, topic by topic in the order of their first one, and each with its answers."""

    overall: Covered
    topics: dict[str, Covered]
    answers: tuple[Answered, ...]


def evaluate_quiz(questions: Sequence[Question], untuned: Sequence[str], tuned: Sequence[str]) -> QuizEvaluation:
    """Look for the key concepts of each question in the two answers to it."""
    answers = [_answered(*parts) for parts in zip(questions, untuned, tuned, strict=True)]
    by_topic = {
        topic: _covered([one for one in answers if one.topic == topic])
        for topic in dict.fromkeys(one.topic for one in answers)
    }
    return QuizEvaluation(_covered(answers), by_topic, tuple(answers))


def _answered(question: Question, untuned: str, tuned: str) -> Answered:
    shares = [
        coverage(text, question.key_concepts).share if question.key_concepts else None for text in (untuned, tuned)
    ]
    return Answered(question.topic, question.question, question.reference_answers, untuned, tuned, *shares)


def _covered(answers: Sequence[Answered]) -> Covered:
    return Covered(
        len(answers),
        _mean([one.untuned for one in answers], [one.untuned_coverage for one in answers]),
        _mean([one.tuned for one in answers], [one.tuned_coverage for one in answers]),
    )


def _mean(texts: Sequence[str], shares: Sequence[float | None]) -> float | NotScored:
    known = [share for share in shares if share is not None]
    if not known:
        return NotScored("no question has key concepts")
    if not any(text.strip() for text in texts):
        return NotScored(f"all {len(texts)} answers are empty")
    return sum(known) / len(known)
