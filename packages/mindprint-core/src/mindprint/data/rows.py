"""Rows: the texts that a model learns from, checked and brought into one form. docs/data-formats.md shows every form.

A field that decides what is trained is honoured or refused. A field that nothing here knows is named once.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from mindprint.config import Config, ConfigFile
from mindprint.data.row_files import (
    Origin,
    Record,
    RowSource,
    file_source,
    hub_source,
    is_row_file,
    kind_of,
    shown_path,
)
from mindprint.data.stored import (
    IN_MEMORY,
    Encoded,
    Stored,
    StoreWriter,
    build_entry,
    cache_folder,
    content_key,
    count_topics,
    find_entry,
    in_portions,
)
from mindprint.errors import DataError
from mindprint.input_files import parse_json, shortened

DEFAULT_TOPIC = "main"
"""The topic of rows that name none."""

TOPIC_FIELD = "topic"
"""The column of topics, unless `data.topic` names another."""

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)
Format = Literal["chat", "raw"]

ROLE_NAMES: Mapping[str, Role] = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai", "bing", "bard"), "assistant"),
    **dict.fromkeys(("developer",), "system"),
}
"""The roles as ShareGPT files, Gemini's and OpenAI's call them."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. An assistant's turn that is not `trained` is context alone."""

    role: Role
    content: str
    trained: bool = True


Messages = tuple[Message, ...]
Text = str | Messages
"""Plain text, or messages. In `data.format: chat` a string is short for one message."""


@dataclass(frozen=True, slots=True)
class SftRow:
    """A row to be imitated.

    `prompt` given: the assistant's turns in `completion` are trained. `prompt` None: every assistant turn of the
    conversation `completion` is, or (raw format) the whole text `completion`. `variables` are the row's own variables
    for the chat template, as JSON.
    """

    topic: str
    prompt: Text | None
    completion: Text
    origin: Origin
    variables: str = ""

    @property
    def messages(self) -> Messages:
        """Return the whole conversation."""
        return self.prompt_messages + as_messages(self.completion, "assistant")

    @property
    def prompt_messages(self) -> Messages:
        return () if self.prompt is None else as_messages(self.prompt, "user")


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """Two answers to one prompt, the first preferred. `variables` are those of its chat template, as JSON."""

    topic: str
    prompt: Text
    chosen: Text
    rejected: Text
    origin: Origin
    variables: str = ""

    @property
    def prompt_messages(self) -> Messages:
        return as_messages(self.prompt, "user")

    @property
    def chosen_messages(self) -> Messages:
        return as_messages(self.chosen, "assistant")

    @property
    def rejected_messages(self) -> Messages:
        return as_messages(self.rejected, "assistant")


@dataclass(frozen=True)
class Rows:
    """All rows that a configuration names. A stage that is off has none, and `heldout` may be empty.

    `notes` are sentences for the user about all of them. More than `stored.IN_MEMORY` rows of a kind are on disk.
    """

    sft: Sequence[SftRow]
    preferences: Sequence[PreferenceRow]
    heldout: Sequence[PreferenceRow]
    notes: tuple[str, ...] = ()


@dataclass
class Findings:
    """What is collected while rows are read, and said once about all of them."""

    topic_field: str = TOPIC_FIELD
    has_topics: bool = False
    ignored: dict[str, None] = field(default_factory=dict)
    histories: int = 0

    def ignore(self, names: Iterable[str]) -> None:
        """Remember columns that nothing reads, in the order in which they are met."""
        self.ignored.update(dict.fromkeys(names))

    def add(self, other: Findings) -> None:
        """Add the findings in another part of the data."""
        self.has_topics = self.has_topics or other.has_topics
        self.ignored.update(other.ignored)
        self.histories += other.histories

    def notes(self) -> Iterator[str]:
        """Yield the sentences for the user."""
        if self.ignored:
            hint = " (data.topic=source would make topics of source)" if "source" in self.ignored else ""
            yield f"ignored columns: {_named(self.ignored, 12)}{hint}"
        if self.histories:
            rows = _count(self.histories, "row")
            yield f"in {rows} the answers of `history` are context: write `messages` to train them as well"


def as_messages(text: Text, role: Role) -> Messages:
    """Return a string as one message of `role`, and messages unchanged."""
    return (Message(role, text),) if isinstance(text, str) else text


def text_of(text: Text) -> str:
    """Return the last message's content, or the string itself: the part of a prompt or answer that a scorer reads."""
    return text if isinstance(text, str) else text[-1].content


