"""The result of an evaluation, and its tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mindprint.api.results import Result, Source, Table
from mindprint.events import Notice
from mindprint.printing import html_text
from mindprint.reports.advice import MANY_LOOPS, loops_found
from mindprint.reports.phrases import interval
from mindprint.runs.records import Figures
from mindprint.sampling import ENOUGH_PENALTY
from mindprint.voice.assessment import AnswerScores, Assessment
from mindprint.voice.copying import Copying
from mindprint.voice.preferences import ByTopic, PairFigures, TextFigures
from mindprint.voice.quizzing import QuizEvaluation
from mindprint.voice.scoring import NotScored, VoiceScore

PAIRS_HEADER = ("topic", "pairs", "preference accuracy", "per token", "margin", "perplexity", "reward accuracy")
TEXTS_HEADER = ("topic", "texts", "tokens", "perplexity")
DISTANCE_HEADER = (
    "topic",
    "answers",
    "words",
    "base",
    "distance from the base model",
    "copied",
    "longest copy",
    "length",
)
VOICE_HEADER = ("topic", "answers", "words", "base voice", "tuned voice", "copied", "longest copy", "length")
QUIZ_HEADER = ("topic", "questions", "base concepts", "tuned concepts")


@dataclass(frozen=True)
class EvaluateResult(Result):
    """Figures on held-out text, returned by `mindprint.evaluate`. A part that was not measured is None.

    Attributes:
        source: The adapter, its base model, and where they computed.
        pairs: Both models on held-out preference pairs: `pairs.overall.reward_accuracy`, and so on.
        texts: Both models on held-out texts that are not pairs: perplexity.
        voice: The voice of the models' own answers to held-out prompts.
        quiz: The share of key concepts in answers to quiz questions.
        figures: The figures of all topics together, with the keys of evaluations.jsonl.
        topics: The same of each topic by itself.
        not_evaluated: Quiz questions that could not be evaluated, with the reason.
        notices: Messages about the work, in order.
    """

    source: Source
    pairs: ByTopic[PairFigures] | None
    texts: ByTopic[TextFigures] | None
    voice: Assessment | None
    quiz: QuizEvaluation | None
    figures: Figures
    topics: Mapping[str, Figures]
    not_evaluated: tuple[str, ...] = ()
    notices: tuple[Notice, ...] = ()

    def blocks(self) -> Iterator[Table | str]:
        """Yield one table for each kind of held-out text, with a row per topic and one for all."""
        if self.pairs:
            rows = [_pairs_row(*row) for row in [*self.pairs.topics.items(), ("all", self.pairs.overall)]]
            yield Table(PAIRS_HEADER, rows, range(1, len(PAIRS_HEADER)))
        if self.texts:
            rows = [
                (topic, str(read.texts), str(read.tokens), f"{read.base:.1f} → {read.tuned:.1f}")
                for topic, read in [*self.texts.topics.items(), ("all", self.texts.overall)]
            ]
            yield Table(TEXTS_HEADER, rows, range(1, len(TEXTS_HEADER)))
        if self.voice:
            rows = [_voice_row(*row) for row in [*self.voice.topics.items(), ("all", self.voice.overall)]]
            # Without other people's text the same figure has another name, because it says less.
            header = VOICE_HEADER if self.voice.overall.people else DISTANCE_HEADER
            yield Table(header, rows, range(1, len(VOICE_HEADER)))
        if self.quiz:
            rows = [
                (topic, str(covered.questions), _share(covered.base), _share(covered.tuned))
                for topic, covered in [*self.quiz.topics.items(), ("all", self.quiz.overall)]
            ]
            yield Table(QUIZ_HEADER, rows, range(1, len(QUIZ_HEADER)))

    def cautions(self) -> Sequence[str]:
        """Return the limits of these figures: few pairs, no voice score, copied answers, skipped questions."""
        cautions = []
        if self.pairs and self.pairs.overall.few:
            count = self.pairs.overall.pairs
            cautions.append(
                f"only {count} held-out pairs, so that one of them moves an accuracy by {1 / count:.0%}: "
                "read these figures as hints"
            )
        if self.figures.loops is not None and self.figures.loops >= MANY_LOOPS:
            found = loops_found(self.figures.loops, self.figures.base_loops)
            cautions.append(f"{found}: generation.repetition_penalty={ENOUGH_PENALTY} is mostly enough")
        if self.voice:
            overall = self.voice.overall
            if isinstance(overall.tuned, NotScored):
                cautions.append(f"the voice could not be scored: {overall.tuned.reason}")
            # Copying that could not be measured has no flags, hence the default.
            cautions += [f"tuned model: {flag}" for flag in getattr(overall.copying, "flagged", ())]
        return [*cautions, *(f"not evaluated: {problem}" for problem in self.not_evaluated)]

    def to_dict(self) -> dict[str, Any]:
        """Return the source, and the figures of pairs, texts, voice and quiz."""
        parts = {"texts": self.texts, "voice": self.voice, "quiz": self.quiz}
        return {
            **asdict(self.source),
            # Scripts read the figures of pairs at the top level, so the keys are there without pairs too.
            **(asdict(self.pairs) if self.pairs else {"overall": None, "topics": {}}),
            **{name: asdict(part) if part else None for name, part in parts.items()},
            "figures": {
                "overall": _named(self.figures),
                "topics": {topic: _named(figures) for topic, figures in self.topics.items()},
            },
            "not_evaluated": list(self.not_evaluated),
        }

    def _repr_html_(self) -> str:
        heard = [notice.message for notice in self.notices if notice.warning]
        return "\n".join([super()._repr_html_(), *(html_text(message, warning=True) for message in heard)])


def _named(figures: Figures) -> dict[str, Any]:
    """Return figures as JSON, with the name that their `voice` has."""
    return {**asdict(figures), "voice_name": figures.voice_name}


def _pairs_row(topic: str, measured: PairFigures) -> tuple[str, ...]:
    base, tuned = measured.base, measured.tuned
    return (
        topic,
        str(measured.pairs),
        f"{base.preference_accuracy:.0%} → {tuned.preference_accuracy:.0%}",
        f"{base.preference_accuracy_per_token:.0%} → {tuned.preference_accuracy_per_token:.0%}",
        f"{base.preference_margin:+.1f} → {tuned.preference_margin:+.1f}",
        f"{base.perplexity:.1f} → {tuned.perplexity:.1f}",
        f"{measured.reward_accuracy:.0%}",
    )


def _voice_row(topic: str, assessed: AnswerScores) -> tuple[str, ...]:
    tuned, copying = assessed.tuned, assessed.copying
    counts = (str(tuned.texts), str(tuned.words)) if isinstance(tuned, VoiceScore) else ("-", str(tuned.words))
    copied = ("-", "-", "-")
    if isinstance(copying, Copying):
        length = "-" if copying.length is None else f"{copying.length:.2f}"
        copied = (f"{copying.copy_rate:.0%}", f"{copying.longest.words} words", length)
    return (topic, *counts, _shown_interval(assessed.base), _shown_interval(tuned), *copied)


def _shown_interval(score: VoiceScore | NotScored) -> str:
    return "not scored" if isinstance(score, NotScored) else interval(score)


def _share(share: float | NotScored) -> str:
    return f"{share:.0%}" if isinstance(share, float) else share.reason
