"""Sampled tokens: from the same log-probs and the same random number both backends draw the same token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mindprint.contract import Sampling
from mindprint.sampling import draw_token
from mindprint_torch.generation import draw

ROWS = 64


@pytest.mark.parametrize("vocabulary", [40, 5000])  # fewer and more tokens than a draw looks at first
@pytest.mark.parametrize(("temperature", "top_p", "spread"), [(0.8, 0.95, 3.0), (1.0, 1.0, 1.0), (0.7, 0.9, 0.0)])
def test_the_same_draws(vocabulary: int, temperature: float, top_p: float, spread: float) -> None:
    """A spread of 0 has equally likely tokens only: their order decides, and they need the whole vocabulary."""
    rng = np.random.default_rng(vocabulary)
    logits = (spread * rng.standard_normal((ROWS, vocabulary))).astype(np.float32)
    uniform = rng.random(ROWS)
    sampling = Sampling(1, (), temperature, top_p)
    drawn = draw(torch.from_numpy(logits), sampling, torch.from_numpy(uniform[:, None]))[:, 0].tolist()
    alone = [
        draw_token(row.astype(np.float64), temperature, top_p, number)
        for row, number in zip(logits, uniform, strict=True)
    ]
    assert drawn == alone
    assert len(set(drawn)) > ROWS / 4
