"""The evaluation of an adapter on held-out text: one definition for a run that evaluates itself and for `eval`.

Both models, the base model and the tuned model, read held-out pairs and texts, and answer held-out prompts and the
questions of quizzes. All figures come from here, so that the same figure means the same thing wherever it is printed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np

from mindprint.config import Config
from mindprint.contract import Generation, Measure, Sampling
from mindprint.data.render import render_preferences, render_prompt, render_sft
from mindprint.data.rows import Rows, text_of
from mindprint.data.split import HeldOut
from mindprint.data.tokenizer import Tokenizer
from mindprint.runs.records import AnswerRecord, Figures, Interval
from mindprint.text.ngrams import is_loop
from mindprint.text.words import unspaced_share, word_count, words
from mindprint.voice.answers import drop_trained_answers, held_out_prompts, training_voice
from mindprint.voice.assessment import AnswerScores, Assessment, Judge, fit_judge
from mindprint.voice.concepts import coverage
from mindprint.voice.copying import Copying
from mindprint.voice.fluency import FluencyGate, fit_fluency
from mindprint.voice.preferences import ByTopic, PairFigures, TextFigures, measure_pairs, measure_texts
from mindprint.voice.quizzing import ConceptCoverage, QuizEvaluation, evaluate_quiz
from mindprint.voice.responses import MOST_DRAWS, GeneratedAnswer, HeldOutTokens, ModelInMemory, OnRows, Responses
from mindprint.voice.scoring import (
    FOLDS,
    MIN_FITTED_WORDS,
    MIN_SCORED_WORDS,
    NotScored,
    VoiceReference,
    VoiceScore,
)

USUAL_NEW_TOKENS = 128
"""The longest answer where no text of the person shows how long her answers are."""

MOST_NEW_TOKENS = 512
"""The longest answer that follows from the person's rows: the measures cut texts at 500 words."""

LENGTHS_READ = 200
"""Texts of the person, evenly spaced, whose length is counted."""

SHARE_TO_NOTE = 0.1
"""Share of words in scripts without spaces from which a note says how they are counted."""


@dataclass(frozen=True)
class Evaluation:
    """The figures of an evaluation, of all its topics together and of each, with the details that they come from.

    `figures` and `topics` have the keys of evaluations.jsonl. `pairs`, `texts`, `voice` and `quiz` have the details of
    both models. They are None where nothing of the kind is held out. `answers` are the lines of answers.jsonl. `notes`
    say which rows were left out or cut.
    `base_generations` and `tuned_generations` are both models' answers to the held-out prompts, without the quizzes.
    """

    figures: Figures
    topics: Mapping[str, Figures]
    pairs: ByTopic[PairFigures] | None
    texts: ByTopic[TextFigures] | None
    voice: Assessment | None
    quiz: QuizEvaluation | None
    answers: tuple[AnswerRecord, ...] = ()
    notes: tuple[str, ...] = ()
    base_generations: tuple[Generation, ...] = field(default=(), repr=False)
    tuned_generations: tuple[Generation, ...] = field(default=(), repr=False)


def evaluate(
    memory: ModelInMemory,
    tokenizer: Tokenizer,
    held_out: HeldOut,
    train: Rows,
    config: Config,
    *,
    extra: Sequence[Measure] = (),
    answers: bool = True,
    people: Sequence[str] = (),
) -> Evaluation:
    """Evaluate the adapter that is in memory on all held-out text.

    Args:
        memory: The base model with the adapter, on its backend.
        tokenizer: The base model's tokenizer.
        held_out: Pairs, texts and questions that the adapter was not trained on.
        train: The rows that it was trained on: the voice is fitted on them, and copying is searched for in them.
        config: The run's configuration. `voice` says how answers are drawn. `generation` says how those are made among
            which loops are counted. Of it only `max_new_tokens` counts for the others.
        extra: Measures of scorer plugins, shown next to the voice score.
        answers: Let both models answer prompts. Without answers neither voice nor quiz is measured.
        people: Texts of other people, from which the voice is told.

    Returns:
        The figures of all topics together and of each topic, with their details.
    """
    evaluator = Evaluator(memory, tokenizer, held_out, train, config, extra=extra, people=people)
    return evaluator.evaluate(answers=answers, loops=True)


