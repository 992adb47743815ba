"""A conversation: turns, commands, several lines, and what a pipe gets."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_voice import opened_voice

from mindprint.api.chatting import COMMANDS, Chat
from mindprint.cli import main
from mindprint.cli.chat import converse, messages
from mindprint.data.rows import Message
from mindprint.errors import DataError
from mindprint.runs.opened import OpenedAdapter


@pytest.fixture(scope="module")
def opened(toy_site: Path, toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenedAdapter]:
    """A trained adapter."""
    with opened_voice(toy_site, toy_model, tmp_path_factory.mktemp("chat")) as adapter:
        yield adapter


def lines(text: str) -> Any:
    """Return a reader of these lines."""
    left = iter(text.splitlines())

    def read(_: str) -> str:
        for line in left:
            return line
        raise EOFError

    return read


def test_a_turn_is_the_answer_to_all_turns_before(opened: OpenedAdapter) -> None:
    chat = Chat(opened)
    pieces: list[str] = []
    first = chat.say("sea 1?", lambda side, piece: pieces.append(piece))
    (expected,) = opened.answer(["sea 1?"])
    assert first.answers == {"voice": expected.text}
    assert "".join(pieces) == expected.text
    chat.command("/both")
    chat.command("/system Be brief.")
    both = chat.say("and 2?")
    conversation = (
        Message("system", "Be brief."),
        Message("user", "sea 1?"),
        # The base model was not asked before: it sees the answer that was given.
        Message("assistant", expected.text),
        Message("user", "and 2?"),
    )
    for side in ("voice", "base"):
        (answer,) = opened.answer([conversation], adapter=side == "voice")
        assert both.answers[side] == answer.text
    assert both.answers["voice"] != both.answers["base"]
    assert [message.content for message in chat.messages("base", "x")][-2] == both.answers["base"]
    chat.command("/reset")
    assert chat.messages("base", "x") == (Message("system", "Be brief."), Message("user", "x"))


def test_commands(opened: OpenedAdapter, tmp_path: Path) -> None:
    chat = Chat(opened)
    assert chat.command("/base") == "base will answer"
    assert chat.asked == ("base",)
    assert chat.command("/both") == "voice and base will answer"
    assert chat.command("/system") == "no system message is set"
    assert all(command in str(chat.command("/help")) for command in COMMANDS)
    chat.say("sea 1?")
    assert chat.command(f"/save {tmp_path / 'chat.json'}") == f"written to {tmp_path / 'chat.json'}"
    (turn,) = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))["turns"]
    assert turn == {"user": "sea 1?", **chat.turns[0].answers}
    assert chat.command("/quit") is None
    for line, words in (
        ("/sing", r"/sing: no such command; known: /voice, /base"),
        ("/save", "name the file"),
        (f"/save {tmp_path / 'chat.json'}", "chat.json: File exists"),
        (f"/save {tmp_path / 'no' / 'chat.json'}", "No such file or directory"),
        ("/save a\0b", "null"),
    ):
        with pytest.raises(DataError, match=words):
            chat.command(line)


def test_a_chat_that_is_longer_than_the_model_reads(opened: OpenedAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindprint.api.chatting.longest_sequence", lambda _: 30)
    chat = Chat(opened)
    with pytest.raises(DataError, match="together more than the 30 that this model can read: /reset forgets"):
        chat.say("sea " * 30)
    assert chat.turns == []


def test_an_interrupted_answer_is_kept_as_far_as_it_came(opened: OpenedAdapter) -> None:
    chat = Chat(opened, asked=("voice", "base"))
    heard: list[str] = []

    def interrupt(side: str, piece: str) -> None:
        heard.append(piece)
        if len(heard) == 2:
            raise KeyboardInterrupt

    assert chat.say("sea 1?", interrupt).answers == {"voice": "".join(heard)}
    # The model is as it was.
    assert chat.say("sea 1?").answers["voice"]


def test_messages_of_several_lines() -> None:
    text = 'one\n\n   \n"""two\n three\n"""\nfour\\\nfive\n"""six"""\n//seven'
    assert list(messages(lines(text))) == ["one", "two\n three", "four\nfive", "six", "//seven"]


def test_a_mistake_ends_a_pipe_and_not_a_terminals_chat(
    opened: OpenedAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(opened)
    converse(chat, lines("/sing\n//sing\n/quit\nnever"), interactive=True)
    assert [turn.user for turn in chat.turns] == ["/sing"]
    assert "/sing: no such command" in capsys.readouterr().err
    with pytest.raises(DataError, match="no such command"):
        converse(chat, lines("/sing"), interactive=False)


def test_an_interruption_next_to_an_answer_ends_a_pipe_and_not_a_terminals_chat(
    opened: OpenedAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    chat = Chat(opened)
    monkeypatch.setattr(chat, "_check_length", interrupt)
    converse(chat, lines("sea 1?\n/quit"), interactive=True)
    with pytest.raises(KeyboardInterrupt):
        converse(chat, lines("sea 1?"), interactive=False)
    assert chat.turns == []


def test_through_a_pipe(
    opened: OpenedAdapter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(opened.located.adapter)
    first, second = (answer.text for answer in opened.answer(["sea 1?", "sea 2?"]))
    monkeypatch.setattr("sys.stdin", io.StringIO("sea 1?\n/reset\nsea 2?\n"))
    assert main(["chat", path]) == 0
    assert capsys.readouterr().out == f"{first}\n{second}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("sea 1?\n"))
    assert main(["chat", path, "--with", "both", "--json"]) == 0
    (turn,) = json.loads(capsys.readouterr().out)["turns"]
    assert (turn["user"], turn["voice"]) == ("sea 1?", first)
    monkeypatch.setattr("sys.stdin", io.StringIO("/sing\n"))
    assert main(["chat", path]) == 2
    assert main(["chat", "nowhere"]) == 2
