"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): of each layer only its input is kept.

transformers' own switch works in training mode alone, in which a model also applies the base's dropout. Here the layers
stay in evaluation mode, and only the adapter's dropout, if any, is drawn again as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from mindprint.asked_places import asked_now, asking


@contextmanager
def recomputed(network: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Compute the activations within a layer again in backward passes of this context, instead of keeping them."""
    layers = [layer for layer in network.modules() if enabled and isinstance(layer, GradientCheckpointingLayer)]
    for layer in layers:
        # On the instance, as `lora.py` does, so that removing the attribute restores the class's.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=_contexts)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a layer's two passes. The second is asked for the same places as the first."""
    return nullcontext(), asking(asked_now())
