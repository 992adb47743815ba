"""Exported chats: WhatsApp's text, and the JSON of Telegram, Discord, Slack, ChatGPT and Claude."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mindprint.contract import Document, Turn
from mindprint.errors import DataError, first_line
from mindprint.hookspecs import hookimpl
from mindprint.input_files import LARGEST_FILE, MALFORMED, read_bytes
from mindprint.readers.encodings import is_text, read_any_text

ASSISTANT = "assistant"
"""The name of the other side where it is a model."""

# WhatsApp writes the date as the telephone's language has it, on iOS in brackets.
_MESSAGE = re.compile(
    r"^\u200e?\[?\d{1,4}[./-]\d{1,2}[./-]\d{1,4},? "
    r"\d{1,2}[:.]\d{2}(?:[:.]\d{2})?(?: ?[ap]\.?m\.?)?(?:\]| -) (?P<rest>.*)$",
    re.IGNORECASE,
)
_NAMED = re.compile(r"^(?P<name>[^:]{1,80}): (?P<text>.*)$", re.DOTALL)
_MEDIA = re.compile(r"^(?:<[^<>]*>|\u200e.*|(?:image|video|audio|sticker|GIF|document|Contact card) omitted)$")


@hookimpl
def mindprint_read_documents(path: Path, head: bytes) -> Iterable[Document] | None:
    """Read each conversation of an export as a document."""
    if not path.is_file() or not is_text(head):
        return None
    if path.suffix.lower() == ".txt":
        lines = head.decode("utf-8-sig", errors="replace").splitlines()[:20]
        return _whatsapp(path) if sum(bool(_MESSAGE.match(_spaced(line))) for line in lines) >= 2 else None
    if path.suffix.lower() == ".json":
        return _json_export(path)
    return None


def _whatsapp(path: Path) -> Iterator[Document]:
    turns: list[Turn] = []
    for line in read_any_text(path).splitlines():
        message = _MESSAGE.match(_spaced(line))
        named = _NAMED.match(message["rest"]) if message else None
        if named:
            turns.append(Turn(named["name"].strip("\u200e\u202a\u202c ~"), named["text"]))
        # A line without a date continues the message before it. One without a name is the service's.
        elif not message and turns:
            turns[-1] = Turn(turns[-1].author, f"{turns[-1].text}\n{line}")
    yield from _conversation(str(path), (turn for turn in turns if not _MEDIA.match(turn.text)))


def _spaced(line: str) -> str:
    # iOS puts a narrow space between the time and `PM`.
    return line.replace("\u202f", " ").replace("\u00a0", " ")


def _json_export(path: Path) -> Iterable[Document] | None:
    """Return the conversations of a JSON file, None if it is not the export of a known service."""
    try:
        value = json.loads(read_bytes(path, LARGEST_FILE))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not valid JSON: {first_line(error)}") from error
    for is_export, read in _SERVICES:
        try:
            if is_export(value):
                # Read at once: what comes out of a file of a wrong shape must not fail in the middle of a list.
                return list(read(value, path))
        except MALFORMED as error:
            raise DataError(f"{path}: is not a chat export that can be read: {first_line(error)}") from error
    return None


def _conversation(name: str, turns: Iterable[Turn]) -> Iterator[Document]:
    """Yield a conversation of the turns that have text, the messages that one person sent in a row as one turn."""
    joined: list[Turn] = []
    for turn in turns:
        text = turn.text.strip()
        if not text:
            continue
        if joined and joined[-1].author == turn.author:
            joined[-1] = Turn(turn.author, f"{joined[-1].text}\n{text}")
        else:
            joined.append(Turn(turn.author, text))
    if joined:
        yield Document(name, turns=tuple(joined))


def _is_telegram(value: Any) -> bool:
    return isinstance(value, dict) and ("chats" in value or {"type", "messages", "name"} <= value.keys())


def _telegram(value: Mapping[str, Any], path: Path) -> Iterator[Document]:
    chats = value["chats"]["list"] if "chats" in value else [value]
    for number, chat in enumerate(chats, 1):
        messages = (message for message in chat["messages"] if message["type"] == "message")
        # A forwarded message is another person's.
        own = (message for message in messages if "forwarded_from" not in message)
        turns = (
            Turn(str(message.get("from") or "deleted account"), _telegram_text(message["text"])) for message in own
        )
        yield from _conversation(f"{path}#{chat.get('name') or number}", turns)


def _telegram_text(text: str | Sequence[Any]) -> str:
    # Text with links or emphasis is a list of plain and marked parts.
    parts = [text] if isinstance(text, str) else text
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in parts)


def _is_discord(value: Any) -> bool:
    return isinstance(value, dict) and {"channel", "messages"} <= value.keys()


def _discord(value: Mapping[str, Any], path: Path) -> Iterator[Document]:
    turns = (
        Turn(str(message["author"].get("nickname") or message["author"]["name"]), str(message["content"]))
        for message in value["messages"]
        if message.get("type") in (None, "Default", "Reply")
    )
    yield from _conversation(str(path), turns)


def _is_slack(value: Any) -> bool:
    return _is_list_of(value, "type", "ts") and all("user" in entry or "bot_id" in entry for entry in value)


def _slack(value: Sequence[Mapping[str, Any]], path: Path) -> Iterator[Document]:
    names = _slack_names(path)
    messages = (entry for entry in value if entry["type"] == "message" and "subtype" not in entry and "user" in entry)
    yield from _conversation(
        str(path), (Turn(_slack_name(entry, names), _slack_text(entry.get("text", ""), names)) for entry in messages)
    )


def _slack_names(path: Path) -> dict[str, str]:
    """Return the members' names by their ids, from the export's `users.json`, which is in the folder above."""
    for folder in path.resolve().parents[:2]:
        if (folder / "users.json").is_file():
            users = json.loads(read_bytes(folder / "users.json"))
            return {user["id"]: str(user.get("real_name") or user.get("name") or user["id"]) for user in users}
    return {}


def _slack_name(entry: Mapping[str, Any], names: Mapping[str, str]) -> str:
    stated = (entry.get("user_profile") or {}).get("real_name")
    return names.get(entry["user"]) or str(stated or entry["user"])


def _slack_text(text: str, names: Mapping[str, str]) -> str:
    """Return the text without Slack's marks: `<@U1>` is a person, `<https://a.b|words>` a link."""
    text = re.sub(r"<@(\w+)(?:\|[^>]*)?>", lambda match: "@" + names.get(match[1], match[1]), text)
    text = re.sub(r"<[^<>|]*\|([^<>]*)>", r"\1", text)
    text = re.sub(r"<(https?:[^<>]*)>", r"\1", text)
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def _is_chatgpt(value: Any) -> bool:
    return _is_list_of(value, "mapping")


