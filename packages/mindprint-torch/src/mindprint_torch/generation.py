"""Continuing prompts: greedy, or sampled reproducibly."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from mindprint.contract import Generation, Int32, OnToken, Sampling
from mindprint.sampling import LIKELY, token_generator
from mindprint_torch.adapter import adapter_enabled
from mindprint_torch.model import TorchModel
from mindprint_torch.rope import forget_lengths

Int64 = NDArray[np.int64]

ROWS_AT_ONCE = 32

ROWS_AT_ONCE_CUDA = 64
"""A GPU reads all weights for each token, of however many rows: twice the rows take hardly longer."""

PROBE = ((3, 4, 5, 6, 7), (5, 6, 7))
"""Two prompts of unlike lengths."""


def generate(
    model: TorchModel,
    prompts: Sequence[Int32],
    sampling: Sampling,
    *,
    adapter: bool,
    on_token: OnToken | None = None,
) -> tuple[Generation, ...]:
    """Continue each prompt (int32 `[P]`), in order. `on_token` gets each token, and ends a row by returning False."""
    answers: dict[int, Generation] = {}
    with torch.no_grad(), adapter_enabled(model, enabled=adapter):
        for rows in _row_groups(model, prompts, sampling):
            told = None if on_token is None else TellTokens(rows, sampling, on_token)
            continued = _continue(model, [prompts[row] for row in rows], sampling, told)
            answers.update(zip(rows, continued, strict=True))
    return tuple(answers[index] for index in range(len(prompts)))


def _row_groups(model: TorchModel, prompts: Sequence[Int32], sampling: Sampling) -> list[list[int]]:
    """Return which prompts are continued together: those of like length, which keeps padding short."""

    limit, together = model.head.rotary_limit, continues_rows(model, prompts)

    def kind(row: int) -> tuple[int, int]:
        """Return a key: prompts of unequal kinds would change one another's numbers."""
        length = len(prompts[row])
        if not together:
            return 0, row
        if limit is None:
            return 0, 0
        start, end = limit.kinds(np.array([length, length + sampling.max_new_tokens], np.int32)).tolist()
        # A prompt that crosses the limit on its way does so at its own length, and so may only meet its equals.
        return (start, 0) if start == end else (-1, length)

    order = sorted(range(len(prompts)), key=lambda row: (kind(row), len(prompts[row])))
    alike = [list(rows) for _, rows in groupby(order, kind)]
    most = ROWS_AT_ONCE_CUDA if model.device.type == "cuda" else ROWS_AT_ONCE
    return [rows[start : start + most] for rows in alike for start in range(0, len(rows), most)]


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
    output = _run(model, prompts, 0, max_new_tokens=2, output_logits=True, return_dict_in_generate=True)
    logits: Tensor = output.logits[1]
    return logits


def _continue(model: TorchModel, prompts: list[Int32], sampling: Sampling, told: TellTokens | None) -> list[Generation]:
    fill = sampling.stop_token_ids[0] if sampling.stop_token_ids else 0
    draws = [Draw(sampling, prompts)] if sampling.temperature > 0 or sampling.repetition_penalty != 1 else []
    stops = list(sampling.stop_token_ids) or None
    limits = {"max_new_tokens": sampling.max_new_tokens, "eos_token_id": stops}
    output = _run(model, prompts, fill, draws, [] if told is None else [told], **limits)
    width = max(len(prompt) for prompt in prompts)
    answers = [_until_stop(row, sampling) for row in output[:, width:].cpu().numpy().astype(np.int32)]
    return answers if told is None else [told.cut(place, answer) for place, answer in enumerate(answers)]


def _run(
    model: TorchModel,
    prompts: list[Int32],
    fill: int,
    processors: Sequence[LogitsProcessor] = (),
    criteria: Sequence[StoppingCriteria] = (),
    **settings: Any,
) -> Any:
    """Let transformers continue the prompts, and nothing but `settings` decide how."""
    if model.head.rotary_limit is not None:
        forget_lengths(model.network)
    tokens, mask = left_padded(prompts, fill)
    network: Any = model.network
    return network.generate(
        input_ids=torch.from_numpy(tokens).to(model.device),
        attention_mask=torch.from_numpy(mask).to(model.device),
        generation_config=GenerationConfig(do_sample=False, pad_token_id=fill, **settings),
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList(criteria),
    )


def _until_stop(tokens: Int32, sampling: Sampling) -> Generation:
    stops = np.flatnonzero(np.isin(tokens, sampling.stop_token_ids))
    return Generation(tokens[: stops[0]], "stop") if len(stops) else Generation(tokens, "length")


class TellTokens(StoppingCriteria):
    """Tells each new token, as a criterion that transformers asks behind every token whether a row has ended."""

    def __init__(self, rows: Sequence[int], sampling: Sampling, on_token: OnToken) -> None:
        self.rows = rows
        self.on_token = on_token
        self.stops = frozenset(sampling.stop_token_ids)
        self.told = [0] * len(rows)
        self.done = [False] * len(rows)
        self.ended: set[int] = set()
        """The places of rows that `on_token` ended, and no stop token."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # noqa: ARG002 (transformers' signature)
        for place, token in enumerate(input_ids[:, -1].tolist()):
            # Rows that are done are filled up with stop tokens, or with any token where there are none.
            if self.done[place]:
                continue
            if token in self.stops:
                self.done[place] = True
                continue
            self.told[place] += 1
            if self.on_token(self.rows[place], token) is False:
                self.done[place] = True
                self.ended.add(place)
        return torch.tensor(self.done, device=input_ids.device)

    def cut(self, place: int, answer: Generation) -> Generation:
        """Return an answer without the filling behind the token at which it was ended."""
        return Generation(answer.tokens[: self.told[place]], "stop") if place in self.ended else answer


class Draw(LogitsProcessor):
    """Sampling and its filters as a processor of logits: of each row's logits only the chosen token's is left.

    A row's random numbers come from the seed and its own prompt, so that they do not depend on its neighbours.
    transformers' own sampling draws from one generator for all rows, and its penalty takes filling for text.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[Int32]) -> None:
        self.sampling = sampling
        self.prompts = prompts
        self.width = max(map(len, prompts))
        self.generators = [token_generator(sampling, prompt) for prompt in prompts]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # In float64 as the definition is, so that the same logits give the same token. MPS has none.
        values = scores.to(torch.float32 if scores.device.type == "mps" else torch.float64)
        if self.sampling.repetition_penalty != 1:
            values = penalised(values, self._seen(input_ids, values), self.sampling.repetition_penalty)
        if self.sampling.temperature == 0:
            chosen = values.argmax(-1, keepdim=True)
        else:
            uniform = torch.tensor([[generator.random()] for generator in self.generators], dtype=values.dtype)
            chosen = draw(values, self.sampling, uniform.to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    def _seen(self, input_ids: Tensor, values: Tensor) -> Tensor:
        """Return which tokens each row has had, bool `[rows, vocabulary]`: those of its prompt and of its answer."""
        seen = torch.zeros_like(values, dtype=torch.bool)
        for row, prompt in zip(seen, self.prompts, strict=True):
            row[torch.from_numpy(prompt.astype(np.int64)).to(row.device)] = True
        return seen.scatter(1, input_ids[:, self.width :], True)


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


def left_padded(prompts: list[Int32], fill: int) -> tuple[Int64, Int64]:
    """Return prompts as rows that end together, and a mask that is 0 on the filling; both int64 `[rows, P]`."""
    width = max(len(prompt) for prompt in prompts)
    tokens, mask = np.full((len(prompts), width), fill, np.int64), np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return tokens, mask
