"""Rendering of rows as token ids with masks: the one place that tells trained tokens from context.

The completion is everything that the template adds to the rendered prompt, the end-of-turn token included. Where the
tokens of the prompt are not a prefix of the whole, the common prefix decides, exactly as in TRL 1.16 (`SFTTrainer` and
`DPOTrainer`, `_prepare_dataset`). Truncation keeps the start, as there.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from mindprint.config import DataConfig
from mindprint.contract import Bool, Int32
from mindprint.data.processes import results_in_order
from mindprint.data.row_files import Origin
from mindprint.data.rows import Messages, PreferenceRow, SftRow, Text, as_messages, decode_row
from mindprint.data.stored import (
    Encoded,
    Stored,
    StoreWriter,
    build_entry,
    content_key,
    count_topics,
    find_entry,
    in_portions,
)
from mindprint.data.tokenizer import Tokenizer, load_tokenizer
from mindprint.errors import DataError

CHUNK = 1024
"""Rows rendered at a time: enough for the tokenizer's threads, little in memory."""


@dataclass(frozen=True, eq=False)
class SftExample:
    """`tokens` int32 `[T]`, `loss_mask` bool `[T]`: True where a token is trained, never on the first one."""

    topic: str
    tokens: Int32
    loss_mask: Bool
    origin: Origin


@dataclass(frozen=True, eq=False)
class PreferenceExample:
    """`prompt` int32 `[P]`, `chosen` int32 `[C]`, `rejected` int32 `[C]`, none of them empty."""

    topic: str
    prompt: Int32
    chosen: Int32
    rejected: Int32
    origin: Origin


Example = TypeVar("Example", SftExample, PreferenceExample)


@dataclass(frozen=True)
class Rendered(Generic[Example]):
    """Examples in the order of their rows.

    `cut` counts rows whose end was cut at `max_length`, `left_out` rows whose prompt leaves no room for an answer, and
    `same` pairs whose answers are the same tokens, once they are cut. `notes` and `warnings` are for the user.
    """

    examples: Sequence[Example]
    cut: int = 0
    left_out: int = 0
    notes: tuple[str, ...] = ()
    same: int = 0
    warnings: tuple[str, ...] = ()


def render_sft(
    rows: Sequence[SftRow], tokenizer: Tokenizer, data: DataConfig, *, held_out: bool = False
) -> Rendered[SftExample]:
    """Render SFT rows as tokens and masks. If the template rewrites a conversation's history, each turn is an example.

    Raises `DataError` where the template refuses a row, a completion renders to nothing, or a topic loses every row.
    Of `held_out` rows a topic may lose every one: nothing is trained on them.
    """
    if isinstance(rows, Stored):
        return _render_stored(rows, "sft", tokenizer, data, held_out=held_out)
    tally = _Tally()
    examples: list[SftExample] = []
    for chunk in _chunks(rows):
        examples += _sft_chunk(chunk, tokenizer, data, tally)
    return _rendered(rows, examples, tally, tokenizer, data, held_out=held_out)


def render_preferences(
    rows: Sequence[PreferenceRow], tokenizer: Tokenizer, data: DataConfig, *, held_out: bool = False
) -> Rendered[PreferenceExample]:
    """Render preference pairs as tokens, as `DPOTrainer` does. Raises `DataError` as `render_sft` does.

    A pair whose answers are the same tokens, once they are cut, is left out and counted: its gradient is zero.
    """
    if isinstance(rows, Stored):
        return _render_stored(rows, "preferences", tokenizer, data, held_out=held_out)
    tally = _Tally()
    examples: list[PreferenceExample] = []
    for chunk in _chunks(rows):
        examples += _pairs_chunk(chunk, tokenizer, data, tally)
    return _rendered(rows, examples, tally, tokenizer, data, held_out=held_out)


