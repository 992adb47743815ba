"""The LM head on chosen positions only, by the model's own code.

The model is called twice in two halves. First its body alone, which gives hidden states. Then the whole model, with its
body replaced by something that returns the hidden states of the chosen positions: what then runs is the head, tied or
not, with whatever scaling or soft-capping the class applies after it. No family is special-cased.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn

from mindprint.errors import ModelError

BODIES = ("model", "transformer", "backbone")
"""The attributes under which mlx-lm's classes keep everything but the head."""

PROBE = ((0, 1, 2, 3), (0, 1, 2, 4))
AGREEMENT = 1e-2
"""Relative distance of logits, generous to rounding: a head that does not split is off by far more, or fails."""


class _Given:
    """Stands where a model's body was: answers any call with given hidden states, and is the body in all else."""

    def __init__(self, body: nn.Module, hidden: mx.array) -> None:
        self._body = body
        self._hidden = hidden

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


@dataclass(frozen=True)
class Head:
    """How a model's logits at chosen positions are computed. `body` is None where the class cannot be split."""

    module: nn.Module
    vocab_size: int
    body: str | None = None

    @classmethod
    def of(cls, module: nn.Module) -> Head:
        """Split the model if its two halves give the logits that it gives as a whole; tried out on a few tokens.

        Raises `ModelError` if a token sees what follows it: rows padded on the right would then be wrong.
        """
        tokens = mx.array(PROBE)
        try:
            whole = module(tokens)
            mx.eval(whole)
        except Exception as error:
            raise ModelError(f"mlx-lm's class cannot run as it was built here ({error})") from error
        if not _agree(whole[0, :-1], whole[1, :-1]):
            raise ModelError("in this model a token sees what follows it; only causal language models can be trained")
        for name in BODIES:
            split = cls(module, whole.shape[-1], name)
            if isinstance(getattr(module, name, None), nn.Module) and split._agrees(tokens, whole):
                return split
        return cls(module, whole.shape[-1])

    def states(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        """What the body makes of tokens `[rows, T]`, flat `[rows * T, ...]`: hidden states, or logits if not split."""
        out: mx.array = self.module(tokens, cache) if self.body is None else self.module[self.body](tokens, cache)
        return out.reshape(-1, out.shape[-1])

    def logits(self, states: mx.array) -> mx.array:
        """Logits `[n, vocabulary]` of chosen states `[n, ...]`."""
        if self.body is None:
            return states
        with self._given(states[None]):
            logits: mx.array = self.module(mx.zeros((1, len(states)), mx.int32))
        return logits[0]

    @contextmanager
    def _given(self, hidden: mx.array) -> Iterator[None]:
        body = self.module[self.body]
        dict.__setitem__(self.module, self.body, _Given(body, hidden))
        try:
            yield
        finally:
            dict.__setitem__(self.module, self.body, body)

    def _agrees(self, tokens: mx.array, whole: mx.array) -> bool:
        try:
            return _agree(self.logits(self.states(tokens)), whole.reshape(-1, whole.shape[-1]))
        except Exception:  # noqa: BLE001  a class that cannot be called in halves may fail in any way
            return False


def _agree(found: mx.array, wanted: mx.array) -> bool:
    if found.shape != wanted.shape:
        return False
    difference = found.astype(mx.float32) - wanted.astype(mx.float32)
    return bool((mx.linalg.norm(difference) <= AGREEMENT * mx.linalg.norm(wanted.astype(mx.float32))).item())