class Evaluator:
    """Evaluations of whichever adapter is in memory, on the same held-out text each time.

    The base model reads and answers once, and the voice is fitted once. Each answer is drawn by numbers that follow
    from `seed` and its prompt, so that a run that is resumed measures the same figures as a run that was never stopped.

    All held-out pairs and texts are read. Reading costs little, and an accuracy of few pairs says little.
    """

    def __init__(
        self,
        memory: ModelInMemory,
        tokenizer: Tokenizer,
        held_out: HeldOut,
        train: Rows,
        config: Config,
        *,
        extra: Sequence[Measure] = (),
        most_per_topic: int | None = None,
        reuse: bool = False,
        why_empty: Callable[[str], str | None] = lambda _: None,
        people: Sequence[str] = (),
    ) -> None:
        """Choose and render the held-out rows. The first `most_per_topic` prompts and questions are answered, or all.

        With `reuse`, an adapter that is evaluated again responds only to rows that it has not seen yet (`Responses`).
        `why_empty` returns the reason why nothing of a topic is held out, if there is one to give. `people` are texts
        of other people.
        """
        self._config = config
        self._extra = extra
        self._why_empty = why_empty
        self._reference = replace(training_voice(train, tokenizer.without_thoughts), people=tuple(people))
        every = tuple(
            replace(prompt, person=tokenizer.without_thoughts(prompt.person)) for prompt in held_out_prompts(held_out)
        )
        fresh = drop_trained_answers(every, self._reference)
        self._dropped = len(every) - len(fresh)
        self._prompts = _first_of_each_topic(fresh, most_per_topic)
        self._questions = _first_of_each_topic(held_out.questions, most_per_topic)
        pairs = render_preferences(held_out.pairs, tokenizer, config.data, held_out=True)
        texts = render_sft(held_out.texts, tokenizer, config.data, held_out=True)
        self._pairs, self._texts = pairs.examples, texts.examples
        own_format = config.data.format
        # Each prompt with its row's own variables for the chat template.
        prompts = [
            (prompt.topic, render_prompt(prompt.prompt, tokenizer, own_format, prompt.variables))
            for prompt in self._prompts
        ]
        questions = [(row.topic, render_prompt(row.question, tokenizer, own_format, "")) for row in self._questions]
        rows = HeldOutTokens(tuple(prompts), tuple(questions), tuple(self._pairs), tuple(self._texts))
        voice = config.voice
        longest = config.generation.max_new_tokens or answer_limit(tokenizer, training_voice(train).own)
        sampling = Sampling(longest, tokenizer.stop_token_ids, voice.temperature, voice.top_p, config.seed)
        self._responses = Responses(
            memory,
            tokenizer,
            rows,
            sampling,
            usual=config.generation.sampling(tokenizer.stop_token_ids, config.seed),
            # Greedy answers to one prompt are all the same.
            draws=voice.answers_per_prompt if voice.temperature > 0 else 1,
            draws_needed=self._draws_needed,
            reuse=reuse,
        )
        of_rows = (note for part in (pairs, texts) if part.examples for note in (*part.warnings, *part.notes))
        self.notes = (*of_rows, *_notes_on_prompts(len(every), self._dropped), *_notes_on_words(self._reference))

    @property
    def topics(self) -> tuple[str, ...]:
        """Return the topics of which anything is held out."""
        kinds: tuple[Sequence[_OfTopic], ...] = (self._prompts, self._questions, self._pairs, self._texts)
        return tuple(dict.fromkeys(row.topic for rows in kinds for row in rows))

    def evaluate(
        self,
        topics: Sequence[str] | None = None,
        *,
        each: bool = True,
        answers: bool = True,
        loops: bool = False,
        on_rows: OnRows = lambda done, total: None,  # noqa: ARG005 (named for the type)
    ) -> Evaluation:
        """Evaluate the adapter that is in memory on the held-out text of `topics`, or of all topics.

        With `each` every topic is also scored by itself. Without `answers` the models read, and answer nothing. With
        `loops` some prompts are also answered with the settings of `generation`, and the loops among them are counted.
        `on_rows` receives how many rows have been answered or read, and how many there are.
        """
        topics = self.topics if topics is None else topics
        prompts = [place for place, prompt in enumerate(self._prompts) if prompt.topic in topics]
        questions = [place for place, question in enumerate(self._questions) if question.topic in topics]
        if not answers:
            prompts, questions = [], []
        self._responses.collect(topics, answers=answers, usual=loops, on_rows=on_rows)
        # Answers are kept by the place of their prompt, because the base model's answers and the judge use it too.
        prompt_answers = self._answers(prompts)
        answered = self._responses.question_answers(questions, adapter=True)
        question_answers = dict(zip(questions, answered, strict=True))
        pairs, texts = self._read_pairs(topics), self._read_texts(topics)
        voice = self._score_voice(topics if each else (), prompt_answers) if answers else None
        quiz = self._score_quiz(question_answers)

        def figures_of(named: Sequence[str], topic: str | None) -> Figures:
            chosen = {place: answer for place, answer in prompt_answers.items() if self._prompts[place].topic in named}
            # The voice needs the count of prompts, and texts give a perplexity only where pairs gave none. So the order
            # of these calls matters.
            figures = self._with_loops(_with_answers(Figures(), list(chosen.values())), chosen)
            figures = _with_voice(figures, _part(voice, topic), self._why_no_answers(named, answers=answers))
            figures = _with_pairs(figures, _part(pairs, topic))
            figures = _with_texts(figures, _part(texts, topic), self._why_nothing(named))
            return _with_quiz(figures, _part(quiz, topic), "no answers were asked for" if not answers else None)

        return Evaluation(
            figures=figures_of(topics, None),
            topics={topic: figures_of([topic], topic) for topic in topics} if each else {},
            pairs=pairs,
            texts=texts,
            voice=voice,
            quiz=quiz,
            answers=self._answer_records(prompt_answers, question_answers),
            notes=(*self.notes, *self._notes_on_sampling()) if answers else self.notes,
            base_generations=_generations(self._responses.answers(list(prompt_answers), adapter=False)),
            tuned_generations=_generations(answer for drawn in prompt_answers.values() for answer in drawn),
        )

    def _notes_on_sampling(self) -> tuple[str, ...]:
        if self._config.voice.temperature == 0 or self._responses.sampling.temperature > 0 or not self._prompts:
            return ()
        return ("the backend does not sample: one greedy answer to each prompt is scored",)

    @cached_property
    def _person_has_too_few_words(self) -> bool:
        """Return whether no number of answers would do: the other texts that a scale needs are missing."""
        others = (*self._reference.background, *self._reference.people)
        return (
            word_count(self._reference.own) < MIN_FITTED_WORDS
            or (bool(others) and word_count(others) < MIN_FITTED_WORDS)
            or word_count([prompt.person for prompt in self._prompts]) < MIN_SCORED_WORDS
        )

    def _draws_needed(self, answers: Sequence[Sequence[str]]) -> int:
        """Return how many answers to each prompt the fit of a voice needs, from the words in those so far."""
        draws, counts = len(answers[0]), [word_count(drawn) for drawn in answers]
        if self._person_has_too_few_words:
            return draws
        if self._reference.background or self._reference.people:
            # The answers are only the floor, and no fit is made on them.
            return math.ceil(draws * MIN_SCORED_WORDS / sum(counts)) if any(counts) else MOST_DRAWS + 1
        # Each half of the prompts is judged by a fit on the base model's answers to the other half. An answer makes a
        # passage at least, and a fit needs passages as well as words.
        halves = [(sum(counts[half::2]), draws * len(counts[half::2])) for half in (0, 1)]
        return max(
            math.ceil(draws * max(MIN_FITTED_WORDS / words, FOLDS / texts)) if words else MOST_DRAWS + 1
            for words, texts in halves
        )

    def _answers(self, places: Sequence[int]) -> dict[int, tuple[GeneratedAnswer, ...]]:
        """Return the tuned model's answers by the place of their prompt, one for each draw."""
        return self._by_place(places, adapter=True)

    def _by_place(self, places: Sequence[int], *, adapter: bool) -> dict[int, tuple[GeneratedAnswer, ...]]:
        answers, draws = self._responses.answers(places, adapter=adapter), self._responses.draws
        return {place: answers[index * draws : (index + 1) * draws] for index, place in enumerate(places)}

    @cached_property
    def _judge(self) -> Judge:
        # All prompts calibrate the scale, also those of other topics. So all evaluations of a run have one scale.
        base = [answer.text for answer in self._responses.answers(range(len(self._prompts)), adapter=False)]
        person = [prompt.person for prompt in self._prompts]
        return fit_judge(
            self._reference, base, person, extra=self._extra, seed=self._config.seed, draws=self._responses.draws
        )

    @cached_property
    def _fluency(self) -> FluencyGate | None:
        # The person's held-out texts were read by the base model anyway.
        sums = self._responses.base_sums_of_person()
        tokens = [len(pair.chosen) for pair in self._pairs] + [int(text.loss_mask.sum()) for text in self._texts]
        return fit_fluency(sums / np.array(tokens)) if len(sums) else None

    def _score_voice(
        self, topics: Sequence[str], answers: Mapping[int, tuple[GeneratedAnswer, ...]]
    ) -> Assessment | None:
        # If every prompt was dropped as trained, the assessment is made nevertheless. Its scores then say why there is
        # no number.
        if not answers and (self._prompts or not self._dropped):
            return None

        def scores(places: Sequence[int]) -> AnswerScores:
            drawn = [answer for place in places for answer in answers[place]]
            reasons = [self._fluency.reason(answer.base_log_prob) if self._fluency else None for answer in drawn]
            return self._judge.score_answers([answer.text for answer in drawn], places, reasons)

        by_topic = {topic: [place for place in answers if self._prompts[place].topic == topic] for topic in topics}
        return Assessment(
            scores(list(answers)), {topic: scores(places) for topic, places in by_topic.items() if places}
        )

    def _with_loops(self, figures: Figures, places: Collection[int]) -> Figures:
        base, tuned = (
            _share_of_loops(self._responses.usual_answers(places, adapter=adapter)) for adapter in (False, True)
        )
        return replace(figures, loops=tuned, base_loops=base)

    def _score_quiz(self, answers: Mapping[int, GeneratedAnswer]) -> QuizEvaluation | None:
        if not answers:
            return None
        base = self._responses.question_answers(list(answers), adapter=False)
        return evaluate_quiz(
            [self._questions[place] for place in answers],
            [answer.text for answer in base],
            [answer.text for answer in answers.values()],
        )

    def _answer_records(
        self, prompts: Mapping[int, tuple[GeneratedAnswer, ...]], questions: Mapping[int, GeneratedAnswer]
    ) -> tuple[AnswerRecord, ...]:
        """Return a line for each draw of each prompt, the first draws of all prompts first, and for each question."""
        records = []
        base_answers = self._by_place(list(prompts), adapter=False)
        for draw in range(self._responses.draws):
            for place, drawn in prompts.items():
                prompt, base, tuned = self._prompts[place], base_answers[place][draw], drawn[draw]
                records.append(
                    AnswerRecord(
                        prompt.topic,
                        text_of(prompt.prompt),
                        prompt.person,
                        base.text,
                        tuned.text,
                        cut=_cut(base, tuned),
                        draw=draw,
                    )
                )
        base_by_question = self._responses.question_answers(list(questions), adapter=False)
        for (place, answer), base in zip(questions.items(), base_by_question, strict=True):
            question = self._questions[place]
            concepts = question.key_concepts
            records.append(
                AnswerRecord(
                    question.topic,
                    question.question,
                    question.reference_answers[0],
                    base.text,
                    answer.text,
                    quiz=True,
                    missing=coverage(answer.text, concepts).missing if concepts else (),
                    cut=_cut(base, answer),
                )
            )
        return tuple(records)

    def _read_pairs(self, topics: Sequence[str]) -> ByTopic[PairFigures] | None:
        rows = [row for row, pair in enumerate(self._pairs) if pair.topic in topics]
        if not rows:
            return None
        pairs = [self._pairs[row] for row in rows]
        base, tuned = (self._responses.pair_sums(rows, adapter=adapter) for adapter in (False, True))
        return measure_pairs(base, tuned, pairs)

    def _read_texts(self, topics: Sequence[str]) -> ByTopic[TextFigures] | None:
        rows = [row for row, text in enumerate(self._texts) if text.topic in topics]
        if not rows:
            return None
        texts = [self._texts[row] for row in rows]
        base, tuned = (self._responses.text_sums(rows, adapter=adapter) for adapter in (False, True))
        return measure_texts(base, tuned, texts)

    def _why_nothing(self, topics: Sequence[str]) -> str:
        reasons = (self._why_empty(topic) for topic in topics)
        return next((reason for reason in reasons if reason), "there are no held-out prompts")

    def _why_no_answers(self, topics: Sequence[str], *, answers: bool) -> str:
        return self._why_nothing(topics) if answers else "no answers were asked for"