def render_prompt(
    prompt: Text, tokenizer: Tokenizer, data_format: Literal["chat", "raw"] = "chat", variables: str = ""
) -> Int32:
    """Render a prompt, `[P]` int32: a conversation up to the assistant's turn, or plain text.

    `variables` are a row's own variables for the chat template, as JSON.
    """
    if data_format == "raw":
        if not isinstance(prompt, str):
            raise DataError("messages need data.format=chat; data.format is raw, which takes strings")
        # A tokenizer that appends EOS would end the text before the model continues it.
        ids = tokenizer.encode(prompt)
        return np.array(ids[:-1] if ids[-1:] == [tokenizer.eos_id] else ids, dtype=np.int32)
    messages = as_messages(prompt, "user")
    return tokenizer.render_all([messages], generation_prompt=True, variables=[variables])[0]


def common_prefix(first: Int32, second: Int32) -> int:
    """Count the tokens that two sequences have in common at their beginning."""
    length = min(len(first), len(second))
    # `argmax` of booleans is the first True, at C speed: this runs for every row.
    differ = first[:length] != second[:length]
    return int(differ.argmax()) if differ.any() else length


@dataclass(frozen=True)
class _Sequence:
    """Tokens, and the spans `(start, end)` of them that are trained."""

    tokens: Int32
    spans: tuple[tuple[int, int], ...]