def read_rows(file: ConfigFile) -> Rows:
    """Read the rows that the stages of a configuration need.

    Raises `DataError` with one line that names file and line, and how to fix it.
    """
    config = file.config
    findings = Findings(config.data.topic or TOPIC_FIELD)
    rows = Rows(
        sft=_read_part(file, "sft", sft_row, findings) if config.sft.enabled else (),
        preferences=_read_part(file, "preferences", preference_row, findings) if config.dpo.enabled else (),
        heldout=_read_part(file, "heldout", preference_row, findings),
    )
    if config.data.topic and not findings.has_topics and (rows.sft or rows.preferences):
        raise DataError(f"{file.source}: data.topic names the column {config.data.topic!r}, and no row has it")
    return replace(rows, notes=tuple(findings.notes()))


def check_topics(rows: Rows, config: Config) -> None:
    """Raise `DataError` if a topic lacks rows for a stage that runs, with the counts and how to fix it."""
    if not (config.sft.enabled and config.dpo.enabled):
        return
    sft, pairs = count_topics(rows.sft), count_topics(rows.preferences)
    for topic in dict.fromkeys([*sft, *pairs]):
        if not pairs[topic]:
            found = f"{_count(sft[topic], 'SFT row')} and no preference pairs"
            raise DataError(f"topic {topic!r} has {found}: add pairs of this topic, or set dpo.enabled=false")
        if not sft[topic]:
            found = f"{_count(pairs[topic], 'preference pair')} and no SFT rows"
            raise DataError(f"topic {topic!r} has {found}: add rows of this topic, or set sft.enabled=false")


PROMPT_NAMES = ("prompt", "instruction", "question", "query", "input")
ANSWER_NAMES = ("completion", "output", "answer", "response")

SFT_FORMS = (
    ("prompt", "completion"),
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    ("question", "answer"),
    *((prompt, answer) for prompt in PROMPT_NAMES for answer in ANSWER_NAMES),
    ("text",),
)
"""The fields that make an SFT row, first match wins. `instruction` may have an `input` next to it."""

PREFERENCE_FORMS = (
    ("prompt", "chosen", "rejected"),
    ("instruction", "chosen", "rejected"),
    ("question", "chosen", "rejected"),
    ("conversations", "chosen", "rejected"),
    ("chosen", "rejected"),
)
"""The fields that make a preference row. Without `prompt`, it is what `chosen` and `rejected` begin with alike."""

SHOWN_FORMS = 6
"""How many of the forms a message shows: the other SFT forms differ from these in names alone."""

_SYSTEM_NAMES = ("system", "system_prompt")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_TRAINED_IF: Mapping[str, bool] = {"weight": True, "train": True, "loss": True, "masked": False}
"""Fields that say whether something is trained, and the value with which it is."""

_SWITCHES: Mapping[object, bool] = {**dict.fromkeys(("true", "1", "1.0"), True),
                                    **dict.fromkeys(("false", "0", "0.0"), False)}  # fmt: skip

RESERVED_VARIABLES = (
    "messages", "conversations", "chat_template", "add_generation_prompt", "continue_final_message",
    "return_assistant_tokens_mask", "tokenize",
)  # fmt: skip
"""Variables of a chat template that Mindprint sets itself."""


def sft_row(record: Record, origin: Origin, data_format: Format, findings: Findings | None = None) -> SftRow:
    """Check one SFT record. Raises `DataError` with its origin. What is said once goes into `findings`."""
    findings = findings or Findings()
    form = _form(record, SFT_FORMS, origin)
    _refuse_untrainable(record, form, origin)
    prompt, completion = _sft_parts(record, form, origin, findings)
    prompt, completion = _with_context(record, prompt, completion, origin, findings)
    if data_format == "raw":
        _only_strings(origin, prompt, completion)
    elif prompt is None and isinstance(completion, str):
        raise DataError(f"{origin}: `text` is plain text: write `prompt` and `completion`, or set data.format=raw")
    if prompt is not None:
        _answers_only(completion, "completion", origin)
    topic, variables = _topic(record, origin, findings), _variables(record, origin, data_format)
    findings.ignore(_unread(record, form, findings))
    row = SftRow(topic, prompt, completion, origin, variables)
    if not isinstance(completion, str) and not any(m.role == "assistant" and m.trained for m in completion):
        raise DataError(f"{origin}: none of its answers is trained (`weight: 0` or the like): leave the row out")
    return row


