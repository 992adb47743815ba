"""Continuing prompts: greedy, or sampled reproducibly.

Prompts are read together, and then continued together, as many rows as there are. A row's numbers do not depend on its
neighbours, except by rounding: matrix products add in an order that depends on the number of rows and on a row's place
among them. Where a class cannot do that (recurrent layers, other caches), every prompt runs alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mindprint.contract import Generation, Int32, OnToken, Sampling
from mindprint.sampling import AnswerRow, TokenChoice
from mindprint_mlx.arrays import to_numpy
from mindprint_mlx.model import MlxModel
from mindprint_mlx.rows import ROWS, read_together


class Row(AnswerRow):
    """A prompt and its answer so far, with the choice of its tokens. `choose` is None for plain greedy decoding."""

    choose: TokenChoice | None = None


def generate(
    model: MlxModel,
    prompts: Sequence[Int32],
    sampling: Sampling,
    *,
    adapter: bool,
    on_token: OnToken | None = None,
) -> tuple[Generation, ...]:
    """Continue each prompt (int32 `[P]`), in order. `on_token` gets each token, and ends a row by returning False."""
    rows = [
        Row(prompt, sampling, None if on_token is None else partial(on_token, index))
        for index, prompt in enumerate(prompts)
    ]
    if sampling.temperature > 0 or sampling.repetition_penalty != 1:
        for row in rows:
            row.choose = TokenChoice(sampling, row.prompt)
    with model.in_use(adapter=adapter):
        for group in _row_groups(rows) if model.continues_rows else [[row] for row in rows]:
            _continue(model, group, sampling)
    return tuple(row.answer() for row in rows)


def _row_groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Return which rows continue together: those of like length, which keeps the filling short."""
    by_length = sorted(rows, key=lambda row: len(row.prompt))
    return [by_length[start : start + ROWS] for start in range(0, len(rows), ROWS)]


def _continue(model: MlxModel, rows: Sequence[Row], sampling: Sampling) -> None:
    if sampling.max_new_tokens == 0:
        return
    # The last token of a prompt is left for the first step, so that logits are computed for it alone.
    read = [row.prompt[:-1] for row in rows]
    cache: list[Any] = model.new_cache()
    if len(rows) > 1:
        cache = [*read_together(model.module, cache, read)]
    elif len(read[0]):
        model.module(mx.array(read[0])[None], cache=cache)
        mx.eval([layer.state for layer in cache])
    running = list(rows)
    while running:
        last = [row.last_token for row in running]
        _take(model.module(mx.array(last)[:, None], cache=cache)[:, -1], running)
        places = [place for place, row in enumerate(running) if not row.is_done]
        # To take rows out costs a copy of all keys and values, so it must save a good part of the work.
        if len(places) > len(running) / 2:
            continue
        running = [running[place] for place in places]
        if running:
            kept = mx.array(places)
            for layer in cache:
                layer.keep(kept)


def _take(logits: mx.array, rows: Sequence[Row]) -> None:
    """Choose the next token of each row from logits `[rows, vocabulary]`."""
    if rows[0].choose is None:
        tokens = np.array(mx.argmax(logits, axis=-1)).tolist()
    else:
        values = to_numpy(logits).astype(np.float64)
        tokens = [row.choose(scores) for row, scores in zip(rows, values, strict=False) if row.choose]
    for row, token in zip(rows, tokens, strict=False):
        row.take(token)