@dataclass
class _Tally:
    """Counts of what happened to rows. `left_out` and `same` are by topic, and `unread` names template variables."""

    cut: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    split: int = 0
    diverging: int = 0
    same: Counter[str] = field(default_factory=Counter)
    same_once_cut: int = 0
    shortened: int = 0
    asked_otherwise: int = 0
    unread: dict[str, None] = field(default_factory=dict)

    def look_for(self, answer: str, text: str) -> None:
        """Count an answer that the template did not write whole, such as one whose thought it leaves out."""
        # Templates trim: only the words must be there.
        self.shortened += answer.strip() not in text

    def add(self, other: _Tally) -> None:
        """Add the counts of other rows."""
        for name in ("cut", "split", "diverging", "same_once_cut", "shortened", "asked_otherwise"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.left_out.update(other.left_out)
        self.same.update(other.same)
        self.unread.update(other.unread)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> _Tally:
        """Return the tally whose attributes are these facts."""
        return cls(**{**facts, "left_out": Counter(facts["left_out"]), "same": Counter(facts["same"])})


@dataclass(frozen=True)
class _Turn:
    """One assistant turn: the prompt before it, and the conversation up to its end."""

    prompt: Int32
    upto: Int32

    def sequence(self, origin: Origin) -> _Sequence:
        # Some tokenizers merge the prompt's end with the answer's start. Then training starts where they part.
        start = common_prefix(self.prompt, self.upto)
        if start >= len(self.upto):
            raise DataError(f"{origin}: the completion renders to nothing: the template leaves it out")
        return _Sequence(self.upto, ((start, len(self.upto)),))


def _chat_sequences(
    rows: Sequence[SftRow], tokenizer: Tokenizer, data: DataConfig, tally: _Tally
) -> Iterator[list[_Sequence]]:
    ends = [trained_turns(row, data) for row in rows]
    origins = [row.origin for row, turns in zip(rows, ends, strict=True) for _ in turns]
    variables = [row.variables for row, turns in zip(rows, ends, strict=True) for _ in turns]
    prompts = [row.messages[:end] for row, turns in zip(rows, ends, strict=True) for end in turns]
    wholes = [row.messages[: end + 1] for row, turns in zip(rows, ends, strict=True) for end in turns]
    texts = _render(wholes, origins, variables, tokenizer, generation_prompt=False)
    for messages, text in zip(wholes, texts, strict=True):
        tally.look_for(messages[-1].content, text)
    _note_unread(variables, tokenizer, tally)
    asked = _render(prompts, origins, variables, tokenizer, generation_prompt=True)
    _note_other_states(prompts, origins, variables, asked, tokenizer, tally)
    prompt_ids = tokenizer.encode_rendered(asked)
    rendered = map(_Turn, prompt_ids, encode_answers(tokenizer, prompts, asked, prompt_ids, texts))
    for row, turns in zip(rows, ends, strict=True):
        yield _conversation(row, [next(rendered) for _ in turns], tally)


def trained_turns(row: SftRow, data: DataConfig) -> list[int]:
    """Return the indices of the assistant's messages to train: those after the prompt with something before them.

    An answer that its own fields take out (`weight: 0`) is context.
    """
    messages, first = row.messages, max(1, len(row.prompt_messages))
    turns = [
        index
        for index in range(first, len(messages))
        if messages[index].role == "assistant" and messages[index].trained
    ]
    return turns[-1:] if data.train_on == "last" else turns


def _conversation(row: SftRow, turns: list[_Turn], tally: _Tally) -> list[_Sequence]:
    """Make one sequence with a span per turn, or one per turn if an earlier rendering is not a prefix of the last."""
    sequences = [turn.sequence(row.origin) for turn in turns]
    tally.diverging += any(s.spans[0][0] < len(turn.prompt) for s, turn in zip(sequences, turns, strict=True))
    whole = turns[-1].upto
    if any(common_prefix(turn.upto, whole) < len(turn.upto) for turn in turns):
        # The model never writes an answer in its rewritten form, so each turn needs its own sequence.
        tally.split += 1
        return sequences
    return [_Sequence(whole, tuple(sequence.spans[0] for sequence in sequences))]


def _raw_sequences(rows: Sequence[SftRow], tokenizer: Tokenizer, tally: _Tally) -> Iterator[list[_Sequence]]:
    """Encode plain text and end-of-sequence. A prompt, where there is one, is context."""
    prompts = tokenizer.encode_all([_plain(row.prompt) if row.prompt else "" for row in rows])
    wholes = tokenizer.encode_all([_plain(row.prompt or "") + _ended(row.completion, tokenizer) for row in rows])
    for row, prompt, whole in zip(rows, prompts, wholes, strict=True):
        text = [_Sequence(whole, ((0, len(whole)),))]
        yield _conversation(row, [_Turn(prompt, whole)], tally) if row.prompt else text


def _sft_examples(row: SftRow, sequences: list[_Sequence], max_length: int, tally: _Tally) -> Iterator[SftExample]:
    """Cut a row's sequences at `max_length`. A row without a trained token left counts as left out."""
    kept = [sequence for sequence in sequences if _has_room(sequence, max_length)]
    tally.left_out[row.topic] += not kept
    tally.cut += bool(kept) and (len(kept) < len(sequences) or any(len(s.tokens) > max_length for s in kept))
    for sequence in kept:
        tokens = sequence.tokens[:max_length]
        yield SftExample(row.topic, tokens, _mask(sequence, len(tokens)), row.origin)


def _has_room(sequence: _Sequence, max_length: int) -> bool:
    """Return whether a trained token is left. Nothing predicts the first token of a sequence: it is never trained."""
    return any(max(start, 1) < min(end, max_length) for start, end in sequence.spans)


def _mask(sequence: _Sequence, length: int) -> Bool:
    mask = np.zeros(length, dtype=np.bool_)
    for start, end in sequence.spans:
        mask[start:end] = True
    # Nothing predicts the first token.
    mask[:1] = False
    return mask


_Parts = tuple[Int32, Int32, Int32]


def _chat_pairs(rows: Sequence[PreferenceRow], tokenizer: Tokenizer, tally: _Tally) -> Iterator[_Parts]:
    origins = [row.origin for row in rows]
    variables = [row.variables for row in rows]
    prompts = [row.prompt_messages for row in rows]
    chosen = [row.prompt_messages + row.chosen_messages for row in rows]
    rejected = [row.prompt_messages + row.rejected_messages for row in rows]
    texts = (
        _render(prompts, origins, variables, tokenizer, generation_prompt=True),
        _render(chosen, origins, variables, tokenizer, generation_prompt=False),
        _render(rejected, origins, variables, tokenizer, generation_prompt=False),
    )
    for messages, text in zip(chosen, texts[1], strict=True):
        tally.look_for(messages[-1].content, text)
    _note_unread(variables, tokenizer, tally)
    asked, *answered = texts
    _note_other_states(prompts, origins, variables, asked, tokenizer, tally)
    prompt_ids = tokenizer.encode_rendered(asked)
    answers = [encode_answers(tokenizer, prompts, asked, prompt_ids, wholes) for wholes in answered]
    return zip(prompt_ids, *answers, strict=True)


def encode_answers(
    tokenizer: Tokenizer,
    prompts: Sequence[Messages],
    asked: Sequence[str],
    prompt_ids: Sequence[Int32],
    wholes: Sequence[str],
) -> list[Int32]:
    """Encode conversations `wholes` that continue the rendered prompts `asked`, whose ids are `prompt_ids`.

    Where a generation prompt writes a thought's marker, the answer continues the prompt's own tokens. A tokenizer may
    join the prompt's last line break with the answer's first, and then what the model is asked with (`<think>` and one
    line break) would never be trained. Any other conversation is encoded as a whole, as TRL does.
    """
    encoded = tokenizer.encode_rendered(wholes)
    parted = [
        place
        for place, (messages, prompt, ids) in enumerate(zip(prompts, asked, prompt_ids, strict=True))
        if common_prefix(ids, encoded[place]) < len(ids)
        and wholes[place].startswith(prompt)
        and _writes_thought(prompt, messages, tokenizer)
    ]
    rest = tokenizer.encode_rendered([wholes[place].removeprefix(asked[place]) for place in parted])
    for place, answer in zip(parted, rest, strict=True):
        encoded[place] = np.concatenate([prompt_ids[place], answer])
    return encoded


def _writes_thought(asked: str, messages: Messages, tokenizer: Tokenizer) -> bool:
    """Return whether the template writes a thought's marker after the last message of a prompt."""
    opening = _opening(asked, messages)
    return any(marker in opening for pair in tokenizer.thought_markers for marker in pair)


def _opening(asked: str, messages: Messages) -> str:
    """Return the text that a template writes after the last message of a prompt: the opening of the answer."""
    # Templates trim what they write, so the words are looked for without the space around them.
    last = messages[-1].content.strip() if messages else ""
    return asked.rpartition(last)[2] if last else asked


def _note_other_states(
    prompts: Sequence[Messages],
    origins: Sequence[Origin],
    variables: Sequence[str],
    asked: Sequence[str],
    tokenizer: Tokenizer,
    tally: _Tally,
) -> None:
    """Count rows whose own variables open the answer in another way than a prompt without a row is asked."""
    for own in dict.fromkeys(filter(None, variables)):
        places = [place for place, text in enumerate(variables) if text == own]
        first = places[0]
        (general,) = _render([prompts[first]], [origins[first]], [""], tokenizer, generation_prompt=True)
        if _opening(general, prompts[first]) != _opening(asked[first], prompts[first]):
            tally.asked_otherwise += len(places)


def _note_unread(variables: Sequence[str], tokenizer: Tokenizer, tally: _Tally) -> None:
    """Remember the template variables that the template does not mention: they change nothing."""
    names = [name for own in dict.fromkeys(variables) if own for name in json.loads(own)]
    tally.unread.update(dict.fromkeys(name for name in names if name not in tokenizer.template))


def _raw_pairs(rows: Sequence[PreferenceRow], tokenizer: Tokenizer) -> Iterator[_Parts]:
    return zip(
        tokenizer.encode_all([_plain(row.prompt) for row in rows]),
        tokenizer.encode_all([_plain(row.prompt) + _ended(row.chosen, tokenizer) for row in rows]),
        tokenizer.encode_all([_plain(row.prompt) + _ended(row.rejected, tokenizer) for row in rows]),
        strict=True,
    )


def _pair_example(
    row: PreferenceRow, prompt: Int32, chosen: Int32, rejected: Int32, max_length: int, tally: _Tally
) -> Iterator[PreferenceExample]:
    """Cut a pair after the common prefix of all three. As in TRL, it is left out where that fills `max_length`."""
    # Both answers must continue the same tokens, or their log-probs could not be compared.
    start = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
    _check_pair(row, start, chosen, rejected)
    tally.diverging += start < len(prompt)
    if start >= max_length:
        tally.left_out[row.topic] += 1
        return
    is_cut = max(len(chosen), len(rejected)) > max_length
    # Compared after the cut: answers that differ only behind it are the same to the model.
    if np.array_equal(chosen[:max_length], rejected[:max_length]):
        tally.same[row.topic] += 1
        tally.same_once_cut += is_cut
        return
    tally.cut += is_cut
    yield PreferenceExample(row.topic, prompt[:start], chosen[start:max_length], rejected[start:max_length], row.origin)


def _check_pair(row: PreferenceRow, start: int, chosen: Int32, rejected: Int32) -> None:
    if not start:
        raise DataError(f"{row.origin}: prompt and answers share no token: end the prompt where a word ends")
    for name, tokens in (("chosen", chosen), ("rejected", rejected)):
        if len(tokens) == start:
            raise DataError(f"{row.origin}: `{name}` renders to nothing: the template leaves it out")


def _sft_chunk(chunk: Sequence[SftRow], tokenizer: Tokenizer, data: DataConfig, tally: _Tally) -> list[SftExample]:
    raw = data.format == "raw"
    parts = _raw_sequences(chunk, tokenizer, tally) if raw else _chat_sequences(chunk, tokenizer, data, tally)
    rendered = zip(chunk, parts, strict=True)
    return list(chain(*(_sft_examples(row, sequences, data.max_length, tally) for row, sequences in rendered)))


def _pairs_chunk(
    chunk: Sequence[PreferenceRow], tokenizer: Tokenizer, data: DataConfig, tally: _Tally
) -> list[PreferenceExample]:
    parts = _raw_pairs(chunk, tokenizer) if data.format == "raw" else _chat_pairs(chunk, tokenizer, tally)
    rendered = zip(chunk, parts, strict=True)
    return list(chain(*(_pair_example(row, *tokens, data.max_length, tally) for row, tokens in rendered)))


def _render_stored(
    rows: Stored[Any], kind: Kind, tokenizer: Tokenizer, data: DataConfig, *, held_out: bool
) -> Rendered[Any]:
    """Render rows on disk to examples on disk, with all cores, or take those that an earlier run rendered."""
    settings = (data.format, data.max_length, data.train_on, dict(tokenizer.variables))
    digests = (tokenizer.digest, tokenizer.template_digest, tokenizer.variables_digest)
    key = content_key("examples", kind, rows.key, digests, settings)
    decode = decode_example

    def build(writer: StoreWriter) -> Mapping[str, Any]:
        tally = _Tally()
        portions = in_portions((rows.content(index) for index in range(len(rows))), CHUNK)
        arguments = (kind, tokenizer.folder, dict(tokenizer.variables), data)
        for encoded, counts in results_in_order(f"{__name__}:chunk_renderer", arguments, portions):
            writer.add(encoded)
            tally.add(counts)
        return vars(tally)

    examples: Stored[Any] = find_entry(rows.cache, key, decode) or build_entry(rows.cache, key, decode, build)
    return _rendered(rows, examples, _Tally.from_facts(examples.facts), tokenizer, data, held_out=held_out)


def chunk_renderer(
    kind: Kind, folder: Path, variables: Mapping[str, Any], data: DataConfig
) -> Callable[[Sequence[bytes]], tuple[list[Encoded], _Tally]]:
    """Return a function that renders stored rows, for a process that does nothing else."""
    tokenizer = load_tokenizer(folder, variables)

    def render_chunk(contents: Sequence[bytes]) -> tuple[list[Encoded], _Tally]:
        tally, rows = _Tally(), [decode_row(content) for content in contents]
        chunk: Callable[..., Sequence[Any]] = _sft_chunk if kind == "sft" else _pairs_chunk
        return [encode_example(example) for example in chunk(rows, tokenizer, data, tally)], tally

    return render_chunk


Kind = Literal["sft", "preferences"]

_HEADER = struct.Struct("<qHHHiii")
"""The line of an example's row, the bytes of its topic, file and unit, and the lengths of its three arrays."""


def encode_example(example: SftExample | PreferenceExample) -> Encoded:
    """Return an example as bytes, for the disk, with the tokens that the model reads of it."""
    parts: tuple[Int32, ...] = (
        (example.tokens,) if isinstance(example, SftExample) else (example.prompt, example.chosen, example.rejected)
    )
    mask = np.packbits(example.loss_mask).tobytes() if isinstance(example, SftExample) else b""
    lengths = [len(part) for part in parts]
    origin = example.origin
    names = [name.encode("utf-8", "surrogatepass") for name in (example.topic, origin.file, origin.unit)]
    header = _HEADER.pack(origin.line, *map(len, names), *lengths, *[-1] * (3 - len(parts)))
    tokens = (part.astype("<i4").tobytes() for part in parts)
    return Encoded(b"".join((header, *names, *tokens, mask)), example.topic, sum(lengths))


def decode_example(content: bytes) -> SftExample | PreferenceExample:
    """Return the example that `encode_example` made bytes of."""
    line, *sizes = _HEADER.unpack_from(content)
    at, names = _HEADER.size, []
    for size in sizes[:3]:
        names.append(content[at : at + size].decode("utf-8", "surrogatepass"))
        at += size
    parts = []
    for length in sizes[3:]:
        if length >= 0:
            parts.append(np.frombuffer(content, "<i4", length, at).astype(np.int32))
            at += 4 * length
    topic, file, unit = names
    origin = Origin(file, line, unit)  # type: ignore[arg-type]
    if len(parts) == 3:
        prompt, chosen, rejected = parts
        return PreferenceExample(topic, prompt, chosen, rejected, origin)
    bits = np.frombuffer(content, np.uint8, offset=at)
    return SftExample(topic, parts[0], np.unpackbits(bits, count=len(parts[0])).astype(np.bool_), origin)


_Row = TypeVar("_Row", SftRow, PreferenceRow)


def _chunks(rows: Sequence[_Row]) -> Iterator[Sequence[_Row]]:
    return (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))


