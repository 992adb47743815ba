"""The base model's answers and log-probs, each computed once and kept in a file, so that a killed command continues."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import numpy as np

from mindprint.config import DataConfig
from mindprint.contract import Int32, Sampling
from mindprint.data.render import render_prompt, render_sft
from mindprint.data.row_files import Origin
from mindprint.data.rows import SftRow, Text, as_messages
from mindprint.errors import RunError
from mindprint.input_files import parse_json
from mindprint.models.folder import base_digest
from mindprint.models.likelihoods import BATCH_ROWS, batches_by_length, sum_texts
from mindprint.models.positions import longest_sequence
from mindprint.runs.opened import OpenedModel

OnBatch = Callable[[str, int, int], None]
"""Receives the kind of work, how much of it is done, and how much there is."""


ROWS = 32
"""Prompts that are answered at once, as many as both backends take together on a processor."""

UNREADABLE = -1e9
"""The log-prob of a row that is longer than the model can read. No prompt gains anything then."""


@dataclass(frozen=True)
class Question:
    """A prompt, plain or a conversation, and the most tokens of its answer."""

    prompt: Text
    tokens: int


@dataclass(frozen=True)
class Reply:
    """An answer of the base model, and whether it ended by itself."""

    text: str
    ended: bool


class Kept:
    """A file of JSON lines, each with the results of a batch by their keys.

    A killed process may leave the last line half written, which is removed. So whole batches are kept or lost, and the
    command that continues makes the batches that this one would have made, with the same rounding in each.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: dict[str, Any] = {}
        self._file: int | None = None

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with os.fdopen(os.dup(handle), "rb") as file:
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = parse_json(line)
                self._values.update(entry["values"])
            except (ValueError, KeyError, TypeError) as error:
                os.close(handle)
                raise RunError(f"{self._path}:{number}: is damaged; remove the file to start again") from error
        os.ftruncate(handle, len(whole))
        os.lseek(handle, 0, os.SEEK_END)
        self._file = handle
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)

    def get(self, key: str) -> Any | None:
        """Return the value of a key, None if it is not known."""
        return self._values.get(key)

    def add(self, values: Mapping[str, Any]) -> None:
        """Write the results of a batch as one line."""
        if not values:
            return
        assert self._file is not None, "only within the block"
        self._values.update(values)
        content = memoryview((json.dumps({"values": values}) + "\n").encode())
        while content:
            content = content[os.write(self._file, content) :]


class BaseModel:
    """A base model that is asked, greedily, and whose results are kept.

    Batches follow from the lengths of the questions, in their order, and each is kept whole. So a command that was
    killed asks the rest in the batches in which it would have been asked, and rounding is the same.
    """

    def __init__(self, opened: OpenedModel, kept: Kept, on_batch: OnBatch) -> None:
        self._opened = opened
        self._kept = kept
        self._on_batch = on_batch
        tokenizer = opened.tokenizer
        self._longest = longest_sequence(opened.base.path) or 10**9
        # Another model, template or dtype is another answer. The backend is not in the key: both give the same one.
        self._identity = (base_digest(opened.base.path), tokenizer.template_digest, opened.placement.dtype)

    def replies(self, questions: Sequence[Question], kind: str, *, repetition_penalty: float = 1.0) -> list[Reply]:
        """Answer each question, greedily, in batches of prompts of similar length.

        The penalty is left out on a backend without the capability `filters`.
        """
        penalty = repetition_penalty if "filters" in self._opened.backend.info.capabilities else 1.0
        penalised = () if penalty == 1 else (f"repetition penalty {penalty}",)
        keys = [self._key("reply", *_words(question.prompt), question.tokens, *penalised) for question in questions]
        missing = {key: question for key, question in zip(keys, questions, strict=True) if self._kept.get(key) is None}
        rendered = {key: render_prompt(question.prompt, self._opened.tokenizer) for key, question in missing.items()}
        limits = {key: min(missing[key].tokens, self._longest - len(rendered[key])) for key in missing}
        # A passage that fills the model's context leaves no room for an answer.
        self._kept.add({key: ("", False) for key, limit in limits.items() if limit < 1})
        # Answers of unlike limits in one batch would wait for the longest, so the limit counts as length.
        names = [name for name in missing if limits[name] >= 1]
        lengths = [len(rendered[name]) + limits[name] for name in names]
        for batch in self._batches(lengths, kind, ROWS):
            chosen = [names[place] for place in batch]
            limit = max(limits[name] for name in chosen)
            sampling = Sampling(limit, self._opened.tokenizer.stop_token_ids, repetition_penalty=penalty)
            made = self._opened.backend.generate(
                self._opened.model, [rendered[name] for name in chosen], sampling, adapter=False
            )
            self._kept.add(
                {
                    name: self._reply(generation.tokens, generation.stop_reason, limits[name], rendered[name])
                    for name, generation in zip(chosen, made, strict=True)
                }
            )
        return [Reply(*self._kept.get(key)) for key in keys]  # type: ignore[misc]

    def log_probs(self, pairs: Sequence[tuple[str, str]], kind: str) -> list[float]:
        """Return `log p(completion | prompt)` in nats for a token, for each pair of prompt and completion."""
        keys = [self._key("log-prob", *pair) for pair in pairs]
        missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if self._kept.get(key) is None}
        rows = [SftRow("main", prompt, completion, Origin("", 0)) for prompt, completion in missing.values()]
        rendered = render_sft(rows, self._opened.tokenizer, DataConfig(max_length=10**6)).examples if rows else ()
        by_key = dict(zip(missing, rendered, strict=True))
        names = [name for name, example in by_key.items() if len(example.tokens) <= self._longest]
        self._kept.add({name: UNREADABLE for name, example in by_key.items() if len(example.tokens) > self._longest})
        examples = [by_key[name] for name in names]
        for batch in self._batches([len(example.tokens) for example in examples], kind, BATCH_ROWS):
            chosen = [examples[place] for place in batch]
            pad = self._opened.tokenizer.pad_id
            sums = sum_texts(self._opened.backend, self._opened.model, chosen, pad, adapter=False)
            counts = [int(example.loss_mask.sum()) for example in chosen]
            # Float32 is the precision of the sums' parts, and its shortest form is the same in every process.
            means = (float(np.float32(total / count)) for total, count in zip(sums, counts, strict=True))
            self._kept.add(dict(zip((names[place] for place in batch), means, strict=True)))
        return [float(self._kept.get(key)) for key in keys]  # type: ignore[arg-type]

    def tokens(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self._opened.tokenizer.encode(text))

    def _batches(self, lengths: Sequence[int], kind: str, rows: int) -> Iterator[list[int]]:
        done = 0
        for batch in batches_by_length(lengths, rows):
            yield batch
            done += len(batch)
            self._on_batch(kind, done, len(lengths))

    def _reply(self, tokens: Int32, stop_reason: str, limit: int, prompt: Int32) -> tuple[str, bool]:
        # A batch may have allowed this answer more tokens than it has by itself.
        own = tokens.tolist()[:limit]
        ended = stop_reason == "stop" and len(tokens) <= limit
        return self._opened.tokenizer.answer_text(own, prompt.tolist()), ended

    def _key(self, *parts: str | int) -> str:
        return blake2b(json.dumps([*self._identity, *parts]).encode(), digest_size=16).hexdigest()


def _words(prompt: Text) -> list[str]:
    return [part for message in as_messages(prompt, "user") for part in (message.role, message.content)]
