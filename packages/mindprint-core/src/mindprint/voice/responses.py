"""Both models' answers to held-out prompts and their log-probs of held-out rows, computed in batches, each once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, Protocol

import numpy as np

from mindprint.adapter.peft_format import adapter_digest
from mindprint.contract import Float64, Generation, Int32, LoadedModel, Sampling
from mindprint.data.render import PreferenceExample, SftExample
from mindprint.data.tokenizer import Tokenizer
from mindprint.models.likelihoods import CompletionSums, batches_by_length, sum_pairs, sum_texts
from mindprint.plugins.backend import Backend

OnRows = Callable[[int, int], None]
"""Receives the rows that are done, and how many there are. An exception that it raises ends the evaluation."""


class ModelInMemory(Protocol):
    """A base model with its adapter in memory, such as an `Engine` or an `OpenedAdapter`."""

    @property
    def backend(self) -> Backend:
        """Return the backend that holds the model."""

    @property
    def model(self) -> LoadedModel:
        """Return the model, as the backend's hooks take it."""


@dataclass(frozen=True)
class GeneratedAnswer:
    """One answer, as the backend made it and as text."""

    generation: Generation
    text: str


@dataclass(frozen=True)
class HeldOutTokens:
    """Everything that the models answer or read, as tokens: prompts with their topics, pairs and texts."""

    prompts: tuple[tuple[str, Int32], ...]
    pairs: tuple[PreferenceExample, ...]
    texts: tuple[SftExample, ...]


@dataclass(frozen=True)
class _Known:
    """The responses of one model so far, by the place of the row among those of its kind."""

    answers: dict[int, GeneratedAnswer] = field(default_factory=dict)
    pairs: dict[int, tuple[float, float]] = field(default_factory=dict)
    texts: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Batch:
    """Rows of one kind that one call of the backend answers or reads, with the adapter or without it."""

    kind: Literal["answers", "pairs", "texts"]
    rows: list[int]
    adapter: bool