def _chatgpt(value: Sequence[Mapping[str, Any]], path: Path) -> Iterator[Document]:
    for number, conversation in enumerate(value, 1):
        turns = [Turn(None if role == "user" else ASSISTANT, text) for role, text in _chatgpt_turns(conversation)]
        yield from _conversation(f"{path}#{number}", turns)


def _chatgpt_turns(conversation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return role and text of the branch that was seen last. An edited question makes another branch of the tree."""
    nodes, turns = conversation["mapping"], []
    at = conversation.get("current_node") or next(reversed(nodes))
    seen: set[str] = set()
    while at is not None and at not in seen:
        seen.add(at)
        message = nodes[at].get("message")
        if message and message["author"]["role"] in ("user", ASSISTANT):
            parts = (message.get("content") or {}).get("parts") or ()
            text = "\n".join(part for part in parts if isinstance(part, str))
            turns.append((message["author"]["role"], text))
        at = nodes[at].get("parent")
    return turns[::-1]


def _is_claude(value: Any) -> bool:
    return _is_list_of(value, "chat_messages")


def _claude(value: Sequence[Mapping[str, Any]], path: Path) -> Iterator[Document]:
    for number, conversation in enumerate(value, 1):
        turns = (
            Turn(None if message["sender"] == "human" else ASSISTANT, _claude_text(message))
            for message in conversation["chat_messages"]
        )
        yield from _conversation(f"{path}#{number}", turns)


def _claude_text(message: Mapping[str, Any]) -> str:
    parts = [part["text"] for part in message.get("content") or () if part.get("type") == "text"]
    return "\n".join(parts) or str(message.get("text") or "")


def _is_list_of(value: Any, *keys: str) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(e, dict) and set(keys) <= e.keys() for e in value)


_SERVICES: tuple[tuple[Callable[[Any], bool], Callable[[Any, Path], Iterator[Document]]], ...] = (
    (_is_telegram, _telegram),
    (_is_discord, _discord),
    (_is_slack, _slack),
    (_is_chatgpt, _chatgpt),
    (_is_claude, _claude),
)
