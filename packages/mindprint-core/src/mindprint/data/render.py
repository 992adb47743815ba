"""Rendering of rows as token ids with masks: the one place that tells trained tokens from context.

The completion is everything that the template adds to the rendered prompt, the end-of-turn token included. Where the
tokens of the prompt are not a prefix of the whole, the common prefix decides, exactly as in TRL 1.16 (`SFTTrainer` and
`DPOTrainer`, `_prepare_dataset`). Truncation keeps the start, as there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Generic, Literal, TypeVar

import numpy as np

from mindprint.config import DataConfig
from mindprint.contract import Bool, Int32
from mindprint.data.rows import Message, Messages, Origin, PreferenceRow, SftRow, Text, as_messages
from mindprint.data.tokenizer import Tokenizer
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

    `cut` counts rows whose end was cut at `max_length`, `left_out` rows whose prompt leaves no room for an answer.
    """

    examples: tuple[Example, ...]
    cut: int = 0
    left_out: int = 0
    notes: tuple[str, ...] = ()


def render_sft(rows: Sequence[SftRow], tokenizer: Tokenizer, data: DataConfig) -> Rendered[SftExample]:
    """Render SFT rows as tokens and masks. If the template rewrites a conversation's history, each turn is an example.

    Raises `DataError` where the template refuses a row, a completion renders to nothing, or a topic loses every row.
    """
    tally = _Tally()
    examples: list[SftExample] = []
    for chunk in _chunks(rows):
        raw = data.format == "raw"
        parts = _raw_sequences(chunk, tokenizer, tally) if raw else _chat_sequences(chunk, tokenizer, data, tally)
        for row, sequences in zip(chunk, parts, strict=True):
            examples.extend(_sft_examples(row, sequences, data.max_length, tally))
    return _rendered(rows, examples, tally, tokenizer, data)


def render_preferences(
    rows: Sequence[PreferenceRow], tokenizer: Tokenizer, data: DataConfig
) -> Rendered[PreferenceExample]:
    """Render preference pairs as tokens, as `DPOTrainer` does. Raises `DataError` as `render_sft` does."""
    tally = _Tally()
    examples: list[PreferenceExample] = []
    for chunk in _chunks(rows):
        parts = _raw_pairs(chunk, tokenizer) if data.format == "raw" else _chat_pairs(chunk, tokenizer)
        for row, (prompt, chosen, rejected) in zip(chunk, parts, strict=True):
            examples.extend(_pair_example(row, prompt, chosen, rejected, data.max_length, tally))
    return _rendered(rows, examples, tally, tokenizer, data)


def render_prompt(prompt: Text, tokenizer: Tokenizer, data_format: Literal["chat", "raw"] = "chat") -> Int32:
    """Render a prompt, `[P]` int32: a conversation up to the assistant's turn, or plain text."""
    if data_format == "raw":
        if not isinstance(prompt, str):
            raise DataError("messages need data.format=chat; data.format is raw, which takes strings")
        # A tokenizer that appends EOS would end the text before the model continues it.
        ids = tokenizer.encode(prompt)
        return np.array(ids[:-1] if ids[-1:] == [tokenizer.eos_id] else ids, dtype=np.int32)
    return np.array(tokenizer.render(as_messages(prompt, "user"), generation_prompt=True), dtype=np.int32)


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
    cut: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    split: int = 0
    diverging: int = 0
    same: int = 0


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
    prompts = [row.messages[:end] for row, turns in zip(rows, ends, strict=True) for end in turns]
    wholes = [row.messages[: end + 1] for row, turns in zip(rows, ends, strict=True) for end in turns]
    rendered = map(
        _Turn,
        _render(prompts, origins, tokenizer, generation_prompt=True),
        _render(wholes, origins, tokenizer, generation_prompt=False),
    )
    for row, turns in zip(rows, ends, strict=True):
        yield _conversation(row, [next(rendered) for _ in turns], tally)


def trained_turns(row: SftRow, data: DataConfig) -> list[int]:
    """Return the indices of the assistant's messages to train: those after the prompt with something before them."""
    messages, first = row.messages, max(1, len(row.prompt_messages))
    turns = [index for index in range(first, len(messages)) if messages[index].role == "assistant"]
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


