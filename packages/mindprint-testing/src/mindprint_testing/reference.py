"""References to compare a backend with: NumPy in float64, and numbers taken from a backend by arithmetic alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import (
    AdamW,
    Float32,
    LoadedModel,
    LoraFactors,
    PreferenceBatch,
    StepMetrics,
    TokenBatch,
    TrainingState,
    Update,
)
from mindprint.losses import NUMPY, PairLogProbs, PreferenceLoss
from mindprint.plugins.backend import Backend

Arrays = dict[str, NDArray[np.float64]]
"""Factors, moments or gradients by `SITE.a` and `SITE.b`, float64."""

Step = Callable[[Update], StepMetrics]


def flat(tensors: Mapping[str, LoraFactors]) -> Arrays:
    """Return factors or moments by `SITE.a` and `SITE.b`, float64."""
    return {
        f"{site}.{letter}": np.asarray(values, np.float64)
        for site, pair in tensors.items()
        for letter, values in zip("ab", pair, strict=True)
    }


def norm(arrays: Arrays) -> float:
    """Return the global 2-norm."""
    return float(np.sqrt(sum((values**2).sum() for values in arrays.values())))


def distance(computed: Arrays, expected: Arrays) -> float:
    """Return the norm of the difference, relative to the norm of the expected arrays."""
    return norm({name: computed[name] - expected[name] for name in expected}) / norm(expected)


def gradients(backend: Backend, model: LoadedModel, step: Step, update: Update) -> Arrays:
    """Return the gradients of one step, unclipped.

    AdamW's first moment after a first step is (1 - beta1) times the gradient, and beta1 is 0.9: so every backend tells
    its gradient, without a hook for it.
    """
    # From zero moments, or the first moment would hold earlier gradients too.
    start = backend.save(model).without_optimizer()
    backend.restore(model, start)
    step(replace(update, max_grad_norm=None))
    computed = {name: moment / 0.1 for name, moment in flat(backend.save(model).first_moments).items()}
    backend.restore(model, start)
    return computed


def slope(backend: Backend, model: LoadedModel, loss: Callable[[], float], direction: Arrays, size: float) -> float:
    """Return the derivative of `loss` along `direction` by central differences. The adapter moves by `size`."""
    start = backend.save(model).without_optimizer()
    # The step is the same for a large gradient and a small one: float32 losses carry about 1e-7 of noise, and a step of
    # `size` must rise far above it without leaving the region where the loss is nearly quadratic.
    by = size / norm(direction)

    def at(distance: float) -> float:
        backend.restore(model, moved(start, direction, distance))
        return loss()

    derivative = (at(by) - at(-by)) / (2 * by)
    backend.restore(model, start)
    return derivative


def moved(state: TrainingState, direction: Arrays, by: float) -> TrainingState:
    """Return the adapter `by` times `direction` away. Factors that `direction` does not name stay as they are."""

    def factor(name: str, values: Float32) -> Float32:
        return (values + by * direction.get(name, 0.0)).astype(np.float32)

    tensors = {
        site: LoraFactors(factor(f"{site}.a", pair.a), factor(f"{site}.b", pair.b))
        for site, pair in state.adapter.tensors.items()
    }
    return TrainingState(replace(state.adapter, tensors=tensors))


def adamw(
    values: Arrays, gradient: Arrays, first: Arrays, second: Arrays, rate: float, options: AdamW, step: int
) -> tuple[Arrays, Arrays, Arrays]:
    """Return values and moments after a step of AdamW (Loshchilov & Hutter 2019, algorithm 2).

    The order is that of `torch.optim.AdamW`: decay first, and eps added to the root, not under it.
    """
    beta1, beta2 = options.betas
    first = {name: beta1 * first[name] + (1 - beta1) * g for name, g in gradient.items()}
    second = {name: beta2 * second[name] + (1 - beta2) * g**2 for name, g in gradient.items()}
    new = {}
    for name, value in values.items():
        mean, square = first[name] / (1 - beta1**step), second[name] / (1 - beta2**step)
        new[name] = value * (1 - rate * options.weight_decay) - rate * mean / (np.sqrt(square) + options.eps)
    return new, first, second


def whole_sequences(batch: PreferenceBatch) -> TokenBatch:
    """Return prompt + chosen of every pair, then prompt + rejected, token by token, without core's layouts."""
    rows = []
    for answers, lengths in ((batch.chosen, batch.chosen_lengths), (batch.rejected, batch.rejected_lengths)):
        for pair in range(batch.pairs):
            prompt = list(batch.prompt[pair, : batch.prompt_lengths[pair]])
            rows.append((prompt, list(answers[pair, : lengths[pair]])))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.bool_)
    for row, (prompt, answer) in enumerate(rows):
        tokens[row, : len(prompt) + len(answer)] = prompt + answer
        mask[row, len(prompt) : len(prompt) + len(answer)] = True
    return TokenBatch(tokens, np.array([len(prompt) + len(answer) for prompt, answer in rows], np.int32), mask)


def preference(
    backend: Backend, model: LoadedModel, batch: PreferenceBatch, loss: PreferenceLoss, update: Update
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Return core's loss of what `mindprint_log_probs` gives, and the sums of both completions, `[pairs]`."""
    sums = backend.log_probs(model, whole_sequences(batch)).astype(np.float64).sum(axis=1)
    chosen, rejected = np.split(sums, 2)
    reference = batch.reference_chosen, batch.reference_rejected
    pairs = PairLogProbs(chosen, rejected, *reference, batch.chosen_lengths, batch.rejected_lengths)
    total = loss.total(NUMPY, pairs, pair_count=update.pairs, chosen_token_count=update.tokens)
    return float(total), chosen, rejected
