"""Textbooks: topics, lessons, tests and style guide of a sample become rows, quizzes, curriculum and lexicon."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mindprint.api.preparation import _outline, _quizzes
from mindprint.config import load_config
from mindprint.curriculum.outline import read_outline
from mindprint.data.quizzes import read_quizzes
from mindprint.errors import DataError
from mindprint.writing.gathering import Options, gather
from mindprint.writing.textbook import is_textbook, read_textbook

SAMPLE = Path(__file__).parent / "textbook"
LEVEL, ROPES, PEOPLE = "unit-01/chapter-01/topic-01", "unit-01/chapter-01/topic-02", "unit-01/chapter-02/topic-01"


def test_topics_have_the_order_and_the_titles_of_the_curriculum() -> None:
    assert is_textbook(SAMPLE) and not is_textbook(SAMPLE / "units")
    book = read_textbook(SAMPLE)
    assert list(book.topics.values()) == [PEOPLE, LEVEL, ROPES]
    assert book.titles == {
        "unit-01": "The river",
        "unit-01/chapter-02": "People",
        "unit-01/chapter-01": "Water",
        PEOPLE: "Passengers",
        LEVEL: "The level of the river",
        ROPES: "Ropes",
    }


def test_concepts_and_summaries_are_lessons_and_objectives_are_not() -> None:
    book = read_textbook(SAMPLE)
    lessons = [(book.topics[lesson.document], lesson.kind, lesson.about) for lesson in book.lessons]
    assert lessons == [
        (PEOPLE, "concept", "Passenger"),
        (LEVEL, "concept", "Gauge"),
        (LEVEL, "concept", "Landing"),
        (LEVEL, "summary", "The level of the river"),
        (ROPES, "summary", "Ropes"),
    ]
    assert book.lessons[0].text == "a person who knows the river better than the one who is paid to."
    texts = " ".join(block.text for document in book.documents for block in document.blocks)
    assert "Look at the gauge and not at the water" in texts and "The mark of the flood" in texts
    assert "Read a gauge" not in texts and "Reference" not in texts


def test_a_test_becomes_a_quiz_with_the_concepts_that_its_answer_has() -> None:
    book = read_textbook(SAMPLE)
    first, second = book.tests[LEVEL]
    assert first.question == "Why is the gauge read in the morning?"
    assert first.reference.startswith("Because the gauge decides") and first.reference.endswith("stand on it.")
    # What the focus asks of the reader of an answer is in no answer.
    assert first.concepts == ("Gauge", "Landing", "the work of the day")
    assert (second.question, second.concepts) == ("What does a mark on the landing tell?", ("Flood",))
    assert [note for note in book.notes if "question" in note] == [
        f"{SAMPLE / 'units' / LEVEL}-test.md: question 3 has no Reference Answer"
    ]


def test_the_style_guide_is_a_lexicon() -> None:
    book = read_textbook(SAMPLE)
    assert book.lexicon == {
        "wanted": ["so much for that", "mind you"],
        "unwanted": ["going forward", "at the end of the day"],
        "distinctions": [["ferry", "boat"]],
    }
    assert any("'in conclusion, we see'" in note for note in book.notes)


def test_every_topic_is_trained_and_its_concepts_are_asked(tmp_path: Path) -> None:
    gathered = gather([SAMPLE], Options(least=15, most=40))
    topics = gathered.textbook.topics
    assert {topics[passage.document] for passage in gathered.train} == {PEOPLE, LEVEL, ROPES}
    assert not gathered.heldout and not gathered.heldout_exchanges
    assert [exchange.prompt[0]["content"] for exchange in gathered.exchanges][:2] == [
        'What do you mean by "Passenger"?',
        'What do you mean by "Gauge"?',
    ]
    # Core reads the files that are written of it.
    rows = [{"topic": topic} for topic in topics.values()]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "curriculum.yaml").write_text(_outline(rows, gathered.textbook))
    for name, content in _quizzes(gathered.textbook).items():
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_bytes(content)
    (tmp_path / "mindprint.yaml").write_text(
        f"voice: {{scorers: {{lexicon: {json.dumps(gathered.textbook.lexicon)}}}}}"
    )
    file = load_config(tmp_path)
    outline = read_outline(file, list(topics.values()))
    assert outline.topics == (PEOPLE, LEVEL, ROPES)
    assert outline.title_of("unit-01/chapter-01") == "Water"
    assert [question.topic for question in read_quizzes(file).questions] == [LEVEL, LEVEL]


def test_a_textbook_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    shutil.copytree(SAMPLE, tmp_path / "book")
    shutil.copytree(SAMPLE, tmp_path / "other")
    with pytest.raises(DataError, match="other: is a second textbook"):
        gather([tmp_path / "book", tmp_path / "other"], Options())
    (tmp_path / "book" / "units" / f"{ROPES}.md").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match=r"topic-02.md: is not UTF-8 text"):
        read_textbook(tmp_path / "book")
