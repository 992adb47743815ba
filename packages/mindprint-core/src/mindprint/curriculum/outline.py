"""Units, chapters and topics, from ids such as `unit-01/chapter-02/topic-03`, with order and titles of curriculum.yaml.

    title: One year on the river
    units:
      - id: unit-01
        title: The water
        chapters:
          - id: chapter-02
            topics:
              - {id: topic-03, title: The tide}

An id of two parts is a unit and a topic in it. An id of one part is a topic without a unit. The file decides the order.
Without a file, topics come in the order of their first rows.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mindprint.config import ConfigFile, Level
from mindprint.errors import DataError
from mindprint.input_files import read_text
from mindprint.yaml_files import parse_yaml

CURRICULUM_FILE = "curriculum.yaml"


# A misspelt key is an error: if it were ignored, the topics under it would be missing without a word.
class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str = Field(min_length=1)
    title: str | None = None


class _Chapter(_Entry):
    topics: list[_Entry | str] = Field(min_length=1)


class _Unit(_Entry):
    chapters: list[_Chapter] = []
    topics: list[_Entry | str] = []


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    title: str | None = None
    units: list[_Unit] = []
    topics: list[_Entry | str] = []


@dataclass(frozen=True)
class Part:
    """A unit or a chapter, with its topics in order."""

    level: Level
    name: str
    topics: tuple[str, ...]


MOST_LISTED = 20
"""The most topics that a message lists."""


@dataclass(frozen=True)
class Outline:
    """Topic ids in the order of training, with the titles of topics, chapters and units by id."""

    topics: tuple[str, ...]
    titles: Mapping[str, str] = field(default_factory=dict)
    title: str | None = None

    def title_of(self, name: str) -> str:
        """Return the title of a topic, chapter or unit, or the last part of its id if it has none."""
        return self.titles.get(name) or name.rpartition("/")[2]

    def ending_with(self, topic: str) -> tuple[Part, ...]:
        """Return the chapter and the unit whose last topic is `topic`, the chapter first."""
        levels: tuple[tuple[Level, str | None], ...] = (("chapter", chapter_of(topic)), ("unit", unit_of(topic)))
        parts = []
        for level, name in levels:
            # The slash keeps `unit-1` from taking the topics of `unit-10`.
            members = tuple(member for member in self.topics if name is not None and member.startswith(f"{name}/"))
            if members and members[-1] == topic:
                parts.append(Part(level, str(name), members))
        return tuple(parts)

    def chosen(self, wanted: Sequence[str] | None, limit: int | None) -> Outline:
        """Return an outline of the topics in `wanted`, and of those only the first `limit`.

        `wanted` has ids of topics, chapters and units. Raises `DataError` for an id that no row has.
        """
        kept = self.topics
        if wanted is not None:
            for name in wanted:
                if not any(_within(topic, name) for topic in self.topics):
                    raise DataError(f"topic {name!r} is in no row{_nearest(name, self.topics)}; {_listed(self.topics)}")
            # Topics keep the order of the outline, whatever the order of `wanted`: the curriculum decides it.
            kept = tuple(topic for topic in self.topics if any(_within(topic, name) for name in wanted))
        return Outline(kept[:limit], self.titles, self.title)

    def stated(self) -> dict[str, Any]:
        """Return the outline as the JSON object of manifest.json."""
        return {"title": self.title, "topics": {topic: self.title_of(topic) for topic in self.topics},
                "titles": dict(self.titles)}  # fmt: skip


def chapter_of(topic: str) -> str | None:
    """Return the chapter's id, `unit/chapter`, of a topic whose id has three parts or more, else None."""
    head, _, _ = topic.rpartition("/")
    # A head without a slash is a unit, and its topic is in no chapter.
    return head if "/" in head else None


def unit_of(topic: str) -> str | None:
    """Return the unit's id of a topic whose id has two parts or more, else None."""
    head, slash, _ = topic.partition("/")
    return head if slash else None


def read_outline(file: ConfigFile, topics: Sequence[str]) -> Outline:
    """Return the outline of `topics`, which are those of the rows in the order of their first row.

    Raises `ConfigError` or `DataError` where a curriculum.yaml is malformed, names a topic without rows, or lacks one
    that has rows.
    """
    path = _path(file)
    if path is None:
        return Outline(tuple(topics))
    content = _parsed(path)
    ordered, titles = _flattened(content, path)
    have = set(topics)
    for topic in ordered:
        if topic not in have:
            raise DataError(
                f"{path}: names topic {topic!r}, which no row has{_nearest(topic, topics)}; "
                "add rows with this topic, or remove it from the file"
            )
    for topic in topics:
        if topic not in ordered:
            raise DataError(
                f"{path}: lacks topic {topic!r}, which rows have{_nearest(topic, ordered)}; add it to the file, "
                "or remove its rows"
            )
    return Outline(tuple(ordered), titles, content.title)


def _path(file: ConfigFile) -> Path | None:
    data = file.config.data
    if data.curriculum is not None:
        named = file.resolve(data.curriculum)
        if not named.is_file():
            raise DataError(f"{file.source}: data.curriculum: {named} does not exist")
        return named
    if data.path is None:
        return None
    # A file that the configuration names must exist. The one next to the data is optional.
    default = file.resolve(data.path) / CURRICULUM_FILE
    return default if default.is_file() else None


def _parsed(path: Path) -> _File:
    try:
        values, lines = parse_yaml(read_text(path), str(path))
        return _File.model_validate(values)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        line = lines.get((str(problem["loc"][0]),))
        at = f" line {line}:" if line else ""
        raise DataError(f"{path}:{at} {where}: {problem['msg'][0].lower()}{problem['msg'][1:]}") from error


def _flattened(content: _File, path: Path) -> tuple[dict[str, None], dict[str, str]]:
    """Return topic ids in order, and titles by id."""
    titles: dict[str, str] = {}
    # The keys of a dict are an ordered set: they keep the order of the file and find a repeated topic at once.
    ordered: dict[str, None] = {}

    def add(prefix: str, entries: Sequence[_Entry | str]) -> None:
        for entry in entries:
            topic = _Entry(id=entry) if isinstance(entry, str) else entry
            name = _add_title(titles, prefix, topic)
            if name in ordered:
                raise DataError(f"{path}: topic {name!r} is named twice")
            ordered[name] = None

    add("", content.topics)
    for unit in content.units:
        above = _add_title(titles, "", unit)
        add(above, unit.topics)
        for chapter in unit.chapters:
            add(_add_title(titles, above, chapter), chapter.topics)
    return ordered, titles


def _add_title(titles: dict[str, str], prefix: str, entry: _Entry) -> str:
    name = f"{prefix}/{entry.id}" if prefix else entry.id
    if entry.title:
        titles[name] = entry.title
    return name


def _within(topic: str, name: str) -> bool:
    # An id may be written with a slash at its end, as a folder's name is.
    return topic == name or topic.startswith(f"{name.rstrip('/')}/")


def _nearest(name: str, known: Sequence[str] | Mapping[str, None]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def _listed(topics: Sequence[str]) -> str:
    more = len(topics) - MOST_LISTED
    return f"topics are {', '.join(topics[:MOST_LISTED])}{f' and {more} more' if more > 0 else ''}"
