"""The measures of a voice, by hand and on a model."""

import math
from pathlib import Path

import numpy as np
import pytest

from mindprint.adapter.initial import initial_adapter
from mindprint.contract import LoadedModel, LoraConfig, ModelSpec, TokenBatch, Update
from mindprint.data.collate import pair_sequences
from mindprint.data.render import PreferenceExample
from mindprint.data.rows import Origin
from mindprint.models.likelihoods import CompletionSums, sum_pairs
from mindprint.plugins.backend import Backend, load_backend
from mindprint.voice.preferences import FEW_PAIRS, ByTopic, CompletionTokens, PairFigures, measure_pairs, pair_figures

TOKENS = CompletionTokens(np.array([4, 2, 2, 2]), np.array([2, 2, 4, 2]))
BASE = CompletionSums(np.array([-8.0, -2, -6, -4]), np.array([-6.0, -4, -8, -4]))
"""Margins −2, 2, 2, 0; a token −2 > −3, −1 > −2, −3 < −2, −2 = −2."""
TUNED = CompletionSums(np.array([-4.0, -2, -6, -2]), np.array([-6.0, -4, -6, -5]))
"""Margins 2, 2, 0, 3; a token −1 > −3, −1 > −2, −3 < −1.5, −1 > −2.5; over the base: 4, 0, −2, 3."""
ALL = np.ones(4, np.bool_)


def test_measures_by_hand() -> None:
    measured = pair_figures(BASE, TUNED, TOKENS, ALL)
    assert (measured.pairs, measured.tokens) == (4, 10)
    assert (measured.base.preference_accuracy, measured.tuned.preference_accuracy) == (0.5, 0.75)
    assert (measured.base.preference_accuracy_per_token, measured.tuned.preference_accuracy_per_token) == (0.5, 0.75)
    assert (measured.base.preference_margin, measured.tuned.preference_margin) == (0.5, 1.75)
    assert measured.base.perplexity == pytest.approx(math.exp(20 / 10))
    assert measured.tuned.perplexity == pytest.approx(math.exp(14 / 10))
    assert (measured.reward_accuracy, measured.reward_margin) == (0.5, 1.25)


def test_measures_of_a_selection() -> None:
    measured = pair_figures(BASE, TUNED, TOKENS, np.array([True, False, False, True]))
    assert (measured.pairs, measured.tokens) == (2, 6)
    assert (measured.base.preference_accuracy, measured.tuned.preference_accuracy) == (0.0, 1.0)
    assert measured.tuned.perplexity == pytest.approx(math.exp(6 / 6))
    assert measured.reward_margin == 3.5


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    hopeless = CompletionSums(np.full(4, -1e4), BASE.rejected)
    assert (
        pair_figures(hopeless, TUNED, CompletionTokens(np.ones(4, int), TOKENS.rejected), ALL).base.perplexity
        == math.inf
    )


def test_few_pairs_are_few() -> None:
    many = CompletionSums(np.zeros(FEW_PAIRS), np.zeros(FEW_PAIRS))
    ones = CompletionTokens(np.ones(FEW_PAIRS, int), np.ones(FEW_PAIRS, int))
    assert not pair_figures(many, many, ones, np.ones(FEW_PAIRS, np.bool_)).few
    assert pair_figures(many, many, ones, np.arange(FEW_PAIRS) > 0).few


def test_on_a_model_that_learns_one_answer(toy: str, toy_model: Path) -> None:
    """Before training base and adapter are one; after it the trained answer is preferred, and only by the adapter."""
    backend = load_backend(toy)
    model = backend.load_model(ModelSpec(str(toy_model), "cpu", "float32"))
    sites = backend.adapter_sites(model)
    config = LoraConfig(4, 8.0, tuple(site.name for site in sites[:2]))
    backend.inject_adapter(model, initial_adapter(sites, config, 0))
    examples = [_example("a", 10), _example("b", 40), _example("a", 70)]
    before = _measured(backend, model, examples)
    assert before.overall.base == before.overall.tuned
    assert before.overall.reward_margin == 0.0

    chosen, _ = pair_sequences(examples, 0)
    for _ in range(30):
        backend.sft_step(model, [chosen], Update(1e-2, chosen.loss_tokens))
    after = _measured(backend, model, examples)
    assert after.overall.base == before.overall.base
    assert after.overall.reward_accuracy == 1.0
    assert after.overall.tuned.perplexity == pytest.approx(_perplexity(backend.log_probs(model, chosen), chosen))
    assert after.overall.tuned.perplexity < 0.5 * after.overall.base.perplexity
    assert list(after.topics) == ["a", "b"]
    assert [measured.pairs for measured in after.topics.values()] == [2, 1]


def _measured(backend: Backend, model: LoadedModel, examples: list[PreferenceExample]) -> ByTopic[PairFigures]:
    base, tuned = (sum_pairs(backend, model, examples, 0, adapter=adapter) for adapter in (False, True))
    return measure_pairs(base, tuned, examples)


def _example(topic: str, first: int) -> PreferenceExample:
    def tokens(*ids: int) -> np.ndarray:
        return np.array(ids, np.int32)

    start = tokens(3, first, first + 1)
    return PreferenceExample(topic, start, tokens(first + 2, 1), tokens(first + 3, first + 4, 1), Origin("x.jsonl", 1))


def _perplexity(log_probs: np.ndarray, batch: TokenBatch) -> float:
    return math.exp(-log_probs.sum(dtype=np.float64) / batch.loss_tokens)