def _chat_pairs(rows: Sequence[PreferenceRow], tokenizer: Tokenizer) -> Iterator[_Parts]:
    origins = [row.origin for row in rows]
    prompts = [row.prompt_messages for row in rows]
    chosen = [row.prompt_messages + row.chosen_messages for row in rows]
    rejected = [row.prompt_messages + row.rejected_messages for row in rows]
    return zip(
        _render(prompts, origins, tokenizer, generation_prompt=True),
        _render(chosen, origins, tokenizer, generation_prompt=False),
        _render(rejected, origins, tokenizer, generation_prompt=False),
        strict=True,
    )


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
    tally.same += np.array_equal(chosen, rejected)
    if start >= max_length:
        tally.left_out[row.topic] += 1
        return
    tally.cut += max(len(chosen), len(rejected)) > max_length
    yield PreferenceExample(row.topic, prompt[:start], chosen[start:max_length], rejected[start:max_length], row.origin)


def _check_pair(row: PreferenceRow, start: int, chosen: Int32, rejected: Int32) -> None:
    if not start:
        raise DataError(f"{row.origin}: prompt and answers share no token: end the prompt where a word ends")
    for name, tokens in (("chosen", chosen), ("rejected", rejected)):
        if len(tokens) == start:
            raise DataError(f"{row.origin}: `{name}` renders to nothing: the template leaves it out")


_Row = TypeVar("_Row", SftRow, PreferenceRow)


def _chunks(rows: Sequence[_Row]) -> Iterator[Sequence[_Row]]:
    return (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))


def _render(
    conversations: Sequence[Messages], origins: Sequence[Origin], tokenizer: Tokenizer, *, generation_prompt: bool
) -> list[Int32]:
    """Render many conversations at once. If the template refuses one, name its row."""
    try:
        return tokenizer.render_all(conversations, generation_prompt=generation_prompt)
    except DataError:
        # One after the other, which is slow, but only on the way to an error.
        for messages, origin in zip(conversations, origins, strict=True):
            # Whichever conversation the template refuses raises here, with its row's origin.
            _render_one(messages, origin, tokenizer, generation_prompt=generation_prompt)
        raise


def _render_one(messages: Sequence[Message], origin: Origin, tokenizer: Tokenizer, *, generation_prompt: bool) -> None:
    try:
        tokenizer.render(messages, generation_prompt=generation_prompt)
    except DataError as error:
        raise DataError(f"{origin}: {error}") from error


def _plain(text: Text) -> str:
    if not isinstance(text, str):
        raise DataError("messages need data.format=chat; data.format is raw, which takes strings")
    return text


def _ended(completion: Text, tokenizer: Tokenizer) -> str:
    """Append end-of-sequence, unless the text ends with it."""
    text = _plain(completion)
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def _rendered(
    rows: Sequence[_Row], examples: list[Example], tally: _Tally, tokenizer: Tokenizer, data: DataConfig
) -> Rendered[Example]:
    # A topic without rows would be a stage without steps, so it is an error and not a note.
    kept = {example.topic for example in examples}
    for topic, left_out in tally.left_out.items():
        if left_out and topic not in kept:
            first = next(row.origin for row in rows if row.topic == topic)
            raise DataError(
                f"{first}: topic {topic!r} has no row left ({left_out} of {left_out}): every prompt fills "
                f"max_length ({data.max_length} tokens): raise data.max_length, or shorten the prompts"
            )
    notes = tuple(chain(tokenizer.notes if data.format == "chat" else (), _notes(tally)))
    return Rendered(tuple(examples), tally.cut, tally.left_out.total(), notes)


def _notes(tally: _Tally) -> Iterator[str]:
    if tally.split:
        yield f"the chat template rewrites earlier turns: {tally.split} conversations became one example per turn"
    if tally.diverging:
        yield f"in {tally.diverging} rows an answer changes the prompt's own tokens: trained from where they part"
    if tally.same:
        yield f"in {tally.same} pairs chosen and rejected are the same: they teach nothing"
