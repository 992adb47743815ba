"""Rows: the texts that a model learns from, read and checked.

JSON Lines and CSV are read here, so that every mistake is named with file and line; Parquet files and datasets on the
hub come through `datasets`, which is imported only for them. docs/data-formats.md shows every form.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from mindprint.config import Config, ConfigFile
from mindprint.errors import DataError, first_line
from mindprint.input_files import parse_json

DEFAULT_TOPIC = "main"
"""The topic of rows that name none."""

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)
Format = Literal["chat", "raw"]
Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a row: `sft.jsonl: line 3`. Parquet files and datasets count rows, quizzes questions.

    Rows from memory have their index: `rows[3]`.
    """

    file: str
    line: int
    unit: Literal["line", "row", "question", "index"] = "line"

    def __str__(self) -> str:
        if self.unit == "index":
            return f"{self.file}[{self.line}]"
        return f"{self.file}: {self.unit} {self.line}"


Messages = tuple[Message, ...]
Text = str | Messages
"""Plain text, or messages. In `data.format: chat` a string is short for one message."""


@dataclass(frozen=True, slots=True)
class SftRow:
    """A row to be imitated.

    `prompt` given: the assistant's turns in `completion` are trained. `prompt` None: every assistant turn of the
    conversation `completion` is, or (raw format) the whole text `completion`.
    """

    topic: str
    prompt: Text | None
    completion: Text
    origin: Origin

    @property
    def messages(self) -> Messages:
        """Return the whole conversation."""
        return self.prompt_messages + as_messages(self.completion, "assistant")

    @property
    def prompt_messages(self) -> Messages:
        return () if self.prompt is None else as_messages(self.prompt, "user")


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """Two answers to one prompt, the first preferred."""

    topic: str
    prompt: Text
    chosen: Text
    rejected: Text
    origin: Origin

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
    """All rows that a configuration names. A stage that is off has none, and `heldout` may be empty."""

    sft: tuple[SftRow, ...]
    preferences: tuple[PreferenceRow, ...]
    heldout: tuple[PreferenceRow, ...]


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

    def sft(record: Record, origin: Origin) -> SftRow:
        return sft_row(record, origin, config.data.format)

    def preference(record: Record, origin: Origin) -> PreferenceRow:
        return preference_row(record, origin, config.data.format)

    return Rows(
        sft=_read_part(file, "sft", sft) if config.sft.enabled else (),
        preferences=_read_part(file, "preferences", preference) if config.dpo.enabled else (),
        heldout=_read_part(file, "heldout", preference),
    )


def check_topics(rows: Rows, config: Config) -> None:
    """Raise `DataError` if a topic lacks rows for a stage that runs, with the counts and how to fix it."""
    if not (config.sft.enabled and config.dpo.enabled):
        return
    sft = Counter(row.topic for row in rows.sft)
    pairs = Counter(row.topic for row in rows.preferences)
    for topic in dict.fromkeys([*sft, *pairs]):
        if not pairs[topic]:
            found = f"{_count(sft[topic], 'SFT row')} and no preference pairs"
            raise DataError(f"topic {topic!r} has {found}: add pairs of this topic, or set dpo.enabled=false")
        if not sft[topic]:
            found = f"{_count(pairs[topic], 'preference pair')} and no SFT rows"
            raise DataError(f"topic {topic!r} has {found}: add rows of this topic, or set sft.enabled=false")


SFT_FORMS = (
    ("prompt", "completion"),
    ("messages",),
    ("instruction", "output"),
    ("question", "answer"),
    ("text",),
)
"""The fields that make an SFT row, first match wins. `instruction` may have an `input` next to it."""

PREFERENCE_FORMS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
"""The fields that make a preference row. Without `prompt`, it is what `chosen` and `rejected` begin with alike."""


