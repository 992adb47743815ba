"""Rows from conversations: the person's turns are trained, and the turns before them are the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mindprint.contract import Document, Turn
from mindprint.text.words import words

MOST_WORDS = 600
"""Words of a row: longer conversations become several."""

SPOKEN = 5
"""Words that the person's longest turn in a row must have: a row of `ok` and `thanks` teaches nothing."""


@dataclass(frozen=True)
class Exchange:
    """A stretch of a conversation that begins with somebody else's turn and ends with the person's.

    `messages` are (role, text) with the roles `user` and `assistant` in turn: several others are one `user`.
    """

    document: str
    place: int
    messages: tuple[tuple[str, str], ...]

    @property
    def own(self) -> str:
        """Return the person's turns as one text."""
        return "\n\n".join(text for role, text in self.messages if role == "assistant")

    @property
    def prompt(self) -> list[dict[str, str]]:
        """Return everything before the last turn, as messages."""
        return _as_messages(self.messages[:-1])

    @property
    def sft(self) -> dict[str, Any]:
        return {"messages": _as_messages(self.messages)}

    def pair(self, rejected: str) -> dict[str, Any]:
        """Return a pair of the last turn and another answer to the same prompt."""
        return {"prompt": self.prompt, "chosen": self.messages[-1][1], "rejected": rejected}


def exchanges(document: Document, person: frozenset[str]) -> Iterator[Exchange]:
    """Yield the exchanges of a conversation. `person` are the names that mean the person."""
    place = 0
    stretch: list[tuple[str, str]] = []
    for role, text in _roles(document.turns, person):
        size = sum(len(words(said)) for _, said in stretch)
        # A new row begins where somebody else speaks, so that each begins with a prompt.
        if role == "user" and stretch and size + len(words(text)) > MOST_WORDS:
            if exchange := _exchange(document.name, place, stretch):
                yield exchange
                place += 1
            stretch = []
        stretch.append((role, text))
    if exchange := _exchange(document.name, place, stretch):
        yield exchange


def _roles(turns: Sequence[Turn], person: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield roles and texts, with turns that follow each other on the same side as one."""
    said: tuple[str, str] | None = None
    for turn in turns:
        role = "assistant" if turn.author is None or turn.author in person else "user"
        if said and said[0] == role:
            said = (role, f"{said[1]}\n{turn.text}")
            continue
        if said:
            yield said
        said = (role, turn.text)
    if said:
        yield said


def _exchange(document: str, place: int, stretch: Sequence[tuple[str, str]]) -> Exchange | None:
    # The person's first words answer nobody, and the last words of others are answered by nobody.
    messages = list(stretch)
    while messages and messages[0][0] != "user":
        messages.pop(0)
    while messages and messages[-1][0] != "assistant":
        messages.pop()
    longest = max((len(words(text)) for role, text in messages if role == "assistant"), default=0)
    return Exchange(document, place, tuple(messages)) if longest >= SPOKEN else None


def _as_messages(messages: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in messages]
