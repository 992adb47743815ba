"""Texts that ask the base model for prompts, and texts that become prompts. A folder can replace each.

A text that asks may show examples first. Then lines of `---` set the turns of a conversation apart, which begins and
ends with the user. Small models need the examples: without them they describe the task and do not do it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from mindprint.data.rows import Message, Text
from mindprint.errors import ConfigError
from mindprint.input_files import read_text

NAMES: Mapping[str, str] = {
    "answer-1": "passage",
    "answer-2": "passage",
    "answer-3": "passage",
    "topic-1": "passage",
    "topic-2": "passage",
    "rewrite": "passage",
    "ask-topic": "topic",
    "ask-rewrite": "plain",
    "ask-continue": "before",
    "ask-concept": "concept",
    "ask-summary": "topic",
    "ask-nothing": "",
}
"""Each template, and the word in braces that it must have."""

TURNS = re.compile(r"\n[ \t]*---[ \t]*\n")
"""The line between two turns of a template."""


class Templates:
    """The templates that come with Mindprint, or a person's own under the same names (`answer-1.txt`)."""

    def __init__(self, folder: Path | None = None) -> None:
        self._texts: dict[str, str] = {}
        unknown = sorted(path.name for path in folder.glob("*.txt") if path.stem not in NAMES) if folder else []
        if folder is not None and (unknown or not folder.is_dir()):
            problem = f"{unknown[0]} is not a template" if unknown else "is not a folder"
            raise ConfigError(f"{folder}: {problem}; templates are {', '.join(f'{name}.txt' for name in NAMES)}")
        for name, word in NAMES.items():
            own = folder / f"{name}.txt" if folder else None
            if own is not None and own.is_file():
                text = read_text(own)
            else:
                text = files("mindprint").joinpath("resources", "prepare", f"{name}.txt").read_text(encoding="utf-8")
            if word and f"{{{word}}}" not in text:
                raise ConfigError(f"{own}: has no {{{word}}}, where the text goes")
            if not name.startswith("ask-") and len(TURNS.split(text)) % 2 == 0:
                raise ConfigError(f"{own}: its turns are divided by `---`, and the last one must be the user's")
            self._texts[name] = text.strip()

    def fill(self, name: str, text: str = "") -> str:
        """Return a template with a text in the place of its word."""
        # Not `format`: braces in the person's text, or in another place of the template, mean themselves.
        return self._texts[name].replace(f"{{{NAMES[name]}}}", text) if NAMES[name] else self._texts[name]

    def ask(self, name: str, passage: str) -> Text:
        """Return a question to the base model about a passage: a text, or the turns of a conversation."""
        # The passage goes in last: a line of `---` within it divides nothing.
        *examples, question = TURNS.split(self._texts[name])
        filled = question.replace(f"{{{NAMES[name]}}}", passage)
        if not examples:
            return filled
        turns = [*examples, filled]
        return tuple(Message("assistant" if place % 2 else "user", turn.strip()) for place, turn in enumerate(turns))

    def proposals(self, kind: str) -> Sequence[str]:
        """Return the names of the templates that propose prompts of a kind."""
        return tuple(name for name in NAMES if name.rpartition("-")[0] == kind)

    @property
    def texts(self) -> Mapping[str, str]:
        """Return all texts by name."""
        return self._texts