def sft_row(record: Record, origin: Origin, data_format: Format) -> SftRow:
    """Check one SFT record. Raises `DataError` with its origin."""
    prompt, completion = _sft_parts(record, origin)
    if data_format == "raw":
        _only_strings(origin, prompt, completion)
    elif prompt is None and isinstance(completion, str):
        raise DataError(f"{origin}: `text` is plain text: write `prompt` and `completion`, or set data.format=raw")
    if prompt is not None:
        _answers_only(completion, "completion", origin)
    return SftRow(_topic(record, origin), prompt, completion, origin)


def preference_row(record: Record, origin: Origin, data_format: Format) -> PreferenceRow:
    """Check one preference record; an implicit prompt is taken apart as TRL's `extract_prompt` does it.

    Raises `DataError` with its origin.
    """
    _form(record, PREFERENCE_FORMS, origin)
    chosen, rejected = _answer(record, "chosen", origin), _answer(record, "rejected", origin)
    prompt = _text(record, "prompt", origin) if _given(record, "prompt") else None
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
    return PreferenceRow(_topic(record, origin), prompt, chosen, rejected, origin)


def _sft_parts(record: Record, origin: Origin) -> tuple[Text | None, Text]:
    form = _form(record, SFT_FORMS, origin)
    if form == ("messages",):
        messages = _conversation(record["messages"], "messages", origin)
        return None, _ending_in_answer(messages, "messages", origin)
    if form == ("text",):
        return None, checked_text(record["text"], "text", origin)
    if form == ("prompt", "completion"):
        return _text(record, "prompt", origin), _answer(record, "completion", origin)
    prompt = checked_text(record[form[0]], form[0], origin)
    # Alpaca's form: `input` is the text that the instruction is about, and is often empty.
    if form[0] == "instruction" and record.get("input"):
        prompt += "\n\n" + checked_text(record["input"], "input", origin)
    return prompt, checked_text(record[form[1]], form[1], origin)


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
    ways = "; or ".join(_and(form) for form in forms)
    return f"needs {ways}; found {_listed(record) or 'no field'}"


def _topic(record: Record, origin: Origin) -> str:
    for name in ("topic", "source"):
        value = record.get(name)
        if value is None or value == "":
            continue
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{origin}: `{name}` must be text, found {value!r}")
        return value.strip()
    return DEFAULT_TOPIC


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


def _text(record: Record, name: str, origin: Origin) -> Text:
    value = record[name]
    return _conversation(value, name, origin) if isinstance(value, list) else checked_text(value, name, origin)


def _answer(record: Record, name: str, origin: Origin) -> Text:
    """Return a completion: text, or messages that end with the assistant's."""
    value = _text(record, name, origin)
    return value if isinstance(value, str) else _ending_in_answer(value, name, origin)


def _conversation(value: object, name: str, origin: Origin) -> Messages:
    if not isinstance(value, list):
        raise DataError(f"{origin}: `{name}` must be a list of messages, found {kind_of(value)}")
    if not value:
        raise DataError(f"{origin}: `{name}` is empty")
    return tuple(_message(item, f"{name}[{index}]", origin) for index, item in enumerate(value))


_UNSUPPORTED = ("tool_calls", "tool_call_id", "function_call", "reasoning_content", "reasoning", "thinking")


def _message(value: object, name: str, origin: Origin) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{origin}: `{name}` must be an object with `role` and `content`, found {kind_of(value)}")
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise DataError(f"{origin}: `{name}.role` must be system, user or assistant, found {role!r}")
    if not isinstance(content, str):
        raise DataError(f"{origin}: `{name}.content` must be text, found {kind_of(content)}")
    if role == "assistant" and not content.strip():
        raise DataError(f"{origin}: `{name}.content` is empty")
    # Two fields are the usual case, and this runs for every message.
    if len(value) > 2:
        _refuse_unsupported(value, name, origin)
    return Message(role, _encodable(content, f"{name}.content", origin))


