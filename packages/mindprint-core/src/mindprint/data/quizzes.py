"""Quizzes: questions that are only ever asked, with the answers and the key concepts expected.

A `quiz.json` lies in the data folder or in the folder of a topic below it, `unit-01/chapter-02/topic-03/quiz.json`, and
is a list of questions. They are held out by definition: no row with such a prompt is trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindprint.config import ConfigFile
from mindprint.data.row_files import Origin, Record, kind_of, shown_path
from mindprint.data.rows import DEFAULT_TOPIC, checked_text
from mindprint.errors import DataError
from mindprint.input_files import read_json
from mindprint.text.words import words

QUIZ_FILE = "quiz.json"
FIELDS = ("question", "reference_answers", "key_concepts", "topic")


@dataclass(frozen=True, slots=True)
class Question:
    """A question, one or more answers to it, and the concepts that an answer should mention (`tide|ebb` is either)."""

    topic: str
    question: str
    reference_answers: tuple[str, ...]
    key_concepts: tuple[str, ...]
    origin: Origin


@dataclass(frozen=True)
class Quizzes:
    """All questions that can be evaluated, and the mistakes in the others.

    `held_out` are the questions as they are asked, those without reference answers too. `without_references` and
    `unreadable` name the mistakes, one line each. Questions that cannot be read cannot be held out either.
    """

    questions: tuple[Question, ...] = ()
    held_out: tuple[str, ...] = ()
    without_references: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        return self.unreadable + self.without_references


class _UnansweredError(DataError):
    """A question that can be held out and cannot be evaluated."""

    def __init__(self, question: str, message: str) -> None:
        super().__init__(message)
        self.question = question


def read_quizzes(file: ConfigFile) -> Quizzes:
    """Read every `quiz.json` of a configuration's data folder. Never raises for their content: see `Quizzes`."""
    if file.config.data.path is None:
        return Quizzes()
    folder = file.resolve(file.config.data.path)
    questions: list[Question] = []
    unanswered: list[_UnansweredError] = []
    unreadable: list[str] = []
    # Sorted, because the order of a folder's entries depends on the file system.
    for path in sorted(folder.rglob(QUIZ_FILE)):
        topic = path.parent.relative_to(folder).as_posix()
        try:
            records = _read(path)
        except DataError as error:
            unreadable.append(str(error))
            continue
        for number, record in enumerate(records, 1):
            try:
                questions.append(_question(record, DEFAULT_TOPIC if topic == "." else topic, _origin(path, number)))
            except _UnansweredError as error:
                unanswered.append(error)
            except DataError as error:
                unreadable.append(str(error))
    # Questions without answers are held out too. Somebody may add the answers, and the model must not have learnt them.
    held_out = (*(question.question for question in questions), *(error.question for error in unanswered))
    return Quizzes(tuple(questions), held_out, tuple(map(str, unanswered)), tuple(unreadable))


def _origin(path: Path, number: int) -> Origin:
    return Origin(shown_path(path), number, "question")


def _read(path: Path) -> list[Any]:
    name = shown_path(path)
    try:
        found = read_json(path)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: is not UTF-8 (byte {error.start + 1}): save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{name}: line {error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{name}: cannot be read as JSON: {error}") from None
    if not isinstance(found, list) or not found:
        what = "an empty list" if found == [] else kind_of(found)
        raise DataError(f"{name}: must be a list of questions [{{...}}, ...], found {what}")
    return found


def _question(record: object, topic: str, origin: Origin) -> Question:
    if not isinstance(record, dict):
        raise DataError(f"{origin}: must be an object with `question` and `reference_answers`, found {kind_of(record)}")
    unknown = [name for name in record if name not in FIELDS]
    if unknown:
        raise DataError(f"{origin}: unknown field {unknown[0]!r}; known are {', '.join(FIELDS)}")
    asked = checked_text(record.get("question"), "question", origin)
    named = checked_text(record["topic"], "topic", origin).strip() if record.get("topic") is not None else topic
    concepts = _all(record, "key_concepts", origin, _concept)
    answers = _all(record, "reference_answers", origin, checked_text)
    if not answers:
        raise _UnansweredError(asked, f"{origin}: has no `reference_answers`: write at least one")
    return Question(named, asked, answers, concepts, origin)


def _all(record: Record, name: str, origin: Origin, check: Callable[[object, str, Origin], str]) -> tuple[str, ...]:
    value = record.get(name)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise DataError(f"{origin}: `{name}` must be a list of texts, found {kind_of(value)}")
    return tuple(check(item, f"{name}[{index}]", origin) for index, item in enumerate(value))


def _concept(value: object, name: str, origin: Origin) -> str:
    concept = checked_text(value, name, origin)
    # A concept without a word would be found in no answer, or in every one.
    if not all(words(way) for way in concept.split("|")):
        raise DataError(f"{origin}: `{name}` has no word in it: {concept!r}")
    return concept