def preference_row(
    record: Record, origin: Origin, data_format: Format, findings: Findings | None = None
) -> PreferenceRow:
    """Check one preference record; an implicit prompt is taken apart as TRL's `extract_prompt` does it.

    Raises `DataError` with its origin. What is said once goes into `findings`.
    """
    findings = findings or Findings()
    form = _form(record, PREFERENCE_FORMS, origin)
    _refuse_untrainable(record, form, origin)
    chosen, rejected = _answer(record, "chosen", origin, findings), _answer(record, "rejected", origin, findings)
    prompt = _prompt(record, form[0], origin, findings) if len(form) == 3 else None
    if data_format == "raw":
        _only_strings(origin, prompt, chosen, rejected)
    elif prompt is None and (isinstance(chosen, str) or isinstance(rejected, str)):
        raise DataError(
            f"{origin}: `prompt` is missing: strings in `chosen` and `rejected` hold one only with data.format=raw"
        )
    if prompt is None or _repeated(prompt, chosen, rejected):
        prompt, chosen, rejected = _without_prompt(chosen, rejected, prompt, origin)
    _answers_only(chosen, "chosen", origin)
    _answers_only(rejected, "rejected", origin)
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(side, str) and not all(message.trained for message in side if message.role == "assistant"):
            raise DataError(f"{origin}: `{name}` has an answer with `weight: 0` or the like: a pair is trained whole")
    prompt, _ = _with_context(record, prompt, chosen, origin, findings)
    assert prompt is not None
    if data_format == "raw":
        _only_strings(origin, prompt)
    topic, variables = _topic(record, origin, findings), _variables(record, origin, data_format)
    findings.ignore(_unread(record, form, findings))
    return PreferenceRow(topic, prompt, chosen, rejected, origin, variables)


def _sft_parts(record: Record, form: tuple[str, ...], origin: Origin, findings: Findings) -> tuple[Text | None, Text]:
    if form in (("messages",), ("conversations",)):
        messages = _conversation(record[form[0]], form[0], origin, findings)
        return None, _ending_in_answer(messages, form[0], origin)
    if form == ("text",):
        return None, checked_text(record["text"], "text", origin)
    return _prompt(record, form[0], origin, findings), _answer(record, form[1], origin, findings)


def _prompt(record: Record, name: str, origin: Origin, findings: Findings) -> Text:
    prompt = _text(record, name, origin, findings)
    # Alpaca's form: `input` is the text that the instruction is about, and is often empty.
    if name == "instruction" and record.get("input") and isinstance(prompt, str):
        prompt += "\n\n" + checked_text(record["input"], "input", origin)
    return prompt


def _with_context(
    record: Record, prompt: Text | None, completion: Text, origin: Origin, findings: Findings
) -> tuple[Text | None, Text]:
    """Return the parts with the row's system message and history before them."""
    before = [Message("system", checked_text(record[name], name, origin)) for name in _SYSTEM_NAMES if record.get(name)]
    if len(before) > 1:
        raise DataError(f"{origin}: has `system` and `system_prompt`: leave out one of them")
    if record.get("history"):
        before += _history(record["history"], origin)
        findings.histories += 1
    if not before:
        return prompt, completion
    first = completion if prompt is None else prompt
    if prompt is None and isinstance(completion, str):
        raise DataError(f"{origin}: `system` and `history` need a `prompt` next to them, and `text` is not one")
    messages = as_messages(first, "user")
    if before[0].role == messages[0].role == "system":
        if before[0].content != messages[0].content:
            raise DataError(f"{origin}: has a system message both as a column and in its messages: leave out one")
        before.pop(0)
    joined = (*before, *messages)
    return (None, joined) if prompt is None else (joined, completion)


def _history(value: object, origin: Origin) -> list[Message]:
    """Return earlier turns: a list of pairs, each what the user said and what the assistant answered."""
    if not isinstance(value, list):
        raise DataError(f"{origin}: `history` must be a list of [prompt, answer] pairs, found {kind_of(value)}")
    turns = []
    for index, pair in enumerate(value):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"{origin}: `history[{index}]` must be a pair [prompt, answer], found {kind_of(pair)}")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(Message(ROLE_NAMES[role], checked_text(text, f"history[{index}]", origin), role == "user"))
    return turns


