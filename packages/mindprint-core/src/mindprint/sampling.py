"""The token that is drawn from logits, as backends that compute on a CPU with NumPy draw it.

From the same logits and the same random number every backend must choose the same token. A backend that draws on a
device follows this definition (`tests/parity/test_draws.py`).
"""

from __future__ import annotations

import numpy as np

from mindprint.contract import Float64, Int32, Sampling

LIKELY = 1024
"""Tokens that a draw looks at first."""


def token_generator(sampling: Sampling, prompt: Int32) -> np.random.Generator:
    """Return the random numbers of one answer. They follow from the seed and its prompt, and not from neighbours."""
    seeds = np.random.SeedSequence([sampling.seed, *map(int, prompt)])
    return np.random.Generator(np.random.Philox(seeds))


def draw_token(logits: Float64, temperature: float, top_p: float, uniform: float) -> int:
    """Return the token for a uniform number in [0, 1), for logits `[vocabulary]`.

    Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751): the fewest most likely tokens that together reach
    `top_p`.
    """
    scaled = (logits - logits.max()) / temperature
    every = np.exp(scaled)
    every /= every.sum()
    # To sort a whole vocabulary takes longer than to run a small model. The likeliest tokens nearly always reach
    # `top_p`. They are sorted by id first, so that equally likely ones come in the same order as in a full sort.
    ids = np.sort(np.argpartition(-every, LIKELY)[:LIKELY]) if len(every) > LIKELY else np.arange(len(every))
    if every[ids].sum() < top_p:
        ids = np.arange(len(every))
    order = ids[np.argsort(-every[ids], kind="stable")]
    probabilities = every[order]
    before = np.cumsum(probabilities) - probabilities
    kept = before < top_p
    kept[0] = True
    reached = np.cumsum(np.where(kept, probabilities, 0.0))
    index = np.searchsorted(reached, uniform * reached[-1], side="right")
    return int(order[min(int(index), len(order) - 1)])