def _render(
    conversations: Sequence[Messages],
    origins: Sequence[Origin],
    variables: Sequence[str],
    tokenizer: Tokenizer,
    *,
    generation_prompt: bool,
) -> list[str]:
    """Render many conversations at once. If the template refuses one, name its row."""
    try:
        return tokenizer.render_text(conversations, generation_prompt=generation_prompt, variables=variables)
    except DataError:
        # One after the other, which is slow, but only on the way to an error.
        for messages, origin, own in zip(conversations, origins, variables, strict=True):
            # Whichever conversation the template refuses raises here, with its row's origin.
            try:
                tokenizer.render_text([messages], generation_prompt=generation_prompt, variables=[own])
            except DataError as error:
                raise DataError(f"{origin}: {error}") from error
        raise


def _plain(text: Text) -> str:
    if not isinstance(text, str):
        raise DataError("messages need data.format=chat; data.format is raw, which takes strings")
    return text


def _ended(completion: Text, tokenizer: Tokenizer) -> str:
    """Append end-of-sequence, unless the text ends with it."""
    text = _plain(completion)
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def _rendered(
    rows: Sequence[_Row],
    examples: Sequence[Example],
    tally: _Tally,
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    held_out: bool,
) -> Rendered[Example]:
    if not held_out:
        _refuse_empty_topics(rows, count_topics(examples), tally, data)
    chat = data.format == "chat"
    return Rendered(
        examples if isinstance(examples, Stored) else tuple(examples),
        tally.cut,
        tally.left_out.total(),
        tuple(chain(tokenizer.notes if chat else (), _notes(tally, chat=chat))),
        tally.same.total(),
        tuple(_warnings(examples, tally, tokenizer, data)) if chat else (),
    )