def _refuse_untrainable(record: Record, form: tuple[str, ...], origin: Origin) -> None:
    """Raise `DataError` for a row that its own fields take out of training, or that is more than text."""
    for name in _MEDIA:
        if record.get(name):
            raise DataError(f"{origin}: `{name}` is not supported: only text is trained; leave the column out")
    if record.get("functions"):
        raise DataError(f"{origin}: `functions` is not supported: write them as `tools`")
    for name, value_if_trained in _TRAINED_IF.items():
        # A column `loss` of numbers is a measurement that somebody took.
        if name in record and not (name == "loss" and isinstance(record[name], float)):
            switch = _switch(record[name])
            if record[name] not in (None, "") and switch is not value_if_trained:
                raise DataError(
                    f"{origin}: `{name}` is {shortened(str(record[name]))}: weights of rows are not supported; leave "
                    "out the rows that are not to be trained, and this column"
                )
    # A number can also be a class, of a text that was sorted by hand. Next to a prompt it says good or bad.
    label = record.get("label")
    if _switch(label) is False and (label is False or form != ("text",)):
        raise DataError(
            f"{origin}: `label: false` marks a bad answer (a row for KTO), which SFT would imitate: leave it out, or "
            "make a pair in preferences.jsonl: `prompt`, `chosen` (an answer labelled true) and `rejected` (this one)"
        )


def _switch(value: object) -> bool | None:
    """Return the boolean that a value means, as CSV and JSON write it; None for another value."""
    return _SWITCHES.get(str(value).lower())


def _variables(record: Record, origin: Origin, data_format: Format) -> str:
    """Return the row's own variables for the chat template as JSON, or nothing: `tools` and `chat_template_kwargs`."""
    tools, variables = record.get("tools"), record.get("chat_template_kwargs")
    if not tools and not variables:
        return ""
    if data_format == "raw":
        name = "tools" if tools else "chat_template_kwargs"
        raise DataError(f"{origin}: `{name}` needs data.format=chat; data.format is raw, which has no template")
    tools, variables = (_parsed(value, name, origin) for name, value in
                        (("tools", tools), ("chat_template_kwargs", variables)))  # fmt: skip
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise DataError(f"{origin}: `tools` must be a list of objects, found {kind_of(tools)}")
    if variables is not None and not isinstance(variables, Mapping):
        raise DataError(f"{origin}: `chat_template_kwargs` must be an object, found {kind_of(variables)}")
    try:
        return template_variables({**({"tools": tools} if tools else {}), **(variables or {})})
    except ValueError as error:
        raise DataError(f"{origin}: `chat_template_kwargs`: {error}") from None


def _parsed(value: object, name: str, origin: Origin) -> Any:
    """Return a value that may be written as JSON text, as TRL recommends it for datasets with differing tools."""
    if not isinstance(value, str):
        return value or None
    try:
        return parse_json(value)
    except ValueError as error:
        raise DataError(f"{origin}: `{name}` is text and not valid JSON: {error}") from None


def template_variables(variables: Mapping[str, Any]) -> str:
    """Return variables of a chat template as JSON. Raise `ValueError` for names that Mindprint sets itself.

    The order of keys is kept, because templates write tools as they come.
    """
    for name in variables:
        if name in RESERVED_VARIABLES:
            raise ValueError(f"{name!r} is set by Mindprint itself: leave it out")
    try:
        return json.dumps(variables) if variables else ""
    except TypeError as error:
        raise ValueError(f"must be values that JSON has: {error}") from None


def _unread(record: Record, form: tuple[str, ...], findings: Findings) -> Iterator[str]:
    """Yield the columns with a value that nothing reads."""
    read = {*form, *_SYSTEM_NAMES, "history", "tools", "chat_template_kwargs", *_TRAINED_IF, findings.topic_field}
    if form[0] == "instruction":
        read.add("input")
    for name, value in record.items():
        # A label that marks no answer as bad has been heeded. Other kinds of labels are not read.
        heeded = name in read or (name == "label" and _switch(value) is True)
        if not heeded and value not in (None, "", []):
            yield str(name)


def _given(record: Record, name: str) -> bool:
    return record.get(name) is not None


def _form(record: Record, forms: Sequence[tuple[str, ...]], origin: Origin) -> tuple[str, ...]:
    # The order of the forms decides where a row has the fields of two.
    for form in forms:
        if all(_given(record, name) for name in form):
            return form
    raise DataError(f"{origin}: {_no_form(record, forms)}")


