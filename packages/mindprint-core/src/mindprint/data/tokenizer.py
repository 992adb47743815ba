"""The tokenizer of a model folder: it turns text and conversations into ids, the same on every backend.

`tokenizer.json` is the truth. `AutoTokenizer` is not used for it: it imports torch where torch is installed (1.7 s, in
an MLX run too), and for several families it rebuilds the tokenizer from parts of the file instead of reading it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mindprint.collection import collection_paused
from mindprint.contract import Int32
from mindprint.data.rows import Message, template_variables
from mindprint.errors import ConfigError, DataError, ModelError
from mindprint.input_files import INFINITIES, read_object
from mindprint.limits import LimitError, limited
from mindprint.text.thoughts import Markers, opens_thought, thought_markers, without_thoughts

if TYPE_CHECKING:
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""A folder with one of these has a tokenizer."""

PLAIN_TEMPLATE = (
    "{%- if add_bos %}{{ bos_token }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{%- if message.role != 'system' %}{{ 'User: ' if message.role == 'user' else 'Assistant: ' }}{% endif %}"
    "{{- message.content }}"
    "{%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
"""The chat template of tokenizers that bring none: `User: …`, a blank line, `Assistant: …` and end-of-sequence.

Turns are separated before each but the first, so that a rendered conversation is a prefix of every longer one. A BOS
comes first where the tokenizer puts one before plain text.
"""

SECONDS, SECONDS_A_CONVERSATION = 3.0, 0.02
"""The longest that a chat template may take: a real one takes a tenth of a millisecond a conversation."""

PROMPT_END = 16
"""Tokens at the end of a prompt in which the opening of a thought is looked for."""

FIXED_DATES = {"%d %b %Y": "26 Jul 2024", "%d %B %Y": "26 July 2024", "%Y-%m-%d": "2024-07-26"}
"""The results of `strftime_now(format)` in a template: the day that Llama's templates name without a clock.

With the real date the same rows would be other tokens tomorrow: no resume, no cached reference, no second backend.
"""


class Tokenizer:
    """A loaded tokenizer with its chat template.

    `pad_id` is the pad token, or else end-of-sequence (any id would do: padding is masked). `stop_token_ids` are all
    that end an answer: end-of-sequence, what `generation_config.json` names, and the end-of-turn token that the
    template writes after an assistant's message. `notes` are messages for the user. `variables` are given to every
    rendering of the template.
    """

    def __init__(self, hf: TokenizersBackend, folder: Path, variables: Mapping[str, Any] | None = None) -> None:
        self._hf = hf
        self.folder = folder
        self.variables: Mapping[str, Any] = variables or {}
        self._refused: DataError | None = None
        self._backend = hf.backend_tokenizer
        self._configured_eos = _eos_in(folder)
        # Files can ask for truncation and padding, which core decides itself.
        self._backend.no_truncation()
        self._backend.no_padding()
        template = _default_template(hf.chat_template)
        if template is not None and not isinstance(template, str):
            raise ModelError(f"{folder}: the chat template must be text: take the model's own tokenizer files")
        self.has_template = template is not None
        self.template = PLAIN_TEMPLATE if template is None else template
        self.eos_id = _eos_id(hf, self._configured_eos, folder)
        self.eos_token = str(self._backend.id_to_token(self.eos_id))
        self.bos_id: int | None = hf.bos_token_id
        self.pad_id: int = self.eos_id if hf.pad_token_id is None else hf.pad_token_id
        self.vocab_size: int = len(hf)
        self.notes = tuple(self._notes())

    def encode(self, text: str) -> list[int]:
        """Encode plain text with the BOS and EOS that the tokenizer adds by itself, each once, never twice."""
        ids: list[int] = self.encode_all([text])[0].tolist()
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[Int32]:
        """Encode many texts at once."""
        return [self._once(ids) for ids in self._ids(texts, special=True)]

    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        """Decode ids. Special tokens are left out unless asked for."""
        text: str = self._backend.decode([int(token) for token in ids], skip_special_tokens=not keep_special)
        return text

    def answer_text(self, ids: Sequence[int], prompt: Sequence[int] = ()) -> str:
        """Decode an answer without its thoughts. `prompt` tells whether the answer begins within one."""
        # Markers can be special tokens, which a plain decoding would leave out and keep the thought.
        whole = self.decode(ids, keep_special=True)
        opened = opens_thought(self.decode(prompt[-PROMPT_END:], keep_special=True), self.thought_markers)
        if not opened and not any(marker in whole for pair in self.thought_markers for marker in pair):
            return self.decode(ids).strip()
        text = without_thoughts(whole, self.thought_markers, opened=opened)
        for token in self._special_tokens:
            text = text.replace(token, "")
        return text.strip()

    def without_thoughts(self, text: str) -> str:
        """Return a text without the thoughts in it, which are not in the person's voice."""
        # Most texts have none, and are returned as they are.
        if not any(marker in text for pair in self.thought_markers for marker in pair):
            return text
        return without_thoughts(text, self.thought_markers)

    @cached_property
    def thought_markers(self) -> tuple[Markers, ...]:
        """The texts around thoughts in this template's answers."""
        return thought_markers(self.template)

    @cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        return tuple(str(token) for token in self._hf.added_tokens_decoder.values() if token.special)

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> list[int]:
        """Render a conversation with the chat template, with the opening of the assistant's next turn or without it.

        Raises `DataError` with the template's own message where it refuses the conversation (no system role, say).
        """
        ids: list[int] = self.render_all([messages], generation_prompt=generation_prompt)[0].tolist()
        return ids

    def render_all(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        generation_prompt: bool,
        variables: Sequence[str] | None = None,
    ) -> list[Int32]:
        """Render many conversations at once."""
        texts = self.render_text(conversations, generation_prompt=generation_prompt, variables=variables)
        return self.encode_rendered(texts)

    def encode_rendered(self, texts: Sequence[str]) -> list[Int32]:
        """Encode what a template has rendered: special tokens are those that it wrote, and none is added."""
        return list(self._ids(texts, special=False))

    def render_text(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        generation_prompt: bool,
        variables: Sequence[str] | None = None,
    ) -> list[str]:
        """Render conversations as text, before it is encoded.

        `variables` are those of each conversation's own, as JSON. They come before the tokenizer's.
        """
        if variables is None or not any(variables):
            return self._rendered(conversations, self.variables, generation_prompt=generation_prompt)
        texts = [""] * len(conversations)
        # Conversations with the same variables are rendered together, in as few calls as possible.
        for own in dict.fromkeys(variables):
            places = [place for place, text in enumerate(variables) if text == own]
            chats = [conversations[place] for place in places]
            given = {**self.variables, **(json.loads(own) if own else {})}
            for place, text in zip(
                places, self._rendered(chats, given, generation_prompt=generation_prompt), strict=True
            ):
                texts[place] = text
        return texts

    def _rendered(
        self, conversations: Sequence[Sequence[Message]], variables: Mapping[str, Any], *, generation_prompt: bool
    ) -> list[str]:
        from transformers.utils.chat_template_utils import render_jinja_template  # noqa: PLC0415 (0.5 s)

        if self._refused is not None:
            raise self._refused
        if self._raises_to_powers:
            raise DataError(
                f"{self.folder}: the chat template computes powers (**), which no limit on time can stop: take the "
                "model's own template"
            )
        chats = [[{"role": m.role, "content": m.content} for m in messages] for messages in conversations]
        try:
            with limited(SECONDS + SECONDS_A_CONVERSATION * len(chats)):
                rendered = render_jinja_template(
                    conversations=chats,
                    chat_template=self._clockless,
                    add_generation_prompt=generation_prompt,
                    **{**self._variables, **variables},
                )
        except LimitError as error:
            # Remembered: every further conversation would take as long again.
            self._refused = DataError(f"{self.folder}: the chat template {error}: take the model's own template")
            raise self._refused from error
        except Exception as error:  # a template is a program of somebody else's, and can raise anything
            raise DataError(f"the chat template refuses this conversation: {_one_line(error)}") from error
        return list(rendered[0])  # annotated as a string, in fact texts and the spans of `{% generation %}`

    @cached_property
    def _raises_to_powers(self) -> bool:
        """Whether the template has the operator `**`, which Python computes in one step that no signal interrupts.

        `10 ** 100000000` takes ten seconds, already when the template is compiled. No template of a model needs powers.
        """
        import jinja2  # noqa: PLC0415 (quick next to transformers, and only rendering needs it)

        before = ""
        # Broken templates are refused where they are rendered.
        with suppress(jinja2.TemplateSyntaxError):
            for _, kind, value in jinja2.Environment(autoescape=False).lex(self._clockless):  # noqa: S701 (renders nothing)
                # In a call, `**` before the first argument or behind a comma unpacks a mapping.
                if kind == "operator" and value == "**" and before not in ("(", ","):
                    return True
                before = before if kind == "whitespace" else value
        return False

    @cached_property
    def digest(self) -> str:
        """Digest the parts that turn text into ids (blake2b): model, normalizer, pre-tokenizer, added tokens, BOS, EOS.

        Taken from the loaded tokenizer, without fields that are null or false: a file that another version of the
        library wrote again has the same digest.
        """
        # From the loaded tokenizer: two files that load alike are the same tokenizer.
        parts = json.loads(self._backend.to_str())
        model = dict(parts["model"])
        if "merges" in model:
            # Two versions of the library write merges as pairs or as strings.
            model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        return _digest(
            {
                "model": _without_defaults(model),
                "normalizer": _without_defaults(parts["normalizer"]),
                "pre_tokenizer": _without_defaults(parts["pre_tokenizer"]),
                "added_tokens": _without_defaults(sorted(parts["added_tokens"], key=lambda token: int(token["id"]))),
                "around_text": self._backend.encode("").ids,
            }
        )

    @cached_property
    def decoder_digest(self) -> str:
        """Digest the part that turns ids into text (blake2b)."""
        return _digest(_without_defaults(json.loads(self._backend.to_str())["decoder"]))

    @cached_property
    def variables_digest(self) -> str:
        """Digest the special tokens that the chat template writes by name (blake2b), such as `bos_token`."""
        # A token that the template does not name (a pad token that another tool has added) changes no text.
        named = {name: text for name, text in self._variables.items() if re.search(rf"\b{name}\b", self.template)}
        return _digest(named)

    @cached_property
    def largest_id(self) -> int:
        """The greatest id that a token has. Ids can have gaps, so it is not the size less one."""
        return max(self._backend.get_vocab().values(), default=0)

    def token_text(self, token: int) -> str | None:
        """Return the token that has this id, or None."""
        return self._backend.id_to_token(token) if token >= 0 else None

    @cached_property
    def template_digest(self) -> str:
        """Digest the chat template's text (blake2b), or that of `PLAIN_TEMPLATE` where the tokenizer has none."""
        return _digest(self.template)

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        ids = {*self._configured_eos, *self._end_of_turn()} - {self.eos_id}
        return (self.eos_id, *sorted(ids))

    def _ids(self, texts: Sequence[str], *, special: bool) -> Iterable[Int32]:
        for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=special):
            yield np.array(encoding.ids, dtype=np.int32)

    def _once(self, ids: Int32) -> Int32:
        """Remove a second BOS or EOS of text that begins or ends with a written one."""
        start = int(len(ids) > 1 and ids[0] == ids[1] == self.bos_id)
        end = len(ids) - int(len(ids) > 1 and ids[-1] == ids[-2] == self.eos_id)
        return ids[start:end]

    @cached_property
    def _variables(self) -> dict[str, Any]:
        tokens = {name: str(token) for name, token in self._hf.special_tokens_map.items() if isinstance(token, str)}
        adds_bos = self.bos_id is not None and self._backend.encode("a").ids[:1] == [self.bos_id]
        return {**tokens, "eos_token": self.eos_token, **({} if self.has_template else {"add_bos": adds_bos})}

    @cached_property
    def _clockless(self) -> str:
        """Return the template with its clock stopped at `FIXED_DATES`."""
        if "strftime_now" not in self.template:
            return self.template
        date = f"{FIXED_DATES!r}.get(format, '26 Jul 2024')"
        macro = "{%- macro strftime_now(format) %}{{ " + date + " }}{% endmacro %}"
        # The empty expression keeps `trim_blocks` from eating a line break that the template begins with.
        return macro + "{{ '' }}" + self.template

    def _notes(self) -> Iterable[str]:
        if not self.has_template:
            yield "the tokenizer has no chat template: rows are written as `User: …` and `Assistant: …`"
        if self._clockless is not self.template:
            date = FIXED_DATES["%d %b %Y"]
            yield f"the chat template writes today's date: held at {date}, so that tokens stay the same"

    def _end_of_turn(self) -> set[int]:
        """Find the first special token after an assistant's words, as the template writes it."""
        words = "Tea at four."
        chat = (Message("user", "Tea?"), Message("assistant", words))
        try:
            # Without the run's variables: a fingerprint records these ids, and is verified where nobody knows them.
            (text,) = self._rendered([chat], {}, generation_prompt=False)
        except DataError:
            return set()
        _, found, after = text.rpartition(words)
        # A template may write a line break or a word after an answer. Only a special token ends it.
        special = {token for token, added in self._hf.added_tokens_decoder.items() if added.special}
        ids = self._backend.encode(after.strip(), add_special_tokens=False).ids if found else []
        return set(ids[:1]) & special


