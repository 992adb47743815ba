"""The last layer's products, only at the positions whose hidden states are asked for.

After a layer's attention each token is treated alone, and the head reads only hidden states that predict a counted
token. So in the last layer the feed-forward block, the attention's output and its queries are needed at those places
alone. Keys and values are needed at all of them. At other places these modules return zeros, on which nothing that is
asked for depends. Injecting an adapter measures both: that a module treats tokens one by one, and that even NaN at the
other places does not reach those that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mindprint.asked_places import Asked, asked_now, asking
from mindprint_torch.head import Head, embedding_layer, input_device

IN_ATTENTION = ("q_proj", "o_proj")
"""The classes' names for the layers of attention whose results no other position reads."""

PROBE_SHAPE = (2, 6)
PROBE_PLACES = (1, 3, 4, 8, 11)
"""Places in the probe's rows, with other tokens before, between and behind them."""


@torch.no_grad()
def skip_unasked(head: Head) -> int:
    """Let parts of the last layer skip the other places, where that is measured to hold; return their number."""
    tokens = torch.arange(PROBE_SHAPE[0] * PROBE_SHAPE[1], device=input_device(head.model)).view(PROBE_SHAPE)
    tokens %= embedding_layer(head.model).num_embeddings
    places = torch.tensor(PROBE_PLACES, device=tokens.device)

    def asked_states() -> Tensor:
        return head.hidden_states(tokens).flatten(0, 1)[places]

    modules, expected = _separable_modules(head.model, asked_states, places)
    # Layers of attention are left out together, rather than tried one by one: most models allow all of them.
    for tried in (modules, [module for module in modules if not isinstance(module, nn.Linear)]):
        before = [module.forward for module in tried]
        for module in tried:
            module.forward = partial(_forward, module, module.forward)
        with asking(Asked(places, torch.nan)):
            if _is_same(asked_states, expected):
                return len(tried)
        for module, forward in zip(tried, before, strict=True):
            module.forward = forward
    return 0


def _forward(module: nn.Module, everywhere: Callable[..., Tensor], *inputs: Any, **named: Any) -> Tensor:
    """Compute a module where it is asked, `[..., in]` to `[..., out]`."""
    asked = asked_now()
    # A mask of dropout is drawn for all positions, so that the numbers of a seed do not depend on those asked for.
    if asked is None or any(isinstance(part, nn.Dropout) and part.training for part in module.modules()):
        return everywhere(*inputs, **named)
    (x,) = inputs
    places = asked.places.to(x.device)
    rows = everywhere(_rows_at(x, places)).flatten(0, -2)
    result = rows.new_full((x.shape[:-1].numel(), rows.shape[-1]), asked.elsewhere)
    return result.index_copy(0, places, rows).view(*x.shape[:-1], -1)


def _rows_at(x: Tensor, places: Tensor) -> Tensor:
    """Return `[..., tokens, width]` at flat places, with as many dimensions: `[1, places, width]`."""
    rows = x.flatten(0, -2).index_select(0, places)
    return rows.view(*(1 for _ in x.shape[2:]), *rows.shape)


def _separable_modules(
    network: PreTrainedModel, asked_states: Callable[[], Tensor], places: Tensor
) -> tuple[list[Any], Tensor]:
    """Return the candidates that compute the same for some rows alone as for all, and the asked states of a pass."""
    seen: dict[nn.Module, list[bool]] = {}

    def compare(module: Any, inputs: tuple[Any, ...], named: Any, output: Any) -> None:
        # Within the layer's own pass, since a sharded base holds its weights only then.
        same = not named and len(inputs) == 1 and _is_separable(module, inputs[0], output, places)
        seen.setdefault(module, []).append(same)

    hooks = [module.register_forward_hook(compare, with_kwargs=True) for module in _candidates(network)]
    try:
        expected = asked_states()
    finally:
        for hook in hooks:
            hook.remove()
    return [module for module, results in seen.items() if results == [True]], expected


def _candidates(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts of the last layer, and the layers in them that attention may not need everywhere."""
    layers = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    for part in layers[-1].children() if layers else ():
        # Norms cost too little to select rows for.
        if next(part.children(), None) is not None:
            yield part
            yield from (layer for name, layer in part.named_children() if name in IN_ATTENTION)


def _is_separable(module: Any, x: Any, output: Any, places: Tensor) -> bool:
    tokens = PROBE_SHAPE[0] * PROBE_SHAPE[1]
    if not isinstance(x, Tensor) or not isinstance(output, Tensor):
        return False
    if x.shape[:-1] != output.shape[:-1] or x.shape[:-1].numel() != tokens:
        return False
    # The last layer may be on another device than the tokens.
    own = places.to(x.device)
    return _is_same(lambda: module.forward(_rows_at(x, own)).flatten(0, -2), output.flatten(0, -2)[own])


def _is_same(compute: Callable[[], Tensor], expected: Tensor) -> bool:
    try:
        values = compute()
    except Exception:  # noqa: BLE001  a class that needs all rows may fail in any way
        return False
    tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
    # With NaN in it, the comparison is false.
    return values.shape == expected.shape and bool((values - expected).abs().max() <= tolerance * expected.abs().max())