def _no_form(record: Record, forms: Sequence[tuple[str, ...]]) -> str:
    """Name the fields that the nearest form lacks, with the key that was perhaps meant."""
    if all(_given(record, name) for name in ("chosen", "rejected")):
        return "is a preference pair: move it to preferences.jsonl"
    known = {name for form in forms for name in form}
    best = max(forms, key=lambda form: sum(_given(record, name) for name in form))
    missing = [name for name in best if not _given(record, name)]
    for name in missing if len(missing) < len(best) else sorted(known):
        near = difflib.get_close_matches(name, [key for key in record if key not in known], n=1, cutoff=0.7)
        if near:
            return f"no field `{name}`; is it {near[0]!r}?"
    if len(missing) < len(best):
        null = "null" if missing[0] in record else "missing"
        return f"`{missing[0]}` is {null}, next to {_and(name for name in best if name not in missing)}"
    shown = [*forms[: SHOWN_FORMS - 1], forms[-1]] if len(forms) > SHOWN_FORMS else forms
    ways = "; or ".join(_and(form) for form in shown)
    return f"needs {ways}; found {_listed(record) or 'no field'}"


def _topic(record: Record, origin: Origin, findings: Findings) -> str:
    name = findings.topic_field
    value = record.get(name)
    if value is None or value == "":
        return DEFAULT_TOPIC
    findings.has_topics = True
    # A column that the configuration names may hold numbers: chapters, years.
    if name != TOPIC_FIELD and type(value) is int:
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{origin}: `{name}` must be text, found {value!r}")
    return value.strip()


def checked_text(value: object, name: str, origin: Origin) -> str:
    """Return a field that must be text with something in it. Raises `DataError` with its origin."""
    if not isinstance(value, str):
        raise DataError(f"{origin}: `{name}` must be text, found {kind_of(value)}")
    if not value.strip():
        raise DataError(f"{origin}: `{name}` is empty")
    return _encodable(value, name, origin)


def _encodable(value: str, name: str, origin: Origin) -> str:
    """Refuse half a surrogate pair, which JSON can escape and no tokenizer can read."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{origin}: `{name}` has a broken \\u escape at character {error.start + 1}") from None
    return value


def _text(record: Record, name: str, origin: Origin, findings: Findings) -> Text:
    value = record[name]
    # Some pairs have a single message as an answer, without a list around it.
    if isinstance(value, Mapping) and name in ("chosen", "rejected"):
        value = [value]
    if isinstance(value, list) and name not in ("instruction", "question", "query", "input", *ANSWER_NAMES[1:]):
        return _conversation(value, name, origin, findings)
    return checked_text(value, name, origin)


def _answer(record: Record, name: str, origin: Origin, findings: Findings) -> Text:
    """Return a completion: text, or messages that end with the assistant's."""
    value = _text(record, name, origin, findings)
    return value if isinstance(value, str) else _ending_in_answer(value, name, origin)


def _conversation(value: object, name: str, origin: Origin, findings: Findings) -> Messages:
    if not isinstance(value, list):
        raise DataError(f"{origin}: `{name}` must be a list of messages, found {kind_of(value)}")
    if not value:
        raise DataError(f"{origin}: `{name}` is empty")
    return tuple(_message(item, f"{name}[{index}]", origin, findings) for index, item in enumerate(value))


_UNSUPPORTED = ("tool_calls", "tool_call_id", "function_call", "reasoning_content", "reasoning", "thinking",
                "train_detail", "training_detail")  # fmt: skip
_MESSAGE_FIELDS = {"role", "content", "from", "value", *_TRAINED_IF, *_UNSUPPORTED}


def _message(value: object, name: str, origin: Origin, findings: Findings) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{origin}: `{name}` must be an object with `role` and `content`, found {kind_of(value)}")
    # ShareGPT's names are `from` and `value`.
    from_field = "from" if value.get("role") is None and "from" in value else "role"
    text_field = "value" if value.get("content") is None and "value" in value else "content"
    called, content = value.get(from_field), value.get(text_field)
    role = ROLE_NAMES.get(called) if isinstance(called, str) else None
    if role is None:
        raise DataError(f"{origin}: `{name}.{from_field}` must be system, user or assistant, found {called!r}")
    if isinstance(content, list):
        content = _joined_parts(content, f"{name}.{text_field}", origin)
    if not isinstance(content, str):
        raise DataError(f"{origin}: `{name}.{text_field}` must be text, found {kind_of(content)}")
    if role == "assistant" and not content.strip():
        raise DataError(f"{origin}: `{name}.{text_field}` is empty")
    trained = True
    # Two fields are the usual case, and this runs for every message.
    if len(value) > 2:
        _refuse_unsupported(value, name, origin)
        trained = _is_trained(value, role, name, origin)
        findings.ignore(
            f"messages.{key}" for key, given in value.items() if key not in _MESSAGE_FIELDS and given not in (None, "")
        )
    return Message(role, _encodable(content, f"{name}.{text_field}", origin), trained)


