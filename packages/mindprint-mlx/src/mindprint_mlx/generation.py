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
    samplings: Sequence[Sampling],
    *,
    adapter: bool,
    on_token: OnToken | None = None,
) -> tuple[Generation, ...]:
    """Continue each prompt (int32 `[P]`) with its settings, in order.

    `on_token` gets each token, and ends a row by returning False.
    """
    rows = [
        Row(prompt, sampling, None if on_token is None else partial(on_token, index))
        for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]
    for row in rows:
        if row.sampling.temperature > 0 or row.sampling.repetition_penalty != 1:
            row.choose = TokenChoice(row.sampling, row.prompt)
    open_rows = [row for row in rows if not row.is_done]
    with model.in_use(adapter=adapter):
        for group in _row_groups(open_rows) if model.continues_rows else [[row] for row in open_rows]:
            _continue(model, group, adapter=adapter)
    return tuple(row.answer() for row in rows)


def _row_groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Return which rows continue together: those of like length, which keeps the filling short."""
    by_length = sorted(rows, key=lambda row: len(row.prompt))
    return [by_length[start : start + ROWS] for start in range(0, len(rows), ROWS)]


def _continue(model: MlxModel, rows: Sequence[Row], *, adapter: bool) -> None:
    # The last token of a prompt is left for the first step, so that logits are computed for it alone.
    read = [row.prompt[:-1] for row in rows]
    cache: list[Any] = model.new_cache()
    if len(rows) > 1:
        cache = [*read_together(model.module, cache, read)]
    else:
        known = _fetch(model, rows[0], cache, adapter=adapter)
        if known < len(read[0]):
            model.module(mx.array(read[0][known:])[None], cache=cache)
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
    if len(rows) == 1 and _converses(model, rows[0]):
        _keep(model, rows[0], cache, adapter=adapter)


def _converses(model: MlxModel, row: Row) -> bool:
    """Return whether a row's cache serves the next turn: somebody listens, and it holds keys and values alone."""
    # A frequency that depends on the length of a text would be another one for its beginning.
    return row.tell is not None and model.continues_rows and model.head.rotary_limit is None


def _fetch(model: MlxModel, row: Row, cache: list[Any], *, adapter: bool) -> int:
    """Fill an empty cache with a prompt's beginning, if it is kept. Return the number of tokens that it holds then."""
    kept = model.kept.find(row.prompt, adapter=adapter) if _converses(model, row) else None
    if kept is None:
        return 0
    length, layers = kept
    for layer, (keys, values) in zip(cache, layers, strict=True):
        layer.state = keys[:, :, :length], values[:, :, :length], length
    return length


def _keep(model: MlxModel, row: Row, cache: list[Any], *, adapter: bool) -> None:
    """Keep the keys and values of a prompt and its complete answer for the next turn of the conversation."""
    # Copies, because the cache's arrays have room for more.
    layers = tuple(
        (mx.contiguous(layer.keys[:, :, : layer.offset]), mx.contiguous(layer.values[:, :, : layer.offset]))
        for layer in cache
    )
    mx.eval(layers)
    # The last token of most answers is chosen, and was not read.
    tokens = np.append(row.prompt, np.array(row.tokens, np.int32))[: layers[0][0].shape[2]]
    model.kept.keep(tokens, layers, sum(half.nbytes for layer in layers for half in layer), adapter=adapter)


def _take(logits: mx.array, rows: Sequence[Row]) -> None:
    """Choose the next token of each row from logits `[rows, vocabulary]`."""
    likeliest = np.array(mx.argmax(logits, axis=-1)).tolist()
    # Logits leave the device only if a row needs more than the likeliest token.
    values = to_numpy(logits) if any(row.choose for row in rows) else None
    for place, row in enumerate(rows):
        choose = row.choose
        row.take(likeliest[place] if choose is None or values is None else choose(values[place].astype(np.float64)))