PartT_co = TypeVar("PartT_co", covariant=True)


# `Assessment`, `ByTopic` and `QuizEvaluation` have these two properties in common, and no base class.
class _Divided(Protocol[PartT_co]):
    @property
    def overall(self) -> PartT_co: ...

    @property
    def topics(self) -> Mapping[str, PartT_co]: ...


def _part(divided: _Divided[PartT_co] | None, topic: str | None) -> PartT_co | None:
    """Return the figures of one topic, or of all together where `topic` is None."""
    if divided is None:
        return None
    return divided.overall if topic is None else divided.topics.get(topic)


def answer_limit(tokenizer: Tokenizer, own: Sequence[str]) -> int:
    """Return the tokens that 95 % of the person's texts need, with the token that ends them."""
    if not own:
        return USUAL_NEW_TOKENS
    read = [own[index] for index in range(0, len(own), -(-len(own) // LENGTHS_READ))]
    # Every tokenizer may add a BOS, which then counts for the end of the turn. `higher` is the length of some text.
    lengths = [len(ids) + 1 for ids in tokenizer.encode_all(read)]
    return min(int(np.quantile(lengths, 0.95, method="higher")), MOST_NEW_TOKENS)


def _generations(answers: Iterable[GeneratedAnswer]) -> tuple[Generation, ...]:
    return tuple(answer.generation for answer in answers)


def _with_answers(figures: Figures, drawn: Sequence[Sequence[GeneratedAnswer]]) -> Figures:
    """Set the figures of the answers to each prompt: `drawn` has those of one prompt together."""
    answers = [answer for prompt in drawn for answer in prompt]
    if not answers:
        return figures
    return replace(
        figures,
        prompts=len(drawn),
        answers_per_prompt=len(answers) // len(drawn),
        words=word_count([answer.text for answer in answers]),
        stopped=_share(answer.generation.stop_reason == "stop" for answer in answers),
        empty=_share(not answer.text for answer in answers),
    )


def _with_voice(figures: Figures, scores: AnswerScores | None, why_none: str) -> Figures:
    if scores is None or not figures.prompts:
        return _unmeasured(figures, why_none, "voice", "copy_rate")
    figures = replace(
        figures,
        voice=_interval(scores.tuned),
        base_voice=_interval(scores.base),
        person_voice=_interval(scores.person),
        people_voice=None if scores.people is None else _interval(scores.people),
        no_text={} if isinstance(scores.tuned, NotScored) else scores.tuned.failed,
        base_no_text={} if isinstance(scores.base, NotScored) else scores.base.failed,
    )
    for name, score in {"voice": scores.tuned, "base_voice": scores.base, "person_voice": scores.person}.items():
        if isinstance(score, NotScored):
            figures = _unmeasured(figures, score.reason, name)
    return _with_copying(figures, scores.copying)


def _with_copying(figures: Figures, copying: Copying | NotScored) -> Figures:
    if isinstance(copying, NotScored):
        return _unmeasured(figures, copying.reason, "copy_rate")
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


def _with_pairs(figures: Figures, pairs: PairFigures | None) -> Figures:
    if pairs is None:
        return _unmeasured(figures, "there are no held-out pairs", "reward_accuracy", "reward_margin")
    return replace(
        figures,
        pairs=pairs.pairs,
        reward_accuracy=pairs.reward_accuracy,
        reward_margin=pairs.reward_margin,
        perplexity=pairs.tuned.perplexity,
        base_perplexity=pairs.base.perplexity,
    )


def _with_texts(figures: Figures, texts: TextFigures | None, why_none: str) -> Figures:
    """Set the perplexity of held-out texts, unless the pairs' chosen answers have given one already."""
    if figures.pairs:
        return figures
    if texts is None:
        return _unmeasured(figures, why_none, "perplexity")
    return replace(figures, perplexity=texts.tuned, base_perplexity=texts.base)


def _with_quiz(figures: Figures, quiz: ConceptCoverage | None, why_none: str | None) -> Figures:
    if quiz is None:
        return _unmeasured(figures, why_none or "there is no quiz", "concept_coverage")
    figures = replace(figures, questions=quiz.questions)
    if isinstance(quiz.tuned, NotScored):
        return _unmeasured(figures, quiz.tuned.reason, "concept_coverage")
    # The base model's coverage is only shown for comparison, so it needs no reason where it is missing.
    base = None if isinstance(quiz.base, NotScored) else quiz.base
    return replace(figures, concept_coverage=quiz.tuned, base_concept_coverage=base)


def _unmeasured(figures: Figures, why: str, *names: str) -> Figures:
    return replace(figures, unmeasured={**figures.unmeasured, **dict.fromkeys(names, why)})


def _interval(score: VoiceScore | NotScored) -> Interval | None:
    return None if isinstance(score, NotScored) else Interval(score.value, score.low, score.high)


def _cut(base: GeneratedAnswer, tuned: GeneratedAnswer) -> tuple[str, ...]:
    """Return the models whose answer did not end by itself."""
    sides = {"base": base, "tuned": tuned}
    return tuple(name for name, answer in sides.items() if answer.generation.stop_reason == "length")


def _share_of_loops(answers: Sequence[GeneratedAnswer]) -> float | None:
    return _share(is_loop(words(answer.text)) for answer in answers) if answers else None


def _share(facts: Iterable[bool]) -> float:
    return float(np.mean(list(facts)))


def _notes_on_prompts(every: int, dropped: int) -> tuple[str, ...]:
    if not every:
        return ("no held-out row has a prompt to answer: the voice is not scored",)
    return (f"{dropped} held-out rows are also in the training data: not scored",) if dropped else ()


def _notes_on_words(reference: VoiceReference) -> tuple[str, ...]:
    if unspaced_share(reference.own) < SHARE_TO_NOTE:
        return ()
    return ("the training text has no spaces between words, so the voice counts letters and signs as words",)


class _OfTopic(Protocol):
    @property
    def topic(self) -> str: ...


Row = TypeVar("Row", bound=_OfTopic)


def _first_of_each_topic(rows: Sequence[Row], most: int | None) -> tuple[Row, ...]:
    if most is None:
        return tuple(rows)
    seen: Counter[str] = Counter()
    kept = []
    for row in rows:
        seen[row.topic] += 1
        if seen[row.topic] <= most:
            kept.append(row)
    return tuple(kept)