def _joined_parts(parts: Sequence[object], name: str, origin: Origin) -> str:
    """Return the text of a content that is a list of parts. Raise `DataError` for a part that is not text."""
    texts = []
    for index, part in enumerate(parts):
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text":
            raise DataError(f"{origin}: `{name}[{index}]` is a part of type {kind!r}: only text parts are trained")
        if not isinstance(text, str):
            raise DataError(f"{origin}: `{name}[{index}].text` must be text, found {kind_of(text)}")
        texts.append(text)
    return "".join(texts)


def _is_trained(message: Record, role: Role, name: str, origin: Origin) -> bool:
    """Return whether a message's own fields let it be trained: `weight` as OpenAI's, `train` as Axolotl's, `loss`."""
    trained = True
    for key, value_if_trained in _TRAINED_IF.items():
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(f"{origin}: `{name}.{key}` must be 0 or 1 (false or true), found {shortened(repr(value))}")
        wanted = bool(value) is value_if_trained
        if wanted and role != "assistant" and key != "masked":
            raise DataError(f"{origin}: `{name}.{key}` asks to train a {role} message: only the assistant's are")
        trained = trained and wanted
    return trained


def _refuse_unsupported(message: Record, name: str, origin: Origin) -> None:
    """Raise `DataError` for fields that templates render: without them, another conversation would be trained."""
    for key in _UNSUPPORTED:
        if message.get(key):
            raise DataError(f"{origin}: `{name}.{key}` is not supported: leave it out, or write it into `content`")


def _ending_in_answer(messages: Messages, name: str, origin: Origin) -> Messages:
    if messages[-1].role != "assistant":
        raise DataError(f"{origin}: `{name}` must end with an assistant message, found {messages[-1].role}")
    # An assistant's first message alone answers nothing.
    if name in ("messages", "conversations") and all(message.role != "assistant" for message in messages[1:]):
        raise DataError(f"{origin}: `{name}` has nothing before the assistant's answer")
    return messages


def _answers_only(completion: Text, name: str, origin: Origin) -> None:
    if not isinstance(completion, str) and completion[0].role != "assistant":
        raise DataError(f"{origin}: `{name}` begins with a {completion[0].role} message: leave out what `prompt` has")


def _only_strings(origin: Origin, *parts: Text | None) -> None:
    if any(isinstance(part, tuple) for part in parts):
        raise DataError(f"{origin}: messages need data.format=chat; data.format is raw, which takes strings")


def _repeated(prompt: Text, chosen: Text, rejected: Text) -> bool:
    """Return whether a prompt given as a string is also the start of two whole conversations (as in ultrafeedback)."""
    return isinstance(prompt, str) and all(
        not isinstance(side, str) and side[0].role != "assistant" for side in (chosen, rejected)
    )


_P = TypeVar("_P", str, Messages)


def _without_prompt(chosen: Text, rejected: Text, stated: Text | None, origin: Origin) -> tuple[Text, Text, Text]:
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split(chosen, rejected, _shared_text(chosen, rejected), origin)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise DataError(f"{origin}: one of `chosen` and `rejected` is text, the other messages: write both alike")
    parts = _split(chosen, rejected, _shared(chosen, rejected), origin)
    if isinstance(stated, str) and parts[0][-1].content != stated:
        raise DataError(f"{origin}: `prompt` is not the last message that `chosen` and `rejected` begin with alike")
    return parts


def _split(chosen: _P, rejected: _P, shared: int, origin: Origin) -> tuple[_P, _P, _P]:
    # Without a common beginning there is nothing that could be the prompt.
    if not shared:
        raise DataError(f"{origin}: no `prompt`, and `chosen` and `rejected` do not begin alike")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _shared(chosen: Sequence[object], rejected: Sequence[object]) -> int:
    """Count the items that both begin with, without the last of the shorter: an answer has at least one."""
    limit = min(len(chosen), len(rejected)) - 1
    return next((index for index in range(limit) if chosen[index] != rejected[index]), limit)


def _shared_text(chosen: str, rejected: str) -> int:
    """Cut strings as TRL does: at the first character that differs. A space before it belongs to the answers."""
    shared = _shared(chosen, rejected)
    differ = chosen[shared] != rejected[shared]
    return shared - 1 if differ and shared and chosen[shared - 1] == " " else shared


