"""The memory that a run needs, from sizes alone: which arrays this backend keeps, and how it divides a batch.

`benchmarks/plan.py` compares it with measured runs. The arrays that a layer keeps for its backward pass were listed by
`torch.autograd.graph.saved_tensors_hooks`, for Llama and Gemma models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mindprint.contract import Dtype, MemoryNeed, MemoryRequest, ModelSpec, PreferenceBatch, TokenBatch
from mindprint.layouts import forked, groups_of_like_length, pair_lengths, pairs_of, preference_sequences, token_rows
from mindprint_torch.elementwise import triton_kernels
from mindprint_torch.logprobs import (
    FUSED_TOKENS,
    FUSED_VOCABULARY_CHUNK,
    LOGITS_BYTES,
    LOGITS_BYTES_CUDA,
    fused_head_usable,
)
from mindprint_torch.lora import FUSED_DTYPES
from mindprint_torch.model import TORCH_DTYPES
from mindprint_torch.prompts import WINDOWS
from mindprint_torch.steps import GROUP_OVERHEAD, TOKENS_AT_ONCE

GATED = ("gate_proj", "up_proj", "down_proj")
"""The sites of a feed-forward block that `gated.py` computes in one piece, if all have LoRA."""

BACKWARD_INNER = 3
"""Arrays of a feed-forward block's inner width that its backward pass writes, in addition to those that are kept."""

READING_LOGITS = 3
"""Arrays of a chunk's float32 logits that a pass without gradients holds at once (`log_softmax_at`)."""

HOST_COPIES = 5
"""Copies of A and B that core keeps next to the backend's, on a CPU: the start, and saved factors and moments."""

HEAP_SHARE, RECOMPUTED_HEAP_SHARE = 0.18, 0.35
"""Memory of freed arrays that glibc cannot use again, as a share of all activations, kept or computed again. No formula
gives it: these shares were fitted to measured runs."""

POOLS = 96 << 20
"""Threads, kernels and their buffers: of OpenMP and oneDNN on a CPU, of cuBLAS on a GPU."""

GATHERED_LAYERS = 2
"""Copies of a sharded layer that a rank holds while it computes: FSDP's buffer, and the weights copied out of it."""

BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class _Rows:
    """Rows that are read at once: their number, width, and tokens that are asked for. `forked`: under a mask."""

    rows: int
    width: int
    targets: int
    forked: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.width


def memory_need(request: MemoryRequest) -> MemoryNeed:
    """Return the parts of the run's greatest need, in bytes."""
    on_cpu = request.spec.device == "cpu"
    item = BYTES[request.spec.dtype]
    elements, packed = _held_elements(request), request.base.packed_bytes
    factors = sum(request.adapter.rank(site.name) * (site.in_features + site.out_features) for site in request.sites)
    # A, B, their gradients and two moments, all float32. On a CPU core's copies are in the same memory.
    adapter = 4 * factors * (4 + (HOST_COPIES if on_cpu else 0))
    parts = list(_training_rows(request))
    kept = max(_activations(request, part) for part in parts)
    # A rank that holds a part of the base gives every freed array back at once (`return_freed_arrays`).
    if on_cpu and not request.spec.shard:
        share = RECOMPUTED_HEAP_SHARE if request.update.gradient_checkpointing else HEAP_SHARE
        kept += int(share * max(request.base.layers * part.tokens * _kept_per_token(request, part) for part in parts))
    free = None if on_cpu else _free(request.spec)

    def need(weights: int, logits: int) -> MemoryNeed:
        return MemoryNeed(weights + packed, adapter, kept, logits, POOLS, free)

    needs = [need(elements * item, max(_training_logits(request, part) for part in parts))]
    if request.read is not None:
        # The C library keeps a step's arrays for later ones, and gives only the largest back to the system. On a GPU
        # nothing but the weights is left of a step.
        reading = need(elements * item, _reading_logits(request, request.read, request.spec.dtype))
        needs.append(reading if on_cpu else _without_step(reading))
    stored = request.base.stored_dtype
    # Ranks of a sharded base read one weight at a time.
    if on_cpu and not request.spec.shard and stored is not None and stored != request.spec.dtype:
        # Files are mapped, and their pages stay until all weights are converted.
        needs.append(MemoryNeed(elements * (item + BYTES[stored]) + packed, 0, 0, 0, POOLS, free))
    return max(needs, key=lambda each: each.total)


def _held_elements(request: MemoryRequest) -> int:
    """Return the elements of the base that a rank holds at most: of a sharded one its part, and the layer in work."""
    base = request.base
    if not request.spec.shard:
        return base.elements
    whole = base.elements - base.layer_elements
    return whole + base.layer_elements // request.ranks + GATHERED_LAYERS * base.layer_elements // max(base.layers, 1)


def _without_step(need: MemoryNeed) -> MemoryNeed:
    return MemoryNeed(need.weights, need.adapter, 0, need.logits, need.other, need.free)


def _free(spec: ModelSpec) -> int | None:
    """Return the bytes that are free on the base's devices together."""
    if spec.device != "cuda" or not torch.cuda.is_available():
        return None
    return sum(int(torch.cuda.mem_get_info(device)[0]) for device in spec.devices or (None,))


