"""The next token of an answer, chosen from logits: the definition, for backends that choose with NumPy.

From the same logits every backend must choose the same token. A backend that chooses on a device follows this
definition (`tests/parity/test_draws.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Float64, Generation, Int32, Sampling

ENOUGH_PENALTY = 1.1
"""A repetition penalty that keeps greedy answers of small models out of loops. `benchmarks/loops.py` measures it."""

LIKELY = 1024
"""Tokens that a draw looks at first."""


@dataclass
class AnswerRow:
    """A prompt and the tokens of its answer so far.

    Args:
        prompt: int32 `[P]`.
        sampling: The settings of the answer, which say when it ends.
        tell: Gets each token, and ends the answer by returning False. None if nobody listens.
    """

    prompt: Int32
    sampling: Sampling
    tell: Callable[[int], bool | None] | None = None
    tokens: list[int] = field(default_factory=list)
    stopped: bool = False

    @property
    def last_token(self) -> int:
        """The token that the next one follows."""
        return self.tokens[-1] if self.tokens else int(self.prompt[-1])

    @property
    def is_done(self) -> bool:
        """Whether the answer is complete."""
        return self.stopped or len(self.tokens) >= self.sampling.max_new_tokens

    def take(self, token: int) -> None:
        """Append a token, or stop at it. A complete answer takes none."""
        if self.is_done:
            return
        if token in self.sampling.stop_token_ids:
            self.stopped = True
        else:
            self.tokens.append(token)
            self.stopped = self.tell is not None and self.tell(token) is False

    def answer(self) -> Generation:
        """Return the answer as a backend returns it."""
        return Generation(np.array(self.tokens, np.int32), "stop" if self.stopped else "length")


class TokenChoice:
    """The choices of one answer. It remembers the tokens so far, and takes its random numbers one by one."""

    def __init__(self, sampling: Sampling, prompt: Int32) -> None:
        """Begin an answer to a prompt, int32 `[P]`."""
        self._sampling = sampling
        self._generator = token_generator(sampling, prompt)
        self._seen = set(prompt.tolist())

    def __call__(self, logits: Float64) -> int:
        """Return the next token for logits `[vocabulary]`."""
        sampling = self._sampling
        if sampling.repetition_penalty != 1:
            logits = penalised(logits, np.fromiter(self._seen, np.int64), sampling.repetition_penalty)
        greedy = sampling.temperature == 0
        token = int(logits.argmax()) if greedy else draw_token(logits, sampling, self._generator.random())
        self._seen.add(token)
        return token


def token_generator(sampling: Sampling, prompt: Int32) -> np.random.Generator:
    """Return the random numbers of one answer. They follow from the seed and its prompt, and not from neighbours."""
    seeds = np.random.SeedSequence([sampling.seed, *map(int, prompt)])
    return np.random.Generator(np.random.Philox(seeds))


def penalised(logits: Float64, seen: NDArray[np.int64], penalty: float) -> Float64:
    """Return logits `[vocabulary]` in which tokens that were seen, int64 `[seen]`, are less likely.

    The rule is that of transformers, mlx-lm and llama.cpp: a logit above 0 is divided, and one below is multiplied.
    """
    changed = logits.copy()
    values = changed[seen]
    changed[seen] = np.where(values > 0, values / penalty, values * penalty)
    return changed


def draw_token(logits: Float64, sampling: Sampling, uniform: float) -> int:
    """Return the token for a uniform number in [0, 1), for logits `[vocabulary]` at a temperature above 0.

    Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751): the fewest most likely tokens that together reach
    `top_p`, of the `top_k` likeliest, none of them less likely than `min_p` times the likeliest. Equally likely tokens
    are taken in the order of their ids.
    """
    every = np.exp((logits - logits.max()) / sampling.temperature)
    every /= every.sum()
    # To sort a whole vocabulary takes longer than to run a small model. The likeliest tokens nearly always suffice.
    # They are sorted by id first, so that equally likely ones come in the same order as in a full sort.
    ids = np.sort(np.argpartition(-every, LIKELY)[:LIKELY]) if len(every) > LIKELY else np.arange(len(every))
    enough = sampling.top_k <= LIKELY if sampling.top_k else every[ids].sum() >= sampling.top_p
    if not enough:
        ids = np.arange(len(every))
    order = ids[np.argsort(-every[ids], kind="stable")]
    total = 1.0
    if sampling.top_k:
        order = order[: sampling.top_k]
        total = every[order].sum()
    probabilities = every[order]
    # A token is kept if those before it do not reach `top_p` yet: the first is kept whatever the settings are.
    before = np.cumsum(probabilities) - probabilities
    kept = (before < sampling.top_p * total) & (probabilities >= sampling.min_p * probabilities[0])
    kept[0] = True
    reached = np.cumsum(np.where(kept, probabilities, 0.0))
    index = np.searchsorted(reached, uniform * reached[-1], side="right")
    return int(order[min(int(index), len(order) - 1)])
