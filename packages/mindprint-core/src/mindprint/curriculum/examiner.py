"""A run's evaluations of itself: the figures of some topics, and whether training has broken the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from mindprint.config import Config, Level
from mindprint.contract import Measure
from mindprint.curriculum.policy import collapsed
from mindprint.data.split import Split
from mindprint.data.tokenizer import Tokenizer
from mindprint.input_files import typed
from mindprint.models.engine import Engine
from mindprint.runs.records import AnswerRecord, Figures
from mindprint.voice.evaluation import Evaluator
from mindprint.voice.responses import OnRows


@dataclass(frozen=True)
class Examined:
    """Figures of some topics together, and of each by itself where that was asked for.

    `collapse` says in words how training has broken the model. It is empty where the model is sound.
    """

    figures: Figures
    collapse: tuple[str, ...]
    answers: tuple[AnswerRecord, ...]
    topics: Mapping[str, Figures]


class Examiner:
    """Evaluations of whichever adapter is in memory, with at most `evaluation.prompts_per_topic` answers of each topic.

    Where a run evaluates more than its end, an adapter that is evaluated again, as part of a chapter or at the end,
    responds to no row twice.
    """

    def __init__(
        self,
        split: Split,
        config: Config,
        tokenizer: Tokenizer,
        engine: Engine,
        extra: Sequence[Measure] = (),
        people: Sequence[str] = (),
    ) -> None:
        self._evaluator = Evaluator(
            engine,
            tokenizer,
            split.held_out,
            split.train,
            config,
            extra=extra,
            # A run evaluates itself many times, so the configuration can keep each evaluation short.
            most_per_topic=config.evaluation.prompts_per_topic,
            reuse=_evaluates_more_than_its_end(config),
            why_empty=split.nothing_held_out,
            people=people,
        )

    def examine(self, topics: Sequence[str], on_rows: OnRows, *, each: bool = False, loops: bool = False) -> Examined:
        """Evaluate the adapter on the held-out text of `topics` together, and with `each` of every one by itself.

        With `loops` also count those among answers with the settings of `generation`.
        """
        evaluation = self._evaluator.evaluate(topics, each=each, loops=loops, on_rows=on_rows)
        return Examined(
            evaluation.figures,
            collapsed(evaluation.figures, evaluation.tuned_generations, evaluation.base_generations),
            evaluation.answers,
            evaluation.topics,
        )


def examined_to_bytes(examined: Examined) -> bytes:
    """Encode figures and signs of a collapse, by which a run decides. Answers are left out: the first rank has them."""
    topics = {name: asdict(figures) for name, figures in examined.topics.items()}
    return json.dumps([asdict(examined.figures), examined.collapse, topics]).encode()


def examined_from_bytes(content: bytes) -> Examined:
    """Decode what `examined_to_bytes` encoded."""
    figures, collapse, topics = json.loads(content)
    of_topics = {name: typed(Figures, values) for name, values in topics.items()}
    return Examined(typed(Figures, figures), tuple(collapse), (), of_topics)


def _evaluates_more_than_its_end(config: Config) -> bool:
    evaluation, curriculum = config.evaluation, config.curriculum
    reacts = curriculum.roll_back or not isinstance(curriculum.dpo, str)
    levels: tuple[Level, ...] = ("topic", "chapter", "unit")
    return (evaluation.after_stages and reacts) or any(evaluation.happens(level) for level in levels)
