"""Prompts that are read once for both of their completions, in one row with a mask and positions that we make.

transformers' models take both, and hand a mask of four dimensions on as it is. But not all of them do: some make their
own positions (ALiBi), some have no attention to mask (recurrent layers), some cut it to a window that a given mask
replaces. So loading a model measures whether it can share prompts. The windows of its configuration bound the length,
and so does a rotary embedding that depends on the length of its input.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from mindprint.layouts import Forked, Layout, forked, sees, sequences, sharing_probe
from mindprint_torch.arrays import on_device
from mindprint_torch.forked_attention import unmasked
from mindprint_torch.head import Head, embedding_layer, input_device

WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "window_size", "attention_chunk_size")
"""Configurations' names for the number of tokens that a layer sees at most."""

UNLIMITED = sys.maxsize


@torch.no_grad()
def longest_shared(model: PreTrainedModel, head: Head) -> int:
    """Return the longest sequence whose prompt this model can share between completions, in tokens; 0 if none."""
    if not _shares(head, masked=True):
        return 0
    # Above a rotary limit the two sequences of a row may be of different kinds. Positions decide, not the row's width.
    limits = [] if head.rotary_limit is None else [head.rotary_limit.positions]
    return min(_windows(model.config) + limits, default=UNLIMITED)


@torch.no_grad()
def attends_without_mask(head: Head) -> bool:
    """Return whether this model's attention can read forked rows as plain ones (`forked_attention.py`)."""
    return _shares(head, masked=False)


def row_shape(layout: Layout, device: torch.device, dtype: torch.dtype, *, masked: bool = True) -> dict[str, Tensor]:
    """Return the arguments that the model's body needs, in addition to the tokens, to read a layout's rows.

    Args:
        layout: The rows.
        device: The model's device.
        dtype: The model's dtype.
        masked: Whether forked rows get a mask, or are read as plain rows by each layer's attention.
    """
    if not isinstance(layout, Forked):
        return {}
    if not masked:
        mask = unmasked(layout, device, dtype)
        return {"position_ids": on_device(device, layout.positions), "attention_mask": mask}
    parts = on_device(device, layout.parts)
    seen = sees(parts, torch.arange(parts.shape[1], device=device))[:, None]
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
    return {"position_ids": on_device(device, layout.positions), "attention_mask": mask}


def _shares(head: Head, *, masked: bool) -> bool:
    """Return whether forked rows, read in this way, give the hidden states of whole rows."""
    batch = sharing_probe(embedding_layer(head.model).num_embeddings)
    expected = _asked_states(head, sequences(batch))
    try:
        states = _asked_states(head, forked(batch), masked=masked)
    except Exception:  # noqa: BLE001  a class that cannot take a mask or positions may fail in any way
        return False
    tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
    return bool((states - expected).abs().max() <= tolerance * expected.abs().max())


def _asked_states(head: Head, layout: Layout, *, masked: bool = True) -> Tensor:
    """Return the hidden states from which a layout's targets are predicted, `[n, hidden]`."""
    device = input_device(head.model)
    shape = row_shape(layout, device, head.model.dtype, masked=masked)
    states = head.hidden_states(on_device(device, layout.tokens), **shape)
    return states.flatten(0, 1)[on_device(device, layout.sources)]


def _windows(config: PreTrainedConfig) -> list[int]:
    text: Any = config.get_text_config()
    windows = [getattr(text, name, None) for name in WINDOWS]
    return [window for window in windows if isinstance(window, int) and window > 0]
