"""Continuing prompts, the likeliest token or a seeded draw at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from mindprint.contract import Generation, Int32, OnToken, Sampling
from mindprint.sampling import AnswerRow, TokenChoice
from mindprint_llamacpp.model import Context, LlamaModel

ROWS = 16
"""Prompts that take turns in one context."""


def generate(
    model: LlamaModel,
    prompts: Sequence[Int32],
    samplings: Sequence[Sampling],
    *,
    adapter: bool,
    on_token: OnToken | None = None,
) -> tuple[Generation, ...]:
    """Continue each prompt (int32 `[P]`) with its settings, in order.

    `on_token` gets each token, and ends a row by returning False.

    Rows take turns: each call of llama.cpp reads one token of one row. A batch of several rows would be rounded
    otherwise than each row alone.
    """
    rows = [
        AnswerRow(prompt, sampling, None if on_token is None else partial(on_token, index))
        for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]
    open_rows = [row for row in rows if not row.is_done]
    for start in range(0, len(open_rows), ROWS):
        group = open_rows[start : start + ROWS]
        length = max(len(row.prompt) for row in group) + max(row.sampling.max_new_tokens for row in group)
        # Always the same number of rows for one prompt and for several, because it decides how memory is laid out.
        with model.context(ROWS if len(prompts) > 1 else 1, length, adapter=adapter) as context:
            _continue(context, group)
    return tuple(row.answer() for row in rows)


def _continue(context: Context, rows: Sequence[AnswerRow]) -> None:
    choices = [TokenChoice(row.sampling, row.prompt) for row in rows]

    def step(place: int, tokens: Int32, start: int) -> None:
        for _, logits in context.decode(place, tokens, start, [len(tokens) - 1]):
            rows[place].take(choices[place](logits.astype(np.float64)))

    for place, row in enumerate(rows):
        step(place, row.prompt, 0)
    while open_rows := [(place, row) for place, row in enumerate(rows) if not row.is_done]:
        for place, row in open_rows:
            step(place, np.array([row.last_token], np.int32), len(row.prompt) + len(row.tokens) - 1)
