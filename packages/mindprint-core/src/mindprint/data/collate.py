"""Collation of examples into the arrays of contract.py: padded on the right, one dtype each, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mindprint.contract import Bool, Float32, Float64, Int32, PreferenceBatch, TokenBatch
from mindprint.data.render import PreferenceExample, SftExample


def sft_batch(examples: Sequence[SftExample], pad_id: int) -> TokenBatch:
    """Collate rows of tokens into one batch, `[rows, longest]`."""
    return _token_batch([example.tokens for example in examples], [example.loss_mask for example in examples], pad_id)


def whole_sequences(rows: Sequence[Int32], pad_id: int = 0) -> TokenBatch:
    """Collate rows of tokens as `[rows, longest]`, in which every token but the first of its row counts."""
    return _token_batch(rows, [np.arange(len(row)) > 0 for row in rows], pad_id)


def preference_batch(
    examples: Sequence[PreferenceExample],
    pad_id: int,
    reference: tuple[Float32 | Float64, Float32 | Float64] | None = None,
) -> PreferenceBatch:
    """Collate pairs into one batch. `reference` holds the summed log-probs of chosen and rejected, `[pairs]` each."""
    chosen, rejected = (None, None) if reference is None else (_float32(part) for part in reference)
    prompts = [example.prompt for example in examples]
    return PreferenceBatch(
        prompt=_padded(prompts, pad_id),
        prompt_lengths=_lengths(prompts),
        chosen=_padded([example.chosen for example in examples], pad_id),
        chosen_lengths=_lengths([example.chosen for example in examples]),
        rejected=_padded([example.rejected for example in examples], pad_id),
        rejected_lengths=_lengths([example.rejected for example in examples]),
        reference_chosen=chosen,
        reference_rejected=rejected,
    )


def shared_sequences(examples: Sequence[PreferenceExample], pad_id: int) -> TokenBatch:
    """Collate prompt + chosen of every pair, then prompt + rejected of every pair, as rows that share prompts."""
    # Chosen first: `TokenBatch.shared` pairs row k with row rows / 2 + k.
    chosen = [_joined(example.prompt, example.chosen) for example in examples]
    rejected = [_joined(example.prompt, example.rejected) for example in examples]
    return replace(_pairs_of([*chosen, *rejected], pad_id), shared=_lengths([example.prompt for example in examples]))


def pair_sequences(examples: Sequence[PreferenceExample], pad_id: int) -> tuple[TokenBatch, TokenBatch]:
    """Collate prompt + chosen and prompt + rejected as whole sequences, the completions under the mask."""
    chosen = [_joined(example.prompt, example.chosen) for example in examples]
    rejected = [_joined(example.prompt, example.rejected) for example in examples]
    return _pairs_of(chosen, pad_id), _pairs_of(rejected, pad_id)


def _pairs_of(sequences: Sequence[tuple[Int32, Bool]], pad_id: int) -> TokenBatch:
    return _token_batch([tokens for tokens, _ in sequences], [mask for _, mask in sequences], pad_id)


def _joined(prompt: Int32, completion: Int32) -> tuple[Int32, Bool]:
    mask = np.zeros(len(prompt) + len(completion), dtype=np.bool_)
    mask[len(prompt) :] = True
    return np.concatenate([prompt, completion]), mask


def _token_batch(tokens: Sequence[Int32], masks: Sequence[Bool], pad_id: int) -> TokenBatch:
    # Padding stays False, so padded tokens never count, whatever their id.
    loss_mask = np.zeros((len(masks), max(map(len, masks), default=0)), dtype=np.bool_)
    for row, mask in zip(loss_mask, masks, strict=True):
        row[: len(mask)] = mask
    return TokenBatch(_padded(tokens, pad_id), _lengths(tokens), loss_mask)


def _padded(sequences: Sequence[Int32], pad_id: int) -> Int32:
    """Pad sequences to `[rows, longest]`, int32."""
    result = np.full((len(sequences), max(map(len, sequences), default=0)), pad_id, dtype=np.int32)
    for row, sequence in zip(result, sequences, strict=True):
        row[: len(sequence)] = sequence
    return result


def _lengths(sequences: Sequence[Int32]) -> Int32:
    return np.array([len(sequence) for sequence in sequences], dtype=np.int32)


def _float32(values: Float32 | Float64) -> Float32:
    return np.asarray(values, dtype=np.float32)
