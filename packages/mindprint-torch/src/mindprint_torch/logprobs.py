"""Log-probs of chosen tokens, without ever holding logits of more than a stated size.

The output layer sees only the hidden states whose next token counts, a chunk at a time. Log-softmax is in float32.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mindprint.asked_places import Asked, asking
from mindprint.contract import Float32, TokenBatch
from mindprint.layouts import Forked, Layout, forked, sequences, sequences_apart
from mindprint_torch.adapter import adapter_enabled
from mindprint_torch.arrays import on_device
from mindprint_torch.head import Head
from mindprint_torch.model import TorchModel
from mindprint_torch.packed import multiply_back
from mindprint_torch.packed_layers import PackedLinear, frozen_weight
from mindprint_torch.prompts import row_shape

LOGITS_BYTES = 64 << 20
"""The most that the float32 logits of one chunk may take. A chunk holds up to three such arrays at a time."""

LOGITS_BYTES_CUDA = 256 << 20
"""The same on a GPU, which reads the whole output layer for each chunk: 523 rows of 128,256 logits keep it busy."""

ROWS_IN_CACHE = 16
"""Rows of logits that are normalised together on a CPU: few enough that they stay in its cache."""

FUSED_VOCABULARY_CHUNK = 32768
"""The width of the tiles that TRL's kernel computes. TRL's trainers use the same."""

FUSED_TOKENS = 4096
"""The rows of these tiles at most: `TOKEN_CHUNK_SIZE` of `trl.kernels.chunked_logprob`."""


def log_probs(model: TorchModel, batch: TokenBatch, *, adapter: bool) -> Float32:
    """Return log-probs under the mask, float32 `[rows, T]`, 0 elsewhere."""
    with torch.no_grad(), adapter_enabled(model, enabled=adapter):
        return placed_log_probs(model, batch_layouts(model, batch)).cpu().numpy()


def batch_layouts(model: TorchModel, batch: TokenBatch, *, share_prompts: bool = True) -> tuple[Layout, ...]:
    """Return how the batch is read: prompts once, if that is allowed and possible at this length, else whole rows.

    There are several layouts only where the model's rotary embedding tells rows apart by their length.
    """
    shares = share_prompts and batch.shared is not None
    if shares and int(batch.lengths.max()) <= model.longest_shared:
        return (forked(batch),)
    limit = model.head.rotary_limit
    return (sequences(batch),) if limit is None else sequences_apart(batch, limit)


def placed_log_probs(model: TorchModel, layouts: Sequence[Layout]) -> Tensor:
    """Return log-probs at the places of their tokens, float32 `layout.shape`, differentiable; 0 elsewhere."""
    rows, width = layouts[0].shape
    flat = torch.zeros(rows * width, dtype=torch.float32, device=model.device)
    for layout in layouts:
        flat = flat.scatter(0, on_device(model.device, layout.slots), layout_log_probs(model, layout))
    return flat.view(rows, width)


def layout_log_probs(model: TorchModel, layout: Layout) -> Tensor:
    """Return the log-prob of each of the layout's targets, float32 `[n]`, differentiable."""
    if not len(layout.sources):
        return torch.zeros(0, device=model.device)
    # Whether forked rows get a mask is measured when the first of them is read.
    masked = not isinstance(layout, Forked) or model.masks_forks
    shape = row_shape(layout, model.device, model.network.dtype, masked=masked)
    # Two completions may ask for the same hidden state, that of their prompt's last token.
    places = on_device(model.device, np.unique(layout.sources))
    with asking(Asked(places)):
        hidden = model.head.hidden_states(on_device(model.device, layout.tokens), **shape)
    selected = hidden.flatten(0, 1).index_select(0, on_device(model.device, layout.sources))
    return head_log_probs(model.head, selected, on_device(model.device, layout.targets))