class Responses:
    """Both models' responses to held-out rows. The base model responds once, the tuned model once for each adapter.

    With `reuse` the responses of an adapter are kept until another one is in memory. The batches are then of one topic
    each, because a row's numbers depend on its neighbours in the batch in their last bits: a run that is resumed must
    get the same figures, whichever topics it has evaluated before.
    """

    def __init__(
        self, memory: ModelInMemory, tokenizer: Tokenizer, rows: HeldOutTokens, max_new_tokens: int, *, reuse: bool
    ) -> None:
        self._memory = memory
        self._tokenizer = tokenizer
        self._rows = rows
        self._sampling = Sampling(max_new_tokens, tokenizer.stop_token_ids)
        self._reuse = reuse
        self._base = _Known()
        self._tuned = _Known()
        self._adapter = ""

    def collect(self, topics: Sequence[str], *, answers: bool, on_rows: OnRows) -> None:
        """Have both models read the rows of `topics`, and answer their prompts, as far as they have not yet.

        The base model does so for the rows of every topic: the scale of the voice needs all its answers.
        """
        self._forget_another_adapter()
        batches = list(self._batches(topics, answers=answers))
        done, total = 0, sum(len(batch.rows) for batch in batches)
        for batch in batches:
            on_rows(done, total)
            self._respond(batch)
            done += len(batch.rows)
        if batches:
            on_rows(done, total)

    def answers(self, places: Sequence[int], *, adapter: bool) -> tuple[GeneratedAnswer, ...]:
        """Return the answers to the prompts at `places`, which were collected before."""
        known = self._known(adapter=adapter).answers
        return tuple(known[place] for place in places)

    def pair_sums(self, rows: Sequence[int], *, adapter: bool) -> CompletionSums:
        """Return the summed log-probs of the pairs at `rows`, which were collected before."""
        known = self._known(adapter=adapter).pairs
        chosen, rejected = np.array([known[row] for row in rows], np.float64).T
        return CompletionSums(chosen, rejected)

    def text_sums(self, rows: Sequence[int], *, adapter: bool) -> Float64:
        """Return the summed log-probs of the texts at `rows`, `[rows]`, which were collected before."""
        known = self._known(adapter=adapter).texts
        return np.array([known[row] for row in rows], np.float64)

    def _known(self, *, adapter: bool) -> _Known:
        return self._tuned if adapter else self._base

    def _forget_another_adapter(self) -> None:
        if not self._reuse:
            self._tuned = _Known()
            return
        # A digest and not the step: a roll-back or a retry puts another adapter in place at the same step.
        digest = adapter_digest(self._memory.backend.save(self._memory.model).adapter)
        if digest != self._adapter:
            self._tuned, self._adapter = _Known(), digest

    def _batches(self, topics: Sequence[str], *, answers: bool) -> Iterator[_Batch]:
        """Yield the batches that are missing, those without the adapter first."""
        of_pairs = [(pair.topic, len(pair.prompt) + len(pair.chosen)) for pair in self._rows.pairs]
        of_texts = [(text.topic, len(text.tokens)) for text in self._rows.texts]
        of_prompts = [(topic, len(tokens)) for topic, tokens in self._rows.prompts]
        for adapter in (False, True):
            known = self._known(adapter=adapter)
            # Texts and pairs first: they are quick, and an evaluation that is stopped has lost little.
            for rows in self._missing(of_pairs, topics, known.pairs.keys(), adapter=adapter):
                yield _Batch("pairs", rows, adapter)
            for rows in self._missing(of_texts, topics, known.texts.keys(), adapter=adapter):
                yield _Batch("texts", rows, adapter)
            if answers:
                for rows in self._missing(of_prompts, topics, known.answers.keys(), adapter=adapter):
                    yield _Batch("answers", rows, adapter)

    def _missing(
        self, rows: Sequence[tuple[str, int]], topics: Sequence[str], known: Collection[int], *, adapter: bool
    ) -> Iterator[list[int]]:
        """Yield batches of the rows, given as topic and length, that one of the models has not responded to."""
        wanted = set(topics)
        if not any(topic in wanted for topic, _ in rows):
            return
        # The base model does all rows at once, in batches that mix topics: they are the same in every process.
        places = [
            place for place, (topic, _) in enumerate(rows) if place not in known and (topic in wanted or not adapter)
        ]
        apart = adapter and self._reuse
        groups = groupby(sorted(places, key=lambda place: rows[place][0]), lambda place: rows[place][0])
        for group in [list(group) for _, group in groups] if apart else [places]:
            for batch in batches_by_length([rows[place][1] for place in group]):
                yield [group[index] for index in batch]

    def _respond(self, batch: _Batch) -> None:
        backend, model, known = self._memory.backend, self._memory.model, self._known(adapter=batch.adapter)
        pad_id = self._tokenizer.pad_id
        if batch.kind == "pairs":
            pairs = [self._rows.pairs[row] for row in batch.rows]
            sums = sum_pairs(backend, model, pairs, pad_id, adapter=batch.adapter)
            known.pairs.update(zip(batch.rows, zip(sums.chosen, sums.rejected, strict=True), strict=True))
        elif batch.kind == "texts":
            texts = [self._rows.texts[row] for row in batch.rows]
            known.texts.update(
                zip(batch.rows, sum_texts(backend, model, texts, pad_id, adapter=batch.adapter), strict=True)
            )
        else:
            prompts = [self._rows.prompts[row][1] for row in batch.rows]
            made = backend.generate(model, prompts, self._sampling, adapter=batch.adapter)
            # Thoughts are left out here, before anything is scored: they are in nobody's voice.
            decoded = (
                GeneratedAnswer(answer, self._tokenizer.answer_text(answer.tokens.tolist(), prompt.tolist()))
                for answer, prompt in zip(made, prompts, strict=True)
            )
            known.answers.update(zip(batch.rows, decoded, strict=True))