@collection_paused()
def load_tokenizer(folder: Path, variables: Mapping[str, Any] | None = None) -> Tokenizer:
    """Load the tokenizer of a model folder. `variables` are given to its chat template (`data.chat_template_kwargs`).

    From `tokenizer.json` no torch is imported. A folder without it goes through transformers' `AutoTokenizer`, which
    converts older formats and may import torch. Raises `ModelError` for a folder without a usable tokenizer.
    """
    try:
        template_variables(variables or {})
    except ValueError as error:
        raise ConfigError(f"data.chat_template_kwargs: {error}") from None
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{folder}: has no tokenizer (tokenizer.json): copy its files into the model folder")
    # Without torch, transformers advises to install it whenever it is imported; here that is as it should be.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        hf = _load(folder)
    except Exception as error:  # the Rust side raises bare Exception
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {_one_line(error)}") from error
    return Tokenizer(hf, folder, variables)


def _load(folder: Path) -> TokenizersBackend:
    from transformers.tokenization_utils_tokenizers import TokenizersBackend  # noqa: PLC0415 (0.5 s)

    if (folder / "tokenizer.json").is_file():
        loaded = TokenizersBackend.from_pretrained(folder, local_files_only=True)
    else:
        from transformers import AutoTokenizer  # noqa: PLC0415 (imports torch where it can)

        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not isinstance(loaded, TokenizersBackend):
        raise TypeError(f"{type(loaded).__name__} has no tokenizer.json and cannot be converted to one")
    return loaded


