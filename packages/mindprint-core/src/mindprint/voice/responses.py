"""Both models' answers to held-out prompts and their log-probs of held-out rows, computed in batches, each once.

Answers to prompts are drawn at the temperature of `voice`, several for each prompt. Greedy answers of a small model run
into loops that its sampled answers do not have, so they say little about its voice. Questions are answered greedily.
Some prompts can also be answered with the settings of `generation`, which shows how many answers are loops.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from typing import Any, Literal, Protocol

import numpy as np

from mindprint.adapter.peft_format import adapter_digest
from mindprint.contract import Float64, Generation, Int32, LoadedModel, Sampling
from mindprint.data.render import PreferenceExample, SftExample
from mindprint.data.row_files import Origin
from mindprint.data.tokenizer import Tokenizer
from mindprint.models.likelihoods import CompletionSums, batches_by_length, sum_pairs, sum_texts
from mindprint.plugins.backend import Backend

OnRows = Callable[[int, int], None]
"""Receives the rows that are done, and how many there are. An exception that it raises ends the evaluation."""


MOST_DRAWS = 16
"""The most answers to a prompt that are asked for to get enough words."""

MOST_USUAL = 16
"""The most prompts that are answered with the settings of `generation`, which are mostly greedy."""

_NO_ROW = Origin("an answer", 0)


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
    """One answer, as the backend made it and as text.

    `base_log_prob` is the mean log-prob of its tokens under the base model. It is None for the base model's own
    answers, for greedy answers to questions, and for an answer without tokens.
    """

    generation: Generation
    text: str
    base_log_prob: float | None = None


@dataclass(frozen=True)
class HeldOutTokens:
    """Everything that the models answer or read, as tokens: prompts and questions by topic, pairs and texts."""

    prompts: tuple[tuple[str, Int32], ...]
    questions: tuple[tuple[str, Int32], ...]
    pairs: tuple[PreferenceExample, ...]
    texts: tuple[SftExample, ...]


@dataclass(frozen=True)
class _Known:
    """The responses of one model so far, by the place of the row among those of its kind.

    `answers` has a dict for each draw.
    """

    answers: list[dict[int, GeneratedAnswer]] = field(default_factory=lambda: [{} for _ in range(MOST_DRAWS)])
    usual: dict[int, GeneratedAnswer] = field(default_factory=dict)
    questions: dict[int, GeneratedAnswer] = field(default_factory=dict)
    pairs: dict[int, tuple[float, float]] = field(default_factory=dict)
    texts: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Batch:
    """Rows of one kind that one call of the backend answers or reads, with the adapter or without it."""

    kind: Literal["answers", "usual", "questions", "pairs", "texts"]
    rows: list[int]
    adapter: bool
    draw: int = 0


class Responses:
    """Both models' responses to held-out rows. The base model responds once, the tuned model once for each adapter.

    With `reuse` the responses of an adapter are kept until another one is in memory. The batches are then of one topic
    each, because a row's numbers depend on its neighbours in the batch in their last bits: a run that is resumed must
    get the same figures, whichever topics it has evaluated before.
    """

    def __init__(
        self,
        memory: ModelInMemory,
        tokenizer: Tokenizer,
        rows: HeldOutTokens,
        sampling: Sampling,
        *,
        usual: Sampling,
        draws: int,
        draws_needed: Callable[[Sequence[Sequence[str]]], int],
        reuse: bool,
    ) -> None:
        """Ask for `draws` answers to each prompt, and for as many more as are needed, up to `MOST_DRAWS`.

        `draws_needed` estimates the number from the base model's answers: those to each prompt, one for each draw.
        Where it is more than `MOST_DRAWS`, none is added, because the words would not suffice anyway. `usual` are the
        settings of `generation`.
        """
        self._memory = memory
        self._tokenizer = tokenizer
        self._rows = rows
        self._usual = usual
        # At even distances, so that every topic has its share.
        self._usual_places = range(0, len(rows.prompts), -(-len(rows.prompts) // MOST_USUAL) or 1)
        self.sampling = sampling
        self.draws = draws
        self._draws_needed = draws_needed
        self._reuse = reuse
        self._base = _Known()
        self._tuned = _Known()
        self._adapter = ""

    @property
    def answers_as_usual(self) -> bool:
        """Whether the backend knows the settings of `generation`."""
        capabilities = self._memory.backend.info.capabilities
        samples = self._usual.temperature == 0 or "sampling" in capabilities
        return samples and (not self._usual.filters or "filters" in capabilities)

    def collect(self, topics: Sequence[str], *, answers: bool, usual: bool, on_rows: OnRows) -> None:
        """Have both models read the rows of `topics`, and answer their prompts, as far as they have not yet.

        With `usual` some prompts are also answered with the settings of `generation`, if the backend knows them. The
        base model responds to the rows of every topic: the scale of the voice needs all its answers.
        """
        self._forget_another_adapter()
        if not any(topic in topics for topic in self._topics):
            return
        if self.sampling.temperature > 0 and "sampling" not in self._memory.backend.info.capabilities:
            # Greedy answers to one prompt are all the same.
            self.sampling, self.draws = replace(self.sampling, temperature=0.0), 1
        usual = usual and answers and self.answers_as_usual
        base = list(self._batches(topics, adapter=False, answers=answers, usual=usual))
        tuned = list(self._batches(topics, adapter=True, answers=answers, usual=usual))
        done = self._respond_all(base, 0, _rows_in(base) + _rows_in(tuned), on_rows)
        # The number of draws follows from the base model's answers alone. So it is the same for every adapter, in each
        # process that resumes the run, and whichever topics are evaluated first.
        while answers and self._rows.prompts and self.sampling.temperature > 0:
            # One rank decides for all: on other processors the last bits of an estimate may differ.
            needed = self._memory.backend.ranks.from_first(lambda: self._draws_needed(self._base_texts()))
            if not self.draws < needed <= MOST_DRAWS:
                break
            self.draws = needed
            base = list(self._batches(topics, adapter=False, answers=True, usual=usual))
            tuned = list(self._batches(topics, adapter=True, answers=True, usual=usual))
            done = self._respond_all(base, done, done + _rows_in(base) + _rows_in(tuned), on_rows)
        total = done + _rows_in(tuned)
        if self._respond_all(tuned, done, total, on_rows):
            on_rows(total, total)

    def answers(self, places: Sequence[int], *, adapter: bool) -> tuple[GeneratedAnswer, ...]:
        """Return the answers to the prompts at `places`, which were collected before: every draw, prompt by prompt."""
        known = self._known(adapter=adapter).answers
        return tuple(known[draw][place] for place in places for draw in range(self.draws))

    def usual_answers(self, places: Collection[int], *, adapter: bool) -> tuple[GeneratedAnswer, ...]:
        """Return the answers with the settings of `generation` that were collected, of the prompts at `places`."""
        known = self._known(adapter=adapter).usual
        return tuple(answer for place, answer in known.items() if self._usual_places[place] in places)

    def question_answers(self, places: Sequence[int], *, adapter: bool) -> tuple[GeneratedAnswer, ...]:
        """Return the greedy answers to the questions at `places`, which were collected before."""
        known = self._known(adapter=adapter).questions
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

    def base_sums_of_person(self) -> Float64:
        """Return the base model's summed log-probs of the person's held-out texts: chosen answers, then texts."""
        chosen = [self._base.pairs[row][0] for row in range(len(self._rows.pairs))]
        return np.array([*chosen, *(self._base.texts[row] for row in range(len(self._rows.texts)))], np.float64)

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

    @property
    def _topics(self) -> set[str]:
        rows = self._rows
        asked = {topic for topic, _ in (*rows.prompts, *rows.questions)}
        return asked | {pair.topic for pair in rows.pairs} | {text.topic for text in rows.texts}

    def _base_texts(self) -> list[list[str]]:
        places = range(len(self._rows.prompts))
        return [[self._base.answers[draw][place].text for draw in range(self.draws)] for place in places]

    def _respond_all(self, batches: Sequence[_Batch], done: int, total: int, on_rows: OnRows) -> int:
        """Respond to all batches, and return how many rows are done then. Each rank responds to its share of them."""
        starts = list(accumulate((len(batch.rows) for batch in batches), initial=done))
        divided = self._memory.backend.ranks.divide(
            batches, self._respond, lambda count: on_rows(starts[count], total), _to_values, _from_values
        )
        for batch, responses in divided:
            known = self._known(adapter=batch.adapter)
            of_kind: dict[int, Any] = (
                known.answers[batch.draw] if batch.kind == "answers" else getattr(known, batch.kind)
            )
            of_kind.update(zip(batch.rows, responses, strict=True))
        return starts[-1]

    def _batches(self, topics: Sequence[str], *, adapter: bool, answers: bool, usual: bool) -> Iterator[_Batch]:
        """Yield the batches that are missing of one model."""
        of_pairs = [(pair.topic, len(pair.prompt) + len(pair.chosen)) for pair in self._rows.pairs]
        of_texts = [(text.topic, len(text.tokens)) for text in self._rows.texts]
        of_prompts, of_questions = (
            [(topic, len(tokens)) for topic, tokens in rows] for rows in (self._rows.prompts, self._rows.questions)
        )
        known = self._known(adapter=adapter)
        # Texts and pairs first: they are quick, and an evaluation that is stopped has lost little.
        for rows in self._missing(of_pairs, topics, known.pairs.keys(), adapter=adapter):
            yield _Batch("pairs", rows, adapter)
        for rows in self._missing(of_texts, topics, known.texts.keys(), adapter=adapter):
            yield _Batch("texts", rows, adapter)
        for draw in range(self.draws if answers else 0):
            for rows in self._missing(of_prompts, topics, known.answers[draw].keys(), adapter=adapter):
                yield _Batch("answers", rows, adapter, draw)
        if usual:
            of_usual = [of_prompts[place] for place in self._usual_places]
            for rows in self._missing(of_usual, topics, known.usual.keys(), adapter=adapter):
                yield _Batch("usual", rows, adapter)
        if answers:
            for rows in self._missing(of_questions, topics, known.questions.keys(), adapter=adapter):
                yield _Batch("questions", rows, adapter)

    def _missing(
        self, rows: Sequence[tuple[str, int]], topics: Sequence[str], known: Collection[int], *, adapter: bool
    ) -> Iterator[list[int]]:
        """Yield batches of the rows, given as topic and length, that one of the models has not responded to."""
        wanted = set(topics)
        # The base model does all rows at once, in batches that mix topics: they are the same in every process.
        places = [
            place for place, (topic, _) in enumerate(rows) if place not in known and (topic in wanted or not adapter)
        ]
        apart = adapter and self._reuse
        groups = groupby(sorted(places, key=lambda place: rows[place][0]), lambda place: rows[place][0])
        for group in [list(group) for _, group in groups] if apart else [places]:
            for batch in batches_by_length([rows[place][1] for place in group]):
                yield [group[index] for index in batch]

    def _respond(self, batch: _Batch) -> list[Any]:
        """Return a response for each row of a batch, as `_Known` holds it."""
        backend, model, pad_id = self._memory.backend, self._memory.model, self._tokenizer.pad_id
        if batch.kind == "pairs":
            pairs = [self._rows.pairs[row] for row in batch.rows]
            sums = sum_pairs(backend, model, pairs, pad_id, adapter=batch.adapter)
            return list(zip(sums.chosen, sums.rejected, strict=True))
        if batch.kind == "texts":
            texts = [self._rows.texts[row] for row in batch.rows]
            return list(sum_texts(backend, model, texts, pad_id, adapter=batch.adapter))
        if batch.kind == "questions":
            greedy = replace(self.sampling, temperature=0.0)
            questions = [self._rows.questions[row][1] for row in batch.rows]
            return self._generate(questions, greedy, adapter=batch.adapter)
        if batch.kind == "usual":
            usual = [self._rows.prompts[self._usual_places[row]][1] for row in batch.rows]
            return self._generate(usual, self._usual, adapter=batch.adapter)
        # Backends seed the draws of an answer by this seed and its prompt. So each draw needs a seed for itself.
        seeded = replace(self.sampling, seed=self.sampling.seed + batch.draw)
        prompts = [self._rows.prompts[row][1] for row in batch.rows]
        made = self._generate(prompts, seeded, adapter=batch.adapter)
        return self._with_log_probs(prompts, made) if batch.adapter else made

    def _generate(self, prompts: Sequence[Int32], sampling: Sampling, *, adapter: bool) -> list[GeneratedAnswer]:
        made = self._memory.backend.generate(self._memory.model, prompts, sampling, adapter=adapter)
        # Thoughts are left out here, before anything is scored: they are in nobody's voice.
        return [
            GeneratedAnswer(answer, self._tokenizer.answer_text(answer.tokens.tolist(), prompt.tolist()))
            for answer, prompt in zip(made, prompts, strict=True)
        ]

    def _with_log_probs(self, prompts: Sequence[Int32], made: list[GeneratedAnswer]) -> list[GeneratedAnswer]:
        """Return the answers with the mean log-prob of their tokens under the base model."""
        rows = [row for row, answer in enumerate(made) if len(answer.generation.tokens)]
        examples = [_as_example(prompts[row], made[row].generation.tokens) for row in rows]
        sums = sum_texts(self._memory.backend, self._memory.model, examples, self._tokenizer.pad_id, adapter=False)
        for row, total in zip(rows, sums, strict=True):
            made[row] = replace(made[row], base_log_prob=float(total) / len(made[row].generation.tokens))
        return made


def _to_values(responses: list[Any]) -> list[Any]:
    """Return responses as values that JSON knows, for the other ranks: numbers, or answers by their parts."""
    return [
        [answer.generation.tokens.tolist(), answer.generation.stop_reason, answer.text, answer.base_log_prob]
        if isinstance(answer, GeneratedAnswer)
        else answer
        for answer in responses
    ]


def _from_values(values: list[Any]) -> list[Any]:
    """Return the responses that `_to_values` made values of. An answer has four parts, a pair two."""
    return [
        GeneratedAnswer(Generation(np.array(value[0], np.int32), value[1]), value[2], value[3])
        if isinstance(value, list) and len(value) == 4
        else value
        for value in values
    ]


def _as_example(prompt: Int32, answer: Int32) -> SftExample:
    mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
    return SftExample("", np.concatenate([prompt, answer]).astype(np.int32), mask, _NO_ROW)


def _rows_in(batches: Sequence[_Batch]) -> int:
    return sum(len(batch.rows) for batch in batches)
