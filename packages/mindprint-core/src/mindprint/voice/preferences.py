"""Figures of held-out pairs and texts, from the summed log-probs of the base model and of the tuned model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Bool, Float64
from mindprint.data.render import PreferenceExample, SftExample
from mindprint.models.likelihoods import CompletionSums

FEW_PAIRS = 30
"""Below this many pairs one pair moves an accuracy by more than 3 points, and the result says so."""


@dataclass(frozen=True)
class ModelFigures:
    """Figures of one model, base or tuned, on a set of pairs.

    `preference_accuracy` is the share of pairs whose chosen answer has the higher summed log-prob. Every token lowers a
    sum, so it favours the shorter answer. `preference_accuracy_per_token` compares mean log-probs instead.
    `preference_margin` is the mean of log p(chosen) − log p(rejected), summed, in nats. `perplexity` is
    exp(−Σ log p / tokens) of the chosen answers.
    """

    preference_accuracy: float
    preference_accuracy_per_token: float
    preference_margin: float
    perplexity: float


@dataclass(frozen=True)
class PairFigures:
    """Figures of a set of pairs under both models. `tokens` are those of the chosen answers.

    `reward_accuracy` is the share of pairs in which training raised the chosen answer more than the rejected one. It
    compares DPO's implicit rewards, log p_tuned − log p_base, without the factor beta (Rafailov et al. 2023,
    section 5). `reward_margin` is the mean difference of these rewards, in nats.
    """

    pairs: int
    tokens: int
    base: ModelFigures
    tuned: ModelFigures
    reward_accuracy: float
    reward_margin: float

    @property
    def few(self) -> bool:
        """Return whether there are too few pairs to take the accuracies for more than hints."""
        return self.pairs < FEW_PAIRS


@dataclass(frozen=True)
class TextFigures:
    """Perplexities of held-out texts that are not pairs, over their trained tokens, under both models."""

    texts: int
    tokens: int
    base: float
    tuned: float


FiguresT = TypeVar("FiguresT", PairFigures, TextFigures)


@dataclass(frozen=True)
class ByTopic(Generic[FiguresT]):
    """Figures of all rows together, and topic by topic in the order of their first row."""

    overall: FiguresT
    topics: dict[str, FiguresT]


class CompletionTokens(NamedTuple):
    """Token counts of the answers of pairs, `[pairs]`."""

    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]


def measure_pairs(
    base: CompletionSums, tuned: CompletionSums, examples: Sequence[PreferenceExample]
) -> ByTopic[PairFigures]:
    """Return the figures of pairs from both models' summed log-probs of them. `examples` must not be empty."""
    tokens = CompletionTokens(
        np.array([len(example.chosen) for example in examples]),
        np.array([len(example.rejected) for example in examples]),
    )
    return _by_topic(examples, lambda rows: pair_figures(base, tuned, tokens, rows))


def measure_texts(base: Float64, tuned: Float64, examples: Sequence[SftExample]) -> ByTopic[TextFigures]:
    """Return the figures of texts from both models' summed log-probs of them. `examples` must not be empty."""
    tokens = np.array([int(example.loss_mask.sum()) for example in examples])

    def text_figures(rows: Bool) -> TextFigures:
        # One perplexity over all tokens: a mean over texts would give a short text the weight of a long one.
        count = int(tokens[rows].sum())
        base_perplexity, tuned_perplexity = (perplexity(float(sums[rows].sum()), count) for sums in (base, tuned))
        return TextFigures(int(rows.sum()), count, base_perplexity, tuned_perplexity)

    return _by_topic(examples, text_figures)


def pair_figures(base: CompletionSums, tuned: CompletionSums, tokens: CompletionTokens, rows: Bool) -> PairFigures:
    """Return the figures of the pairs that the mask `rows`, `[pairs]`, selects."""
    base, tuned = base.select(rows), tuned.select(rows)
    counts = CompletionTokens(tokens.chosen[rows], tokens.rejected[rows])
    # The factor beta is positive. It would scale a margin and could not change its sign.
    margins = (tuned.chosen - base.chosen) - (tuned.rejected - base.rejected)
    return PairFigures(
        pairs=int(rows.sum()),
        tokens=int(counts.chosen.sum()),
        base=_model_figures(base, counts),
        tuned=_model_figures(tuned, counts),
        # A tie is a miss, so an adapter that changes nothing has an accuracy of 0 and not of 1.
        reward_accuracy=float((margins > 0).mean()),
        reward_margin=float(margins.mean()),
    )


def perplexity(log_prob: float, tokens: int) -> float:
    """Return exp(−Σ log p / tokens), infinite where that is beyond a float."""
    try:
        return math.exp(-log_prob / tokens)
    # `math.exp` raises beyond e^709. A model that training broke must still get its figures.
    except OverflowError:
        return math.inf


def _model_figures(sums: CompletionSums, tokens: CompletionTokens) -> ModelFigures:
    margins = sums.chosen - sums.rejected
    per_token = sums.chosen / tokens.chosen - sums.rejected / tokens.rejected
    return ModelFigures(
        preference_accuracy=float((margins > 0).mean()),
        preference_accuracy_per_token=float((per_token > 0).mean()),
        preference_margin=float(margins.mean()),
        perplexity=perplexity(float(sums.chosen.sum()), int(tokens.chosen.sum())),
    )


def _by_topic(
    examples: Sequence[PreferenceExample] | Sequence[SftExample], measure: Callable[[Bool], FiguresT]
) -> ByTopic[FiguresT]:
    names = np.array([example.topic for example in examples])
    topics = {topic: measure(names == topic) for topic in dict.fromkeys(names.tolist())}
    return ByTopic(measure(np.ones(len(examples), dtype=np.bool_)), topics)
