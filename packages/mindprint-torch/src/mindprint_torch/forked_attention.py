"""Attention over rows whose prompt is read once for two completions, without a mask.

A mask says which token of such a row sees which. But a GPU's fast kernels take no mask, they only know that a token
sees those before it, and the mask is as large as the row is long, squared. So each layer's queries, keys and values
are copied into two plain rows, prompt + first and prompt + second completion, for the time of the attention alone.
Padding needs no mask either, since it lies behind all tokens that count. Attention within the prompt is computed twice,
but everything else, which is most, still once.

transformers looks attention functions up by name. Here its `sdpa` gets a branch for the masks of `unmasked`, which hold
no values but the places of tokens. All other masks go to transformers' own function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mindprint.layouts import FIRST, PADDING, PROMPT, SECOND, Forked
from mindprint_torch.arrays import on_device

MARK = "mindprint_places"
"""The attribute of a mask that holds `Places`."""


@dataclass(frozen=True)
class Places:
    """The places of a forked layout's tokens in plain rows. All are flat indices, int64, on the model's device.

    Args:
        pairs: The number of forked rows.
        width: The tokens of a plain row.
        tokens: `[2 * pairs * width]`, the forked token at each place of the plain rows. Places behind a row's end
            hold its first token.
        places: `[pairs * forked width]`, the place of each forked token. Prompts have theirs in the first row.
        prompts: The forked tokens of all prompts.
        prompt_copies: Their places in the second rows, in the same order.
        padding: The forked tokens that are padding.
        unused: The places whose outputs nobody needs: copies of prompts, and those behind a row's end.
    """

    pairs: int
    width: int
    tokens: Tensor
    places: Tensor
    prompts: Tensor
    prompt_copies: Tensor
    padding: Tensor
    unused: Tensor


def find_places(layout: Forked, device: torch.device) -> Places:
    """Return the places of a layout's tokens in plain rows."""
    parts = layout.parts
    pairs, forked_width = parts.shape
    prompt, first, second = ((parts == part).sum(axis=1) for part in (PROMPT, FIRST, SECOND))
    width = int((prompt + np.maximum(first, second)).max())
    starts = np.arange(pairs)[:, None] * width
    # In its own plain row, the second completion follows the prompt at once.
    columns = np.arange(forked_width) + np.where(parts == SECOND, pairs * width - first[:, None], 0)
    places = starts + np.where(parts == PADDING, 0, columns)
    flat = np.arange(pairs * forked_width).reshape(parts.shape)
    is_prompt, is_padding = parts == PROMPT, parts == PADDING
    prompt_copies = places[is_prompt] + pairs * width
    tokens = np.repeat(np.tile(flat[:, 0], 2), width)
    tokens[places[~is_padding]] = flat[~is_padding]
    tokens[prompt_copies] = flat[is_prompt]
    is_used = np.zeros(len(tokens), np.bool_)
    is_used[places[~is_padding]] = True
    indices = (tokens, places.reshape(-1), flat[is_prompt], prompt_copies, flat[is_padding], np.flatnonzero(~is_used))
    return Places(pairs, width, *(on_device(device, each) for each in indices))


def unmasked(layout: Forked, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a mask of the right shape that takes no memory, and tells our attention function the places of tokens."""
    pairs, width = layout.parts.shape
    mask = torch.zeros((), dtype=dtype, device=device).expand(pairs, 1, width, width)
    setattr(mask, MARK, find_places(layout, device))
    return mask


def mask_on(device: torch.device, tensor: Tensor) -> Tensor:
    """Return a tensor on another device. A mask of `unmasked` keeps its shape without memory, and its places."""
    places: Places | None = getattr(tensor, MARK, None)
    if places is None:
        return tensor.to(device)
    mask = torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)
    indices = (value.to(device) for value in vars(places).values() if isinstance(value, Tensor))
    setattr(mask, MARK, Places(places.pairs, places.width, *indices))
    return mask


def attention_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute as transformers' `sdpa`, and forked rows as plain ones.

    Args:
        module: The attention layer.
        query: `[rows, heads, tokens, size]`. Keys and values may have fewer heads.
        key: Likewise.
        value: Likewise.
        attention_mask: None, a mask, or one that `unmasked` made.
        options: Whatever transformers passes on.

    Returns:
        `[rows, tokens, heads, size]`, and None for the weights.
    """
    places: Places | None = getattr(attention_mask, MARK, None)
    if places is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query_rows, key_rows, value_rows = (_to_plain_rows(each, places) for each in (query, key, value))
    output, _ = sdpa_attention_forward(module, query_rows, key_rows, value_rows, None, **options)
    forked: Tensor = _FromPlainRows.apply(output.flatten(0, 1), places)  # type: ignore[no-untyped-call]
    return forked.view(query.shape[0], query.shape[2], *output.shape[2:]), None


def _to_plain_rows(states: Tensor, places: Places) -> Tensor:
    """Return `[2 * pairs, heads, width, size]` for `[pairs, heads, forked width, size]`."""
    flat = states.transpose(1, 2).flatten(0, 1)
    rows: Tensor = _ToPlainRows.apply(flat, places)  # type: ignore[no-untyped-call]
    return rows.view(2 * places.pairs, places.width, *flat.shape[1:]).transpose(1, 2)


class _ToPlainRows(torch.autograd.Function):
    """Copies of forked tokens, `[tokens, ...]`, at their places. Autograd's own gradient would add in any order."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return states.index_select(0, places.tokens)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        places = ctx.places
        gradient = outer[0].index_select(0, places.places)
        # A prompt's tokens have two copies. All indices differ, so that the sum does not depend on an order.
        gradient.index_add_(0, places.prompts, outer[0].index_select(0, places.prompt_copies))
        return gradient.index_fill_(0, places.padding, 0.0), None


class _FromPlainRows(torch.autograd.Function):
    """The outputs of forked tokens out of those at all places, `[places, ...]`."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return outputs.index_select(0, places.places)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        gradient = outer[0].index_select(0, ctx.places.tokens)
        return gradient.index_fill_(0, ctx.places.unused, 0.0), None


AttentionInterface.register("sdpa", attention_forward)
