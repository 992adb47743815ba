"""Whether and how a model reads a prompt once for both of its completions: one row, a mask and positions of its own.

transformers' models take both, and hand a mask of four dimensions on as it is; but not all of them do. Some make their
own positions (ALiBi), some have no attention to mask (recurrent layers), some cut it to a window that a given mask
replaces. So what can be shared is measured when the model is loaded, and bounded by the windows of its configuration.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from mindprint.layouts import Forked, Layout, forked, sees, sequences, sharing_probe
from mindprint_torch.arrays import on_device
from mindprint_torch.head import Head, embedding_layer

WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "window_size", "attention_chunk_size")
"""What configurations call the number of tokens that a layer sees at most."""

UNLIMITED = sys.maxsize


@torch.no_grad()
def longest_shared(model: PreTrainedModel, head: Head) -> int:
    """The longest sequence whose prompt this model can share between completions, in tokens; 0 if it cannot at all."""
    batch = sharing_probe(embedding_layer(model).num_embeddings)
    plain, shared = sequences(batch), forked(batch)
    expected = _answers(head, plain)
    try:
        answered = _answers(head, shared)
    except Exception:  # noqa: BLE001  a class that cannot take a mask or positions may fail in any way
        return 0
    tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
    if (answered - expected).abs().max() > tolerance * expected.abs().max():
        return 0
    return min(_windows(model.config), default=UNLIMITED)


def row_shape(layout: Layout, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the model's body needs beside the tokens to read a layout's rows as they are meant."""
    if not isinstance(layout, Forked):
        return {}
    parts = on_device(device, layout.parts)
    seen = sees(parts, torch.arange(parts.shape[1], device=device))[:, None]
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
    return {"position_ids": on_device(device, layout.positions), "attention_mask": mask}


def _answers(head: Head, layout: Layout) -> Tensor:
    """The hidden states that a layout asks, `[n, hidden]`."""
    device = head.model.device
    shape = row_shape(layout, device, head.model.dtype)
    states = head.hidden_states(on_device(device, layout.tokens), **shape)
    return states.flatten(0, 1)[on_device(device, layout.sources)]


def _windows(config: PreTrainedConfig) -> list[int]:
    text: Any = config.get_text_config()
    found = [getattr(text, name, None) for name in WINDOWS]
    return [window for window in found if isinstance(window, int) and window > 0]