Part = Literal["sft", "preferences", "heldout"]
Parsed = TypeVar("Parsed", SftRow, PreferenceRow)

DEFAULT_FILES: Mapping[Part, tuple[str, ...]] = {
    "sft": ("sft.jsonl", "sft_data.jsonl"),
    "preferences": ("preferences.jsonl", "preference_data.jsonl"),
    "heldout": ("heldout.jsonl",),
}
"""The names of a data folder's files."""

_TURNED_OFF_BY: Mapping[Part, str] = {"sft": "sft.enabled=false", "preferences": "dpo.enabled=false"}
_HUB_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(?::(?P<split>[\w.\[\]%:-]+))?")


Parse = Callable[[Record, Origin, Format, Findings], Parsed]

CACHED_BYTES = 2**20
"""Bytes of a part's sources from which on the cache is looked into before they are read: fewer hold few rows."""


def _read_part(file: ConfigFile, part: Part, parse: Parse[Parsed], findings: Findings) -> Sequence[Parsed]:
    if part != "heldout" and (file.records is not None or file.config.data.rows_digest):
        placed = _records_in_memory(file, part)
        return tuple(parse(record, origin, file.config.data.format, findings) for origin, record in placed)
    sources = [_opened_source(file, source, part) for source in _sources(file, part)]
    decode: Callable[[bytes], Any] = decode_row
    key = None
    if part != "heldout" and sum(source.size for source in sources) >= CACHED_BYTES:
        key = _rows_key(file, part, sources)
        if (kept := find_entry(cache_folder(file), key, decode)) is not None:
            findings.add(Findings(**kept.facts))
            return kept
    own = Findings(findings.topic_field)
    rows = _parsed_rows(file, part, sources, parse, own)
    # Held-out rows are given by a person, row by row: they are few.
    first = list(islice(rows, None if part == "heldout" else IN_MEMORY + 1))
    if part == "heldout" or len(first) <= IN_MEMORY:
        findings.add(own)
        return tuple(first)

    def build(writer: StoreWriter) -> Mapping[str, Any]:
        for portion in in_portions(chain(first, rows)):
            writer.add([Encoded(encode_row(row), row.topic) for row in portion])
        return asdict(own)

    stored: Stored[Any] = build_entry(cache_folder(file), key or _rows_key(file, part, sources), decode, build)
    # Another process may have built the entry while this one waited.
    findings.add(Findings(**stored.facts))
    return stored


def _parsed_rows(
    file: ConfigFile, part: Part, sources: Sequence[RowSource], parse: Parse[Parsed], findings: Findings
) -> Iterator[Parsed]:
    for source in sources:
        count = 0
        try:
            for origin, record in source.records():
                yield parse(record, origin, file.config.data.format, findings)
                count += 1
        except MemoryError:
            raise DataError(
                f"{source.shown}: needs more memory than there is: split it, or train on a part of it"
            ) from None
        if not count:
            raise DataError(f"{source.shown}: the file is empty: data.{part} needs a row")


def _rows_key(file: ConfigFile, part: Part, sources: Sequence[RowSource]) -> str:
    """Digest the content of a part's sources, and everything that decides how they are read."""
    # The name as shown is a part of every row: messages name it.
    contents = [(source.shown, source.digest()) for source in sources]
    return content_key("rows", part, contents, file.config.data.format, file.config.data.topic)


def encode_row(row: SftRow | PreferenceRow) -> bytes:
    """Return a row as bytes, for the disk."""
    origin = [row.origin.file, row.origin.line, row.origin.unit]
    texts = (row.prompt, row.completion) if isinstance(row, SftRow) else (row.prompt, row.chosen, row.rejected)
    parts = [text if text is None or isinstance(text, str) else [astuple(turn) for turn in text] for text in texts]
    # A topic, unlike texts, may hold half a surrogate pair.
    return json.dumps([row.topic, *parts, origin, row.variables], ensure_ascii=False).encode("utf-8", "surrogatepass")


def decode_row(content: bytes) -> SftRow | PreferenceRow:
    """Return the row that `encode_row` made bytes of."""
    topic, *parts, (name, line, unit), variables = json.loads(content.decode("utf-8", "surrogatepass"))
    texts = [tuple(Message(*turn) for turn in part) if isinstance(part, list) else part for part in parts]
    row: Callable[..., SftRow | PreferenceRow] = SftRow if len(texts) == 2 else PreferenceRow
    return row(topic, *texts, Origin(name, line, unit), variables)


