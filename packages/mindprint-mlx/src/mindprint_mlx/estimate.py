"""The memory that a run needs, from sizes alone: which arrays this backend keeps, and how it divides a batch.

`benchmarks/plan.py` compares it with measured runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mindprint.contract import Dtype, MemoryNeed, MemoryRequest, PreferenceBatch, TokenBatch
from mindprint.layouts import continued, pairs_of, preference_sequences, token_rows
from mindprint.loss_scale import initial_loss_scale
from mindprint_mlx import cpu, devices, division, groups
from mindprint_mlx.division import Work
from mindprint_mlx.logprobs import LOGITS_BYTES

BACKWARD_INNER = 4
"""Arrays of a feed-forward block's inner width that its backward pass writes, in addition to those that are kept."""

BACKWARD_SCORES = 2
"""Arrays of the size of the attention's scores that its backward pass writes."""

LOGITS_ARRAYS = 7
"""Arrays of a chunk's logits that are held at once. MLX's peak for the log-probs of Gemma 3 270M was measured 449 MiB
above its weights, where a chunk has 64 MiB."""

HOST_COPIES = 6
"""Copies of A and B in the machine's memory: core's, and those of an update in work."""

POOLS = 64 << 20
"""Threads, kernels and their buffers."""

BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class _Rows:
    """Rows that are read at once: tokens, pairs of tokens of which one may see the other, and tokens asked for."""

    tokens: int
    scores: int
    targets: int


def memory_need(request: MemoryRequest) -> MemoryNeed:
    """Return the parts of the run's greatest need, in bytes."""
    device = devices.device(request.spec.device)
    item = BYTES[request.spec.dtype]
    base = request.base
    factors = sum(request.adapter.rank(site.name) * (site.in_features + site.out_features) for site in request.sites)
    on_cpu = device == mx.Device(mx.cpu)
    # A, B, their gradients and two moments, all float32. A Mac's GPU has the machine's memory, core's copies too.
    adapter = 4 * factors * (4 + HOST_COPIES)
    cores = groups.core_count(device)
    parts = [(_activations(request, part), _logits(request, part.targets)) for part in _training_rows(request)]
    # As many parts as there are cores are computed at once. The largest may come together.
    kept, logits = (sum(sorted(column, reverse=True)[:cores]) for column in zip(*parts, strict=True))
    if request.read is not None:
        logits = max(logits, _logits(request, request.read.loss_tokens))
    weights = base.elements * item + base.packed_bytes
    return MemoryNeed(weights, adapter, kept, logits, POOLS, None if on_cpu else _free(device))


def _free(device: mx.Device) -> int:
    """Return the memory that MLX may still take of the GPU's, as the system recommends it."""
    facts: dict[str, Any] = mx.device_info(device)
    limit = facts.get("max_recommended_working_set_size") or facts.get("memory_size") or 0
    return max(int(limit) - int(mx.get_active_memory()), 0)


def _training_rows(request: MemoryRequest) -> Iterator[_Rows]:
    """Yield the parts of a micro-batch that a step differentiates by themselves (`division.py`)."""
    batch, work = request.batch, _work(request)
    if not isinstance(batch, PreferenceBatch):
        for rows in division.row_groups(batch, work):
            yield _sequences(token_rows(batch, rows))
        return
    share = request.update.share_prompts
    completions = np.stack([batch.chosen_lengths, batch.rejected_lengths])
    split = initial_loss_scale(request.spec.dtype) is None
    for group in division.pair_groups(batch.prompt_lengths, completions, work, share=share, split=split):
        sequences = preference_sequences(pairs_of(batch, group.pairs))
        if group.apart:
            for half in (0, 1):
                yield _sequences(token_rows(replace(sequences, shared=None), np.array([half])))
        else:
            yield _continued(sequences, None if work is None else work.read) if share else _sequences(sequences)


def _work(request: MemoryRequest) -> Work | None:
    base = request.base
    head = base.vocabulary * base.hidden
    # A head that is not tied is another table of that size.
    tables = head if base.config.get("tie_word_embeddings", True) else 2 * head
    elements = max(base.elements, 1)
    return groups.work(devices.device(request.spec.device), elements, head / max(elements - tables, 1))


def _sequences(batch: TokenBatch) -> _Rows:
    rows, width = len(batch.lengths), int(batch.lengths.max(initial=1))
    return _Rows(rows * width, rows * _causal(width), batch.loss_tokens)


def _continued(batch: TokenBatch, read: int | None) -> _Rows:
    layout = continued(batch)
    pairs, prompt = layout.prompts.shape
    tokens, scores = pairs * prompt, pairs * _causal(prompt)
    for rows in division.completion_reads(layout.completion_lengths, read):
        width = int(layout.completion_lengths[rows].max())
        tokens += len(rows) * width
        scores += len(rows) * width * (prompt + width)
    return _Rows(tokens, scores, batch.loss_tokens)


def _causal(width: int) -> int:
    """Return the scores of a row that are computed: of blocks of queries, those of the keys that the last one sees."""
    starts = np.arange(0, width, cpu.CAUSAL_ROWS)
    ends = np.minimum(starts + cpu.CAUSAL_ROWS, width)
    return int(((ends - starts) * ends).sum())


def _activations(request: MemoryRequest, part: _Rows) -> int:
    """Return the bytes that a step keeps between its forward and its backward pass, and of the layer in work."""
    base, item = request.base, BYTES[request.spec.dtype]
    queries, keys = base.heads * base.head_size, base.key_heads * base.head_size
    # Normalisations keep their input, adapted layers theirs. Attention keeps queries, keys, values and its output.
    norms = base.norms * base.hidden + (queries + keys if base.head_norms else 0)
    per_token = norms + 2 * base.hidden + queries + (2 * queries + 2 * keys) + 4 * base.inner
    layer = item * part.tokens * per_token
    scores = item * base.heads * part.scores if _keeps_scores(request) else 0
    in_work = item * part.tokens * (BACKWARD_INNER * base.inner + 2 * base.hidden) + BACKWARD_SCORES * scores
    head = part.targets * base.hidden * (4 + item)
    if request.update.gradient_checkpointing:
        # Of each layer its input, and one layer at a time is computed again.
        return item * base.layers * part.tokens * base.hidden + layer + scores + in_work + head
    return base.layers * (layer + scores) + in_work + head


def _keeps_scores(request: MemoryRequest) -> bool:
    # Our attention for Linux CPUs keeps the exponentials of all scores. MLX's own computes them again.
    return cpu.replaces(devices.device(request.spec.device)) and request.spec.dtype == "float32"


def _logits(request: MemoryRequest, targets: int) -> int:
    vocabulary = request.base.vocabulary
    rows = min(max(targets, 1), max(LOGITS_BYTES // (4 * vocabulary), 1))
    return LOGITS_ARRAYS * 4 * rows * vocabulary
