"""Textbooks: a folder with a curriculum, topics in Markdown, and a test for each topic.

    curriculum.yaml                             titles and order of units, chapters and topics
    style-guide.md                              phrases that are wanted, and phrases that are not
    units/unit-01/chapter-02/topic-03.md        Learning Objectives, Content, Key Concepts, Summary
    units/unit-01/chapter-02/topic-03-test.md   questions with a Reference Answer and an Evaluation Focus

The content becomes passages. Concepts and summary become rows with prompts that nobody has to find. Tests become
quizzes, the style guide a lexicon.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindprint.contract import Block, Document
from mindprint.errors import DataError
from mindprint.input_files import read_text
from mindprint.readers.text import markdown_blocks
from mindprint.text.words import words
from mindprint.voice.lexicon import LexiconConfig
from mindprint.yaml_files import parse_yaml

UNITS, CURRICULUM = "units", "curriculum.yaml"
STYLE_GUIDES = ("style-guide.md", "style_guide.md", "styleguide.md")

_HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*#*\s*$")
_BULLET = re.compile(r"^\s*(?:[-*+]|\d+[.)])\s+(.*)$")
_TERM = re.compile(
    r"^\s*(?:\*\*|__)(?P<term>[^*_]+?):?(?:\*\*|__)\s*(?::|--|[\u2013\u2014-])?\s*(?P<text>.*)$", re.DOTALL
)
_PLAIN_TERM = re.compile(r"^(?P<term>[^:\u2013\u2014]{2,60})(?::| [\u2013\u2014-])\s+(?P<text>.+)$", re.DOTALL)
_LABEL = re.compile(r"^\s*(?:[-*+]\s+)?[*_]{2}(?P<name>[^*_:]+?):?[*_]{2}:?\s*(?P<text>.*)$")
_NUMBERED = re.compile(r"^(?:question\s*\d*|q\d+|\d+)\s*[.):\u2013\u2014-]*\s*", re.IGNORECASE)
_RULE = re.compile(r"^\s*(?:-{3,}|\*{3,}|_{3,})\s*$")
_MARKS = re.compile(r"[*_`]{1,3}")


@dataclass(frozen=True)
class Lesson:
    """A text that needs no invented prompt. `kind` is `concept` or `summary`, and `about` is its subject."""

    document: str
    kind: str
    about: str
    text: str


@dataclass(frozen=True)
class TestQuestion:
    """A question of a topic's test, with the answer and the concepts that are expected."""

    __test__ = False

    question: str
    reference: str
    concepts: tuple[str, ...]


