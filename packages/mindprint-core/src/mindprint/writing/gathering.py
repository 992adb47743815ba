"""Everything that the person wrote, before any model is asked: passages and exchanges, checked and divided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

from mindprint.contract import Document
from mindprint.draws import uniform
from mindprint.errors import DataError
from mindprint.readers.finding import Reading, read_documents
from mindprint.text.near_duplicates import near_duplicate_groups
from mindprint.text.words import word_count, words
from mindprint.writing.conversations import SPOKEN, Exchange, exchanges
from mindprint.writing.languages import languages_of
from mindprint.writing.passages import LEAST, MOST, Passage, cut
from mindprint.writing.people import is_own, person_in
from mindprint.writing.places import Places
from mindprint.writing.private import find_private, redact
from mindprint.writing.templates import Templates
from mindprint.writing.textbook import Textbook, is_textbook, read_textbook

FEWEST_PASSAGES = 8
"""Passages from which on there is something to learn and something to hold out."""

MOST_CHARACTERS = 2**28
"""Characters of all writing: forty million words, or four hundred novels. They take a few bytes of memory each."""

Part = TypeVar("Part", Passage, Exchange)


@dataclass(frozen=True)
class Options:
    """The choices that a person has about their writing.

    Args:
        author: Their name, as mails and chats have it.
        least: The fewest words of a passage.
        most: The most words of a passage.
        heldout: Share of the passages whose documents give no training row.
        redact: Whether private things are replaced.
        seed: Seed of every draw.
    """

    author: str | None = None
    least: int = LEAST
    most: int = MOST
    heldout: float = 0.1
    redact: bool = False
    seed: int = 0


@dataclass(frozen=True)
class PrivateThing:
    """A private thing, its kind, its document and the line of the file.

    `line` is None in files that are no lines of text, such as DOCX, and in mails that are encoded.
    """

    kind: str
    document: str
    thing: str
    line: int | None

    @property
    def place(self) -> str:
        """Return the document and the line, as far as it is known."""
        return self.document if self.line is None else f"{self.document}:{self.line}"


@dataclass
class Gathered:
    """The person's writing.

    Args:
        train: Passages to train on, in the order of the documents.
        heldout: Passages of documents that give no training row.
        exchanges: Stretches of conversations to train on.
        heldout_exchanges: Stretches of conversations that are held out.
        reading: The files that were read, and those that were not.
        language: The main language.
        other_languages: Passages in other languages, which are left out, by language.
        duplicates: Passages that nearly equal one before them, which are left out.
        others_documents: Documents that somebody else wrote.
        textbook: The textbook among the paths, if one is.
        private: The private things found, in the order of the documents.
        words: The person's words in all.
    """

    train: list[Passage] = field(default_factory=list)
    heldout: list[Passage] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    heldout_exchanges: list[Exchange] = field(default_factory=list)
    reading: Reading = field(default_factory=Reading)
    language: str = ""
    other_languages: Mapping[str, int] = field(default_factory=dict)
    duplicates: int = 0
    others_documents: int = 0
    textbook: Textbook = field(default_factory=Textbook)
    private: list[PrivateThing] = field(default_factory=list)
    words: int = 0


def gather(
    paths: Sequence[Path],
    options: Options,
    on_file: Callable[[Path], None] = lambda _: None,
    templates: Templates | None = None,
) -> Gathered:
    """Read the files and cut them into passages and exchanges. `templates` ask for the concepts of a textbook.

    Raises `DataError` if a path does not exist, if it is not clear who the person is, or if too little is left.
    """
    gathered = Gathered()
    gathered.textbook = book = _textbook(paths, gathered)
    others = [path for path in paths if not is_textbook(path)]
    documents = [*book.documents, *_bounded(read_documents(others, gathered.reading, on_file))]
    person = person_in(documents, options.author)
    own = [document for document in documents if document.turns or is_own(document, person)]
    gathered.others_documents = len(documents) - len(own)
    passages = [passage for document in own for passage in cut(document, options.least, options.most)]
    spoken = [exchange for document in own for exchange in exchanges(document, person)]
    spoken += _lessons(book, templates or Templates())
    passages = _in_main_language(passages, gathered)
    passages = _without_duplicates(passages, lambda passage: passage.text, gathered)
    spoken = _without_duplicates(spoken, lambda exchange: exchange.own, gathered)
    gathered.private = _private_things(
        [*((p.document, p.text) for p in passages), *((e.document, e.own) for e in spoken)]
    )
    if options.redact:
        passages = [replace(p, text=redact(p.text), before=redact(p.before)) for p in passages]
        spoken = [replace(e, messages=tuple((role, redact(text)) for role, text in e.messages)) for e in spoken]
    gathered.words = word_count([p.text for p in passages]) + word_count([e.own for e in spoken])
    if len(passages) + len(spoken) < FEWEST_PASSAGES:
        raise DataError(_too_little(gathered, len(passages) + len(spoken), documents))
    # A textbook is measured with its tests, and each of its topics needs its rows.
    taught = [part for part in passages if part.document in book.topics]
    gathered.train, gathered.heldout = _divided([p for p in passages if p.document not in book.topics], options)
    gathered.train = [*taught, *gathered.train]
    explained = [exchange for exchange in spoken if exchange.document in book.topics]
    spoken = [exchange for exchange in spoken if exchange.document not in book.topics]
    gathered.exchanges, gathered.heldout_exchanges = _divided(spoken, options)
    gathered.exchanges = [*explained, *gathered.exchanges]
    return gathered


def _bounded(documents: Iterable[Document]) -> Iterator[Document]:
    """Yield documents. Raises `DataError` as soon as they are more than anybody writes: they stay in memory."""
    size = 0
    for document in documents:
        size += sum(len(block.text) for block in document.blocks) + sum(len(turn.text) for turn in document.turns)
        if size > MOST_CHARACTERS:
            raise DataError(
                f"the files up to {document.name} have more than {MOST_CHARACTERS:,} characters, and nobody writes so "
                "much: leave out logs and data"
            )
        yield document


def _textbook(paths: Sequence[Path], gathered: Gathered) -> Textbook:
    folders = [path for path in paths if is_textbook(path)]
    if len(folders) > 1:
        raise DataError(f"{folders[1]}: is a second textbook: prepare each into a project")
    book = read_textbook(folders[0]) if folders else Textbook()
    gathered.reading.read |= dict.fromkeys(book.topics, 1)
    return book


def _lessons(book: Textbook, templates: Templates) -> list[Exchange]:
    """Return the concepts and summaries of a textbook with the prompts of their templates."""
    return [
        Exchange(
            lesson.document,
            place,
            (("user", templates.fill(f"ask-{lesson.kind}", lesson.about)), ("assistant", lesson.text)),
        )
        for place, lesson in enumerate(book.lessons)
        if len(words(lesson.text)) >= SPOKEN
    ]


def _private_things(texts: Sequence[tuple[str, str]]) -> list[PrivateThing]:
    """Return the private things in texts, each with the name of its document before it."""
    places = Places()
    return [
        PrivateThing(
            private.kind,
            document,
            text[private.start : private.end],
            places.line(document, text, private.start, private.end),
        )
        for document, text in texts
        for private in find_private(text)
    ]


def _in_main_language(passages: Sequence[Passage], gathered: Gathered) -> list[Passage]:
    if not passages:
        return []
    main, languages = languages_of([passage.text for passage in passages])
    gathered.language = main
    others = Counter(language for language in languages if language != main)
    gathered.other_languages = dict(others.most_common())
    return [passage for passage, language in zip(passages, languages, strict=True) if language == main]


def _without_duplicates(parts: Sequence[Part], text_of: Callable[[Part], str], gathered: Gathered) -> list[Part]:
    if not parts:
        return []
    groups = near_duplicate_groups([text_of(part) for part in parts])
    kept = [part for place, (part, group) in enumerate(zip(parts, groups, strict=True)) if place == group]
    gathered.duplicates += len(parts) - len(kept)
    return kept


def _divided(parts: Sequence[Part], options: Options) -> tuple[list[Part], list[Part]]:
    """Divide by document: a hash of each decides, so that writing that is added later moves none.

    Of a single document, or where the hash would hold out nothing or too much, the last part of the longest one is held
    out, after a gap of one passage.
    """
    by_document: dict[str, list[Part]] = {}
    for part in parts:
        by_document.setdefault(part.document, []).append(part)
    if not parts or not options.heldout:
        return list(parts), []
    drawn = {name for name in by_document if _draw(by_document[name], options.seed) < options.heldout}
    share = sum(len(by_document[name]) for name in drawn) / len(parts)
    if drawn and share <= 3 * options.heldout:
        return (
            [part for part in parts if part.document not in drawn],
            [part for part in parts if part.document in drawn],
        )
    longest = max(by_document.values(), key=len)
    count = max(1, round(options.heldout * len(parts)))
    # Of many short documents the last ones, whole; of a long one its end.
    if count >= len(longest):
        return list(parts[: -count - 1]), list(parts[-count:])
    heldout = longest[-count:]
    gap = {id(part) for part in longest[-count - 1 :]}
    return [part for part in parts if id(part) not in gap], heldout


def _draw(parts: Sequence[Passage] | Sequence[Exchange], seed: int) -> float:
    # By the text and not by the name: a folder that is moved stays divided as it was.
    first = parts[0]
    text = first.text if isinstance(first, Passage) else first.own
    digest = blake2b(text.encode(), digest_size=8).hexdigest()
    return float(uniform((1,), seed, "held out", digest)[0])


def _too_little(gathered: Gathered, found: int, documents: Sequence[Document]) -> str:
    reading = gathered.reading
    if not documents and reading.skipped:
        first, reason = next(iter(reading.skipped.items()))
        others = len(reading.skipped) - 1
        return f"{first}: {reason}" + (f"; nor could {_counted(others, 'other file')} be read" if others else "")
    if not documents:
        return "no file to read: name files or folders with the person's writing"
    texts = [block.text for document in documents for block in document.blocks]
    read = word_count([*texts, *(turn.text for document in documents for turn in document.turns)])
    return (
        f"too little writing: the files have {_counted(read, 'word')}, which make {_counted(found, 'passage')}, and "
        f"{FEWEST_PASSAGES} passages are needed; give more of the person's writing, or ask for shorter passages with "
        "--passage-words"
    )


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")