def _default_template(template: str | dict[str, str] | None) -> str | None:
    """Return the template for plain chat, where a tokenizer has several by name."""
    return template.get("default") if isinstance(template, dict) else template


def _eos_id(hf: TokenizersBackend, configured: Sequence[int], folder: Path) -> int:
    if hf.eos_token_id is not None:
        return int(hf.eos_token_id)
    if not configured:
        raise ModelError(f"{folder}: the tokenizer has no end-of-sequence token: name it in tokenizer_config.json")
    return configured[0]


def _eos_in(folder: Path) -> list[int]:
    """Read the end-of-sequence ids that generation_config.json and config.json name."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        # Either file may be missing; one that is there and broken is named.
        content = read_object(path, ModelError, constants=INFINITIES) if path.exists() else {}
        value = content.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) and 0 <= token < 2**31 for token in ids):
            raise ModelError(f"{path}: eos_token_id must be a token id or a list of them, found {str(value)[:100]}")
        found.extend(ids)
    return found


def _digest(value: object) -> str:
    content = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return blake2b(content.encode(), digest_size=32).hexdigest()


def _without_defaults(value: Any) -> Any:
    """Remove keys whose value is null or false, at every depth but a vocabulary's."""
    if isinstance(value, dict):
        return {key: _without_defaults(item) for key, item in value.items() if item is not None and item is not False}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [_without_defaults(item) for item in value]
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
