"""Quizzes: the share of key concepts that the base model's and the tuned model's answers mention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindprint.data.quizzes import Question
from mindprint.voice.concepts import coverage
from mindprint.voice.scoring import NotScored


@dataclass(frozen=True)
class QuizAnswer:
    """One question with both models' answers, and the share of key concepts that each mentions.

    The shares are None for a question without key concepts.
    """

    topic: str
    question: str
    reference_answers: tuple[str, ...]
    base: str
    tuned: str
    base_coverage: float | None
    tuned_coverage: float | None


@dataclass(frozen=True)
class ConceptCoverage:
    """Mean shares of key concepts over the questions that have such. An empty answer mentions none."""

    questions: int
    base: float | NotScored
    tuned: float | NotScored


@dataclass(frozen=True)
class QuizEvaluation:
    """All questions together, topic by topic in the order of their first question, and each with its answers."""

    overall: ConceptCoverage
    topics: dict[str, ConceptCoverage]
    answers: tuple[QuizAnswer, ...]


def evaluate_quiz(questions: Sequence[Question], base: Sequence[str], tuned: Sequence[str]) -> QuizEvaluation:
    """Look for the key concepts of each question in both models' answers to it."""
    answers = [_covered_answer(*parts) for parts in zip(questions, base, tuned, strict=True)]
    by_topic = {
        topic: _mean_coverage([answer for answer in answers if answer.topic == topic])
        for topic in dict.fromkeys(answer.topic for answer in answers)
    }
    return QuizEvaluation(_mean_coverage(answers), by_topic, tuple(answers))


def _covered_answer(question: Question, base: str, tuned: str) -> QuizAnswer:
    base_share, tuned_share = (
        coverage(text, question.key_concepts).share if question.key_concepts else None for text in (base, tuned)
    )
    return QuizAnswer(
        question.topic, question.question, question.reference_answers, base, tuned, base_share, tuned_share
    )


def _mean_coverage(answers: Sequence[QuizAnswer]) -> ConceptCoverage:
    return ConceptCoverage(
        len(answers),
        _mean_share([answer.base for answer in answers], [answer.base_coverage for answer in answers]),
        _mean_share([answer.tuned for answer in answers], [answer.tuned_coverage for answer in answers]),
    )


def _mean_share(texts: Sequence[str], shares: Sequence[float | None]) -> float | NotScored:
    # A question without key concepts has no share. Counting it as 0 would lower the mean of both models.
    known = [share for share in shares if share is not None]
    if not known:
        return NotScored("no question has key concepts")
    # A model that answers nothing at all is broken, which is not the same as a model that knows nothing.
    if not any(text.strip() for text in texts):
        return NotScored(f"all {len(texts)} answers are empty")
    return sum(known) / len(known)
