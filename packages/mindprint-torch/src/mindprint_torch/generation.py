"""Continuing prompts: greedy, or sampled reproducibly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from mindprint.contract import Generation, Int32, OnToken, Sampling
from mindprint.sampling import LIKELY, AnswerRow, token_generator
from mindprint_torch.adapter import adapter_enabled
from mindprint_torch.decoding import Decoder, RowCache
from mindprint_torch.model import TorchModel

ROWS_AT_ONCE = 32

ROWS_AT_ONCE_CUDA = 64
"""A GPU reads all weights for each token, of however many rows: twice the rows take hardly longer."""

MOST_KEPT = 3 / 4
"""The share of rows that may continue when the others, which are done, are taken out."""

PROBE = ((3, 4, 5, 6, 7), (5, 6, 7))
"""Two prompts of unlike lengths."""


def generate(
    model: TorchModel,
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
        AnswerRow(prompt, sampling, None if on_token is None else partial(on_token, index))
        for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]
    with torch.no_grad(), adapter_enabled(model, enabled=adapter):
        for places in _row_groups(model, rows):
            _continue(model, [rows[place] for place in places], adapter=adapter)
    return tuple(row.answer() for row in rows)


def _row_groups(model: TorchModel, rows: Sequence[AnswerRow]) -> list[list[int]]:
    """Return which prompts are continued together: those of like length, which keeps padding short."""

    prompts = [row.prompt for row in rows]
    limit, together = model.head.rotary_limit, continues_rows(model, prompts)

    def kind(row: int) -> tuple[int, int]:
        """Return a key: prompts of unequal kinds would change one another's numbers."""
        length = len(prompts[row])
        if not together:
            return 0, row
        if limit is None:
            return 0, 0
        start, end = limit.kinds(np.array([length, length + rows[row].sampling.max_new_tokens], np.int32)).tolist()
        # A prompt that crosses the limit on its way does so at its own length, and so may only meet its equals.
        return (start, 0) if start == end else (-1, length)

    open_rows = (row for row in range(len(prompts)) if not rows[row].is_done)
    order = sorted(open_rows, key=lambda row: (kind(row), len(prompts[row])))
    alike = [list(group) for _, group in groupby(order, kind)]
    most = ROWS_AT_ONCE_CUDA if model.device.type == "cuda" else ROWS_AT_ONCE
    return [group[start : start + most] for group in alike for start in range(0, len(group), most)]


def continues_rows(model: TorchModel, prompts: Sequence[Int32]) -> bool:
    """Return whether prompts can be continued together: measured, the first time that it matters."""
    if len(prompts) < 2:
        return True
    if model.continues_rows is None:
        # Recurrent layers may take the filling before a prompt for tokens: RWKV does, whatever the mask says.
        probes = [np.array(tokens, np.int32) % model.head.vocabulary for tokens in PROBE]
        together = _next_logits(model, probes)
        alone = torch.cat([_next_logits(model, [probe]) for probe in probes])
        tolerance = 1e-3 if alone.dtype == torch.float32 else 5e-2
        model.continues_rows = bool((together - alone).abs().max() <= tolerance * alone.abs().max())
    return model.continues_rows


def _next_logits(model: TorchModel, prompts: list[Int32]) -> Tensor:
    """Return the logits of each prompt's second new token, `[rows, vocabulary]`, so that the cache takes part."""
    decoder = Decoder(model, prompts, fill=0)
    return decoder.step(decoder.read().argmax(-1))


def _continue(model: TorchModel, rows: Sequence[AnswerRow], *, adapter: bool) -> None:
    stops = rows[0].sampling.stop_token_ids
    fill = stops[0] if stops else 0
    # Whoever listens is in a conversation, whose next prompt begins with this one and its answer.
    listens = rows[0].tell is not None
    decoder = Decoder(model, [row.prompt for row in rows], fill, adapter=adapter if listens else None)
    choice = TokenChoices([row.sampling for row in rows], [row.prompt for row in rows])
    running, logits = list(rows), decoder.read()
    with decoder.decoding():
        while True:
            tokens = choice(logits)
            for place, (row, token) in enumerate(zip(running, tokens.tolist(), strict=True)):
                was_done = row.is_done
                row.take(token)
                if listens and row.is_done and not was_done:
                    _keep_row(model, row, decoder.row_cache(place), adapter=adapter)
            places = [place for place, row in enumerate(running) if not row.is_done]
            if not places:
                return
            # To take rows out costs a copy of all keys and values, so it must save a part of the work.
            if len(places) <= MOST_KEPT * len(running) and decoder.drops_rows:
                running = [running[place] for place in places]
                tokens = tokens[places]
                decoder.keep(places)
                choice.keep(places)
            logits = decoder.step(tokens)