@dataclass
class Textbook:
    """A textbook.

    Args:
        topics: The id of each topic by the name of its document, in the order of the curriculum.
        titles: Titles by id, of units and chapters too.
        documents: The content of each topic.
        lessons: The rows of concepts and summaries.
        tests: The questions by topic.
        lexicon: Settings under `voice.scorers.lexicon`, of the style guide. Empty without one.
        notes: Parts that could not be used, a line each.
    """

    topics: dict[str, str] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    documents: list[Document] = field(default_factory=list)
    lessons: list[Lesson] = field(default_factory=list)
    tests: dict[str, list[TestQuestion]] = field(default_factory=dict)
    lexicon: dict[str, list[Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def is_textbook(path: Path) -> bool:
    """Return whether a folder is a textbook: it has a curriculum, and topics below `units`."""
    return (path / CURRICULUM).is_file() and any((path / UNITS).glob("*/**/topic-*.md"))


def read_textbook(folder: Path) -> Textbook:
    """Read a textbook. Raises `DataError` for a curriculum or a topic that cannot be read."""
    book = Textbook()
    files = {_topic_id(folder, path): path for path in sorted((folder / UNITS).glob("*/**/topic-*.md"))}
    files = {name: path for name, path in files.items() if not path.stem.endswith("-test")}
    order, book.titles = _outline(folder / CURRICULUM, list(files), book.notes)
    for name in order:
        _read_topic(name, files[name], book)
    for style in STYLE_GUIDES:
        if (folder / style).is_file():
            book.lexicon = _lexicon(_text(folder / style), book.notes, style)
            break
    return book


def _topic_id(folder: Path, path: Path) -> str:
    parts = list(path.relative_to(folder / UNITS).with_suffix("").parts)
    # A topic may have a folder for itself: topic-03/topic-03.md.
    if len(parts) > 1 and parts[-1] == parts[-2]:
        parts.pop()
    return "/".join(parts)


def _outline(path: Path, topics: Sequence[str], notes: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the topics in the order of the curriculum, and the titles that it has."""
    value, _ = parse_yaml(_text(path), str(path))
    order: dict[str, None] = {}
    titles: dict[str, str] = {}
    for name, title in _entries(value, ()):
        # Its last parts are enough: a curriculum may name a topic without its unit, where only one has that name.
        meant = [topic for topic in topics if topic == name or topic.endswith(f"/{name}")]
        above = {"/".join(topic.split("/")[: name.count("/") + 1]) for topic in topics}
        if len(meant) == 1:
            order[meant[0]] = None
            titles |= {meant[0]: title} if title else {}
        elif name in above and title:
            titles[name] = title
        elif name not in above:
            notes.append(f"{path}: names {name!r}, which is no topic, chapter or unit below {UNITS}/")
    return [*order, *(topic for topic in topics if topic not in order)], titles


def _entries(value: object, above: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield id and title of each entry of a curriculum, with the ids of the entries around it before its own."""
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, str):
                yield "/".join((*above, entry)), ""
            else:
                yield from _entries(entry, above)
    elif isinstance(value, dict):
        name = value.get("id")
        inner = (*above, str(name)) if name is not None else above
        if name is not None:
            yield "/".join(inner), str(value.get("title") or value.get("name") or "")
        for key in ("units", "chapters", "topics"):
            yield from _entries(value.get(key), inner)


def _read_topic(name: str, path: Path, book: Textbook) -> None:
    document = str(path)
    title, sections = _sections(_text(path))
    book.topics[document] = name
    if title:
        book.titles.setdefault(name, title)
    subject = book.titles.get(name, title or name.rpartition("/")[2])
    content = sections.get("content", "")
    if not content.strip():
        book.notes.append(f"{path}: has no section `Content`")
    blocks = tuple(markdown_blocks(content))
    book.documents.append(Document(document, blocks=(Block(subject, heading=True), *blocks)))
    terms = list(_terms(sections.get("key concepts", "")))
    book.lessons += [Lesson(document, "concept", term, text) for term, text in terms if text]
    if summary := "\n\n".join(block.text for block in markdown_blocks(sections.get("summary", ""))):
        book.lessons.append(Lesson(document, "summary", subject, summary))
    test = path.with_name(f"{path.stem}-test.md")
    if test.is_file():
        questions, problems = _questions(_text(test), [term for term, _ in terms])
        book.notes += [f"{test}: {problem}" for problem in problems]
        if questions:
            book.tests[name] = questions


def _sections(text: str) -> tuple[str, dict[str, str]]:
    """Return the title of a Markdown text, and its sections of the second level by their headings in small letters."""
    title, name = "", ""
    sections: dict[str, list[str]] = {}
    for line in text.splitlines():
        heading = _HEADING.match(line)
        if heading and len(heading[1]) == 1:
            title = title or _plain(heading[2])
        elif heading and len(heading[1]) == 2:
            name = _NUMBERED.sub("", _plain(heading[2])).strip(" :").casefold()
        else:
            sections.setdefault(name, []).append(line)
    return title, {name: "\n".join(lines) for name, lines in sections.items()}


def _terms(text: str) -> Iterator[tuple[str, str]]:
    """Yield the concepts of a list, each with its explanation, which may be empty."""
    for item in _bullets(text):
        match = _TERM.match(item) or _PLAIN_TERM.match(item)
        if match:
            yield _plain(match["term"]).strip(), " ".join(_plain(match["text"]).split())
        elif words(item):
            yield _plain(item).strip(" ."), ""


def _bullets(text: str) -> list[str]:
    """Return the items of a list, or the paragraphs where there is none."""
    items: list[str] = []
    for line in text.splitlines():
        bullet = _BULLET.match(line)
        if bullet:
            items.append(bullet[1])
        elif line.strip() and items:
            items[-1] += f" {line.strip()}"
    return items or [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def _questions(text: str, terms: Sequence[str]) -> tuple[list[TestQuestion], list[str]]:
    """Return the questions of a test, and a line for each that has no reference answer."""
    found: list[dict[str, list[str]]] = []
    part = ""
    for line in text.splitlines():
        heading, label = _HEADING.match(line), _LABEL.match(line)
        name = label["name"].strip().casefold() if label else ""
        if (heading and len(heading[1]) > 1) or name.startswith("question"):
            found.append({"question": [], "reference answer": [], "evaluation focus": []})
            part = "question"
            rest = heading[2] if heading else label["text"] if label else ""
            # `**Question 3**: Why?` and `### Question 3` begin a question alike.
            line = _NUMBERED.sub("", _plain(rest))  # noqa: PLW2901
        elif found and name in ("reference answer", "evaluation focus"):
            part, line = name, label["text"] if label else ""  # noqa: PLW2901
        elif _RULE.match(line) or heading:
            part = ""
        if part:
            found[-1][part].append(line)
    questions, problems = [], []
    for number, parts in enumerate(_merged(found), 1):
        asked = " ".join(_plain(" ".join(parts["question"])).split())
        reference = "\n\n".join(block.text for block in markdown_blocks("\n".join(parts["reference answer"])))
        if reference and asked:
            focus = [item.strip(" .") for item in _bullets("\n".join(parts["evaluation focus"]))]
            questions.append(TestQuestion(asked, reference, _concepts(reference, focus, terms)))
        elif asked.endswith("?"):
            problems.append(f"question {number} has no Reference Answer")
    return questions, problems


def _merged(found: Sequence[Mapping[str, list[str]]]) -> Iterator[Mapping[str, list[str]]]:
    """Yield the questions without those that are only a heading, as `### Question 1` before `**Question**:` is."""
    for parts in found:
        if any(line.strip() for line in (*parts["question"], *parts["reference answer"])):
            yield parts


def _concepts(reference: str, focus: Sequence[str], terms: Sequence[str]) -> tuple[str, ...]:
    """Return the topic's terms that the reference answer has, and the points of the focus that are a few words of it.

    A point such as `Does the answer name both tides?` is meant for a person who reads it: no answer has these words.
    """
    said = f" {' '.join(words(reference))} "
    wanted = [*terms, *(_plain(point) for point in focus)]
    # By their words, so that `Flood` and `flood` are one.
    by_words = {" ".join(words(term)): term for term in reversed(wanted) if words(term)}
    return tuple(by_words[name] for name in reversed(by_words) if f" {name} " in said)


_WANTED = re.compile(
    r"\b(?:use|prefer\w*|wanted|signature|favou?rite|typical|do)\b(?!.*\b(?:not|n't|never)\b)", re.IGNORECASE
)
_UNWANTED = re.compile(r"\b(?:avoid\w*|never|unwanted|banned|forbidden|do not|don['\u2019]t|not)\b", re.IGNORECASE)
_DISTINCT = re.compile(r"\b(?:distinction\w*|distinguish\w*|confus\w*|never the same)\b", re.IGNORECASE)
_BETWEEN = re.compile(r"\s+(?:vs\.?|versus|\u2260|!=|is not|are not|and|/)\s+", re.IGNORECASE)


def _lexicon(text: str, notes: list[str], name: str) -> dict[str, list[Any]]:
    """Return the settings of the lexicon of a style guide: the lists under headings that say which they are."""
    lexicon: dict[str, list[Any]] = {"wanted": [], "unwanted": [], "distinctions": []}
    heading = ""
    for line in text.splitlines():
        if match := _HEADING.match(line):
            heading = _plain(match[2])
            continue
        item = _BULLET.match(line)
        if not item:
            continue
        phrase = _phrase(item[1])
        if _DISTINCT.search(heading):
            sides = [_phrase(side) for side in _BETWEEN.split(_plain(item[1]), maxsplit=1)]
            _add(lexicon, "distinctions", sides, notes, name)
        elif _UNWANTED.search(heading):
            _add(lexicon, "unwanted", phrase, notes, name)
        elif _WANTED.search(heading):
            _add(lexicon, "wanted", phrase, notes, name)
    return {kind: entries for kind, entries in lexicon.items() if entries}


def _add(lexicon: dict[str, list[Any]], kind: str, entry: Any, notes: list[str], name: str) -> None:
    """Add an entry that the lexicon can use, and note one that it cannot."""
    try:
        LexiconConfig.model_validate({kind: [entry]})
    except ValueError:
        notes.append(
            f"{name}: {' / '.join(entry) if isinstance(entry, list) else entry!r} is no phrase for the lexicon"
        )
        return
    if entry not in lexicon[kind]:
        lexicon[kind].append(entry)


def _phrase(item: str) -> str:
    """Return the phrase of an item: what is in quotation marks, or what comes before an explanation."""
    quoted = re.match(r"\s*[\"\u201c\u00ab\u201e]([^\"\u201d\u00bb\u201c]+)", item)
    return _plain(quoted[1] if quoted else re.split(r"\s+[\u2013\u2014-]\s|:\s|\s\(", item)[0]).strip(" .,;")


def _plain(text: str) -> str:
    return _MARKS.sub("", text).strip()


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
