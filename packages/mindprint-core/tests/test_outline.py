"""The order and the titles of topics: from ids alone, and from a curriculum.yaml."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindprint.config import ConfigFile, make_config
from mindprint.curriculum.outline import Outline, Part, chapter_of, read_outline, unit_of
from mindprint.errors import DataError, MindprintError

TOPICS = ["u1/c1/t1", "u1/c1/t2", "u1/c2/t1", "u2/t1", "alone"]


def written(folder: Path, text: str) -> ConfigFile:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "curriculum.yaml").write_text(text, encoding="utf-8")
    return make_config({}, folder)


def test_ids_say_where_a_topic_belongs() -> None:
    assert [chapter_of(topic) for topic in TOPICS] == ["u1/c1", "u1/c1", "u1/c2", None, None]
    assert [unit_of(topic) for topic in TOPICS] == ["u1", "u1", "u1", "u2", None]


def test_chapters_and_units_end_with_their_last_topic() -> None:
    outline = Outline(tuple(TOPICS))
    assert [outline.ending_with(topic) for topic in TOPICS] == [
        (),
        (Part("chapter", "u1/c1", ("u1/c1/t1", "u1/c1/t2")),),
        (Part("chapter", "u1/c2", ("u1/c2/t1",)), Part("unit", "u1", ("u1/c1/t1", "u1/c1/t2", "u1/c2/t1"))),
        (Part("unit", "u2", ("u2/t1",)),),
        (),
    ]


def test_the_file_decides_order_and_titles(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "title: A year\n"
        "units:\n"
        "- id: u2\n  title: Second\n  topics: [t1]\n"
        "- id: u1\n  chapters:\n  - id: c1\n    title: Water\n    topics:\n    - {id: t2, title: Tide}\n    - t1\n"
        "topics: [alone]\n",
    )
    outline = read_outline(file, ["u1/c1/t1", "u1/c1/t2", "u2/t1", "alone"])
    assert outline.topics == ("alone", "u2/t1", "u1/c1/t2", "u1/c1/t1")
    names = ("u1/c1/t2", "u1/c1", "u2", "u1/c1/t1")
    assert [outline.title_of(name) for name in names] == ["Tide", "Water", "Second", "t1"]
    assert outline.title == "A year"


def test_without_a_file_rows_decide(tmp_path: Path) -> None:
    assert read_outline(make_config({}, tmp_path), TOPICS).topics == tuple(TOPICS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topics: [tide, moon]", r"names topic 'moon', which no row has; add rows"),
        ("topics: [tides]", r"names topic 'tides', which no row has \(did you mean 'tide'\?\)"),
        ("topics: []", r"lacks topic 'tide', which rows have"),
        ("topics: [tide, tide]", "topic 'tide' is named twice"),
        ("topics: [tide", r"curriculum.yaml: line 1: expected ',' or ']'"),
        ("lessons: [tide]", "line 1: lessons: extra inputs are not permitted"),
        ("title: A year\nunits: [{title: Water}]", "line 2: units.0.id: field required"),
        ("- tide", "line 1: expected `key: value` lines, found list"),
        ("topics: [tide]\ntopics: [moon]", "line 2: 'topics' is given twice"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(MindprintError, match=message):
        read_outline(written(tmp_path, text), ["tide"])


def test_text_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    file = written(tmp_path, "")
    (tmp_path / "data" / "curriculum.yaml").write_bytes(b"title: caf\xe9\n")
    with pytest.raises(DataError, match=r"curriculum.yaml: is not UTF-8 text \(byte 10\)"):
        read_outline(file, ["tide"])


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.curriculum: .*plan.yaml does not exist"):
        read_outline(make_config({"data": {"curriculum": "plan.yaml"}}, tmp_path), ["tide"])


def test_topics_can_be_chosen_by_any_id_above_them() -> None:
    outline = Outline(tuple(TOPICS))
    assert outline.chosen(["u1/c1"], None).topics == ("u1/c1/t1", "u1/c1/t2")
    assert outline.chosen(["u2", "u1/c2/t1"], None).topics == ("u1/c2/t1", "u2/t1")
    assert outline.chosen(None, 2).topics == ("u1/c1/t1", "u1/c1/t2")
    with pytest.raises(DataError, match=r"topic 'alon' is in no row \(did you mean 'alone'\?\)"):
        outline.chosen(["alon"], None)
