"""Continuing prompts, the likeliest token or a seeded draw at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mindprint.contract import Generation, Int32, OnToken, Sampling
from mindprint.sampling import TokenChoice
from mindprint_llamacpp.model import Context, LlamaModel

ROWS = 16
"""Prompts that take turns in one context."""


@dataclass
class _Row:
    """A prompt that is being answered."""

    index: int
    prompt: Int32
    choose: TokenChoice
    tokens: list[int] = field(default_factory=list)
    stopped: bool = False


def generate(
    model: LlamaModel,
    prompts: Sequence[Int32],
    sampling: Sampling,
    *,
    adapter: bool,
    on_token: OnToken | None = None,
) -> tuple[Generation, ...]:
    """Continue each prompt (int32 `[P]`), in order. `on_token` gets each token, and ends a row by returning False.

    Rows take turns: each call of llama.cpp reads one token of one row. A batch of several rows would be rounded
    otherwise than each row alone.
    """
    rows = [_Row(index, prompt, TokenChoice(sampling, prompt)) for index, prompt in enumerate(prompts)]
    for start in range(0, len(rows) if sampling.max_new_tokens else 0, ROWS):
        group = rows[start : start + ROWS]
        length = max(len(row.prompt) for row in group) + sampling.max_new_tokens
        # Always the same number of rows for one prompt and for several, because it decides how memory is laid out.
        with model.context(ROWS if len(prompts) > 1 else 1, length, adapter=adapter) as context:
            _continue(context, group, sampling, on_token)
    return tuple(Generation(np.array(row.tokens, np.int32), "stop" if row.stopped else "length") for row in rows)


def _continue(context: Context, rows: Sequence[_Row], sampling: Sampling, on_token: OnToken | None) -> None:
    def step(place: int, row: _Row, tokens: Int32, start: int) -> None:
        for _, logits in context.decode(place, tokens, start, [len(tokens) - 1]):
            _take(row, row.choose(logits.astype(np.float64)), sampling, on_token)

    for place, row in enumerate(rows):
        step(place, row, row.prompt, 0)
    while open_rows := [
        (place, row) for place, row in enumerate(rows) if not row.stopped and len(row.tokens) < sampling.max_new_tokens
    ]:
        for place, row in open_rows:
            last = np.array(row.tokens[-1:], np.int32)
            step(place, row, last, len(row.prompt) + len(row.tokens) - 1)


def _take(row: _Row, token: int, sampling: Sampling, on_token: OnToken | None) -> None:
    if token in sampling.stop_token_ids:
        row.stopped = True
        return
    row.tokens.append(token)
    if on_token is not None and on_token(row.index, token) is False:
        row.stopped = True
