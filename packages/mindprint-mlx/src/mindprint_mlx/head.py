"""The computation that a model does after its last hidden state, as a separate function.

The model is called in two halves. First its body alone, which gives hidden states. Then the whole model, with its body
replaced by an object that returns the hidden states of the chosen positions. Only the head then runs, tied or not, with
whatever scaling or soft-capping the class applies after it. No family is special-cased, and loading a model measures
that this holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx import nn

from mindprint.errors import ModelError
from mindprint.layouts import RotaryLimit
from mindprint_mlx.rope import read_rotary_limit

BODIES = ("model", "transformer", "backbone")
"""The attributes under which mlx-lm's classes keep everything but the head."""

PROBE = ((0, 1, 2, 3), (0, 1, 2, 4))
"""Two rows that differ in their last token alone."""

AGREEMENT = 1e-2
"""Relative distance of logits that rounding may explain: a head that does not split is off by far more, or fails."""


class _Returning:
    """A model's body, except that every call returns the given hidden states."""

    def __init__(self, body: nn.Module, hidden: mx.array) -> None:
        self._body = body
        self._hidden = hidden

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


@dataclass(frozen=True)
class Head:
    """A model split in two, at the attribute `body`, which is None where the class cannot be split.

    `rotary_limit` is set where the body depends on the length of its input.
    """

    module: nn.Module
    vocabulary: int
    body: str | None = None
    rotary_limit: RotaryLimit | None = None

    def states(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Return the body's hidden states for tokens `[rows, T]`, flat `[rows * T, ...]`, or logits if not split."""
        out: mx.array = self.module(tokens, cache) if self.body is None else self.module[self.body](tokens, cache)
        return out.reshape(-1, out.shape[-1])

    def logits(self, states: mx.array) -> mx.array:
        """Return the logits `[n, vocabulary]` of chosen states `[n, ...]`."""
        if self.body is None:
            return states
        with self._body_returning(states[None]):
            logits: mx.array = self.module(mx.zeros((1, len(states)), mx.int32))
        return logits[0]

    @contextmanager
    def _body_returning(self, hidden: mx.array) -> Iterator[None]:
        # A module is a dict of its parts. Setting an attribute would go through its own `__setattr__`.
        body = self.module[self.body]
        dict.__setitem__(self.module, self.body, _Returning(body, hidden))
        try:
            yield
        finally:
            dict.__setitem__(self.module, self.body, body)

    def agrees(self, tokens: mx.array, whole: mx.array) -> bool:
        """Return whether the two halves compute the logits of the whole model."""
        try:
            return _agree(self.logits(self.states(tokens)), whole.reshape(-1, whole.shape[-1]))
        except Exception:  # noqa: BLE001  a class that cannot be called in halves may fail in any way
            return False


def read_head(module: nn.Module) -> Head:
    """Split the model if its two halves compute the logits that it computes as a whole, on a few tokens.

    Raises:
        ModelError: If the model cannot run, or lets a token see those after it: padded rows would then be wrong.
    """
    tokens = mx.array(PROBE)
    try:
        whole = module(tokens)
        mx.eval(whole)
    except (Exception, SystemExit) as error:
        raise ModelError(f"mlx-lm's class cannot run as it was built here ({error})") from error
    # Tokens before the last must not notice that the last is another one.
    if not _agree(whole[0, :-1], whole[1, :-1]):
        raise ModelError("in this model a token sees what follows it; only causal language models can be trained")
    whole_head = Head(module, whole.shape[-1], rotary_limit=read_rotary_limit(module))
    split = [replace(whole_head, body=name) for name in BODIES if isinstance(getattr(module, name, None), nn.Module)]
    return next((head for head in split if head.agrees(tokens, whole)), whole_head)


def _agree(values: mx.array, expected: mx.array) -> bool:
    if values.shape != expected.shape:
        return False
    difference = values.astype(mx.float32) - expected.astype(mx.float32)
    return bool((mx.linalg.norm(difference) <= AGREEMENT * mx.linalg.norm(expected.astype(mx.float32))).item())
