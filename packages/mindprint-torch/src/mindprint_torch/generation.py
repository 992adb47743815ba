"""Continuing prompts: greedy, or sampled reproducibly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from mindprint.contract import Generation, Int32, Sampling
from mindprint_torch.adapter import adapter_enabled
from mindprint_torch.model import TorchModel

Int64 = NDArray[np.int64]

ROWS_AT_ONCE = 32


def generate(
    model: TorchModel, prompts: Sequence[Int32], sampling: Sampling, *, adapter: bool
) -> tuple[Generation, ...]:
    """Continue each prompt (int32 `[P]`), in order."""
    # Prompts of like length run together, which keeps padding short.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, Generation] = {}
    with torch.no_grad(), adapter_enabled(model, enabled=adapter):
        for start in range(0, len(order), ROWS_AT_ONCE):
            rows = order[start : start + ROWS_AT_ONCE]
            answers.update(zip(rows, _continue(model, [prompts[row] for row in rows], sampling), strict=True))
    return tuple(answers[index] for index in range(len(prompts)))


def _continue(model: TorchModel, prompts: list[Int32], sampling: Sampling) -> list[Generation]:
    fill = sampling.stop_token_ids[0] if sampling.stop_token_ids else 0
    tokens, mask = left_padded(prompts, fill)
    network: Any = model.network
    output = network.generate(
        input_ids=torch.from_numpy(tokens).to(model.device),
        attention_mask=torch.from_numpy(mask).to(model.device),
        generation_config=GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=list(sampling.stop_token_ids) or None,
            pad_token_id=fill,
        ),
        logits_processor=LogitsProcessorList([Draw(sampling, prompts)] if sampling.temperature > 0 else []),
    )
    return [_until_stop(row, sampling) for row in output[:, tokens.shape[1] :].cpu().numpy().astype(np.int32)]


def _until_stop(tokens: Int32, sampling: Sampling) -> Generation:
    stops = np.flatnonzero(np.isin(tokens, sampling.stop_token_ids))
    return Generation(tokens[: stops[0]], "stop") if len(stops) else Generation(tokens, "length")


class Draw(LogitsProcessor):
    """Leaves of each row's logits only the token drawn for it.

    A row's random numbers come from the seed and its own prompt, so that they do not depend on its neighbours. Nucleus
    sampling (Holtzman et al. 2020, arXiv 1904.09751): the fewest most likely tokens that together reach `top_p`.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[Int32]) -> None:
        self.sampling = sampling
        self.generators = [np.random.Generator(np.random.Philox(_seeds(sampling, prompt))) for prompt in prompts]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002  (transformers' signature)
        uniform = torch.tensor([[generator.random()] for generator in self.generators], dtype=torch.float32)
        drawn = draw(scores, self.sampling, uniform.to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """The token that each uniform number in [0, 1) stands for, int64 `[rows, 1]`, for logits `[rows, vocabulary]`."""
    likely_first = torch.softmax(logits.float() / sampling.temperature, dim=-1).sort(descending=True, stable=True)
    probabilities, tokens = likely_first
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities * (before < sampling.top_p)
    reached = kept.cumsum(-1)
    index = torch.searchsorted(reached, uniform * reached[:, -1:], right=True)
    return tokens.gather(1, index.clamp(max=tokens.shape[1] - 1))


def _seeds(sampling: Sampling, prompt: Int32) -> np.random.SeedSequence:
    return np.random.SeedSequence([sampling.seed, *map(int, prompt)])


def left_padded(prompts: list[Int32], fill: int) -> tuple[Int64, Int64]:
    """Prompts as rows that end together, and the mask that is 0 on the filling before them; both int64 `[rows, P]`."""
    width = max(len(prompt) for prompt in prompts)
    tokens, mask = np.full((len(prompts), width), fill, np.int64), np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return tokens, mask
