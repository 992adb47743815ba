"""Sampled tokens: from the same log-probs and the same random number both backends draw the same token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from mindprint.contract import Sampling
from mindprint.sampling import TokenChoice, draw_token, penalised
from mindprint_torch.generation import TokenChoices, draw
from mindprint_torch.generation import penalised as penalised_torch

ROWS = 64


@pytest.mark.parametrize("vocabulary", [40, 5000])  # fewer and more tokens than a draw looks at first
@pytest.mark.parametrize(
    ("settings", "spread"),
    [
        ({"temperature": 0.8, "top_p": 0.95}, 3.0),
        ({"temperature": 1.0}, 1.0),
        ({"temperature": 0.7, "top_p": 0.9}, 0.0),
        ({"temperature": 1.0, "top_k": 30}, 1.0),
        ({"temperature": 1.0, "top_k": 30, "top_p": 0.7}, 1.0),
        ({"temperature": 1.0, "top_k": 2000}, 0.0),
        ({"temperature": 1.5, "min_p": 0.05}, 2.0),
        ({"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.1}, 1.0),
    ],
)
def test_the_same_draws(vocabulary: int, settings: dict[str, float], spread: float) -> None:
    """A spread of 0 has equally likely tokens only: their order decides, and they need the whole vocabulary."""
    rng = np.random.default_rng(vocabulary)
    logits = (spread * rng.standard_normal((ROWS, vocabulary))).astype(np.float32).astype(np.float64)
    uniform = rng.random(ROWS)
    sampling = Sampling(1, (), **settings)  # type: ignore[arg-type]
    drawn = draw(torch.from_numpy(logits), sampling, torch.from_numpy(uniform[:, None]))[:, 0].tolist()
    alone = [draw_token(row, sampling, number) for row, number in zip(logits, uniform, strict=True)]
    assert drawn == alone
    assert len(set(drawn)) > ROWS / 4


def test_the_same_penalty_as_transformers() -> None:
    """Core's, torch's and transformers' own, which counts filling as text and so has none here."""
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((1, 50))
    seen = np.array([[3, 7, 7, 11]])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.from_numpy(seen), torch.from_numpy(logits))
    marked = torch.zeros(1, 50, dtype=torch.bool)
    marked[0, seen[0]] = True
    assert torch.equal(penalised_torch(torch.from_numpy(logits), marked, 1.3), expected)
    np.testing.assert_array_equal(penalised(logits[0], np.unique(seen), 1.3), expected[0].numpy())


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_same_answers_with_a_penalty(temperature: float) -> None:
    """Two prompts of unlike lengths. The second one is done after three tokens, and the first one continues alone."""
    rng = np.random.default_rng(4)
    prompts = [np.array([1, 2, 3, 4], np.int32), np.array([5, 6], np.int32)]
    sampling = Sampling(6, (), temperature, top_k=5, repetition_penalty=1.4, seed=8)
    on_device, choices = TokenChoices([sampling] * 2, prompts), [TokenChoice(sampling, prompt) for prompt in prompts]
    for place in range(6):
        if place == 3:
            on_device.keep([0])
            choices = choices[:1]
        logits = 2 * rng.standard_normal((len(choices), 12))
        chosen = on_device(torch.from_numpy(logits))
        assert chosen.tolist() == [choose(row) for choose, row in zip(choices, logits, strict=True)]