def _refuse_unsupported(message: Record, name: str, origin: Origin) -> None:
    """Raise `DataError` for fields that templates render: without them, another conversation would be trained."""
    for key in _UNSUPPORTED:
        if message.get(key):
            raise DataError(f"{origin}: `{name}.{key}` is not supported: leave it out, or write it into `content`")


def _ending_in_answer(messages: Messages, name: str, origin: Origin) -> Messages:
    if messages[-1].role != "assistant":
        raise DataError(f"{origin}: `{name}` must end with an assistant message, found {messages[-1].role}")
    # An assistant's first message alone answers nothing.
    if name == "messages" and all(message.role != "assistant" for message in messages[1:]):
        raise DataError(f"{origin}: `messages` has nothing before the assistant's answer")
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
_FILE_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


def _read_part(file: ConfigFile, part: Part, parse: Callable[[Record, Origin], Parsed]) -> tuple[Parsed, ...]:
    if part != "heldout" and (file.records is not None or file.config.data.rows_digest):
        return tuple(parse(record, origin) for origin, record in _records_in_memory(file, part))
    rows: list[Parsed] = []
    for source in _sources(file, part):
        before = len(rows)
        rows.extend(parse(record, origin) for origin, record in _records(file, source, part))
        if len(rows) == before:
            raise DataError(f"{shown_path(file.resolve(str(source)))}: the file is empty: data.{part} needs a row")
    return tuple(rows)


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
    path = file.config.data.path
    if path is None:
        if part == "heldout":
            return []
        raise DataError(f"{file.source}: data.path and data.{part} are both empty: name a folder or files")
    folder = file.resolve(path)
    found = [folder / name for name in DEFAULT_FILES[part] if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(
            f"{shown_path(found[0])} and {found[1].name} both exist: remove one, or name files in data.{part}"
        )
    if not found and part != "heldout":
        raise DataError(_missing_default(folder, part))
    return found


def _missing_default(folder: Path, part: Part) -> str:
    remedy = f"name files in data.{part}, or set {_TURNED_OFF_BY[part]}"
    if not folder.is_dir():
        return f"{shown_path(folder)}: no such data folder: make it (`mindprint init` shows how), {remedy}"
    names = [path.name for path in folder.iterdir() if path.is_file()]
    near = difflib.get_close_matches(DEFAULT_FILES[part][0], names, n=1, cutoff=0.6)
    hint = f" (found {near[0]})" if near else ""
    return f"{shown_path(folder / DEFAULT_FILES[part][0])}: no such file{hint}: make it, {remedy}"


def _records(file: ConfigFile, source: str | Path, part: Part) -> Iterator[tuple[Origin, Record]]:
    path = source if isinstance(source, Path) else file.resolve(source)
    if path.is_file():
        return _file_records(path)
    if path.is_dir():
        raise DataError(f"{shown_path(path)}: data.{part} names a folder: name its files, or set data.path to it")
    # `data/sft.jsonl` has the form of a hub name too. The ending shows that a file is meant, which is not there.
    hub = _HUB_NAME.fullmatch(str(source))
    if hub is None or Path(str(source)).suffix in _FILE_KINDS:
        raise DataError(f"{shown_path(path)}: no such file (data.{part})")
    return _hub_records(hub["repo"], hub["split"] or "train", part)


def _file_records(path: Path) -> Iterator[tuple[Origin, Record]]:
    readers: Mapping[str, Callable[[Path], Iterator[tuple[Origin, Record]]]] = {
        ".csv": _csv_records,
        ".parquet": _parquet_records,
    }
    suffix = path.suffix.lower()
    if suffix not in _FILE_KINDS:
        raise DataError(f"{shown_path(path)}: unknown kind of file: known are {', '.join(_FILE_KINDS)}")
    return readers.get(suffix, _json_records)(path)


def _json_records(path: Path) -> Iterator[tuple[Origin, Record]]:
    shown = shown_path(path)
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                # Some editors begin a UTF-8 file with a byte order mark, which JSON does not allow.
                content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if content.strip():
                    origin = Origin(shown, number)
                    yield origin, _json_object(content, origin)
    except OSError as error:
        raise DataError(f"{shown}: cannot be read: {error.strerror}") from error


def _json_object(line: bytes, origin: Origin) -> Record:
    try:
        value = parse_json(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: is not UTF-8 (byte {error.start + 1}): save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: not valid JSON: {error.msg} at column {error.colno}{_array_hint(line)}") from None
    except ValueError as error:
        raise DataError(f"{origin}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{origin}: must be an object {{...}}, found {kind_of(value)}{_array_hint(line)}")
    return value


def _array_hint(line: bytes) -> str:
    return ": one object a line, without an array around them" if line.lstrip().startswith(b"[") else ""


def _csv_records(path: Path) -> Iterator[tuple[Origin, Record]]:
    """Read CSV with a header line. Every cell is text (`007` and `NA` do not change), an empty cell a missing field."""
    shown = shown_path(path)
    # A letter can be longer than the 128 KiB that the csv module allows, and the limit is global.
    before = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            for record in reader:
                # `line_num` counts the lines read so far. A record with line breaks in its cells began that many lines
                # earlier.
                within = sum(cell.count("\n") for cell in record.values() if isinstance(cell, str))
                origin = Origin(shown, reader.line_num - within)
                yield origin, _csv_record(record, origin)
    except UnicodeDecodeError:
        raise DataError(f"{shown}: line {_undecodable_line(path)}: is not UTF-8: save the file as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{shown}: line {reader.line_num + 1}: is not valid CSV: {error}") from None
    except OSError as error:
        raise DataError(f"{shown}: cannot be read: {error.strerror}") from error
    finally:
        csv.field_size_limit(before)


def _undecodable_line(path: Path) -> int:
    """Find the line of a decoding error. Text is decoded in blocks, so the error itself does not know it."""
    with path.open("rb") as lines:
        return next(number for number, line in enumerate(lines, 1) if line != line.decode(errors="ignore").encode())


def _csv_record(record: dict[str | Any, Any], origin: Origin) -> Record:
    # DictReader collects the cells that have no column under None.
    if None in record:
        raise DataError(f"{origin}: has more cells than the header has columns: quote cells that hold a comma")
    return {name: cell for name, cell in record.items() if cell}


def _parquet_records(path: Path) -> Iterator[tuple[Origin, Record]]:
    import datasets  # noqa: PLC0415 (a second to import, and most data needs none of it)

    shown = shown_path(path)
    try:
        # Streamed: a row is checked as it is read, and a mistake stops before the rest is loaded.
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, record in enumerate(rows, 1):
            yield Origin(shown, number, "row"), record
    except Exception as error:  # datasets, pyarrow and fsspec each raise their own errors
        raise DataError(f"{shown}: cannot be read as Parquet: {first_line(error)}") from error


def _hub_records(repo: str, split: str, part: Part) -> Iterator[tuple[Origin, Record]]:
    import datasets  # noqa: PLC0415 (a second to import, and most data needs none of it)

    try:
        rows = datasets.load_dataset(repo, split=split)
    except Exception as error:  # datasets, huggingface_hub, httpx and fsspec each raise their own errors
        raise DataError(
            f"dataset {repo} (split {split}) of data.{part} is not a file here and could not be loaded from the hub: "
            f"{first_line(error)}"
        ) from error
    name = f"{repo}:{split}"
    return ((Origin(name, number, "row"), record) for number, record in enumerate(rows, 1))


def shown_path(path: str | Path) -> str:
    """Return a path as a person at this prompt would write it."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def kind_of(value: object) -> str:
    # By exact type, because a boolean is also an instance of int.
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")


def _and(names: Iterable[str]) -> str:
    *most, last = [f"`{name}`" for name in names]
    return f"{', '.join(most)} and {last}" if most else last


def _listed(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names]
    more = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
    return ", ".join(shown[:6]) + more


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