def _training_rows(request: MemoryRequest) -> Iterator[_Rows]:
    """Yield the rows that a step reads at once. On a CPU these are parts of the micro-batch (`steps.py`)."""
    batch = request.batch
    lengths = pair_lengths(batch) if isinstance(batch, PreferenceBatch) else batch.lengths
    if request.spec.device == "cpu":
        groups = groups_of_like_length(lengths, TOKENS_AT_ONCE, GROUP_OVERHEAD)
    else:
        groups = groups_of_like_length(lengths, int(lengths.max()) * len(lengths), int(lengths.sum()) * len(lengths))
    for group in groups:
        if isinstance(batch, PreferenceBatch):
            sequences = preference_sequences(pairs_of(batch, group))
            yield _read_rows(request, sequences, shared=request.update.share_prompts)
        else:
            yield _read_rows(request, token_rows(batch, group), shared=False)


def _read_rows(request: MemoryRequest, batch: TokenBatch, *, shared: bool) -> _Rows:
    windows = [request.base.config.get(name) for name in WINDOWS]
    longest = min((window for window in windows if isinstance(window, int) and window > 0), default=1 << 62)
    if shared and batch.shared is not None and int(batch.lengths.max()) <= longest:
        rows, width = forked(batch).tokens.shape
        return _Rows(rows, width, batch.loss_tokens, forked=request.spec.device == "cpu")
    return _Rows(len(batch.lengths), int(batch.lengths.max(initial=1)), batch.loss_tokens)


def _activations(request: MemoryRequest, part: _Rows) -> int:
    """Return the bytes that a step keeps between its forward and its backward pass, and of the layer in work."""
    base, item = request.base, BYTES[request.spec.dtype]
    layer = part.tokens * _kept_per_token(request, part)
    in_work = part.tokens * (BACKWARD_INNER * base.inner + 2 * base.hidden) * item
    mask = part.rows * part.width**2 * item if part.forked else 0
    # The head keeps a gradient in float32 for each state that is asked, and the states.
    head = part.targets * base.hidden * (4 + item)
    if request.update.gradient_checkpointing:
        # Of each layer its input, and one layer at a time is computed again.
        return base.layers * part.tokens * base.hidden * item + layer + in_work + mask + head
    return base.layers * layer + in_work + mask + head


def _kept_per_token(request: MemoryRequest, part: _Rows) -> int:
    """Return the bytes that a layer keeps of each token for its backward pass."""
    base, item = request.base, BYTES[request.spec.dtype]
    queries, keys = base.heads * base.head_size, base.key_heads * base.head_size
    # Normalisations keep their input, and transformers' own in float32, whatever the dtype.
    in_one_kernel = triton_kernels(torch.device(request.spec.device)) is not None
    norms = (item if in_one_kernel else 4) * (base.norms * base.hidden + (queries + keys if base.head_norms else 0))
    # Under a mask, keys and values are repeated for the heads that share them.
    attention = queries + 2 * (queries if part.forked else keys)
    softcapped = 3 * base.heads * part.width if base.config.get("attn_logit_softcapping") else 0
    inputs = 2 * base.hidden + queries
    low = sum(request.adapter.rank(site.name) for site in request.sites) // max(base.layers, 1)
    feed_forward = (2 if _in_one_piece(request) else 4) * base.inner
    # Layers that are not in one piece keep their input once more: after dropout, or in float32 for a float16 base.
    plain = request.spec.dtype == "float16" or _drops_out(request)
    again = sum(site.in_features for site in request.sites) // max(base.layers, 1) if plain else 0
    return norms + item * (inputs + attention + softcapped + low + feed_forward + again) + 4 * base.heads


def _in_one_piece(request: MemoryRequest) -> bool:
    config = request.base.config
    silu = (config.get("hidden_act") or config.get("hidden_activation") or config.get("activation_function")) == "silu"
    adapted = {site.name.rpartition(".")[2] for site in request.sites}
    fused = TORCH_DTYPES[request.spec.dtype] in FUSED_DTYPES and not _drops_out(request)
    return silu and fused and adapted.issuperset(GATED)


def _drops_out(request: MemoryRequest) -> bool:
    return bool(request.adapter.dropout) and isinstance(request.batch, TokenBatch)


def _training_logits(request: MemoryRequest, part: _Rows) -> int:
    device, item = torch.device(request.spec.device), BYTES[request.spec.dtype]
    config, vocabulary = request.base.config, request.base.vocabulary
    plain = not any(config.get(name) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
    if plain and fused_head_usable(device):
        return item * min(part.targets, FUSED_TOKENS) * min(vocabulary, FUSED_VOCABULARY_CHUNK)
    # Plain heads hold float32 logits, and in another dtype those too, and their gradient. Others keep a graph.
    arrays = 4 + (0 if item == 4 else 2 * item) if plain else 4 + 3 * item
    return _chunk(request, part.targets) * vocabulary * arrays


def _reading_logits(request: MemoryRequest, batch: TokenBatch, dtype: Dtype) -> int:
    logits = 0 if dtype == "float32" else BYTES[dtype]
    return _chunk(request, batch.loss_tokens) * request.base.vocabulary * (4 * READING_LOGITS + logits)


def _chunk(request: MemoryRequest, targets: int) -> int:
    """Return the rows of logits that are held at once (`logprobs.py`)."""
    held = LOGITS_BYTES_CUDA if request.spec.device == "cuda" else LOGITS_BYTES
    return min(max(targets, 1), max(held // (4 * request.base.vocabulary), 1))