def _refuse_empty_topics(rows: Sequence[_Row], kept: Collection[str], tally: _Tally, data: DataConfig) -> None:
    """Raise `DataError` for a topic without rows: it would be a stage without steps, or one that learns nothing."""
    for topic in {**tally.left_out, **tally.same}:
        too_long, same = tally.left_out[topic], tally.same[topic]
        if topic in kept or not too_long + same:
            continue
        first = next(row.origin for row in rows if row.topic == topic)
        lost = f"{first}: topic {topic!r} has no row left ({too_long + same} of {too_long + same})"
        limit = f"max_length ({data.max_length} tokens)"
        once_cut = f" once they are cut at {limit}" if tally.same_once_cut else ""
        if not same:
            raise DataError(f"{lost}: every prompt fills {limit}: raise data.max_length, or shorten the prompts")
        raise DataError(
            f"{lost}: in {same} pairs chosen and rejected are the same{once_cut}, which teaches nothing"
            f"{f', and {too_long} prompts fill {limit}' if too_long else ''}: raise data.max_length, or change them"
        )


def _notes(tally: _Tally, *, chat: bool) -> Iterator[str]:
    if tally.split:
        yield f"the chat template rewrites earlier turns: {tally.split} conversations became one example per turn"
    # Plain text has no template: a tokenizer that joins the prompt's last sign with the answer's first is all there is.
    if tally.diverging and not chat:
        yield f"in {tally.diverging} rows an answer changes the prompt's own tokens: trained from where they part"
    if same := tally.same.total():
        cut = f" ({tally.same_once_cut} of them once cut at max_length)" if tally.same_once_cut else ""
        yield f"in {same} pairs chosen and rejected are the same{cut}: left out, they teach nothing"


