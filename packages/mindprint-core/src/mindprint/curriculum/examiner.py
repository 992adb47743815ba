"""A run evaluates itself: the model at hand answers held-out prompts, and reads held-out pairs and texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np

from mindprint.config import Config
from mindprint.contract import Float64, Generation, Measure, Sampling
from mindprint.curriculum.policy import collapsed
from mindprint.data.render import PreferenceExample, SftExample, render_preferences, render_prompt, render_sft
from mindprint.data.rows import text_of
from mindprint.data.split import Split
from mindprint.data.tokenizer import Tokenizer
from mindprint.models.engine import Engine
from mindprint.models.likelihoods import CompletionSums, sum_pairs, sum_texts
from mindprint.runs.records import AnswerRecord, Figures, Interval
from mindprint.text.words import word_count
from mindprint.voice.answers import asked_of, reference_of, unread
from mindprint.voice.assessment import Judge, fit_judge
from mindprint.voice.concepts import coverage
from mindprint.voice.copying import Copying
from mindprint.voice.evaluation import Measured, Read, measure_pairs, measure_texts
from mindprint.voice.quizzing import evaluate_quiz
from mindprint.voice.scoring import NotScored, VoiceScore

TOGETHER = ""
"""What stands for all topics where others are named."""


@dataclass(frozen=True)
class Examined:
    """What was found of some topics; `answers` as answers.jsonl has them."""

    figures: Figures
    collapse: tuple[str, ...]
    answers: tuple[AnswerRecord, ...]
    topics: Mapping[str, Figures]


class Examiner:
    """Evaluates whatever adapter is in memory. The untuned model answers and reads once, and the scale is fitted once.

    All generation is greedy, with the run's `generation.max_new_tokens`, so that a resumed run finds the same.
    """

    def __init__(
        self, split: Split, config: Config, tokenizer: Tokenizer, engine: Engine, extra: Sequence[Measure] = ()
    ) -> None:
        self._split = split
        self._config = config
        self._tokenizer = tokenizer
        self._engine = engine
        self._extra = extra
        self._reference = reference_of(split.train)
        limit, held_out = config.evaluation.prompts_per_topic, split.held_out
        self._asked = _first_of_each_topic(unread(asked_of(held_out), self._reference), lambda one: one.topic, limit)
        self._questions = _first_of_each_topic(held_out.questions, lambda one: one.topic, limit)
        pairs = _first_of_each_topic(held_out.pairs, lambda row: row.topic, limit)
        texts = _first_of_each_topic(held_out.texts, lambda row: row.topic, limit)
        self._pairs = render_preferences(pairs, tokenizer, config.data).examples
        self._texts = render_sft(texts, tokenizer, config.data).examples
        # Everything that is asked, in one order: held-out prompts, then questions of quizzes.
        self._prompts = (*(one.prompt for one in self._asked), *(one.question for one in self._questions))
        self._topics = (*(one.topic for one in self._asked), *(one.topic for one in self._questions))

    def examine(self, topics: Sequence[str], *, each: bool = False) -> Examined:
        """Evaluate the adapter that is in memory on the held-out text of `topics` together, and of `each` by itself."""
        places = [place for place, topic in enumerate(self._topics) if topic in topics]
        said = dict(zip(places, self._answers(places, adapter=True), strict=True))
        pairs, texts = self._read_pairs(topics), self._read_texts(topics)
        figures = self._figures(topics, said, pairs.get(TOGETHER), texts.get(TOGETHER))
        prompts = [place for place in places if place < len(self._asked)]
        return Examined(
            figures,
            collapsed(figures, *([side[place].made for place in prompts] for side in (said, self._untuned))),
            tuple(self._record(place, one.text) for place, one in said.items()),
            {t: self._figures([t], self._of(t, said), pairs.get(t), texts.get(t)) for t in topics} if each else {},
        )

    # --- answers -----------------------------------------------------------------------------------------------------

    def _answers(self, places: Sequence[int], *, adapter: bool) -> tuple[_Answer, ...]:
        if not places:
            return ()
        sampling = Sampling(self._config.generation.max_new_tokens, self._tokenizer.stop_token_ids)
        prompts = [render_prompt(self._prompts[p], self._tokenizer, self._config.data.format) for p in places]
        made = self._engine.backend.generate(self._engine.model, prompts, sampling, adapter=adapter)
        return tuple(_Answer(one, self._tokenizer.decode(one.tokens.tolist()).strip()) for one in made)

    @cached_property
    def _untuned(self) -> tuple[_Answer, ...]:
        return self._answers(range(len(self._prompts)), adapter=False)

    @cached_property
    def _judge(self) -> Judge:
        untuned = [one.text for one in self._untuned[: len(self._asked)]]
        person = [one.person for one in self._asked]
        return fit_judge(self._reference, untuned, person, extra=self._extra, seed=self._config.seed)

    def _of(self, topic: str, said: Mapping[int, _Answer]) -> dict[int, _Answer]:
        return {place: one for place, one in said.items() if self._topics[place] == topic}

    def _record(self, place: int, tuned: str) -> AnswerRecord:
        untuned = self._untuned[place].text
        if place < len(self._asked):
            one = self._asked[place]
            return AnswerRecord(one.topic, text_of(one.prompt), one.person, untuned, tuned)
        question = self._questions[place - len(self._asked)]
        missing = coverage(tuned, question.key_concepts).missing if question.key_concepts else ()
        person = question.reference_answers[0]
        return AnswerRecord(question.topic, question.question, person, untuned, tuned, True, missing)

    # --- pairs and texts ---------------------------------------------------------------------------------------------

    @cached_property
    def _untuned_pairs(self) -> CompletionSums:
        return self._sums(self._pairs, adapter=False)

    def _sums(self, pairs: Sequence[PreferenceExample], *, adapter: bool) -> CompletionSums:
        backend, model = self._engine.backend, self._engine.model
        return sum_pairs(backend, model, pairs, self._tokenizer.pad_id, adapter=adapter)

    def _read_pairs(self, topics: Sequence[str]) -> dict[str, Measured]:
        """Held-out pairs as both models read them, by topic, and of all topics together under `TOGETHER`."""
        rows = [row for row, one in enumerate(self._pairs) if one.topic in topics]
        if not rows:
            return {}
        pairs = [self._pairs[row] for row in rows]
        base = self._untuned_pairs.select(rows)
        found = measure_pairs(base, self._sums(pairs, adapter=True), pairs)
        return {TOGETHER: found.overall, **found.topics}

    @cached_property
    def _untuned_texts(self) -> Float64:
        return self._text_sums(self._texts, adapter=False)

    def _text_sums(self, texts: Sequence[SftExample], *, adapter: bool) -> Float64:
        return sum_texts(self._engine.backend, self._engine.model, texts, self._tokenizer.pad_id, adapter=adapter)

    def _read_texts(self, topics: Sequence[str]) -> dict[str, Read]:
        """The same of held-out texts that are no pairs."""
        rows = [row for row, one in enumerate(self._texts) if one.topic in topics]
        if not rows:
            return {}
        texts = [self._texts[row] for row in rows]
        found = measure_texts(self._untuned_texts[rows], self._text_sums(texts, adapter=True), texts)
        return {TOGETHER: found.overall, **found.topics}

    # --- figures -----------------------------------------------------------------------------------------------------

    def _figures(
        self, topics: Sequence[str], said: Mapping[int, _Answer], pairs: Measured | None, texts: Read | None
    ) -> Figures:
        prompts = {place: one for place, one in said.items() if place < len(self._asked)}
        questions = {place: one for place, one in said.items() if place >= len(self._asked)}
        figures = _with_pairs(self._with_voice(Figures(), topics, prompts), pairs)
        return self._with_quiz(self._with_texts(figures, topics, pairs, texts), questions)

    def _with_voice(self, figures: Figures, topics: Sequence[str], said: Mapping[int, _Answer]) -> Figures:
        if not said:
            return _lacking(figures, self._nothing_held_out(topics), "voice", "copy_rate")
        texts = [one.text for one in said.values()]
        assessed = self._judge.assessed(texts, list(said))
        figures = replace(
            figures,
            prompts=len(texts),
            words=word_count(texts),
            stopped=_share(one.made.stop_reason == "stop" for one in said.values()),
            empty=_share(not text for text in texts),
            voice=_interval(assessed.tuned),
            untuned_voice=_interval(assessed.untuned),
            person_voice=_interval(assessed.person),
        )
        scores = {"voice": assessed.tuned, "untuned_voice": assessed.untuned, "person_voice": assessed.person}
        for name, score in scores.items():
            if isinstance(score, NotScored):
                figures = _lacking(figures, score.reason, name)
        return _with_copying(figures, assessed.copying)

    def _with_texts(
        self, figures: Figures, topics: Sequence[str], pairs: Measured | None, texts: Read | None
    ) -> Figures:
        """Perplexity is that of the chosen answers where there are pairs, of held-out texts where there are none."""
        if pairs:
            return figures
        if texts:
            return replace(figures, perplexity=texts.adapter, untuned_perplexity=texts.base)
        return _lacking(figures, self._nothing_held_out(topics), "perplexity")

    def _with_quiz(self, figures: Figures, said: Mapping[int, _Answer]) -> Figures:
        if not said:
            return _lacking(figures, "there is no quiz", "concept_coverage")
        asked = [self._questions[place - len(self._asked)] for place in said]
        untuned = [self._untuned[place].text for place in said]
        found = evaluate_quiz(asked, untuned, [one.text for one in said.values()]).overall
        figures = replace(figures, questions=len(said))
        if isinstance(found.tuned, NotScored):
            return _lacking(figures, found.tuned.reason, "concept_coverage")
        before = None if isinstance(found.untuned, NotScored) else found.untuned
        return replace(figures, concept_coverage=found.tuned, untuned_concept_coverage=before)

    def _nothing_held_out(self, topics: Sequence[str]) -> str:
        reasons = [self._split.nothing_held_out(topic) for topic in topics]
        return next((why for why in reasons if why), "there are no held-out prompts")


@dataclass(frozen=True, eq=False)
class _Answer:
    """An answer as the model made it, and as text."""

    made: Generation
    text: str


def _with_copying(figures: Figures, copying: Copying | NotScored) -> Figures:
    if isinstance(copying, NotScored):
        return _lacking(figures, copying.reason, "copy_rate")
    return replace(
        figures,
        copy_rate=copying.copy_rate,
        person_copy_rate=copying.person_copy_rate,
        longest_copy=copying.longest.words,
        longest_copy_text=copying.longest.text,
        recited=copying.recited,
        self_bleu=copying.self_bleu,
        person_self_bleu=copying.person_self_bleu,
        length=copying.length,
        flagged=copying.flagged,
    )


def _with_pairs(figures: Figures, measured: Measured | None) -> Figures:
    if measured is None:
        return _lacking(figures, "there are no held-out pairs", "preference_accuracy", "preference_margin")
    return replace(
        figures,
        pairs=measured.pairs,
        preference_accuracy=measured.reward_accuracy,
        preference_margin=measured.reward_margin,
        perplexity=measured.adapter.perplexity,
        untuned_perplexity=measured.base.perplexity,
    )


def _lacking(figures: Figures, why: str, *names: str) -> Figures:
    return replace(figures, unmeasured={**figures.unmeasured, **dict.fromkeys(names, why)})


def _interval(score: VoiceScore | NotScored) -> Interval | None:
    return None if isinstance(score, NotScored) else Interval(score.value, score.low, score.high)


def _share(found: Iterator[bool]) -> float:
    return float(np.mean(list(found)))


Row = TypeVar("Row")


def _first_of_each_topic(rows: Sequence[Row], topic: Callable[[Row], str], limit: int) -> tuple[Row, ...]:
    seen: Counter[str] = Counter()
    kept = []
    for row in rows:
        seen[topic(row)] += 1
        if seen[topic(row)] <= limit:
            kept.append(row)
    return tuple(kept)