def _records_in_memory(file: ConfigFile, part: Literal["sft", "preferences"]) -> list[tuple[Origin, Record]]:
    """Return the rows of a part that were given from memory. A row with `chosen` or `rejected` is a preference pair."""
    if file.records is None:
        raise DataError(
            f"{file.source}: was trained on rows from memory (digest {file.config.data.rows_digest}), which are not "
            "kept: pass the same rows again from Python, rows=rows"
        )
    records = []
    for index, record in enumerate(file.records):
        if any(_given(record, name) for name in ("chosen", "rejected")) == (part == "preferences"):
            records.append((Origin("rows", index, "index"), record))
    if not records:
        wanted = {"sft": "to be imitated (`prompt` and `completion`)",
                  "preferences": "a preference pair (`prompt`, `chosen`, `rejected`)"}  # fmt: skip
        raise DataError(f"rows: none is {wanted[part]}: add some, or set {_TURNED_OFF_BY[part]}")
    return records


def _sources(file: ConfigFile, part: Part) -> Sequence[str | Path]:
    named = getattr(file.config.data, part)
    if named is None:
        return _default_file(file, part)
    if not named:
        raise DataError(f"{file.source}: data.{part} names nothing: give a file or a dataset")
    return [named] if isinstance(named, str) else named


def _default_file(file: ConfigFile, part: Part) -> Sequence[Path]:
    data = file.config.data.path
    if data is None:
        if part == "heldout":
            return []
        raise DataError(f"{file.source}: data.path and data.{part} are both empty: name a folder or files")
    folder = file.resolve(data)
    # A link that leads nowhere is there as well: to pass over it would drop what its owner thinks is read.
    found = [folder / name for name in DEFAULT_FILES[part] if os.path.lexists(folder / name)]
    for path in found:
        if not path.is_file():
            raise DataError(f"{shown_path(path)}: {_not_a_file(path)}: replace it, or name files in data.{part}")
    if len(found) > 1:
        raise DataError(
            f"{shown_path(found[0])} and {found[1].name} both exist: remove one, or name files in data.{part}"
        )
    if not found and part != "heldout":
        raise DataError(_missing_default(folder, part))
    return found


def _not_a_file(path: Path) -> str:
    if path.is_dir():
        return "is a folder and not a file"
    return "is not a regular file but a pipe or a device" if path.exists() else "is a link that leads to no file"


def _missing_default(folder: Path, part: Part) -> str:
    remedy = f"name files in data.{part}, or set {_TURNED_OFF_BY[part]}"
    if not folder.is_dir():
        return f"{shown_path(folder)}: no such data folder: make it (`mindprint init` shows how), {remedy}"
    names = [path.name for path in folder.iterdir() if path.is_file()]
    near = difflib.get_close_matches(DEFAULT_FILES[part][0], names, n=1, cutoff=0.6)
    hint = f" (found {near[0]})" if near else ""
    return f"{shown_path(folder / DEFAULT_FILES[part][0])}: no such file{hint}: make it, {remedy}"


def _opened_source(file: ConfigFile, source: str | Path, part: Part) -> RowSource:
    path = source if isinstance(source, Path) else file.resolve(source)
    if path.is_file():
        return file_source(path)
    if path.is_dir():
        raise DataError(f"{shown_path(path)}: data.{part} names a folder: name its files, or set data.path to it")
    if path.exists():
        # By the name that the configuration has: a link can lead to a device or a pipe.
        raise DataError(f"{source}: is not a regular file (data.{part})")
    # `data/sft.jsonl` has the form of a hub name too. The ending shows that a file is meant, which is not there.
    hub = _HUB_NAME.fullmatch(str(source))
    if hub is None or is_row_file(str(source)):
        if path.exists():
            # The path is that behind all links, which nobody would recognise alone.
            raise DataError(f"{source}: {_not_a_file(path)} (data.{part})")
        raise DataError(f"{shown_path(path)}: no such file (data.{part})")
    return hub_source(hub["repo"], hub["split"] or "train", part)


def _and(names: Iterable[str]) -> str:
    *most, last = [f"`{name}`" for name in names]
    return f"{', '.join(most)} and {last}" if most else last


def _listed(names: Iterable[str]) -> str:
    return _named(map(repr, names), 6)


def _named(names: Iterable[str], most: int) -> str:
    shown = [shortened(name) for name in names]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