ENDS_LOOKED_AT = 50
"""Examples whose end is looked at: a template ends all answers alike."""


def _warnings(
    examples: Sequence[SftExample | PreferenceExample], tally: _Tally, tokenizer: Tokenizer, data: DataConfig
) -> Iterator[str]:
    """Yield warnings of a chat template that asks in another state than it trains, cuts answers, or never ends them."""
    if tally.diverging:
        yield (
            f"in {tally.diverging} rows the template's generation prompt is not a prefix of what is trained: trained "
            f"from where they part, so the model is asked in another state than it is trained in; {_remedy(tokenizer)}"
        )
    if tally.asked_otherwise:
        yield (
            f"in {tally.asked_otherwise} rows the row's own chat_template_kwargs change how the answer is opened: "
            "prompts that come without a row (generate, chat) are asked in another state; set them for the project "
            "(data.chat_template_kwargs)"
        )
    if tally.shortened:
        yield (
            f"in {tally.shortened} rows the template leaves out a part of the trained answer (a thought, say): it is "
            "not trained; take it out of the row, or set a variable of the template that keeps it "
            "(data.chat_template_kwargs)"
        )
    unread = [*(name for name in tokenizer.variables if name not in tokenizer.template), *tally.unread]
    if unread:
        yield f"the chat template does not read {', '.join(dict.fromkeys(unread))}: it changes nothing"
    whole = (tokens for example in examples if len(tokens := _trained_tokens(example, data.max_length)))
    looked_at = list(islice(whole, ENDS_LOOKED_AT))
    stops = np.array(tokenizer.stop_token_ids)
    if looked_at and not any(np.isin(tokens, stops).any() for tokens in looked_at):
        yield (
            "the chat template writes no end-of-turn token after an answer: the model does not learn to stop, and its "
            "answers run to generation.max_new_tokens; write eos_token after the assistant's message in "
            "chat_template.jinja, or set data.format=raw"
        )


# The usual names of a template's switch for thoughts.
_SWITCH = re.compile(r"\b(enable_thinking|thinking|add_thoughts|skip_thinking|reasoning_effort|thinking_budget)\b")


def _remedy(tokenizer: Tokenizer) -> str:
    """Return what the user can do where a template asks in another state than it trains."""
    if named := _SWITCH.search(tokenizer.template):
        example = "={enable_thinking: false}, say" if named[0] == "enable_thinking" else f", which has {named[0]}"
        return f"set a variable of the template that makes them equal (data.chat_template_kwargs{example})"
    return (
        "write what it opens (such as a thought) at the beginning of the answers, or take the opening out of the "
        "generation prompt in chat_template.jinja"
    )


def _trained_tokens(example: SftExample | PreferenceExample, max_length: int) -> Int32:
    """Return the trained tokens of an example, nothing where its end may have been cut."""
    if isinstance(example, SftExample):
        return example.tokens[example.loss_mask & (len(example.tokens) < max_length)]
    return example.chosen[: len(example.chosen) if len(example.prompt) + len(example.chosen) < max_length else 0]