def head_log_probs(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return `log softmax(head(hidden))[targets]`, float32 `[n]`, for hidden states `[n, hidden]`, targets `[n]`."""
    if head.trainable:
        return _checkpointed(head, hidden, targets)
    if head.plain and fused_head_usable(hidden.device) and not isinstance(head.layer, PackedLinear):
        return fused_log_probs(head.layer, hidden, targets)
    values: Tensor = _FrozenHead.apply(hidden, targets, head)  # type: ignore[no-untyped-call]
    return values


def fused_head_usable(device: torch.device) -> bool:
    """Return whether TRL's fused LM head runs as Triton kernels here."""
    return device.type == "cuda" and _has_fused_head()


def fused_log_probs(layer: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Compute as `head_log_probs` for an output layer alone, by TRL's fused head: `[n, vocabulary]` never exists."""
    from trl.kernels import ChunkedLogProbFunction  # noqa: PLC0415  (imported only where it is used)

    outputs: tuple[Tensor, ...] = ChunkedLogProbFunction.apply(  # type: ignore[no-untyped-call]
        hidden, layer.weight, layer.bias, targets, 1.0, FUSED_VOCABULARY_CHUNK, None, 1.0, ("log_probs",)
    )
    return outputs[0]


@cache
def _has_fused_head() -> bool:
    return importlib.util.find_spec("triton") is not None and importlib.util.find_spec("trl.kernels") is not None


def log_softmax_at(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-softmax of float32 logits `[n, vocabulary]` at the targets `[n]`, `[n]`, differentiable."""
    # Not `torch.log_softmax`: on a CPU it adds one exponential after another, and of 262,144 small ones many are lost
    # next to the sum so far, which made log-probs too high by 2.8e-5 on average. `torch.sum` adds in a tree.
    # Shifted by the target, not by the greatest: a log-prob near 0 is then not rounded to the spacing of large logits.
    return -torch.logsumexp(logits - logits.gather(1, targets[:, None]), dim=1)


class _FrozenHead(torch.autograd.Function):
    """Log-probs through a head that is not trained.

    Each row has one log-prob, so its gradient by the hidden state is known up to one factor in the forward pass. It is
    computed there, while the chunk's logits exist, and the backward pass only multiplies. No logits are kept and none
    are computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return torch.cat([_chunk_log_probs(head, *chunk) for chunk in _chunks(head, hidden, targets)])
        done = [_with_gradient(head, *chunk) for chunk in _chunks(head, hidden, targets)]
        values, gradients = zip(*done, strict=True)
        ctx.save_for_backward(torch.cat(gradients))
        ctx.dtype = hidden.dtype
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return (gradients * outer[0][:, None]).to(ctx.dtype), None, None


def _with_gradient(head: Head, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probs `[n]` and their gradients by the hidden states, float32 `[n, hidden]`."""
    if head.plain:
        return _plain_with_gradient(head, hidden, targets)
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        logits = head(hidden)
    # A copy, since autograd may need the logits themselves, as it does those that a cap has bent.
    by_logits = logits.detach().to(torch.float32, copy=True)
    values = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    _replace_by_gradient(by_logits, targets, values)
    scale = _gradient_scale(logits.dtype)
    (gradient,) = torch.autograd.grad(logits, hidden, by_logits.mul_(-scale).to(logits.dtype))
    return values, gradient.float().div_(scale)


def _plain_with_gradient(head: Head, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute as `_with_gradient` where the head is its output layer: no graph, and one array of float32 logits."""
    weight = frozen_weight(head.layer)
    logits = head(hidden).float()
    values = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    together = ROWS_IN_CACHE if hidden.device.type == "cpu" else len(targets)
    for start in range(0, len(targets), together):
        rows = slice(start, start + together)
        _replace_by_gradient(logits[rows], targets[rows], values[rows])
    scale = _gradient_scale(weight.dtype)
    by_logits = logits if scale == 1.0 else logits.mul_(scale)
    return values, multiply_back(by_logits.to(weight.dtype), weight).float().div_(-scale)


def _replace_by_gradient(logits: Tensor, targets: Tensor, values: Tensor) -> None:
    """Write the log-probs of the targets into `values`, and softmax - one-hot(target) in place of the logits."""
    # d log p(target) / d logits = one-hot(target) - softmax. In place, since these are the largest arrays of a step.
    places = targets[:, None]
    logits.sub_(logits.amax(dim=1, keepdim=True))
    chosen = logits.gather(1, places)
    logits.exp_()
    total = logits.sum(dim=1, keepdim=True)
    values.copy_((chosen - total.log()).squeeze(1))
    logits.div_(total)
    logits.scatter_add_(1, places, torch.full_like(chosen, -1.0))


def _gradient_scale(dtype: torch.dtype) -> float:
    """Return a factor under which small probabilities of a large vocabulary pass through the dtype."""
    # float16 holds no magnitude below 6e-8, and a token of 262,144 has 4e-6 on average, most of them far less.
    return 256.0 if dtype == torch.float16 else 1.0


def _checkpointed(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """Compute as `head_log_probs` where the head is trained: logits are computed again in the backward pass."""
    return torch.cat(
        [checkpoint(_chunk_log_probs, head, *chunk, use_reentrant=False) for chunk in _chunks(head, hidden, targets)]
    )


def _chunk_log_probs(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    return log_softmax_at(head(hidden).float(), targets)


def _chunks(head: Head, hidden: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    held = LOGITS_BYTES_CUDA if hidden.device.type == "cuda" else LOGITS_BYTES
    rows = max(held // (4 * head.vocabulary), 1)
    return list(zip(hidden.split(rows), targets.split(rows), strict=True))
