"""A run evaluates itself: the model at hand answers held-out prompts, and reads held-out pairs and texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from mindprint.config import Config
from mindprint.contract import Generation, Sampling
from mindprint.curriculum.policy import collapsed
from mindprint.curriculum.records import AnswerRecord, Figures, Interval
from mindprint.data.render import render_preferences, render_prompt, render_sft
from mindprint.data.rows import Text, text_of
from mindprint.data.split import Split
from mindprint.data.tokenizer import Tokenizer
from mindprint.training.engine import Engine
from mindprint.voice.answers import asked_of, reference_of, unread
from mindprint.voice.assessment import Assessed, Judge, fit_judge
from mindprint.voice.concepts import coverage
from mindprint.voice.copying import Copying
from mindprint.voice.evaluation import Evaluation, Measured, Read, TextEvaluation, evaluate_heldout, evaluate_texts
from mindprint.voice.measures import Measure
from mindprint.voice.quizzing import Covered, evaluate_quiz
from mindprint.voice.scoring import NotScored, VoiceScore


@dataclass(frozen=True)
class Examined:
    """What was found of some topics; `answers` as answers.jsonl has them."""

    figures: Figures
    collapse: tuple[str, ...]
    answers: tuple[AnswerRecord, ...]
    topics: Mapping[str, Figures]


class Examiner:
    """Evaluates whatever adapter is in memory. The untuned model is asked once, and the scale is fitted once.

    All generation is greedy, with the run's `generation.max_new_tokens`, so that a resumed run finds the same.
    """

    def __init__(
        self, split: Split, config: Config, tokenizer: Tokenizer, engine: Engine, extra: Sequence[Measure] = ()
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._engine = engine
        self._extra = extra
        self._reference = reference_of(split.train)
        self._split = split
        limit = config.evaluation.prompts_per_topic
        asked = unread(asked_of(split.held_out), self._reference)
        self._asked = tuple(_first_of_each_topic(asked, lambda one: one.topic, limit))
        self._questions = tuple(_first_of_each_topic(split.held_out.questions, lambda one: one.topic, limit))
        pairs = _first_of_each_topic(split.held_out.pairs, lambda row: row.topic, limit)
        texts = _first_of_each_topic(split.held_out.texts, lambda row: row.topic, limit)
        self._pairs = render_preferences(tuple(pairs), tokenizer, config.data).examples
        self._texts = render_sft(tuple(texts), tokenizer, config.data).examples

    def examine(self, topics: Sequence[str], *, each: bool = False) -> Examined:
        """Evaluate the adapter that is in memory on the held-out text of `topics` together, and of `each` by itself."""
        places = [place for place, one in enumerate(self._asked) if one.topic in topics]
        questions = [place for place, one in enumerate(self._questions) if one.topic in topics]
        prompts = [self._prompts[place] for place in places]
        prompts += [self._prompts[len(self._asked) + place] for place in questions]
        made = self._generated(prompts, adapter=True)
        answers = _Answers(tuple(places), made[: len(places)], tuple(questions), made[len(places) :])
        read = self._read(topics)
        figures = self._figures(topics, answers, read.overall)
        return Examined(
            figures,
            collapsed(figures, answers.made, [self._untuned[place] for place in places]),
            tuple(self._records(answers)),
            {t: self._figures([t], self._of_topic(answers, t), read.of(t)) for t in topics} if each else {},
        )

    # --- answers -----------------------------------------------------------------------------------------------------

    @property
    def _prompts(self) -> tuple[Text, ...]:
        """Everything that is asked: held-out prompts, then questions of quizzes."""
        return (*(one.prompt for one in self._asked), *(one.question for one in self._questions))

    @cached_property
    def _untuned(self) -> tuple[Generation, ...]:
        return self._generated(self._prompts, adapter=False)

    @cached_property
    def _judge(self) -> Judge:
        untuned = [self._text(one) for one in self._untuned[: len(self._asked)]]
        person = [one.person for one in self._asked]
        return fit_judge(self._reference, untuned, person, extra=self._extra, seed=self._config.seed)

    def _generated(self, prompts: Sequence[Text], *, adapter: bool) -> tuple[Generation, ...]:
        if not prompts:
            return ()
        sampling = Sampling(self._config.generation.max_new_tokens, self._tokenizer.stop_token_ids)
        rendered = [render_prompt(prompt, self._tokenizer, self._config.data.format) for prompt in prompts]
        return tuple(self._engine.backend.generate(self._engine.model, rendered, sampling, adapter=adapter))

    def _text(self, made: Generation) -> str:
        return self._tokenizer.decode(made.tokens.tolist()).strip()

    def _records(self, answers: _Answers) -> Iterator[AnswerRecord]:
        for place, made in zip(answers.places, answers.made, strict=True):
            one, untuned = self._asked[place], self._text(self._untuned[place])
            yield AnswerRecord(one.topic, text_of(one.prompt), one.person, untuned, self._text(made))
        for place, made in zip(answers.questions, answers.made_to_questions, strict=True):
            question, untuned = self._questions[place], self._text(self._untuned[len(self._asked) + place])
            tuned = self._text(made)
            missing = coverage(tuned, question.key_concepts).missing if question.key_concepts else ()
            person = question.reference_answers[0]
            yield AnswerRecord(question.topic, question.question, person, untuned, tuned, True, missing)

    def _of_topic(self, answers: _Answers, topic: str) -> _Answers:
        asked = [i for i, place in enumerate(answers.places) if self._asked[place].topic == topic]
        questions = [i for i, place in enumerate(answers.questions) if self._questions[place].topic == topic]
        return _Answers(
            tuple(answers.places[i] for i in asked),
            tuple(answers.made[i] for i in asked),
            tuple(answers.questions[i] for i in questions),
            tuple(answers.made_to_questions[i] for i in questions),
        )

    # --- figures -----------------------------------------------------------------------------------------------------

    def _figures(self, topics: Sequence[str], answers: _Answers, read: _ReadOne) -> Figures:
        found = _Found()
        self._add_voice(found, topics, answers)
        self._add_read(found, topics, read)
        self._add_quiz(found, answers)
        return Figures(**found.values, unmeasured=found.unmeasured)

    def _add_voice(self, found: _Found, topics: Sequence[str], answers: _Answers) -> None:
        texts = [self._text(one) for one in answers.made]
        found.values["prompts"] = len(texts)
        if not texts:
            found.lack(self._nothing_held_out(topics), "voice", "copy_rate")
            return
        assessed = self._judge.assessed(texts, answers.places)
        found.values["words"] = sum(len(text.split()) for text in texts)
        found.values["stopped"] = float(np.mean([one.stop_reason == "stop" for one in answers.made]))
        found.values["empty"] = float(np.mean([not text for text in texts]))
        for name, score in (
            ("voice", assessed.tuned),
            ("untuned_voice", assessed.untuned),
            ("person_voice", assessed.person),
        ):
            found.voice(name, score)
        _add_copying(found, assessed)

    def _read(self, topics: Sequence[str]) -> _Read:
        """Let both models read the held-out pairs of some topics, and their texts that are no pairs."""
        pairs = [one for one in self._pairs if one.topic in topics]
        texts = [one for one in self._texts if one.topic in topics]
        backend, model, pad_id = self._engine.backend, self._engine.model, self._tokenizer.pad_id
        return _Read(
            evaluate_heldout(backend, model, pairs, pad_id) if pairs else None,
            evaluate_texts(backend, model, texts, pad_id) if texts else None,
        )

    def _add_read(self, found: _Found, topics: Sequence[str], read: _ReadOne) -> None:
        """Perplexity is that of the chosen answers where there are pairs, of held-out texts where there are none."""
        if read.pairs:
            _add_measured(found, read.pairs)
            return
        found.lack("there are no held-out pairs", "preference_accuracy", "preference_margin")
        if read.texts:
            found.values |= {"perplexity": read.texts.adapter, "untuned_perplexity": read.texts.base}
        else:
            found.lack(self._nothing_held_out(topics), "perplexity", "perplexity_ratio")

    def _add_quiz(self, found: _Found, answers: _Answers) -> None:
        found.values["questions"] = len(answers.questions)
        if not answers.questions:
            found.lack("there is no quiz", "concept_coverage")
            return
        untuned = [self._text(self._untuned[len(self._asked) + place]) for place in answers.questions]
        tuned = [self._text(one) for one in answers.made_to_questions]
        asked = [self._questions[place] for place in answers.questions]
        _add_covered(found, evaluate_quiz(asked, untuned, tuned).overall)

    def _nothing_held_out(self, topics: Sequence[str]) -> str:
        reasons = [self._split.nothing_held_out(topic) for topic in topics]
        return next((why for why in reasons if why), "there are no held-out prompts")


@dataclass(frozen=True)
class _Answers:
    """The tuned model's answers: to the prompts at `places`, and to the questions at `questions`."""

    places: tuple[int, ...]
    made: tuple[Generation, ...]
    questions: tuple[int, ...]
    made_to_questions: tuple[Generation, ...]


