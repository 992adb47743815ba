"""A conversation with an adapter, its base model, or both: turns, and the commands that change it. No terminal here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mindprint.config import GenerationConfig
from mindprint.data.rows import Message, Messages
from mindprint.errors import DataError
from mindprint.models.positions import longest_sequence
from mindprint.runs.opened import OpenedAdapter, OpenedModel

Side = Literal["voice", "base"]

COMMANDS: Mapping[str, str] = {
    "/voice": "let the adapter answer",
    "/base": "let the base model answer",
    "/both": "let both answer",
    "/system": "TEXT: begin the chat with a system message; without TEXT: with none",
    "/reset": "forget all turns",
    "/save": "FILE: write the chat to a new JSON file",
    "/help": "show this list",
    "/quit": "leave, as Ctrl-D does",
}
"""The commands of a chat, with their meaning. Text that begins with a slash is sent with two."""

OnPiece = Callable[[Side, str], None]
"""Takes the next piece of a side's answer."""


@dataclass(frozen=True)
class Turn:
    """A message, and the answers of those who were asked."""

    user: str
    answers: Mapping[Side, str]


@dataclass
class Chat:
    """A conversation.

    Both models see the same turns. An answer that a model did not give itself, because only the other one was asked, it
    sees as its own.

    Args:
        opened: The model.
        settings: How answers are generated. Default: the run's settings.
        asked: The sides that answer.
        seed: The seed of draws.
    """

    opened: OpenedModel
    settings: GenerationConfig | None = None
    asked: tuple[Side, ...] = ("voice",)
    seed: int = 0
    system: str = ""
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.opened.config.data.format == "raw":
            raise DataError(
                "the adapter was trained on plain text (data.format: raw), which has no turns: use mindprint generate"
            )
        self._ask(self.asked)

    @property
    def has_base(self) -> bool:
        """Whether there is a base model without the adapter. A merged model is whole."""
        return isinstance(self.opened, OpenedAdapter)

    def say(self, text: str, on_piece: OnPiece = lambda _, __: None) -> Turn:
        """Ask the present sides, one after the other, and remember the turn.

        An answer that is interrupted (Ctrl-C) is kept as far as it came.

        Raises:
            DataError: The chat is longer than the model can read, or its template refuses it. Nothing is remembered.
        """
        prompts = {side: self.messages(side, text) for side in self.asked}
        for messages in prompts.values():
            self._check_length(messages)
        answers: dict[Side, str] = {}
        for side, messages in prompts.items():
            pieces: list[str] = []

            def take(_: int, piece: str, side: Side = side, pieces: list[str] = pieces) -> None:
                pieces.append(piece)
                on_piece(side, piece)

            adapter = side == "voice" and self.has_base
            try:
                self.opened.answer([messages], self.settings, seed=self.seed, adapter=adapter, on_text=take)
            except KeyboardInterrupt:
                answers[side] = "".join(pieces)
                break
            answers[side] = "".join(pieces)
        turn = Turn(text, answers)
        self.turns.append(turn)
        return turn

    def messages(self, side: Side, text: str) -> Messages:
        """Return the conversation as a side sees it, up to its next answer."""
        messages = [Message("system", self.system)] if self.system else []
        for turn in self.turns:
            answer = turn.answers.get(side) or next(iter(turn.answers.values()), "")
            messages += [Message("user", turn.user), Message("assistant", answer)]
        return (*messages, Message("user", text))

    def command(self, line: str) -> str | None:
        """Carry out a command. Return its reply, or None to leave.

        Raises:
            DataError: The command is unknown, or cannot be carried out.
        """
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/quit":
            return None
        if name in ("/voice", "/base", "/both"):
            sides: dict[str, tuple[Side, ...]] = {"/voice": ("voice",), "/base": ("base",), "/both": ("voice", "base")}
            self._ask(sides[name])
            return f"{' and '.join(self.asked)} will answer"
        if name == "/system":
            self.system = rest
            return "the system message is set" if rest else "no system message is set"
        if name == "/reset":
            self.turns.clear()
            return "all turns are forgotten"
        if name == "/save":
            return self._save(rest)
        if name == "/help":
            return "\n".join(f"{command:8} {meaning}" for command, meaning in COMMANDS.items())
        raise DataError(f"{name}: no such command; known: {', '.join(COMMANDS)} (// sends text that begins with /)")

    def to_dict(self) -> dict[str, Any]:
        """Return the chat as values for JSON."""
        return {"system": self.system, "turns": [{"user": turn.user, **turn.answers} for turn in self.turns]}

    def _ask(self, sides: tuple[Side, ...]) -> None:
        if "base" in sides and not self.has_base:
            raise DataError("this is a whole model, without an adapter to leave out: only /voice answers")
        self.asked = sides

    def _check_length(self, messages: Messages) -> None:
        longest = longest_sequence(self.opened.base.path)
        new = (self.settings or self.opened.config.generation).longest
        if longest is not None and (size := len(self.opened.render(messages))) + new > longest:
            raise DataError(
                f"the chat has {size} tokens and an answer up to {new}, together more than the {longest} that this "
                "model can read: /reset forgets the turns"
            )

    def _save(self, name: str) -> str:
        if not name:
            raise DataError("/save: name the file: /save chat.json")
        path = Path(name).expanduser()
        try:
            # An existing file is never replaced: it may be somebody's work.
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(self.to_dict(), ensure_ascii=False, indent=2) + "\n")
        except (OSError, ValueError) as error:
            raise DataError(f"/save: {path}: {getattr(error, 'strerror', None) or error}") from None
        return f"written to {path}"
