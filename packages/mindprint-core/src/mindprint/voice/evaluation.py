"""The voice on held-out pairs, before and after: does the model prefer it, and how surprised is it by it?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Bool, Float64, LoadedModel
from mindprint.data.render import PreferenceExample, SftExample
from mindprint.models.likelihoods import CompletionSums, sum_pairs, sum_texts
from mindprint.plugins.backend import Backend

FEW_PAIRS = 30
"""Below this many pairs one pair moves an accuracy by more than 3 points, and the result says so."""


@dataclass(frozen=True)
class Side:
    """One model, base or base with adapter, on a set of pairs.

    `prefers_chosen` is the share of pairs whose chosen answer has the higher summed log-prob. Every token lowers a sum,
    so it favours the shorter answer; `prefers_chosen_per_token` compares mean log-probs instead. `margin` is the mean
    of log p(chosen) − log p(rejected), summed, in nats; `perplexity` is exp(−Σ log p / tokens) of the chosen answers.
    """

    prefers_chosen: float
    prefers_chosen_per_token: float
    margin: float
    perplexity: float


@dataclass(frozen=True)
class Measured:
    """A set of pairs under both models.

    `reward_accuracy` is the share of pairs in which training raised the chosen answer more than the rejected one:
    log-ratio of policy to base, compared (DPO's implicit reward; Rafailov et al. 2023, section 5). `reward_margin` is
    the mean difference of those log-ratios, in nats. `tokens` are the chosen answers'.
    """

    pairs: int
    tokens: int
    base: Side
    adapter: Side
    reward_accuracy: float
    reward_margin: float

    @property
    def few(self) -> bool:
        return self.pairs < FEW_PAIRS


@dataclass(frozen=True)
class Read:
    """Held-out text that is no pair, read by both models: its trained tokens' perplexity, as in `Side`."""

    texts: int
    tokens: int
    base: float
    adapter: float


@dataclass(frozen=True)
class TextEvaluation:
    """All held-out text together, and topic by topic in the order of their first row."""

    overall: Read
    topics: dict[str, Read]


class Tokens(NamedTuple):
    """How many tokens each answer has, `[pairs]`."""

    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]


@dataclass(frozen=True)
class Evaluation:
    """All held-out pairs together, and topic by topic in the order of their first row."""

    overall: Measured
    topics: dict[str, Measured]


def evaluate_heldout(
    backend: Backend, model: LoadedModel, examples: Sequence[PreferenceExample], pad_id: int
) -> Evaluation:
    """Measure held-out pairs with the adapter off and on; `examples` must not be empty."""
    base = sum_pairs(backend, model, examples, pad_id, adapter=False)
    return measure_pairs(base, sum_pairs(backend, model, examples, pad_id, adapter=True), examples)


def measure_pairs(base: CompletionSums, policy: CompletionSums, examples: Sequence[PreferenceExample]) -> Evaluation:
    """The measures from both models' summed log-probs of the same pairs."""
    tokens = Tokens(*(np.array([len(getattr(e, side)) for e in examples]) for side in ("chosen", "rejected")))
    return Evaluation(*_by_topic(examples, lambda rows: measure(base, policy, tokens, rows)))


def evaluate_texts(backend: Backend, model: LoadedModel, examples: Sequence[SftExample], pad_id: int) -> TextEvaluation:
    """Measure held-out SFT rows with the adapter off and on; `examples` must not be empty."""
    base, policy = (sum_texts(backend, model, examples, pad_id, adapter=adapter) for adapter in (False, True))
    return measure_texts(base, policy, examples)


def measure_texts(base: Float64, policy: Float64, examples: Sequence[SftExample]) -> TextEvaluation:
    """The measures from both models' `sum_texts` of the same rows."""
    tokens = np.array([int(example.loss_mask.sum()) for example in examples])

    def read(rows: Bool) -> Read:
        count = int(tokens[rows].sum())
        return Read(int(rows.sum()), count, *(_perplexity(float(side[rows].sum()), count) for side in (base, policy)))

    return TextEvaluation(*_by_topic(examples, read))


Measures = TypeVar("Measures")


def _by_topic(
    examples: Sequence[PreferenceExample] | Sequence[SftExample], measured: Callable[[Bool], Measures]
) -> tuple[Measures, dict[str, Measures]]:
    """What `measured` says of all rows, and of those of each topic in the order of its first."""
    names = np.array([example.topic for example in examples])
    topics = {topic: measured(names == topic) for topic in dict.fromkeys(names.tolist())}
    return measured(np.ones(len(examples), dtype=np.bool_)), topics


def measure(base: CompletionSums, policy: CompletionSums, tokens: Tokens, rows: Bool) -> Measured:
    """The measures over the pairs that `rows` (bool `[pairs]`) selects."""
    base, policy = base.select(rows), policy.select(rows)
    counts = Tokens(tokens.chosen[rows], tokens.rejected[rows])
    gains = (policy.chosen - base.chosen) - (policy.rejected - base.rejected)
    return Measured(
        pairs=int(rows.sum()),
        tokens=int(counts.chosen.sum()),
        base=_side(base, counts),
        adapter=_side(policy, counts),
        reward_accuracy=float((gains > 0).mean()),
        reward_margin=float(gains.mean()),
    )


def _side(sums: CompletionSums, tokens: Tokens) -> Side:
    margins = sums.chosen - sums.rejected
    per_token = sums.chosen / tokens.chosen - sums.rejected / tokens.rejected
    perplexity = _perplexity(float(sums.chosen.sum()), int(tokens.chosen.sum()))
    return Side(float((margins > 0).mean()), float((per_token > 0).mean()), float(margins.mean()), perplexity)


def _perplexity(log_prob: float, tokens: int) -> float:
    """exp(−Σ log p / tokens); infinite where that is beyond a float."""
    try:
        return math.exp(-log_prob / tokens)
    except OverflowError:
        return math.inf