@dataclass(frozen=True)
class _ReadOne:
    """Held-out pairs and texts as both models read them."""

    pairs: Measured | None = None
    texts: Read | None = None


@dataclass(frozen=True)
class _Read:
    """The same of several topics."""

    pairs: Evaluation | None
    texts: TextEvaluation | None

    @property
    def overall(self) -> _ReadOne:
        return _ReadOne(self.pairs.overall if self.pairs else None, self.texts.overall if self.texts else None)

    def of(self, topic: str) -> _ReadOne:
        pairs = self.pairs.topics.get(topic) if self.pairs else None
        return _ReadOne(pairs, self.texts.topics.get(topic) if self.texts else None)


class _Found:
    """Figures as they are gathered."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.unmeasured: dict[str, str] = {}

    def lack(self, why: str, *names: str) -> None:
        self.unmeasured.update(dict.fromkeys(names, why))

    def voice(self, name: str, score: VoiceScore | NotScored) -> None:
        if isinstance(score, NotScored):
            self.lack(score.reason, name)
        else:
            self.values[name] = Interval(score.value, score.low, score.high)


def _add_copying(found: _Found, assessed: Assessed) -> None:
    copying = assessed.copying
    if not isinstance(copying, Copying):
        found.lack(copying.reason, "copy_rate")
        return
    found.values |= {
        "copy_rate": copying.copy_rate,
        "person_copy_rate": copying.person_copy_rate,
        "longest_copy": copying.longest.words,
        "longest_copy_text": copying.longest.text,
        "recited": copying.recited,
        "self_bleu": copying.self_bleu,
        "person_self_bleu": copying.person_self_bleu,
        "length": copying.length,
        "flagged": copying.flagged,
    }


def _add_measured(found: _Found, measured: Measured) -> None:
    found.values |= {
        "pairs": measured.pairs,
        "preference_accuracy": measured.reward_accuracy,
        "preference_margin": measured.reward_margin,
        "perplexity": measured.adapter.perplexity,
        "untuned_perplexity": measured.base.perplexity,
    }


def _add_covered(found: _Found, covered: Covered) -> None:
    for name, share in (("concept_coverage", covered.tuned), ("untuned_concept_coverage", covered.untuned)):
        if isinstance(share, NotScored):
            found.lack(share.reason, name)
        else:
            found.values[name] = share


Row = TypeVar("Row")


def _first_of_each_topic(rows: Sequence[Row], topic: Callable[[Row], str], limit: int) -> Iterator[Row]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[topic(row)] = counts.get(topic(row), 0) + 1
        if counts[topic(row)] <= limit:
            yield row