def _keep_row(model: TorchModel, row: AnswerRow, cache: RowCache | None, *, adapter: bool) -> None:
    """Keep the cache of a prompt and its complete answer for the next turn of the conversation."""
    if cache is not None:
        # The last token of most answers is chosen, and was not read.
        tokens = np.append(row.prompt, np.array(row.tokens, np.int32))[: cache[0][0].shape[2]]
        size = sum(half.nbytes for layer in cache for half in layer)
        model.kept.keep(tokens, cache, size, adapter=adapter)


class TokenChoices:
    """The choices of several answers that are generated together, as `mindprint.sampling.TokenChoice` makes them.

    A row's random numbers come from its seed and its prompt, so that they do not depend on its neighbours. Rows with
    the same settings are chosen for together.
    """

    def __init__(self, samplings: Sequence[Sampling], prompts: Sequence[Int32]) -> None:
        self._prompts = list(prompts)
        self._generators = [token_generator(*row) for row in zip(samplings, prompts, strict=True)]
        # Only these settings decide about a token: a limit, a stop token and a seed are each row's own affair.
        self._ways = [replace(sampling, max_new_tokens=0, stop_token_ids=(), seed=0) for sampling in samplings]
        self._seen: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the next token of each row, int64 `[rows]`, for logits `[rows, vocabulary]`."""
        chosen = logits.argmax(-1)
        ways = dict.fromkeys(way for way in self._ways if way.temperature > 0 or way.repetition_penalty != 1)
        for way in ways:
            places = [place for place, own in enumerate(self._ways) if own == way]
            alone = len(places) == len(self._ways)
            chosen[places] = self._choose(logits if alone else logits[places], way, places)
        if self._seen is not None:
            self._seen.scatter_(1, chosen[:, None], True)
        return chosen

    def _choose(self, logits: Tensor, way: Sampling, places: Sequence[int]) -> Tensor:
        """Return the next token of rows with the same settings, int64 `[rows]`."""
        # In float64 as the definition is, so that the same logits give the same token. MPS has none.
        values = logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)
        if way.repetition_penalty != 1:
            values = penalised(values, self._seen_tokens(values)[list(places)], way.repetition_penalty)
        if way.temperature == 0:
            return values.argmax(-1)
        numbers = [[self._generators[place].random()] for place in places]
        return draw(values, way, torch.tensor(numbers, dtype=values.dtype).to(logits.device))[:, 0]

    def keep(self, places: Sequence[int]) -> None:
        """Keep these rows, and forget the others."""
        self._generators = [self._generators[place] for place in places]
        self._prompts = [self._prompts[place] for place in places]
        self._ways = [self._ways[place] for place in places]
        if self._seen is not None:
            self._seen = self._seen[list(places)]

    def _seen_tokens(self, values: Tensor) -> Tensor:
        """Return which tokens each row has had, bool `[rows, vocabulary]`: those of its prompt and of its answer."""
        if self._seen is None:
            shape = len(self._prompts), values.shape[-1]
            self._seen = torch.zeros(shape, dtype=torch.bool, device=values.device)
            for row, prompt in zip(self._seen, self._prompts, strict=True):
                row[torch.from_numpy(prompt.astype(np.int64)).to(row.device)] = True
        return self._seen


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits `[rows, vocabulary]` in which the tokens that `seen` marks are less likely.

    The definition is `mindprint.sampling.penalised`.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Return the token for each uniform number in [0, 1), int64 `[rows, 1]`, for logits `[rows, vocabulary]`.

    The definition is `mindprint.sampling.draw_token`, here on the device and for all rows at once.
    """
    every = torch.softmax(logits / sampling.temperature, dim=-1)
    # The likeliest first, in the order of their ids, so that equally likely ones come as in a full sort.
    tokens = every.topk(min(LIKELY, every.shape[-1]), dim=-1).indices.sort(dim=-1).values
    if sampling.top_k > LIKELY or (
        not sampling.top_k and bool((every.gather(1, tokens).sum(-1) < sampling.top_p).any())
    ):
        tokens = torch.arange(every.shape[-1], device=every.device).expand_as(every)
    probabilities, order = every.gather(1, tokens).sort(descending=True, stable=True)
    tokens = tokens.gather(1, order)
    total: Tensor | float = 1.0
    if sampling.top_k:
        tokens, probabilities = tokens[:, : sampling.top_k], probabilities[:, : sampling.top_k]
        total = probabilities.sum(-1, keepdim=True)
    # A token is kept if those before it do not reach `top_p` yet: the first is kept whatever the settings are.
    before = probabilities.cumsum(-1) - probabilities
    kept = (before < sampling.top_p * total) & (probabilities >= sampling.min_p * probabilities[:, :1])
    kept[:, 0] = True
    reached = (probabilities * kept).cumsum(-1)
    index = torch.searchsorted(reached, uniform * reached[:, -1:], right=True)
    return tokens.gather(1, index.clamp(max=tokens.shape[1] - 1))
